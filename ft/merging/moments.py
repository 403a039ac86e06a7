"""Gram matrices of the inputs of every linear layer of a model on a data set, for RegMean.

Layers are found while the model runs, by intercepting `torch.nn.functional.linear`, products with a parameter (the
projections of CLIP's towers), and attention, whose input and output projections torch computes in one function. This
works for modules of any library.
"""

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from featcache.datasets.base import Dataset
from featcache.encoders.openclip import TINY, OpenClipEncoder
from featcache.errors import MismatchError, TrainingError
from featcache.progress import Progress, Silent
from ft.checkpoints.folder import path_of, read_metadata, read_state, weights_file, write_state
from ft.checkpoints.parents import account_of
from ft.merging.fisher import pixel_batches
from ft.merging.wise import HEAD_WEIGHT
from ft.regularizers.base import unit

PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
ATTENTION = inspect.signature(F.multi_head_attention_forward)
WEIGHTS = "weights"


class InputMoments(TorchFunctionMode):
    """Context manager that sums ``x^T x`` over all inputs of layers, whose parameters `names` maps from their ids.

    `sums` maps ``NAME@AXIS`` to a (D, D) float64 tensor. AXIS is the input axis of the parameter: 1 in linear layers, 0
    in ``x @ parameter``.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names, self.sums = names, dict[str, torch.Tensor]()

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Add the input of a layer, then call the function."""
        kwargs = kwargs or {}
        if func is F.linear:
            self.add(args[1], 1, args[0])
        elif func in PRODUCTS and len(args) > 1:
            self.add(args[1], 0, args[0])
        elif func is F.multi_head_attention_forward:
            self._add_attention(ATTENTION.bind(*args, **kwargs).arguments)
        return func(*args, **kwargs)

    def _add_attention(self, given: dict[str, torch.Tensor]) -> None:
        query, output = given["query"], given["out_proj_weight"]
        if query is given["key"] and query is given["value"]:
            self.add(given["in_proj_weight"], 1, query)
        # with the identity as output projection, the function returns the input of that projection
        identity = torch.eye(output.shape[1], dtype=query.dtype, device=query.device)
        changed = given | {"out_proj_weight": identity, "out_proj_bias": None}
        self.add(output, 1, F.multi_head_attention_forward(**changed)[0])  # type: ignore[arg-type]

    def add(self, parameter: object, axis: int, inputs: object) -> None:
        """Add inputs (..., D) of a layer whose parameter has a name."""
        name = self.names.get(id(parameter))
        if name is not None and isinstance(inputs, torch.Tensor):
            rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
            self.sums[f"{name}@{axis}"] = self.sums.get(f"{name}@{axis}", 0) + (rows.T @ rows).double()


@torch.no_grad()
def layer_moments(
    encoder: OpenClipEncoder,
    dataset: Dataset,
    prompts: Sequence[Sequence[str]] = (),
    *,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Sums of ``x^T x`` over the inputs of every linear layer, and over the features, which are a head's inputs.

    Parameters
    ----------
    encoder : see `ft.checkpoints.parents.load_open_clip`
    dataset : images, used without augmentation; labels are not used
    prompts : C sequences of prompts for the layers of the text tower; not needed if all merged models share it

    Returns
    -------
    mapping of ``NAME@AXIS`` -> (D, D) float32
        NAME is a key of open_clip's state dict, or ``head.weight`` for the head; see `InputMoments`.

    Raises
    ------
    TrainingError
        There are no images.
    ImageReadError
        An image cannot be read.
    """
    if not len(dataset.index):
        raise TrainingError("no images for the moments; give a split that has some")
    names = {id(parameter): name for name, parameter in encoder.model.named_parameters()}
    head = torch.empty(0)
    moments = InputMoments(names | {id(head): HEAD_WEIGHT})
    for pixels in pixel_batches(encoder, dataset, f"moments of {encoder.name}", progress or Silent()):
        with moments:
            features = encoder.model.encode_image(pixels)
        moments.add(head, 1, unit(features))
    for ids in _of_one_length(encoder, [text for texts in prompts for text in texts]):
        with moments:
            encoder.encode_tokens(ids)
    return {key: value.float().cpu() for key, value in moments.sums.items()}


def _of_one_length(encoder: OpenClipEncoder, texts: Sequence[str]) -> Iterator[torch.Tensor]:
    """Token ids of distinct texts in batches of equal length, without padding."""
    if texts:
        ids = encoder.tokenize(list(dict.fromkeys(texts)))
        lengths = (ids != ids[:, -1:]).sum(dim=1)
        for length in sorted(set(lengths.tolist())):
            yield from torch.split(ids[lengths == length], 256)


def moments_path(folder: str | Path) -> Path:
    """File of the moments beside a model folder: ``RUN/best_moments.safetensors`` for ``RUN/best``.

    For the built-in `tiny` it is in the working directory, since nothing is written into the package.
    """
    path = path_of(folder)
    name = f"{path.name}_moments.safetensors"
    return Path(name) if path.resolve() == TINY.resolve() else path.with_name(name)


def write_moments(values: Mapping[str, torch.Tensor], folder: Path, out: str | Path | None = None) -> Path:
    """Write moments with the sha256 of the model's weights, by default beside the model folder."""
    record = account_of(weights_file(folder))
    return write_state(values, out or moments_path(folder), {"content": "layer moments", WEIGHTS: json.dumps(record)})


def read_moments(path: Path, weights: Path) -> dict[str, torch.Tensor]:
    """Read moments and check that they belong to these weights.

    Raises EncoderError if there is no such file; MismatchError if they were computed with other weights.
    """
    values = read_state(path)
    of = json.loads(read_metadata(path).get(WEIGHTS, "{}"))
    if of.get("sha256") != account_of(weights)["sha256"]:
        raise MismatchError(
            f"{path}: computed with other weights ({of.get('file', 'unknown')}) than {weights} has now; make it again "
            f"(featcache moments DATASET:SPLIT --model local-dir:{weights.parent})"
        )
    return values
