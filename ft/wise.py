"""WiSE-FT on model folders: one merged model for each alpha, ready to encode.

``featcache encode DATA --model local-dir:OUT/alpha=0.500`` gives a merged model its own store; since towers that the
parents share come back bit for bit, fine-tuning the image tower leaves every text store valid for every alpha, and
alpha 0 and 1 are cache hits on the stores of the parents.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from featcache.errors import EncoderError, MismatchError
from featcache.version import __version__
from ft.checkpoint import model_folder, read_config, read_state, weights_file, write_model_folder
from ft.errors import TrainingError
from ft.formats.activation import check_told, told_by_file
from ft.formats.flax import is_flax, read_lipsum
from ft.interpolate import FISHER_FLOOR, interpolate, soup
from ft.parents import Parent, account_of, parent_of
from ft.state import State
from ft.wise_heads import tower_part

__all__ = ["folder_name", "read_tuned", "weights_of", "wise"]


def wise(
    model0: str | Path | Parent,
    folder1: str | Path | Sequence[str | Path],
    alphas: Iterable[float],
    out: str | Path,
    *,
    pretrained: str | None = None,
    fisher: tuple[str | Path, str | Path] | None = None,
    floor: float = FISHER_FLOOR,
    overwrite: bool = False,
) -> list[Path]:
    """Write a merged model folder ``out/alpha=0.500`` for each alpha.

    ``theta(a) = (1 - a) theta0 + a theta1`` over every key, Fisher-weighted where Fishers are given: see
    `ft.interpolate.interpolate`. Everything that can be refused is refused before anything is written.

    Parameters
    ----------
    model0 : str, Path or Parent
        The zero-shot model (alpha 0), which gives configuration and tokenizer: a model folder, ``tiny``, ``RUN/start``
        (what a run of ``featcache finetune`` began with), or an architecture of open_clip; see `ft.parents.parent_of`.
    folder1 : str, Path, or several of them
        The fine-tuned model (alpha 1): a model folder or a checkpoint file. Several are averaged first (a soup).
    alphas : iterable of float
    out : str or Path
        Folder of the new folders.
    pretrained : str, optional
        Weights of an architecture: a tag of open_clip or a checkpoint file.
    fisher : two paths, optional
        Checkpoint files with the diagonal Fisher information of the two models, parameter name -> tensor; what
        they hold of heads has no part here: see `ft.wise_sweep.sweep`.
    floor : float
        Least Fisher information of an element.
    overwrite : bool
        Replace folders that are already there.

    Returns
    -------
    The folders, in the order of the alphas.

    Raises
    ------
    EncoderError
        A model or a Fisher that cannot be read; a folder that exists already; an archive of OpenAI's beside a model
        without QuickGELU.
    MismatchError
        Models with different keys, shapes, architectures or preprocessing.
    TrainingError
        No alphas, repeated or infinite ones, no fine-tuned model.
    """
    targets = _targets(Path(out), alphas, fisher is not None, overwrite)
    tuned = [folder1] if isinstance(folder1, str | Path) else list(folder1)
    if not tuned:
        raise TrainingError("no fine-tuned model was given; expected at least one")
    parent = parent_of(model0, pretrained)
    files = [weights_of(parent, name) for name in tuned]
    theta0 = parent.state()
    others = [read_tuned(file, theta0) for file in files]
    theta1 = others[0] if len(others) == 1 else soup(others)
    fishers = [tower_part(read_state(path)) for path in fisher or ()]
    record = _record(parent, files, fisher, floor)
    for alpha, target in targets.items():
        state = interpolate(theta0, theta1, alpha, *fishers, floor=floor)
        write_model_folder(parent.source, state, target, {**record, "alpha": alpha}, overwrite=overwrite)
    return list(targets.values())


def read_tuned(file: Path, theta0: State) -> dict[str, torch.Tensor]:
    """State dict of a fine-tuned model; what Lipsum-FT's ``.ckpt`` leaves out (the frozen text tower) is `theta0`'s."""
    return {**theta0, **read_lipsum(file).state} if is_flax(file) else read_state(file)


def folder_name(alpha: float) -> str:
    """``alpha=0.500``: three decimals, more where the number has more.

    Examples
    --------
    >>> folder_name(0.5), folder_name(1), folder_name(0.0625)
    ('alpha=0.500', 'alpha=1.000', 'alpha=0.0625')
    """
    rounded = f"{alpha:.3f}"
    return f"alpha={rounded if float(rounded) == alpha else repr(float(alpha))}"


def _targets(out: Path, alphas: Iterable[float], weighted: bool, overwrite: bool) -> dict[float, Path]:
    """The folder of each alpha; everything that can be refused is refused before the first is written."""
    steps = [float(alpha) for alpha in alphas]
    if not steps or len(set(steps)) != len(steps):
        raise TrainingError(f"alphas {steps}: expected at least one, each once")
    lowest, highest = (0.0, 1.0) if weighted else (-math.inf, math.inf)
    if wrong := [alpha for alpha in steps if not math.isfinite(alpha) or not lowest <= alpha <= highest]:
        raise TrainingError(f"alphas {wrong}: expected finite numbers{', in [0, 1] with Fishers' if weighted else ''}")
    targets = {alpha: out / folder_name(alpha) for alpha in steps}
    if existing := [str(target) for target in targets.values() if target.exists() and not overwrite]:
        raise EncoderError(f"{', '.join(existing)}: there already; name another folder, or replace them (--overwrite)")
    return targets


def weights_of(parent: Parent, name: str | Path) -> Path:
    """Weights file of a fine-tuned model; a folder must agree with the zero-shot model in all but the weights."""
    path = Path(str(name).removeprefix("local-dir:"))
    if path.is_file():
        check_told(str(name), told_by_file(path), parent.config, parent.named[0], "ZERO_SHOT")
        return path
    folder = model_folder(name)
    one, two = parent.config, read_config(folder)
    if differing := [part for part in ("model_cfg", "preprocess_cfg") if one.get(part) != two.get(part)]:
        raise MismatchError(
            f"{parent.name} and {folder} differ in {' and '.join(differing)}; merge models of one architecture and "
            "preprocessing, or give the weights file itself to use the zero-shot model's configuration"
        )
    return weights_file(folder)


def _record(parent: Parent, files: Sequence[Path], fisher: Sequence[str | Path] | None, floor: float) -> dict[str, Any]:
    return {
        "featcache": __version__,
        "zero_shot": parent.account(),
        "fine_tuned": [account_of(file) for file in files],
        "fisher": [account_of(Path(path)) for path in fisher] if fisher else None,
        "fisher_floor": floor if fisher else None,
    }
