"""Every kind of damage to a single file, and stores with all files that readers read."""

import io
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fakes import CLASSES, TAP, NumpyDataset, NumpyEncoder, TappedEncoder
from safetensors import safe_open
from small_pictures import write_pictures

import heads
from featcache import EncodeOptions, FeatureBatches, encode_dataset, find_store, list_stores, open_store
from featcache.cli.main import main
from featcache.datasets.base import SampleIndex
from featcache.encoders import load_encoder
from featcache.encoding.texts import embed_prompts
from featcache.errors import FeatcacheError
from featcache.store import StoreWriter, TextStore, open_image_store, open_text_store
from featcache.store.columns import as_columns
from featcache.store.layout import ArraySpec
from featcache.transfer.export import export
from ft.checkpoints.folder import read_state
from ft.training.resume import read_resume
from heads.estimators.kept_moments import store_moments

BROKEN = 5
OPTIONS = {"chunk_rows": 8, "batch_size": 3, "workers": 1, "max_bad": 1}
Content = bytes | None
"""Content of a damaged file; None if it was deleted."""


def damages(content: bytes, neighbour: Content, seed: int) -> Iterator[tuple[str, Content]]:
    """Every kind of damage to a file with this content; `neighbour` is the content of another file."""
    chance = random.Random(seed)
    yield "deleted", None
    if not content:
        yield "filled", b"\0"
        return
    yield "emptied", b""
    for place in sorted({0, len(content) - 1, *(chance.randrange(len(content)) for _ in range(6))}):
        bit = 1 << chance.randrange(8)
        yield f"bit {place}.{bit}", content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
    for length in sorted({1, len(content) // 2, len(content) - 1} - {0, len(content)}):
        yield f"cut to {length}", content[:length]
    yield "grown", content + b"\0"
    yield "garbage", chance.randbytes(len(content))
    yield "zeros", bytes(len(content))
    if neighbour is not None and neighbour != content:
        yield "swapped", neighbour
    yield from json_damages(content, chance)


def json_damages(content: bytes, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """A JSON file with a field changed, removed or added."""
    try:
        record = json.loads(content)
    except ValueError:
        return
    places = list(_places(record))
    for place in chance.sample(places, min(12, len(places))):
        for what, change in CHANGES.items():
            copy = json.loads(content)
            *parents, last = place
            holder = copy
            for name in parents:
                holder = holder[name]
            if change(holder, last):
                yield f"{what} {'.'.join(map(str, place))}", json.dumps(copy, indent=1).encode()


def _places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    named = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in named:
        yield (*above, name)
        yield from _places(inner, (*above, name))


def _alter(holder: Any, name: Any) -> bool:
    value = holder[name]
    if isinstance(value, bool) or value is None:
        holder[name] = not value
    elif isinstance(value, int | float):
        holder[name] = value + 1
    elif isinstance(value, str):
        holder[name] = value[1:] + "x"
    else:
        return False
    return True


def _remove(holder: Any, name: Any) -> bool:
    del holder[name]
    return True


CHANGES: dict[str, Callable[[Any, Any], bool]] = {"altered": _alter, "removed": _remove}


class Columned(NumpyDataset):
    """With a metadata column."""

    @property
    def index(self) -> SampleIndex:
        plain = super().index
        columns = as_columns({"region": [f"place {row % 4}" for row in range(len(plain.ids))]}, len(plain.ids))
        return SampleIndex(plain.ids, plain.sizes, plain.stamps, plain.labels, plain.classnames, columns)


def dataset(seed: int = 0) -> Columned:
    found = Columned(40, broken=[BROKEN])
    found.pixels = np.random.default_rng(seed).integers(0, 256, found.pixels.shape, dtype=np.uint8)
    return found


def encode(root: Path, seed: int = 0) -> Path:
    options = EncodeOptions(taps=[TAP], views=0, **OPTIONS)
    return Path(str(encode_dataset(dataset(seed), TappedEncoder(), root=root, options=options).store.path))


@dataclass
class World:
    """Files to damage, and readers by name with their results."""

    root: Path
    folder: Path
    reads: Mapping[str, Callable[[], object]]
    neighbours: Mapping[str, bytes] = field(default_factory=dict)
    of: Mapping[str, str] = field(default_factory=dict)
    """Pattern of the files that a reader reads; default: all."""
    edits: bool = True
    """Whether a JSON file with a changed value is damaged; otherwise its owner may have edited it."""
    swaps: bool = True
    """Whether a file with another file's content is damaged; heads are valid under any name."""
    mends: Collection[str] = ()
    """Readers that may rewrite damaged files."""

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


def plain(value: Any) -> object:
    """A value that can be compared."""
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes()) if value.dtype != object else value.tolist()
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def image_world(root: Path) -> World:
    """An image store with a tap, a bad row, a column and kept moments, beside another store."""
    path, other = encode(root / "cache"), encode(root / "other", seed=1)
    out = root / "out.csv"

    def opened(**how: str) -> Any:
        return open_store(path, **how)

    def exported(kind: str) -> bytes:
        target = root / f"out.{kind}"
        export(opened(), target, kind)
        return target.read_bytes()

    def batches() -> list[Any]:
        return [(x.clone(), y.clone()) for x, y in FeatureBatches(opened(), 16, torch.zeros(0), resident=False)]

    def fitted(store: Any) -> Any:
        head = heads.Ridge(alphas=[1e-2, 1.0]).fit(store)
        return head.coef_, head.intercept_, head.alpha_

    def judged() -> Any:
        head = heads.LinearHead(np.eye(3, 16, dtype=np.float32), np.zeros(3, np.float32), classnames=CLASSES)
        return [
            {name: value for name, value in row.items() if name in ("top1", "nll", "fake:top1", "fake:nll")}
            for row in heads.evaluate([head], [opened()])
        ]

    def exported_by_verb() -> object:
        out.unlink(missing_ok=True)
        said = io.StringIO()
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            code = main(["export", "fake/train", str(out), "--root", str(root / "cache")])
        if code in (2, 3, 4, 5) and "Traceback" not in said.getvalue():
            raise FeatcacheError(said.getvalue())
        return code, out.read_bytes()

    reads: dict[str, Callable[[], object]] = {
        "numpy": lambda: opened().numpy(),
        "blocks": lambda: [(x.copy(), y.copy()) for x, y in opened().blocks(7)],
        "gather": lambda: opened().gather(np.array([39, 3, 17])),
        "labels": lambda: opened().labels,
        "valid": lambda: opened().valid,
        "norm": lambda: opened().array("norm"),
        "content": lambda: opened().array("content"),
        "ids": lambda: opened().ids,
        "metadata": lambda: opened().metadata,
        "provenance": lambda: opened().provenance,
        "classes": lambda: (opened().classnames, opened().bad, opened().dim),
        "through zarr": lambda: opened(reader="zarr").numpy(),
        "tap": lambda: opened().tap(TAP).numpy(),
        "moments": lambda: [part.xtx for part in store_moments(opened(), 2)],
        "export to csv": lambda: exported("csv"),
        "export to parquet": lambda: exported("parquet"),
        "batches": batches,
        "ridge": lambda: fitted(opened()),
        "ridge on a tap": lambda: fitted(opened().tap(TAP)),
        "evaluate": judged,
        "found by name": lambda: find_store("fake/train@numpy", root / "cache").manifest.to_bytes(),
        "listed": lambda: [(entry.name, entry.split, entry.rows) for entry in list_stores(root / "cache")],
        "export by the verb": exported_by_verb,
    }
    neighbours = {file.relative_to(other).as_posix(): file.read_bytes() for file in other.rglob("*") if file.is_file()}
    return World(root, root / "cache", reads, neighbours)


def text_world(root: Path) -> World:
    """A text store."""
    path = embed_prompts(["ant", "bee", "cat"], ["a {}", "the {}"], NumpyEncoder(), root=root).store.path

    def read(name: str) -> object:
        return getattr(open_store(path), name)

    names = ("raw", "cls", "ctx", "counts", "classnames", "templates", "provenance", "logit_scale")
    reads: dict[str, Callable[[], object]] = {name: partial(read, name) for name in names}
    reads["zero-shot"] = lambda: heads.ZeroShot().fit(open_text_store(path)).coef_
    return World(root, Path(str(path)), reads)


def bank_world(root: Path) -> World:
    """A bank of random texts."""
    rows = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    path = write_bank(root, rows)

    def read(name: str) -> object:
        return getattr(open_store(path), name)

    names = ("features", "moment", "error", "provenance")
    return World(root, path, {name: partial(read, name) for name in names})


def write_bank(root: Path, rows: np.ndarray) -> Path:
    from featcache.encoding.store_job import store_key

    identity = {"encoder": {"text": "numbers"}, "dataset": {"random_texts": len(rows)}}
    key = store_key(identity)
    path, nan = root / "banks" / key, float("nan")
    specs = {"features": ArraySpec("features", "<f4", rows.shape, 8, nan)}
    whole = {"moment": ArraySpec("moment", "<f8", (rows.shape[1],) * 2, rows.shape[1], nan)}
    writer = StoreWriter(path, "banks", key, identity, specs, whole, {}, "text --random")
    for chunk in range(specs["features"].n_chunks):
        span = specs["features"].rows_of(chunk)
        writer.write_chunk(chunk, {"features": rows[span.start : span.stop]})
    info = {"name": "random", "classnames": [], "encoder_name": "numbers", "dim": rows.shape[1], "error": 0.1}
    info |= {"text_digests": ["t"], "logit_scale": None, "logit_bias": None}
    writer.finalise({"moment": rows.T.astype(np.float64) @ rows / len(rows)}, info, {"made": "by hand"})
    return path


def head_world(root: Path) -> World:
    """A fitted head of every kind in its file."""
    chance = np.random.default_rng(0)
    features, labels = chance.standard_normal((30, 8)).astype(np.float32), np.arange(30) % 3
    texts = embed_prompts(["ant", "bee", "cat"], ["a {}"], NumpyEncoder(), root=root / "cache").store
    store = open_store(encode(root / "cache"))
    folder = root / "heads"
    folder.mkdir(parents=True)
    made = {
        "ridge": heads.Ridge().fit(features, labels),
        "named": heads.NearestMean().fit(features, np.array(["x", "y", "z"])[labels]),
        "zero-shot": heads.ZeroShot().fit(texts),
        "knn": heads.KNN(3).fit(store),
        "tip-adapter": heads.TipAdapter().fit(store, texts=texts),
    }
    for name, head in made.items():
        heads.save(head, folder / f"{name}.safetensors")
    heads.RidgeRegression().fit(features, features[:, :2]).save(folder / "regression.safetensors")

    def loaded(name: str) -> Any:
        head = heads.load(folder / f"{name}.safetensors")
        probe = np.random.default_rng(1).standard_normal((5, head.dim)).astype(np.float32)
        return head.predict_proba(probe), head.predict(probe), head.classnames, dict(head.provenance)

    def regression() -> Any:
        model = heads.RidgeRegression.load(folder / "regression.safetensors")
        return model.predict(features), model.alpha_, model.cv_errors_, dict(model.provenance_)

    reads: dict[str, Callable[[], object]] = {f"load {name}": partial(loaded, name) for name in made}
    return World(
        root,
        folder,
        {**reads, "load regression": regression},
        of={f"load {name}": f"{name}.safetensors" for name in (*made, "regression")},
        swaps=False,
    )


def verb(words: str, *files: str) -> Callable[[], object]:
    """A command as a reader: what it prints and writes, without times."""

    def read() -> object:
        for name in files:
            Path(name).unlink(missing_ok=True)
        said, printed = io.StringIO(), io.StringIO()
        with redirect_stderr(said), redirect_stdout(printed), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            code = main(words.split())
        told = (
            "\n".join([said.getvalue(), *(str(warning.message) for warning in warned)]) + printed.getvalue()
        )  # `verify` and the like say on standard output what is wrong
        if (code in (2, 3, 4, 5) and "Traceback" not in told) or "is skipped" in told:
            raise FeatcacheError(told)
        written = re.compile(r"\b[0-9.]+ m?s\b|rows? (appended|in)")
        lines = [line for line in printed.getvalue().splitlines() if not written.search(line)]
        return code, lines, [_stable(Path(name)) for name in files]

    return read


def _stable(file: Path) -> object:
    """Content of a file; for results, rows without durations."""
    if file.suffix != ".jsonl":
        return file.read_bytes()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "fit_seconds"} for row in rows]


