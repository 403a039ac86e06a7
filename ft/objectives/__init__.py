"""Objectives of fine-tuning: the cross entropy of a head, or the contrastive loss of pre-training."""

from ft.objectives.contrastive import caption_ids, contrastive
from ft.objectives.cross_entropy import cross_entropy

__all__ = ["caption_ids", "contrastive", "cross_entropy"]
