"""Files that a run writes: model folders for ``featcache encode``, heads for ``featcache evaluate``, options, logs."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featcache import __version__
from featcache.encoding.chunks import encoder_key
from featcache.errors import MissingExtraError, TrainingError
from featcache.store.places.local import PARTIAL_SUFFIX, put, sweep_partials
from featcache.store.places.targets import writing
from ft.checkpoints.folder import BEST, LAST, LOG, OPTIONS, START, head_path, write_model_folder
from ft.checkpoints.state import Json
from ft.training.resume import RESUME
from ft.training.setup import Run
from ft.training.validation import FEATURES
from heads import LinearHead, load, save
from heads.fitted.provenance import Provenance, SplitRecord, rows_of
from heads.rows.hashes import Hashes


def open_folder(out: Path) -> None:
    """Prepare the folder of a run: create it, or check that it is empty or holds a run to resume.

    Raises TrainingError if the folder holds other files.
    """
    if out.exists() and not (out.is_dir() and ((out / OPTIONS).exists() or _is_empty(out))):
        raise TrainingError(f"{out} exists and is not the folder of a run; name another --out")
    out.mkdir(parents=True, exist_ok=True)
    sweep_partials(out)


def start_again(run: Run, out: Path) -> None:
    """Remove what an earlier run left in a folder.

    Kept are ``last``, which the new run replaces in any case, and the model that the new run starts from.
    """
    for name in (RESUME, LOG, FEATURES, head_path(out, BEST).name):
        (out / name).unlink(missing_ok=True)
    for path in (out / BEST, *out.glob("checkpoint_[0-9]*")):
        if path.is_dir():
            if not (isinstance(run.source, Path) and path.samefile(run.source)):
                shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _is_empty(out: Path) -> bool:
    """Whether a folder is empty, apart from options that a killed run left half-written."""
    return all(path.name.startswith(f"{OPTIONS}.") and path.suffix == PARTIAL_SUFFIX for path in out.iterdir())


def write_options(run: Run, out: Path) -> None:
    """``options.json``: options and data of the run, and the origin of its initial weights."""
    source = run.encoder.source or {}
    record = {
        "featcache": __version__,
        "model": run.encoder.name,
        "start": {
            "model": source.get("model"),
            "pretrained": source.get("pretrained"),
            "weights": run.identity["model"],
        },
        "dataset": run.trained_on,
        "val": run.selected_on,
        "steps": run.total,
        "images": run.order.images(run.total),
        "processes": run.place.world,
        "device": run.encoder.device,
        "options": run.options.to_dict(),
    }
    with writing(out / OPTIONS):
        put(out / OPTIONS, json.dumps(record, indent=2).encode() + b"\n")


def write_model(run: Run, out: Path, name: str, step: int, metrics: Mapping[str, float] | None) -> None:
    """Write the current model to the folder ``out/NAME``, and its head; HeadError if weights are not finite."""
    record = {
        "featcache": __version__,
        "from": run.encoder.name,
        **_splits(run, name),
        "step": step,
        "judged": metrics,
        "average": run.options.average,
        "options": run.options.to_dict(),
    }
    write_model_folder(run.source, run.encoder.model.state_dict(), out / name, record, overwrite=True)
    run.encoder.rehash()
    write_head(run, out, name, step)


def write_head(run: Run, out: Path, name: str, step: int) -> None:
    """Write the current classifier, with the logit scale in its weights, to ``out/NAME_head.safetensors``.

    It belongs to the features that ``featcache encode`` computes in float32 with the current model.
    """
    splits = _splits(run, name)
    weights, bias = (values.cpu().numpy() for values in run.stepper.objective.classifier())
    classnames = run.dataset.index.classnames
    provenance = Provenance(
        head=f"finetuned {name}",
        params={"step": step, "options": run.options.to_dict()},
        encoder_key=encoder_key(run.encoder),
        text_digest=None if run.options.objective == "cross_entropy" else run.encoder.text_digest,
        classnames=list(classnames),
        **splits,
        featcache=__version__,
    )
    save(LinearHead(weights, bias, classnames, name="finetuned", provenance=provenance), head_path(out, name))


def _splits(run: Run, name: str) -> Json:
    """Splits that a model was fitted and chosen on, with hashes of the rows; the initial model has seen none yet."""
    fitted = run.trained_on if name == START else SplitRecord(run.trained_on, run.trained.hashes())
    chosen = [run.selected] if name == BEST and run.selected is not None else []
    return {"fitted_on": [fitted], "chosen_on": chosen}


def rows_before(out: Path) -> Hashes | None:
    """Hashes of the rows that the saved run in a folder was trained on; None if it kept none."""
    path = head_path(out, LAST)
    fitted = load(path).provenance.fitted_on if path.exists() else []
    return rows_of(fitted[0]) if fitted else None


def before_after(run: Run, history: Sequence[Json]) -> list[Json]:
    """Results rows of the initial model and of the last update on the selection split; none without `eval_start`."""
    if run.val is None or not history or history[0]["step"] != 0:
        return []
    rows = []
    for name, entry, fitted in (("start", history[0], []), ("finetuned", history[-1], [run.trained_on])):
        values = {f"{run.val.name}:top1": entry["accuracy"], f"{run.val.name}:nll": entry["nll"]}
        record = {"head": name, "encoder": run.encoder.name, "params": {"step": entry["step"]}}
        rows.append(record | {"fitted_on": fitted, "chosen_on": []} | values)
    return rows


class Log:
    """``log.jsonl``: one JSON object per line, each with a ``step``.

    Records later than step `after`, from which a killed run resumes, and an incomplete last line are dropped.
    """

    def __init__(self, path: Path, after: int) -> None:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if after and path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= after]
        with writing(path):
            put(path, "".join(kept).encode())
        self._path, self._file = path, path.open("a", encoding="utf-8")

    def write(self, record: Json) -> None:
        """Append a record and flush it."""
        with writing(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Sync to disk and close."""
        with writing(self._path), self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


class TensorBoardLog:
    """The same records as TensorBoard scalars; MissingExtraError if tensorboard is not installed."""

    def __init__(self, folder: Path, after: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError(
                f"--tensorboard: tensorboard is not installed ({error}); pip install 'featcache[finetune]'"
            ) from error
        self._writer: Any = SummaryWriter(str(folder), purge_step=after + 1 if after else None)

    def write(self, record: Json) -> None:
        """Write each number of a record under its name, and numbers of nested objects under ``name/part``."""
        for name, value in record.items():
            parts = value if isinstance(value, Mapping) else {"": value}
            for part, number in parts.items():
                if name != "step" and isinstance(number, int | float):
                    self._writer.add_scalar(f"{name}/{part}".rstrip("/"), number, record["step"])

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
