"""Evaluation on the selection split; the features of the best checkpoint are kept for the report page."""

from pathlib import Path
from typing import NamedTuple

import torch

from featcache.datasets.base import Dataset
from featcache.encoding.pipeline import batches_of, default_ahead, prepared_batches
from ft.checkpoints.folder import BEST, head_path, read_metadata, read_state, write_state
from ft.distributed import Place, total
from ft.merging.fisher import stacked
from ft.objectives.base import Objective
from ft.regularizers.base import unit
from ft.training.model import Trainable
from heads import ResidentStore, calibrate, load
from heads.kernels.tally import row_stats
from heads.report.details import Detail, head_details

BATCH = 128  # images of a validation batch
FEATURES = "best_val.safetensors"
"""Features of the selection split under the best checkpoint, in the folder of a run."""


class Judged(NamedTuple):
    """Metrics (``accuracy`` as a fraction, ``nll`` in nats) and features (N, D) in float16.

    Features of rows evaluated by other processes are zero.
    """

    metrics: dict[str, float]
    features: torch.Tensor


@torch.no_grad()
def validate(model: Trainable, objective: Objective, dataset: Dataset, place: Place, workers: int) -> Judged:
    """Evaluate the current model on a data set without augmentation.

    Each process takes every world-th batch. The model is not changed, not even the running statistics of batch
    normalisation. Raises ImageReadError if an image cannot be read.
    """
    weights, bias = objective.classifier()
    labels = torch.from_numpy(dataset.index.labels)
    n, encoder = len(dataset.index), model.encoder
    batches = batches_of(range(n), BATCH)[place.rank :: place.world]
    sums = torch.zeros(2, dtype=torch.float64)
    features = torch.zeros(n, weights.shape[1], dtype=torch.float16)
    with model.evaluating():
        for batch in prepared_batches(dataset, encoder, batches, workers, default_ahead(encoder)):
            found = unit(model.image_features(stacked(batch, dataset).to(encoder.device)))
            logits = found @ weights.T + bias
            rows = [item.row for item in batch]
            features[rows] = found.half().cpu()
            truth = labels[rows].to(logits.device)
            hits = (logits.argmax(dim=1) == truth).sum()  # not by rank, which is 0 where logits are NaN
            sums += torch.stack([hits, row_stats(logits, truth).nll.sum()]).cpu()
    right, loss = total(sums.to(place.device if place.world > 1 else "cpu")).tolist()
    return Judged({"accuracy": right / n, "nll": loss / n}, features)


def keep_features(features: torch.Tensor, out: Path, step: int, place: Place) -> None:
    """Gather the features of the selection split under the best checkpoint so far, and write them."""
    if place.world > 1:
        features = total(features.to(place.device)).cpu()
    if place.first:
        write_state({"features": features}, out / FEATURES, {"step": str(step)})


def best_step(out: Path) -> int | None:
    """Step of the best checkpoint whose features were kept; None if there are none."""
    path = out / FEATURES
    return int(read_metadata(path)["step"]) if path.exists() else None


def best_details(out: Path, val: Dataset) -> list[Detail]:
    """Calibration, classes and confusions of the best checkpoint on its selection split, from the kept features.

    The second reliability diagram uses a temperature fitted on that same split. Empty for runs of earlier versions,
    which kept no features.
    """
    step = best_step(out)
    if step is None:
        return []
    head, index = load(head_path(out, BEST)), val.index
    features = read_state(out / FEATURES)["features"]
    if head.provenance["params"].get("step") != step or len(features) != len(index):
        return []  # the run was started again, or killed between writing the head and the features
    store = ResidentStore(
        features,
        index.labels,
        index.classnames,
        name=val.name,
        split=val.split,
        encoder_key=head.provenance.encoder_key,
        text_digests=() if head.provenance.text_digest is None else (head.provenance.text_digest,),
        ids=index.ids,
        provenance={"data": val.opened_as},
    )
    after = calibrate(head, (features.numpy(), index.labels))
    return head_details(head, [store], [f"{val.name}/{val.split}"], calibrated=after)
