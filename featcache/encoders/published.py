"""Published weights, asked before open_clip is imported: which the names stand for, and whether they can be had here.

open_clip's table of weights is read as text: importing open_clip takes seconds, and to say that there is no network
should not.

OpenAI's weights were trained with QuickGELU. Loaded into a GELU architecture they lose four ImageNet points without an
error (0.6442 instead of 0.6834 for ViT-B/16), and open_clip only warns. Here it is an error, whether the weights come
by tag, by one of OpenAI's files (known by digest), or by another archive in OpenAI's layout.
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
"""End of open_clip's names of architectures that compute QuickGELU."""


TIMM_REMEDY = "connect this machine, or give --pretrained FILE"


class Published(NamedTuple):
    """What open_clip's table says of weights."""

    repository: str
    """Where the hub has them, ``ORG/REPO``."""
    quick_gelu: bool
    """Whether they were trained with QuickGELU."""


def check_reachable(model: str, pretrained: str | None) -> None:
    """Say at once that a model's weights are neither in the local cache nor to be had.

    Models whose place on the hub is not known pass, and so does everything once open_clip or timm is imported: loading
    says the same then.

    Raises
    ------
    EncoderError
        The hub cannot be reached, or is not to be asked (``HF_HUB_OFFLINE``), and the cache lacks the weights.
    ActivationMismatchError
        Nor would they be of use: they were trained with the other activation.
    """
    model, pretrained = open_clip_name(full_name(model), pretrained)
    if "open_clip" in sys.modules or model.endswith(".json") or pretrained == "random":
        return
    from featcache.datasets.hub import hub_lacks, no_hub, timm_lacks  # which reads the hub's settings

    if model.startswith("timm:"):
        name, comma, _ = model.removeprefix("timm:").partition(",")
        if (
            "timm" in sys.modules
            or comma
            or pretrained
            or not _timm_has(name)
            or not timm_lacks(name.partition(".")[0])
        ):
            return
        raise no_hub(model, TIMM_REMEDY)
    found = None if pretrained is None or Path(pretrained).is_file() else published(model, pretrained)
    repository = model.removeprefix("hf-hub:") if model.startswith("hf-hub:") else found and found.repository
    if not repository or not hub_lacks(repository):
        return
    if found is not None:
        check_activation(model, str(pretrained), _computes_quick_gelu(model), found.quick_gelu)
    raise no_hub(f"model {model}")


def _timm_has(name: str) -> bool:
    """Whether timm's sources define a model of that name; importing it takes seconds."""
    define = f"\ndef {name}(".encode()
    return any(define in file.read_bytes() for file in (_folder("timm") / "models").glob("*.py"))


def published(model: str, tag: str) -> Published | None:
    """Weights by architecture and tag; None where open_clip's table has none on the hub.

    Examples
    --------
    >>> published("ViT-B-32", "openai")
    Published(repository='timm/vit_base_patch32_clip_224.openai', quick_gelu=True)
    >>> published("ViT-B-32", "none")
    """
    return _table().get((model.removesuffix(QUICK_SUFFIX), tag.lower().replace("-", "_")))


@cache
def _table() -> dict[tuple[str, str], Published]:
    """(architecture, tag) -> weights; empty where another version of open_clip writes its table in another way."""
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
    """Tag -> weights, of ``dict(TAG=_pcfg(hf_hub=..., quick_gelu=...), ...)``."""
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
    except OSError:  # no architecture of that name, or one that open_clip derives
        return model.endswith(QUICK_SUFFIX)
    return bool(config.get("quick_gelu", False))


def check_activation(
    model: str,
    pretrained: str,
    quick_gelu: bool,
    wanted: bool | None,
    flag: str = "--model",
    remedy: str | None = None,
) -> None:
    """Refuse weights whose activation is not the architecture's.

    Parameters
    ----------
    model, pretrained : architecture and weights, as the user named them
    quick_gelu : what the architecture computes
    wanted : what the weights were trained with; None where nothing is known of them
    flag : the flag that names `model`
    remedy : what to use instead; default: the flag with the architecture's other name

    Raises
    ------
    ActivationMismatchError
        Naming the architecture to use instead.
    """
    if wanted is None or wanted == quick_gelu:
        return
    base = model.removesuffix(QUICK_SUFFIX)
    trained, built = ("QuickGELU", "GELU") if wanted else ("GELU", "QuickGELU")
    raise ActivationMismatchError(
        f"weights {pretrained} in {model}: they were trained with {trained}, {model} computes {built}: accuracy would "
        f"drop by points without an error; use {remedy or f'{flag} {base + QUICK_SUFFIX if wanted else base}'}"
    )
