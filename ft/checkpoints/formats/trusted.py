"""The only code that unpickles: a script that `ft.checkpoints.formats.pickled` runs in a separate process.

``python -I trusted.py FILE OUT`` unpickles FILE, which **runs the code in the file**, and writes the tensors of its
module or state dict to OUT as safetensors, with the class of the module's activation in the header. Classes that are
not installed, such as those of wise-ft, become empty subclasses of `torch.nn.Module`: only their tensors are needed.
"""

import pickle
import sys
import types
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file


class Unpickler(pickle.Unpickler):
    """Unpickler that replaces missing classes by empty modules."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of that name, or an empty module."""
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            return type(
                name, (torch.nn.Module,), {"__module__": module, "__init__": lambda self, *args, **kwargs: None}
            )


def content_of(source: str) -> Any:
    """What a file of ``torch.save``, or of plain ``pickle.dump``, holds."""
    if not zipfile.is_zipfile(source):
        with open(source, "rb") as file:
            content = Unpickler(file).load()
        if not isinstance(content, int):  # with which files of early versions of torch begin
            return content
    door = types.ModuleType("door")
    door.Unpickler, door.load, door.loads = Unpickler, pickle.load, pickle.loads  # type: ignore[attr-defined]
    return torch.load(source, map_location="cpu", weights_only=False, pickle_module=door)


def tensors_of(content: Any) -> dict[str, torch.Tensor]:
    """The state dict of a module, or the tensors of a mapping."""
    if isinstance(content, torch.nn.Module):
        content = content.state_dict()
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise SystemExit(f"holds {type(content).__name__}; expected a module or a state dict")
    found = {str(key): value for key, value in content.items() if torch.is_tensor(value)}
    return {key: value.detach().cpu().contiguous().clone() for key, value in found.items()}


def activation_of(content: Any) -> str:
    """``QuickGELU`` or ``GELU`` if all activations of a module are the same; else empty."""
    layers = content.modules() if isinstance(content, torch.nn.Module) else ()
    found = {type(layer).__name__ for layer in layers} & {"QuickGELU", "GELU"}
    return found.pop() if len(found) == 1 else ""


def main(source: str, out: str) -> None:
    """Unpickle `source`, write its tensors to `out`."""
    content = content_of(source)
    tensors = tensors_of(content)
    if not tensors:
        raise SystemExit("holds no tensor")
    save_file(tensors, out, metadata={"activation": activation_of(content)})


if __name__ == "__main__":
    main(*sys.argv[1:])
