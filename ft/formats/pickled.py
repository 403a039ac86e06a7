"""Pickled modules, as wise-ft saves them: read only where the user trusts the file, and in a process of their own.

Unpickling runs code. No check of the file can tell whether that code is harmless, and a process of its own protects
this one's memory, not the machine: so nothing is unpickled unless it was asked for by name (``convert --trust``).
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from featcache.errors import EncoderError
from ft.formats import __file__ as package_file

__all__ = ["read_pickled"]

SCRIPT = Path(package_file).with_name("trusted.py")


def read_pickled(path: str | Path, *, trust: bool) -> dict[str, torch.Tensor]:
    """The tensors of a pickled module or state dict.

    Parameters
    ----------
    path : str or Path
    trust : bool
        Whether the code in the file may run, with the rights of the user.

    Raises
    ------
    EncoderError
        Without `trust`, or a file that cannot be unpickled or holds no tensors.
    """
    file = Path(path).resolve()
    if not trust:
        raise EncoderError(
            f"{path}: a pickled Python object; unpickling runs whatever code the file holds, with your rights. If you "
            "trust whoever made it: featcache convert --trust FILE OUT"
        )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tensors.safetensors"
        command = [sys.executable, "-I", str(SCRIPT), str(file), str(out)]
        run = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if run.returncode or not out.exists():
            said = (run.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise EncoderError(f"{path}: cannot be unpickled ({said[:300]}); expected a saved module or state dict")
        return load_file(out)
