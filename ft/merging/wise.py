"""WiSE-FT on model folders: one merged model per alpha, ready to encode.

Towers that are equal in both models are kept bit for bit. If only the image tower was fine-tuned, every text store is
therefore valid for every alpha, and alpha 0 and 1 are cache hits on the stores of the two models. Heads are merged by
the same formula, since in WiSE-FT the classifier is a layer of the model.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from featcache import __version__
from featcache.encoders.openclip import OpenClipEncoder
from featcache.encoding.chunks import encoder_key
from featcache.errors import EncoderError, MismatchError, TrainingError
from featcache.transfer.flax import is_flax
from ft.checkpoints.folder import (
    check_targets,
    model_folder,
    path_of,
    read_config,
    read_state,
    weights_file,
    write_model_folder,
)
from ft.checkpoints.formats.activation import activation_of_file, check_base_activation
from ft.checkpoints.formats.lipsum import read_lipsum
from ft.checkpoints.parents import Parent, account_of, parent_of
from ft.checkpoints.state import Json, State
from ft.merging.interpolate import FISHER_FLOOR, interpolate, soup
from heads import LinearHead
from heads.fitted.provenance import Provenance

HEAD_WEIGHT, HEAD_BIAS = "head.weight", "head.bias"


def merged_head(
    first: LinearHead,
    tuned: Sequence[LinearHead],
    alpha: float,
    fishers: Sequence[State] = (),
    floor: float = FISHER_FLOOR,
) -> dict[str, torch.Tensor]:
    """Weights (C, D) and bias (C,) of the head of a merged model as a float64 state dict.

    Interpolates between the head of the zero-shot model and the mean of the `tuned` ones. `fishers` may hold diagonal
    Fisher information of both under `HEAD_WEIGHT` and `HEAD_BIAS`; if both lack these keys, as files of older versions
    do, heads are merged without it. Raises MismatchError if shapes differ, or if Fisher information is of one head only
    or of another shape; TrainingError as `interpolate` does.

    >>> one, three = (LinearHead(np.full((1, 1), x), np.full(1, x), ("cat",)) for x in (1.0, 3.0))
    >>> half, two = ({HEAD_WEIGHT: torch.full((1, 1), f), HEAD_BIAS: torch.full((1,), f)} for f in (0.5, 2.0))
    >>> merged_head(one, [three], 0.3, [half, two])[HEAD_WEIGHT].item()
    2.263157894736842
    """
    theta0, theta1 = head_state(first), soup([head_state(head) for head in tuned])
    return interpolate(theta0, theta1, alpha, *fishers, floor=floor)


def recorded_head(
    state: State,
    used: Sequence[LinearHead],
    encoder: OpenClipEncoder,
    kind: str,
    params: Json,
    alpha: float | None = None,
) -> LinearHead:
    """A merged head, with the splits of the heads that it is made of in its provenance."""
    provenance = Provenance(
        head=kind,
        params=params,
        encoder_key=encoder_key(encoder),
        text_digest=None,
        classnames=list(used[0].classnames),
        fitted_on=[entry for head in used for entry in head.provenance.fitted_on],
        chosen_on=[entry for head in used for entry in head.provenance.chosen_on],
        featcache=__version__,
    )
    weights, bias = state[HEAD_WEIGHT].numpy(), state[HEAD_BIAS].numpy()
    return LinearHead(weights, bias, used[0].classnames, kind, provenance, alpha)


def head_part(state: State) -> dict[str, torch.Tensor]:
    """Entries of a state dict that belong to the head."""
    return {name: value for name, value in state.items() if name in (HEAD_WEIGHT, HEAD_BIAS)}


def tower_part(state: State) -> dict[str, torch.Tensor]:
    """Entries of a state dict that do not belong to the head."""
    return {name: value for name, value in state.items() if name not in (HEAD_WEIGHT, HEAD_BIAS)}


def head_state(head: LinearHead) -> dict[str, torch.Tensor]:
    """Weights and bias of a head as a float64 state dict."""
    values = {HEAD_WEIGHT: head.weights, HEAD_BIAS: head.bias}
    return {name: torch.from_numpy(value.astype(np.float64)) for name, value in values.items()}


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

    ``theta(a) = (1 - a) theta0 + a theta1`` over every key, or its Fisher-weighted form: see
    `ft.merging.interpolate.interpolate`. All checks run before anything is written.

    Parameters
    ----------
    model0
        The zero-shot model (alpha 0), which gives configuration and tokenizer; see `ft.checkpoints.parents.parent_of`.
    folder1
        The fine-tuned model (alpha 1): a model folder or a checkpoint file. Several are averaged first (a soup).
    alphas : distinct numbers, see `ft.merging.interpolate.interpolate`
    out : parent of the new folders
    pretrained : weights of an architecture: a tag of open_clip or a checkpoint file
    fisher
        Files with the diagonal Fisher information of the two models. Keys of heads are not used here, but by
        `ft.merging.sweep.sweep`.
    floor : lower bound on Fisher information
    overwrite : replace existing folders

    Returns
    -------
    The folders, in the order of the alphas.

    Raises
    ------
    EncoderError
        A model or Fisher file cannot be read; a folder exists; or OpenAI's weights are merged with a model without
        QuickGELU.
    MismatchError
        Models differ in keys, shapes, architecture or preprocessing.
    TrainingError
        There are no alphas, or repeated or infinite ones, or there is no fine-tuned model.
    """
    targets = _targets(Path(out).expanduser(), alphas, fisher is not None, overwrite)
    tuned = [folder1] if isinstance(folder1, str | Path) else list(folder1)
    if not tuned:
        raise TrainingError("no fine-tuned model was given; expected at least one")
    parent = parent_of(model0, pretrained)
    files = [weights_of(parent, name) for name in tuned]
    theta0 = parent.state()
    others = [read_tuned(file, theta0) for file in files]
    theta1 = others[0] if len(others) == 1 else soup(others)
    fishers = [tower_part(read_state(path)) for path in fisher or ()]
    record = {
        "featcache": __version__,
        "zero_shot": parent.account(),
        "fine_tuned": [account_of(file) for file in files],
        "fisher": [account_of(Path(path)) for path in fisher] if fisher else None,
        "fisher_floor": floor if fisher else None,
    }
    for alpha, target in targets.items():
        state = interpolate(theta0, theta1, alpha, *fishers, floor=floor)
        write_model_folder(parent.source, state, target, {**record, "alpha": alpha}, overwrite=overwrite)
    return list(targets.values())


