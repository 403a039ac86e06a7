"""LoRA: train a low-rank update of weight matrices instead of the matrices themselves.

``W = W0 + (alpha / r) B A`` with A (r, D) drawn from U(-1/sqrt(D), 1/sqrt(D)) and B (M, r) initially zero, so that
the model starts unchanged. Query, key and value have separate updates, also where a tower packs them in one matrix.

The update is a parametrisation of the weight, which works for every kind of module. The model's state dict holds the
sum under the weight's name, so checkpoints and digests are those of a plain model.

Papers: Hu et al., LoRA (arXiv 2106.09685); Zanella and Ben Ayed, Low-rank few-shot adaptation of vision-language models
(arXiv 2405.18541).
"""

import math
import re
from collections.abc import Iterator, MutableMapping, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from featcache.errors import TrainingError

PACKED = re.compile(r"(in_proj_weight|qkv\.weight)$")
TARGETS = {
    "query": re.compile(r"(q_proj|query)(\.weight|_weight)$"),
    "key": re.compile(r"(k_proj|key)(\.weight|_weight)$"),
    "value": re.compile(r"(v_proj|value)(\.weight|_weight)$"),
    "out": re.compile(r"(attn|attention)\.(out_proj|proj|output\.dense)\.weight$"),
    "mlp": re.compile(r"(mlp\.\w+|intermediate\.dense|layer\.\d+\.output\.dense)\.weight$"),
}
"""Names of the matrices in open_clip, timm and transformers."""
IN_ONE = ("query", "key", "value")
FACTORS = ("lora_A", "lora_B")
UPDATED = re.compile(r"(?:^|\.)parametrizations\.(\w+)\.(original|0\.\w+)$")


class LowRank(nn.Module):
    """Parametrisation ``W0 -> W0 + scale B A`` of a matrix (M, D), or of some of the equal `blocks` of its rows."""

    def __init__(
        self, weight: torch.Tensor, rank: int, scale: float, blocks: Sequence[bool], generator: torch.Generator
    ) -> None:
        super().__init__()
        (rows, width), n = weight.shape, sum(blocks)
        self.scale, self.blocks = scale, tuple(blocks)
        bound = 1 / math.sqrt(width)
        drawn = torch.empty(n, rank, width).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(drawn.to(weight))
        self.lora_B = nn.Parameter(weight.new_zeros(n, rows // len(blocks), rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The updated matrix (M, D), computed in float32 even under autocast."""
        with torch.autocast(weight.device.type, enabled=False):
            updates = iter(self.scale * self.lora_B @ self.lora_A)
            parts = weight.chunk(len(self.blocks))
            return torch.cat(
                [part + next(updates) if chosen else part for part, chosen in zip(parts, self.blocks, strict=True)]
            )


def adapt(model: nn.Module, towers: Sequence[str], targets: Sequence[str], rank: int, scale: float, seed: int) -> None:
    """Add trainable low-rank updates to matrices of the towers of an open_clip model; the keys of its state dict stay.

    Raises TrainingError if a tower has no such matrices, or one that is smaller than the rank.

    Parameters
    ----------
    towers : "image", "text" or both
    targets : names in `TARGETS`
    scale : alpha / r
    seed : seed of A
    """
    generator = torch.Generator().manual_seed(seed)
    for tower in towers:
        found = list(_matrices(model, tower, targets))
        if not found:
            raise TrainingError(
                f"lora_targets {', '.join(targets)}: the {tower} tower of this model has no such matrices; expected a "
                "transformer, or other targets"
            )
        for module, name, blocks in found:
            weight = module.get_parameter(name)
            smaller = min(weight.shape[0] // len(blocks), weight.shape[1])
            if rank > smaller:
                raise TrainingError(
                    f"lora_rank {rank}: a matrix of the {tower} tower has rank {smaller}; expected at most that"
                )
            parametrize.register_parametrization(module, name, LowRank(weight, rank, scale, blocks, generator))
    model.register_state_dict_post_hook(_plain)  # type: ignore[no-untyped-call]


def is_factor(name: str) -> bool:
    """Whether a parameter is one of the factors A and B.

    >>> is_factor("clip.visual.attn.parametrizations.in_proj_weight.0.lora_A"), is_factor("clip.visual.proj")
    (True, False)
    """
    return name.rpartition(".")[2] in FACTORS


def _matrices(
    model: nn.Module, tower: str, targets: Sequence[str]
) -> Iterator[tuple[nn.Module, str, tuple[bool, ...]]]:
    """Module, name and blocks of every matrix to update."""
    for path, module in list(model.named_modules()):
        if path.startswith("visual") is not (tower == "image"):
            continue
        for name, weight in list(module.named_parameters(recurse=False)):
            full = f"{path}.{name}"
            if weight.ndim != 2:
                continue
            if PACKED.search(full):
                blocks = tuple(word in targets for word in IN_ONE)
            else:
                blocks = (any(TARGETS[word].search(full) for word in targets),)
            if any(blocks):
                yield module, name, blocks


def _plain(module: nn.Module, state: MutableMapping[str, torch.Tensor], prefix: str, _: object) -> None:
    """Replace each matrix and its factors in a state dict by their sum, keeping the order of keys."""
    items = list(state.items())
    state.clear()
    for key, value in items:
        match = UPDATED.search(key)
        if match is None:
            state[key] = value
        elif match[2] == "original":
            path = key[: match.start()]
            owner = module.get_submodule(path.removeprefix(prefix))
            with torch.no_grad():
                state[f"{path}.{match[1]}" if path else match[1]] = getattr(owner, match[1]).detach()
