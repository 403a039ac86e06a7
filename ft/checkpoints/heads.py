"""Read linear heads: files of `featcache fit`, and the ``cls`` in files of Lipsum-FT."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from featcache.errors import EncoderError, MismatchError
from featcache.transfer.flax import is_flax
from ft.checkpoints.formats.lipsum import logit_scale_of, read_lipsum
from heads import LinearHead, load
from heads.fitted.linear import as_linear


def load_head(path: str | Path, classnames: Sequence[str], logit_scale: Callable[[], float]) -> LinearHead:
    """Read a linear head: a head file, or a ``.ckpt`` of Lipsum-FT that holds ``cls``, with C classes `classnames`.

    `logit_scale` gives the model's, exponentiated, for a ``.ckpt`` whose own is not found (see `logit_scale_of`).
    Raises EncoderError if a ``.ckpt`` has no ``cls``; MismatchError if it has another number of classes.
    """
    if not is_flax(Path(path)):
        return as_linear(load(path))
    cls = read_lipsum(path).head
    if cls is None:
        raise EncoderError(f"{path}: no cls in it; give a best_acc.ckpt, or a file of heads {{cls, ctx, raw}}")
    if len(cls) != len(classnames):
        raise MismatchError(
            f"{path}: a head of {len(cls)} classes for a data set of {len(classnames)}; expected the same number"
        )
    weights = (logit_scale_of(path) or logit_scale()) * cls.float()
    return LinearHead(weights.numpy(), np.zeros(len(cls), np.float32), tuple(classnames), Path(path).stem)