def read_tuned(file: Path, theta0: State) -> dict[str, torch.Tensor]:
    """State dict of a fine-tuned model; `theta0` gives the text tower that a ``.ckpt`` of Lipsum-FT lacks."""
    if not is_flax(file):
        return read_state(file)
    found = read_lipsum(file)
    if not found.has_tower:
        raise EncoderError(f"{file}: no image tower in it; give a best_acc.ckpt (its heads go to --heads)")
    return {**theta0, **found.state}


def folder_name(alpha: float) -> str:
    """``alpha=0.500``: three decimals, more where the number has more.

    >>> folder_name(0.5), folder_name(1), folder_name(0.0625)
    ('alpha=0.500', 'alpha=1.000', 'alpha=0.0625')
    """
    rounded = f"{alpha:.3f}"
    return f"alpha={rounded if float(rounded) == alpha else repr(float(alpha))}"


def _targets(out: Path, alphas: Iterable[float], weighted: bool, overwrite: bool) -> dict[float, Path]:
    """The folder of each alpha, after the checks that need no model."""
    steps = [float(alpha) for alpha in alphas]
    if not steps or len(set(steps)) != len(steps):
        raise TrainingError(f"alphas {steps}: expected at least one, each once")
    lowest, highest = (0.0, 1.0) if weighted else (-math.inf, math.inf)
    if wrong := [alpha for alpha in steps if not math.isfinite(alpha) or not lowest <= alpha <= highest]:
        raise TrainingError(f"alphas {wrong}: expected finite numbers{', in [0, 1] with --fisher' if weighted else ''}")
    targets = {alpha: out / folder_name(alpha) for alpha in steps}
    check_targets(targets.values(), overwrite)
    return targets


def weights_of(parent: Parent, name: str | Path) -> Path:
    """Weights file of a fine-tuned model; a folder must have the configuration of the zero-shot model."""
    path = path_of(name)
    if path.is_file():
        check_base_activation(str(name), activation_of_file(path), parent.config, parent.named[0], "ZERO_SHOT")
        return path
    folder = model_folder(name)
    one, two = parent.config, read_config(folder)
    if differing := [part for part in ("model_cfg", "preprocess_cfg") if one.get(part) != two.get(part)]:
        raise MismatchError(
            f"{parent.name} and {folder} differ in {' and '.join(differing)}; merge models of one architecture and "
            "preprocessing, or give the weights file itself to use the zero-shot model's configuration"
        )
    return weights_file(folder)