def verb_world(root: Path) -> World:
    """Stores of small pictures and texts with moments and digests, read by all verbs that read stores."""
    os.chdir(root)
    source = write_pictures(root / "pictures", 12)
    at = f"--root {root / 'cache'}"
    (root / "classes.txt").write_text("cat\ndog\n")
    for words in (f"encode {source} --split all --quiet {at}", f"text classes.txt --quiet {at}"):
        assert main(words.split()) == 0
    assert main(f"fit ridge pictures/all -o ridge.safetensors {at}".split()) == 0
    assert main(f"fit zero_shot texts/classes -o texts.safetensors {at}".split()) == 0
    on = f"--on pictures/all {at}"
    reads = {
        "fit": verb(f"fit ridge pictures/all -o head.safetensors {at}", "head.safetensors"),
        "fit knn": verb(f"fit knn pictures/all -o head.safetensors {at}", "head.safetensors"),
        "fit zero-shot": verb(f"fit zero_shot texts/classes -o head.safetensors {at}", "head.safetensors"),
        "evaluate": verb(
            f"evaluate ridge.safetensors {on} --results r.jsonl --per-sample s.npz --confusion c.parquet",
            *("r.jsonl", "s.npz", "c.parquet"),
        ),
        "interpolate": verb(
            f"evaluate texts.safetensors ridge.safetensors --alphas 0 0.5 1 {on} --results r.jsonl", "r.jsonl"
        ),
        "compare": verb(f"compare texts.safetensors ridge.safetensors pictures/all --draws 20 {at}"),
        "sweep": verb(f"sweep ridge --train pictures/all {on} --quiet --results r.jsonl", "r.jsonl"),
        "info": verb(f"info pictures/all {at}"),
        "info of texts": verb(f"info texts/classes {at}"),
        "encode": mended(f"encode {source} --split all --quiet {at}", root, "pictures/all"),
        "text": mended(f"text classes.txt --quiet {at}", root, "texts/classes"),
        "finetune": tuned(source, at),
    }
    return World(root, root / "cache", reads, mends=("encode", "text", "finetune"))


