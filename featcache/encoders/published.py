"""Checks of published weights before open_clip is imported: are they available, and do they fit the architecture?

open_clip's table of weights is parsed as source, since importing open_clip takes seconds. OpenAI's weights were trained
with QuickGELU. In a GELU architecture they lose four ImageNet points (0.6442 instead of 0.6834 for ViT-B/16), and
open_clip only warns. Here it is an error, whether the weights are named by tag, are one of OpenAI's files (recognised
by digest), or another archive in OpenAI's layout.
"""

import ast
import json
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from featcache.encoders.base import full_name
from featcache.encoders.model_names import open_clip_name
from featcache.errors import ActivationMismatchError

QUICK_SUFFIX = "-quickgelu"
"""Suffix of open_clip's architectures with QuickGELU."""
TIMM_REMEDY = "connect this machine, or give --pretrained FILE"


class Published(NamedTuple):
    """An entry of open_clip's table of weights: the hub's ``ORG/REPO``, and whether they need QuickGELU."""

    repository: str
    quick_gelu: bool


def check_reachable(model: str, pretrained: str | None) -> None:
    """EncoderError if a model's weights are not in the local cache, and the hub is out of reach or ``HF_HUB_OFFLINE``.

    ActivationMismatchError if, besides, they were trained with the other activation. Models whose repository is unknown
    pass, and so does everything once open_clip or timm is imported, since loading then raises the same error.
    """
    model, pretrained = open_clip_name(full_name(model), pretrained)
    if "open_clip" in sys.modules or model.endswith(".json") or pretrained == "random":
        return
    from featcache.datasets.hub import hub_lacks, no_hub, timm_lacks  # imports the hub's client

    if model.startswith("timm:"):
        name, comma, _ = model.removeprefix("timm:").partition(",")
        from_hub = not ("timm" in sys.modules or comma or pretrained)
        if from_hub and _timm_has(name) and timm_lacks(name.partition(".")[0]):
            raise no_hub(model, TIMM_REMEDY)
        return
    found = None if pretrained is None or Path(pretrained).is_file() else published(model, pretrained)
    repository = model.removeprefix("hf-hub:") if model.startswith("hf-hub:") else found and found.repository
    if not repository or not hub_lacks(repository):
        return
    if found is not None:
        check_activation(model, str(pretrained), _computes_quick_gelu(model), found.quick_gelu)
    raise no_hub(f"model {model}")


def _timm_has(name: str) -> bool:
    """Whether timm defines a model of that name; searches its source, since importing it takes seconds."""
    define = f"\ndef {name}(".encode()
    return any(define in file.read_bytes() for file in (_folder("timm") / "models").glob("*.py"))


def published(model: str, tag: str) -> Published | None:
    """Weights by architecture and tag; None if open_clip's table has none on the hub.

    >>> published("ViT-B-32", "openai")
    Published(repository='timm/vit_base_patch32_clip_224.openai', quick_gelu=True)
    >>> published("ViT-B-32", "none")
    """
    return _table().get((model.removesuffix(QUICK_SUFFIX), tag.lower().replace("-", "_")))


@cache
def _table() -> dict[tuple[str, str], Published]:
    """(architecture, tag) -> weights; empty if this version of open_clip has its table in another form."""
    tree = ast.parse((_folder() / "pretrained.py").read_text(encoding="utf-8"))
    assigned = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
    tables = {node.targets[0].id: _entries(node.value) for node in assigned if isinstance(node.targets[0], ast.Name)}
    models = next((node.value for node in assigned if ast.unparse(node.targets[0]) == "_PRETRAINED"), None)
    if not isinstance(models, ast.Dict):
        return {}
    return {
        (key.value, tag): weights
        for key, value in zip(models.keys, models.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
        for tag, weights in (tables.get(value.id, {}) if isinstance(value, ast.Name) else _entries(value)).items()
    }


def _entries(node: ast.expr) -> dict[str, Published]:
    """Tag -> weights, from ``dict(TAG=_pcfg(hf_hub=..., quick_gelu=...), ...)``."""
    found = {}
    for entry in node.keywords if isinstance(node, ast.Call) else ():
        if entry.arg is not None and isinstance(entry.value, ast.Call):
            said = {item.arg: item.value.value for item in entry.value.keywords if isinstance(item.value, ast.Constant)}
            if place := said.get("hf_hub"):
                found[entry.arg] = Published(str(place).rpartition("/")[0], bool(said.get("quick_gelu")))
    return found


def _folder(library: str = "open_clip") -> Path:
    spec = find_spec(library)
    return Path(str(spec and spec.origin)).parent


def _computes_quick_gelu(model: str) -> bool:
    try:
        config = json.loads((_folder() / "model_configs" / f"{model}.json").read_bytes())
    except OSError:  # no such architecture, or one that open_clip derives
        return model.endswith(QUICK_SUFFIX)
    return bool(config.get("quick_gelu", False))


def check_activation(
    model: str, pretrained: str, quick_gelu: bool, wanted: bool | None, flag: str = "--model", remedy: str | None = None
) -> None:
    """ActivationMismatchError, which says what to use, if weights were trained with another activation.

    `quick_gelu` is whether the architecture uses QuickGELU, `wanted` whether the weights need it, None if unknown. The
    default `remedy` is `flag`, which gives `model`, with the name of the other architecture.
    """
    if wanted is None or wanted == quick_gelu:
        return
    base = model.removesuffix(QUICK_SUFFIX)
    trained, built = ("QuickGELU", "GELU") if wanted else ("GELU", "QuickGELU")
    raise ActivationMismatchError(
        f"weights {pretrained} in {model}: they were trained with {trained}, {model} computes {built}: accuracy would "
        f"drop by points without an error; use {remedy or f'{flag} {base + QUICK_SUFFIX if wanted else base}'}"
    )
