"""Heads to start from or to merge: files of `featcache fit`, and the ``cls`` of files of Lipsum-FT."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from featcache.errors import EncoderError, MismatchError
from featcache.transfer.flax import is_flax
from ft.checkpoints.formats.lipsum import logit_scale_of, read_lipsum
from heads import LinearHead, load
from heads.fitted.linear import as_linear


def load_head(path: str | Path, classnames: Sequence[str], logit_scale: Callable[[], float]) -> LinearHead:
    """A linear head in a file.

    Parameters
    ----------
    path : str or Path
        A head file, or a ``.ckpt`` of Lipsum-FT that holds ``cls``.
    classnames : sequence of C str
        Class names of a ``.ckpt``, which has none.
    logit_scale : callable
        That of the model, exponentiated: for a ``.ckpt`` without a logit scale in it, beside it or in the folder above.

    Raises
    ------
    EncoderError
        A ``.ckpt`` without ``cls``.
    MismatchError
        A ``.ckpt`` with another number of classes.
    """
    if not is_flax(Path(path)):
        return as_linear(load(path))
    cls = read_lipsum(path).head
    if cls is None:
        raise EncoderError(f"{path}: no cls in it; give a best_acc.ckpt, or a file of heads {{cls, ctx, raw}}")
    if len(cls) != len(classnames):
        raise MismatchError(
            f"{path}: a head of {len(cls)} classes for a data set of {len(classnames)}; they must agree"
        )
    weights = (logit_scale_of(path) or logit_scale()) * cls.float()
    return LinearHead(weights.numpy(), np.zeros(len(cls), np.float32), tuple(classnames), Path(path).stem)
