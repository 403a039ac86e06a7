"""Diagonal Fisher information of a model on a data set, for Fisher-weighted ensembles.

``F_k = mean_n (d/d theta_k log p(y_n | x_n))^2`` with labels y_n **drawn from the model's own predictions**, as in
wise-ft; true labels would give the empirical Fisher instead. Weights (with the logit scale) and biases of the head are
included, so that ``featcache wise --fisher F0 F1 --heads H0 H1`` merges the heads by Fisher information too.

Paper: Matena and Raffel, Merging models with Fisher-weighted averaging (arXiv 2111.09832).
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from featcache.datasets.base import Dataset
from featcache.encoders.base import Batch
from featcache.encoders.openclip import OpenClipEncoder
from featcache.encoding.augment import view_uniforms
from featcache.encoding.pipeline import Sample, batches_of, default_workers, prepared_batches
from featcache.errors import ImageReadError, MismatchError, TrainingError
from featcache.progress import Progress, Silent
from ft.checkpoints.folder import write_state
from ft.merging.wise import HEAD_BIAS, HEAD_WEIGHT
from ft.regularizers.base import unit
from heads import LinearHead

GROUP = 8
MOST_PASSES = 10_000
VISUAL = "visual."


def diagonal_fisher(
    log_probabilities: Callable[[dict[str, torch.Tensor], torch.Tensor], torch.Tensor],
    parameters: dict[str, torch.Tensor],
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """Mean squared per-sample gradient, float32, summed in float64; TrainingError if there are no samples.

    Parameters
    ----------
    log_probabilities : function from parameters and inputs (B, ...) to log p (B, C)
    batches : iterator of (inputs (B, ...), uniforms (B,))
        The label of a sample is the first class at which the cumulative probability exceeds its uniform number.
    """

    def loss(values: dict[str, torch.Tensor], sample: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        logp = log_probabilities(values, sample[None])[0]
        below = (logp.detach().exp().cumsum(0) <= uniform).sum()
        return F.nll_loss(logp[None], below.clamp(max=len(logp) - 1)[None])

    of_samples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in parameters.items()}
    count = 0
    for samples, uniforms in batches:
        for start in range(0, len(samples), GROUP):
            part, drawn = samples[start : start + GROUP], uniforms[start : start + GROUP]
            for name, gradient in of_samples(parameters, part, drawn).items():
                sums[name] += gradient.double().square().sum(0)
            count += len(part)
    if not count:
        raise TrainingError("no images for the Fisher information; give a split that has some")
    return {name: (total / count).float() for name, total in sums.items()}


def fisher(
    encoder: OpenClipEncoder,
    dataset: Dataset,
    head: LinearHead,
    *,
    passes: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Diagonal Fisher information of the parameters of an image tower and a head.

    Keys are those of open_clip's state dict, ``visual.proj`` and so on, with ``head.weight`` (C, D) and ``head.bias``
    (C,) for the head. Zero biases of zero-shot heads are included.

    Parameters
    ----------
    encoder : see `ft.checkpoints.parents.load_open_clip`
    dataset : images, used without augmentation; labels are not used
    head : head of the same model
    passes : labels drawn per image
    seed : seed of the labels, which depend only on seed, pass and sample id

    Raises
    ------
    MismatchError
        The head has another width or other classes.
    ImageReadError
        An image cannot be read.
    """
    if head.dim != encoder.dim or head.classnames != dataset.index.classnames:
        raise MismatchError(
            f"head {head.name} ({len(head.classnames)} classes of {head.dim} features) does not fit {encoder.name} "
            f"({encoder.dim}) and {dataset.name} ({len(dataset.index.classnames)} classes)"
        )
    visual: torch.nn.Module = encoder.model.visual
    tower = {name: value.detach() for name, value in visual.named_parameters() if value.requires_grad}
    layer = {HEAD_WEIGHT: torch.from_numpy(head.weights), HEAD_BIAS: torch.from_numpy(head.bias)}

    def log_probabilities(values: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
        own = {name: values[f"{VISUAL}{name}"] for name in tower}
        features = torch.func.functional_call(visual, own, (pixels,))
        return (unit(features) @ values[HEAD_WEIGHT].T + values[HEAD_BIAS]).log_softmax(-1)

    parameters = {f"{VISUAL}{name}": value for name, value in tower.items()}
    parameters |= {name: value.to(encoder.device) for name, value in layer.items()}
    if not 1 <= passes <= MOST_PASSES:
        raise TrainingError(f"passes {passes}: expected a number from 1 to {MOST_PASSES:,}")
    batches = _batches(encoder, dataset, passes, seed, progress or Silent())
    # fused attention has no batching rule for per-sample gradients
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return diagonal_fisher(log_probabilities, parameters, batches)


def write_fisher(values: dict[str, torch.Tensor], out: str | Path) -> Path:
    """Write Fisher information as safetensors, for ``featcache wise --fisher``."""
    return write_state(values, out, {"content": "diagonal Fisher information"})


def _batches(
    encoder: OpenClipEncoder, dataset: Dataset, passes: int, seed: int, progress: Progress
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs of the image tower, and the uniform random numbers that draw the labels."""
    ids = iter([(turn, name) for turn in range(passes) for name in dataset.index.ids])
    for pixels in pixel_batches(encoder, dataset, f"fisher of {encoder.name}", progress, passes):
        drawn = [view_uniforms(seed, *next(ids), 1)[0] for _ in pixels]
        yield pixels, torch.tensor(drawn, device=encoder.device)


def pixel_batches(
    encoder: OpenClipEncoder, dataset: Dataset, title: str, progress: Progress, passes: int = 1
) -> Iterator[torch.Tensor]:
    """Inputs of the image tower, `passes` times over the data set; ImageReadError if an image cannot be read."""
    n = len(dataset.index)
    progress.start(f"{title} on {dataset.name}/{dataset.split}", n * passes, 0)
    for _ in range(passes):
        for batch in prepared_batches(dataset, encoder, batches_of(range(n), 4 * GROUP), default_workers(), 0):
            yield encoder.pixels(stacked(batch, dataset).to(encoder.device))
            progress.advance(len(batch))
    progress.finish()


def stacked(batch: Sequence[Sample[Batch]], dataset: Dataset) -> torch.Tensor:
    """The images of a batch as one tensor; ImageReadError if one cannot be read."""
    if bad := [item for item in batch if item.image is None]:
        raise ImageReadError(f"{dataset.index.ids[bad[0].row]} cannot be read ({bad[0].error}); repair or remove it")
    return torch.from_numpy(np.stack([item.image for item in batch if item.image is not None]))