def tuned(source: str, at: str) -> Callable[[], object]:
    """Fine-tuning that starts from a head which is fitted on a store."""
    words = f"finetune {source} --split all --out tuned --head ridge --steps 1 --batch-size 4 --workers 1 --quiet {at}"
    read = verb(words, "tuned/last_head.safetensors")

    def anew() -> object:
        shutil.rmtree("tuned", ignore_errors=True)
        return read()

    return anew


def mended(words: str, root: Path, reference: str) -> Callable[[], object]:
    """A command that finds or makes a store, and then the content of the store."""

    def read() -> object:
        verb(words)()
        store = find_store(reference, root / "cache")
        return store.raw if isinstance(store, TextStore) else store.numpy()

    return read


def run_world(root: Path) -> World:
    """Results of fine-tuning: models, heads and state, with their verbs and readers."""
    os.chdir(root)
    source = write_pictures(root / "pictures", 8)
    at = f"--root {root / 'stores'}"
    words = f"finetune {source} --split all --out run --steps 1 --batch-size 4 --workers 1 --quiet --device cpu {at}"
    assert main(words.split()) == 0
    run = root / "run"
    state = read_state(run / "resume.safetensors")
    with safe_open(run / "resume.safetensors", framework="pt") as file:
        identity = json.loads(file.metadata()["run"])["identity"]
    picture = [np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)]

    def features() -> object:
        encoder = load_encoder(f"local-dir:{run / 'last'}", device="cpu")
        return encoder.encode_images([encoder.prepare(picture[0])]), encoder.encode_texts(["a cat"])

    def resumed() -> object:
        found = read_resume(run / "resume.safetensors", identity)
        if found is None:
            raise FeatcacheError("resume.safetensors is gone: the run starts anew")
        record, tensors = found
        return record, {name: tensors[name] for name in state}

    merged = ("merged/alpha=0.500/open_clip_model.safetensors",)
    reads: dict[str, Callable[[], object]] = {
        "load the model": features,
        "load the state": resumed,
        "load the head": lambda: heads.load(run / "last_head.safetensors").linear().weights,
        "wise": verb("wise tiny run/last --alpha 0.5 --out merged --overwrite", *merged),
        "convert": verb("convert run/last converted.safetensors --overwrite", "converted.safetensors"),
        "merge": verb("merge soup tiny run/last --out soup --overwrite", "soup/open_clip_model.safetensors"),
        "predict": (
            predict := verb("predict run/last_head.safetensors pictures/cat/00.png --model local-dir:run/last")
        ),
        "predict by the head": predict,
    }
    of = {
        "merge": "last/*",
        "predict": "last/*",
        "predict by the head": "last_head*",
        "load the model": "last/*",
        "load the state": "resume*",
        "load the head": "last_head*",
    }
    return World(root, run, reads, of=of | {"wise": "last/*", "convert": "last/*"}, edits=False)


def result_world(root: Path) -> World:
    """Results of an evaluation, and other inputs of reports."""
    os.chdir(root)
    path, folder = encode(root / "cache"), root / "results"
    folder.mkdir()
    made = [heads.LinearHead(np.eye(3, 16, dtype=np.float32) * s, np.zeros(3, np.float32), CLASSES) for s in (1, 2, 3)]
    heads.append_rows(folder / "results.jsonl", heads.evaluate(made, [open_image_store(path)]))

    return World(
        root, folder, {"report": verb("report results/results.jsonl -o shown", "shown/report.csv")}, edits=False
    )


WORLDS: dict[str, Callable[[Path], World]] = {
    "images": image_world,
    "texts": text_world,
    "banks": bank_world,
    "heads": head_world,
    "verbs": verb_world,
    "runs": run_world,
    "results": result_world,
}
