"""Accuracy and NLL of the model as it is now on a selection split."""

from typing import Any

import numpy as np
import torch

from featcache.datasets.base import Dataset
from featcache.encoding.pipeline import default_ahead, prepared_batches
from featcache.errors import ImageReadError
from ft.distributed import Place, total
from ft.objectives.base import Objective
from ft.regularizers.base import unit
from ft.training.model import Trainable

BATCH = 128


@torch.no_grad()
def judge(model: Trainable, objective: Objective, dataset: Dataset, place: Place, workers: int) -> dict[str, float]:
    """``accuracy``, a fraction, and ``nll`` in nats on the images of a data set without augmentation.

    Each process takes every world-th batch. The model leaves as it came, running statistics of batch normalisation
    included: nothing of the selection split gets into it.

    Raises
    ------
    ImageReadError
        An image cannot be read.
    """
    weights, bias = objective.classifier()
    labels = torch.from_numpy(dataset.index.labels)
    n = len(dataset.index)
    batches = [range(start, min(start + BATCH, n)) for start in range(0, n, BATCH)][place.rank :: place.world]
    sums = torch.zeros(2, dtype=torch.float64)
    encoder: Any = model.encoder
    with model.evaluating():
        for batch in prepared_batches(dataset, encoder, batches, workers, default_ahead(encoder)):
            if bad := [item for item in batch if item.image is None]:
                name = dataset.index.ids[bad[0].row]
                raise ImageReadError(f"{name} cannot be read ({bad[0].error}); mend or remove it")
            images = torch.from_numpy(np.stack([item.image for item in batch if item.image is not None]))
            logits = unit(model.image_features(images.to(encoder.device))) @ weights.T + bias
            truth = labels[[item.row for item in batch]].to(logits.device)
            sums[0] += (logits.argmax(dim=1) == truth).sum().cpu()
            sums[1] += torch.nn.functional.cross_entropy(logits, truth, reduction="sum").double().cpu()
    right, loss = total(sums.to(place.device if place.world > 1 else "cpu")).tolist()
    return {"accuracy": right / n, "nll": loss / n}
