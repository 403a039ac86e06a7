"""What a run leaves behind: model folders that ``featcache encode`` takes, and heads that ``evaluate`` takes."""

import json
from pathlib import Path
from typing import Any

from featcache import __version__
from featcache.datasets import dataset_key, labels_digest
from featcache.datasets.base import Dataset
from featcache.encoding.chunks import encoder_key
from featcache.errors import TrainingError
from featcache.store.places.local import put
from ft.checkpoints.folder import BEST, LOG, OPTIONS, write_model_folder
from ft.training.resume import RESUME
from ft.training.setup import Run
from heads import LinearHead, save

SPACES = 2


def open_folder(out: Path, overwrite: bool) -> None:
    """The folder of a run: new, empty, or that of a run to go on with.

    Raises
    ------
    TrainingError
        It holds other things.
    """
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / OPTIONS).exists())):
        raise TrainingError(f"{out} exists and is no run's folder; name another --out")
    out.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for name in (RESUME, LOG):  # the models are replaced as the new run writes its own
            (out / name).unlink(missing_ok=True)


def write_options(run: Run, out: Path) -> None:
    """``options.json``: what the run was asked to do, on what, and where the weights that it began with came from."""
    source = run.encoder.source or {}
    record = {
        "featcache": __version__,
        "model": run.encoder.name,
        "start": {
            "model": source.get("model"),
            "pretrained": source.get("pretrained"),
            "weights": run.identity["model"],
        },
        "dataset": _split(run.dataset),
        "val": None if run.val is None else _split(run.val),
        "steps": run.total,
        "processes": run.place.world,
        "device": run.encoder.device,
        "options": run.options.to_dict(),
    }
    put(out / OPTIONS, json.dumps(record, indent=SPACES).encode() + b"\n")


def write_model(run: Run, out: Path, name: str, step: int, judged: dict[str, float] | None) -> None:
    """``out/NAME``, a model folder, and ``out/NAME_head.safetensors``, of the model as it is now.

    Raises
    ------
    HeadError
        Weights that are not finite.
    """
    record = {
        "featcache": __version__,
        "from": run.encoder.name,
        **_splits(run, name),
        "step": step,
        "judged": judged,
        "average": run.options.average,
        "options": run.options.to_dict(),
    }
    write_model_folder(run.source, run.encoder.model.state_dict(), out / name, record, overwrite=True)
    run.encoder.rehash()
    write_head(run, out, name, step)


def write_head(run: Run, out: Path, name: str, step: int) -> None:
    """``out/NAME_head.safetensors``: the classifier as it is now, with the logit scale in its weights.

    It is bound to the features that ``featcache encode`` makes in float32 with the model as the encoder knows it.
    """
    weights, bias = (values.cpu().numpy() for values in run.stepper.objective.classifier())
    own = run.options.objective == "cross_entropy"
    classnames = run.dataset.index.classnames
    provenance: dict[str, Any] = {
        "head": f"finetuned {name}",
        "params": {"step": step, "options": run.options.to_dict()},
        "encoder_key": encoder_key(run.encoder),
        "text_digest": None if own else run.encoder.text_digest,
        "classnames": list(classnames),
        **_splits(run, name),
        "featcache": __version__,
    }
    save(LinearHead(weights, bias, classnames, name="finetuned", provenance=provenance), head_path(out, name))


def _splits(run: Run, name: str) -> dict[str, Any]:
    chosen = [] if run.val is None or name != BEST else [_split(run.val)]
    return {"fitted_on": [_split(run.dataset)], "chosen_on": chosen}


def head_path(out: Path, name: str) -> Path:
    """Where the head of a model folder lies."""
    return out / f"{name}_head.safetensors"


def _split(dataset: Dataset) -> dict[str, Any]:
    index = dataset.index
    return {
        "name": dataset.name,
        "split": dataset.split,
        "dataset_key": dataset_key(index),
        "labels_digest": labels_digest(index.labels, index.classnames),
    }
