"""Pickled modules, such as those of wise-ft: read only if the user trusts the file, and in a separate process.

Unpickling runs code. No check of the file can show that this code is harmless, and a separate process protects the
memory of this one, but not the machine. Nothing is unpickled without an explicit request (``convert --trust``).
"""

import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from featcache.errors import EncoderError
from ft.checkpoints.formats import __file__ as package_file

LOG = logging.getLogger(__name__)
SCRIPT = Path(package_file).with_name("trusted.py")
ACTIVATIONS = {"QuickGELU": True, "GELU": False}


class Pickled(NamedTuple):
    """Content of a pickled file."""

    state: dict[str, torch.Tensor]
    quick_gelu: bool | None
    """Activation of the module's layers; None for a state dict, or if there are several or none."""


def read_pickled(path: str | Path, *, trust: bool) -> Pickled:
    """Read the tensors of a pickled module or state dict; logs a warning that its code runs, with the user's rights.

    Raises EncoderError if `trust` is false, or the file cannot be unpickled or holds no tensors.
    """
    file = Path(path).resolve()
    if not trust:
        raise EncoderError(
            f"{path}: a pickled Python object, which is not read: unpickling runs any code in the file. If you trust "
            "its author, --trust (featcache convert --trust FILE OUT) runs that code, in a separate process but with "
            "your rights, and reads the tensors"
        )
    LOG.warning("%s: --trust runs the code in this file, in a separate process but with your rights", path)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tensors.safetensors"
        command = [sys.executable, "-I", str(SCRIPT), str(file), str(out)]
        run = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if run.returncode or not out.exists():
            said = (run.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise EncoderError(f"{path}: cannot be unpickled ({said[:300]}); expected a saved module or state dict")
        with safe_open(str(out), framework="pt") as written:
            activation = (written.metadata() or {}).get("activation", "")
        return Pickled(load_file(out), ACTIVATIONS.get(activation))
