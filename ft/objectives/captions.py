"""Captions of labelled images, drawn at random: templates filled with class names, or sentences of a prompt file.

The caption of an image depends only on (seed, epoch, row). Equal captions have the same number, so that the
contrastive loss recognises them (two classes may share a name) and each is encoded once per batch.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from featcache.errors import PromptError


class Captions:
    """The captions of C classes; PromptError if a class has none.

    `texts` are the K distinct captions, and `of_class` are C arrays of indices in them.

    >>> captions = Captions([["a cat"], ["a dog"], ["a cat"]], seed=0)
    >>> captions.texts, captions.draw(np.array([2, 1]), np.array([0, 1]), epoch=0).tolist()
    (['a cat', 'a dog'], [0, 1])
    """

    def __init__(self, sentences: Sequence[Sequence[str]], seed: int) -> None:
        if empty := [number for number, texts in enumerate(sentences) if not texts]:
            raise PromptError(f"classes {empty[:5]} have no caption; give each at least one")
        self.texts = list(dict.fromkeys(text for texts in sentences for text in texts))
        places = {text: place for place, text in enumerate(self.texts)}
        self.of_class = [np.array([places[text] for text in texts], dtype=np.int64) for texts in sentences]
        self._seed = seed

    def draw(self, labels: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], epoch: int) -> torch.Tensor:
        """Captions (B,), as indices in `texts`, of rows (B,) with labels (B,) in an epoch."""
        chosen = []
        for label, row in zip(labels.tolist(), rows.tolist(), strict=True):
            own = self.of_class[label]
            draw = 0 if len(own) == 1 else np.random.default_rng([self._seed, epoch, row]).integers(len(own))
            chosen.append(own[draw])
        return torch.tensor(np.array(chosen, dtype=np.int64))
