"""What a run offers to its regularisers: the initial model's texts, stored banks, contexts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from featcache.datasets.base import Dataset
from featcache.encoders.openclip import OpenClipEncoder
from ft.errors import TrainingError
from ft.options import FinetuneOptions
from ft.start import as_stored, text_store
from ft.text_bank import load_bank, load_moment
from ft.trainable import Frozen

__all__ = ["RunSetting"]


@dataclass
class RunSetting:
    """`ft.regularizers.base.Setting` of a run.

    Parameters
    ----------
    encoder : OpenClipEncoder
        Before it is trained.
    frozen : Frozen or None
        Its frozen copy; None where no regulariser needs one.
    """

    encoder: OpenClipEncoder
    frozen: Frozen | None
    dataset: Dataset
    options: FinetuneOptions
    root: str | Path | None
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self.logit_scale = self.encoder.logit_scale

    @property
    def special_tokens(self) -> tuple[int, int, int, int]:
        """See `Setting`."""
        return self.encoder.special_tokens

    def encode_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Setting`."""
        if self.frozen is None:
            raise TrainingError("this regulariser encodes texts, so its `needs` must name frozen_features")
        return self.frozen.text_features(ids)

    def bank(self, reference: Any) -> torch.Tensor:
        """See `Setting`."""
        return load_bank(reference, as_stored(self.encoder), self.root)

    def moment(self, reference: Any) -> Any:
        """See `Setting`."""
        return load_moment(reference, as_stored(self.encoder), self.root)

    def contexts(self, templates: str | None) -> torch.Tensor:
        """See `Setting`."""
        store = text_store(self.options, self.encoder, self.dataset, self.root, templates)
        if store.ctx is None:
            raise TrainingError("a prompt file has no contexts: name templates, as in car=1,templates=openai-imagenet")
        return torch.from_numpy(store.ctx.copy())
