"""Parsers under random and damaged inputs: a value of the declared kind, or one of our errors in one line.

By default each parser gets a few dozen examples; under ``--hypothesis-profile=nightly`` it runs for `SECONDS`. What
they found is kept in `hostile`.
"""

import contextlib
import csv
import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from featcache.cli.arguments import typed
from featcache.datasets import DATASETS, open_dataset
from featcache.datasets.sources.arrays import load_array
from featcache.errors import FeatcacheError, FeatcacheWarning, MissingExtraError
from featcache.parameters import Count, check_record, json_value
from featcache.prompts import load_classnames, load_prompt_file, load_templates
from featcache.store import find_store
from featcache.store.key import canonical_json, checksum
from featcache.store.manifest import parse_manifest
from featcache.store.places.s3 import ObjectPath, check_address
from featcache.transfer.archive import pack, unpack
from featcache.transfer.export import export
from featcache.transfer.flax import read_flax
from featcache.transfer.foreign import READERS, read_foreign
from featcache.transfer.formats import FOLDERS
from featcache.transfer.import_features import Source, import_features
from ft.checkpoints.folder import read_config
from ft.recipes import load_recipe
from ft.training.options import FinetuneOptions
from heads import HEADS, Ridge, load
from heads.cli.arguments import json_setting
from heads.estimators.catalogue import make_head
from heads.evaluation.projections import load_projection
from heads.fitted.provenance import Provenance
from heads.report.read import read_rows
from heads.sweeps.plan import read_plan

SECONDS = float(os.environ.get("FEATCACHE_TEST_SECONDS", 3600)) / 22
"""Seconds per test in the nightly profile: an hour in all."""
QUIET: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
Test = Callable[..., None]


def fuzzed(examples: int = 40, **inputs: Any) -> Callable[[Test], Test]:
    """A test on random inputs: a number of examples, or in the nightly profile as many as `SECONDS` allow."""

    def decorated(test: Test) -> Test:
        def run(tmp_path: Path) -> None:
            def once(**values: Any) -> None:
                test(tmp_path, **values)

            if settings.get_current_profile_name() != "nightly":
                settings(max_examples=examples, derandomize=True, **QUIET)(given(**inputs)(once))()
                return
            end, number = time.monotonic() + SECONDS, time.time_ns() % 10**6
            while time.monotonic() < end:
                number += 1
                phases = (Phase.explicit, Phase.generate, Phase.shrink)
                chosen = settings(max_examples=1000, database=None, phases=phases, **QUIET)
                seed(number)(chosen(given(**inputs)(once)))()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorated


@contextlib.contextmanager
def refused(*kinds: type[Exception]) -> Iterator[None]:
    """Our errors are right if they have a message; the command line escapes it to one line."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (FeatcacheError, *kinds)):
            raise
        if not str(error).strip():
            raise AssertionError(f"an empty {type(error).__name__}") from error


def damaged(good: bytes) -> st.SearchStrategy[bytes]:
    """Valid content with bytes replaced, deleted and inserted."""

    def apply(changes: list[tuple[int, int, bytes]]) -> bytes:
        content = good
        for start, length, new in changes:
            place = start % (len(content) + 1)
            content = content[:place] + new + content[place + length :]
        return content

    change = st.tuples(st.integers(0, 1 << 20), st.integers(0, 40), st.binary(max_size=9))
    return st.lists(change, min_size=1, max_size=4).map(apply)


def replaced(good: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A valid record with values replaced, at any depth."""
    places: list[tuple[str, ...]] = []

    def collect(record: dict[str, Any], above: tuple[str, ...]) -> None:
        for key, value in record.items():
            places.append((*above, key))
            if isinstance(value, dict):
                collect(value, (*above, key))

    collect(good, ())

    def apply(changes: list[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
        record = json.loads(json.dumps(good))
        for path, value in changes:
            inner = record
            for key in path[:-1]:
                inner = inner[key] if isinstance(inner, dict) and isinstance(inner.get(key), dict) else {}
            inner[path[-1]] = value
        return dict(record)

    return st.lists(st.tuples(st.sampled_from(places), JSON), min_size=1, max_size=3).map(apply)


def written(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


ANY_TEXT = st.text(max_size=60) | JSON.map(json.dumps)


@fuzzed(200, text=st.text(max_size=40) | st.binary(max_size=40))
def test_json_is_a_value_or_refused(folder: Path, text: Any) -> None:
    with refused(ValueError):
        json.dumps(json_value(text))


@fuzzed(200, record=JSON)
def test_records_are_checked_or_refused(folder: Path, record: Any) -> None:
    kinds = {"a": int, "b": float | None, "c": list[str], "d": dict[str, Any]}
    with refused(ValueError):
        assert isinstance(check_record(record, kinds, "here", ("a",))["a"], int)


FIELDS = st.sampled_from(list(FinetuneOptions.__dataclass_fields__))


@fuzzed(100, record=st.dictionaries(FIELDS, JSON, max_size=3))
def test_options_are_options_or_refused(folder: Path, record: dict[str, Any]) -> None:
    with refused():
        assert FinetuneOptions.from_dict(record).to_dict()


TOML = st.lists(
    st.tuples(
        st.sampled_from(["steps", "lr", "regularizers", "models", "shots", "data", "head", "[data]", "[[head]]", "x"])
        | st.text(max_size=5),
        ANY_TEXT | st.sampled_from(["1", "[1]", '"x"', "{a = 1}", "1979-05-27", "nan", "[[1]]", "'''", "{}"]),
    ),
    max_size=5,
).map(lambda pairs: "\n".join(f"{key} = {value}" if key[:1] != "[" else key for key, value in pairs))


@fuzzed(60, text=TOML)
def test_recipes_and_plans_are_read_or_refused(folder: Path, text: str) -> None:
    path = written(folder, "x.toml", text)
    for parse in (lambda: FinetuneOptions.from_dict(load_recipe(path)), lambda: read_plan(path)):
        with refused():
            parse()


@fuzzed(100, record=st.dictionaries(st.sampled_from(["fitted_on", "chosen_on", "encoder", "params", "head"]), JSON))
def test_provenance_is_a_record_or_refused(folder: Path, record: dict[str, Any]) -> None:
    with refused(ValueError):
        found = Provenance.checked(record, "here")
        assert all(isinstance(entry, dict) for entry in [*found.fitted_on, *found.chosen_on])


@fuzzed(100, text=st.text(max_size=30))
def test_addresses_are_addresses_or_refused(folder: Path, text: str) -> None:
    for parse in (check_address, lambda address: ObjectPath.parse(f"s3://{address}")):
        with refused():
            parse(text)


@fuzzed(60, text=ANY_TEXT | st.binary(max_size=80))
def test_text_files_are_read_or_refused(folder: Path, text: str | bytes) -> None:
    for suffix, parse in {
        "classes.txt": load_classnames,
        "templates.txt": load_templates,
        "templates.json": load_templates,
        "prompts.json": load_prompt_file,
        "prompts.jsonl": load_prompt_file,
        "projection.json": load_projection,
        "rows.jsonl": lambda path: read_rows([path]),
    }.items():
        with refused(FeatcacheWarning):  # of results whose last line is unfinished
            parse(written(folder, suffix, text))


OFFLINE = [name for name in DATASETS if name not in ("hf",)]
WORD = st.text("abxyz019=,:;#@%{}*[]~ \n\0\t'\"é\ud800", max_size=12).map(lambda text: text.replace("~", "-"))


@fuzzed(80, source=st.sampled_from(OFFLINE) | WORD, argument=WORD, split=WORD)
def test_sources_are_opened_or_refused(folder: Path, source: str, argument: str, split: str) -> None:
    spec = source if not argument else f"{source}:{argument}"
    with refused(UnicodeEncodeError):
        open_dataset(spec, split)


@fuzzed(80, words=st.tuples(WORD, WORD, WORD, WORD))
def test_references_are_found_or_refused(folder: Path, words: tuple[str, str, str, str]) -> None:
    (folder / "cache").mkdir(exist_ok=True)
    name, split, model, key = words
    for reference in (name, f"{name}/{split}", f"{name}/{split}@{model}", f"{name}/{split}@{model}#{key}", f"#{key}"):
        with refused(UnicodeEncodeError):
            find_store(reference, folder / "cache")


@fuzzed(80, head=st.sampled_from(list(HEADS)), name=st.text(max_size=5), value=ANY_TEXT, known=st.integers(0, 20))
def test_settings_are_settings_or_refused(folder: Path, head: str, name: str, value: str, known: int) -> None:
    from heads.estimators.catalogue import parameters_of

    names = [*parameters_of(head), name]
    with refused():
        key, found = json_setting(head, f"{names[known % len(names)]}={value}")
        make_head(head, {key: found})


@fuzzed(60, text=st.text(max_size=25) | st.integers().map(str))
def test_counts_are_counts_or_refused(folder: Path, text: str) -> None:
    from argparse import ArgumentTypeError

    with refused(ArgumentTypeError):
        assert typed(Count)(text) >= 1


def head_file() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    head = Ridge([1.0]).fit(np.eye(4), [0, 1, 0, 1]).frozen()
    tensors, own = head.to_file()
    record = {"kind": head.kind, "name": head.name, "classnames": ["0", "1"], "provenance": head.provenance, **own}
    return tensors, json.loads(json.dumps(record))


TENSORS, RECORD = head_file()


@fuzzed(60, record=replaced(RECORD))
def test_head_files_are_read_or_refused(folder: Path, record: dict[str, Any]) -> None:
    path = written(folder, "head.safetensors", save(TENSORS, {"head": json.dumps(record)}))
    with refused():
        head = load(path)
        head.predict_proba(np.eye(4))
        repr(head)


@fuzzed(60, content=damaged(save(TENSORS, {"head": json.dumps(RECORD)})))
def test_damaged_head_files_are_read_or_refused(folder: Path, content: bytes) -> None:
    with refused():
        load(written(folder, "head.safetensors", content))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record of a finished store."""
    import featcache

    result = featcache.encode("digits", "val", root=tmp_path_factory.mktemp("cache"))
    return dict(json.loads((Path(str(result.path)) / "manifest.json").read_text()))


def test_manifests_are_read_or_refused(tmp_path: Path, manifest: dict[str, Any]) -> None:
    """With a correct digest, as if written by another program rather than damaged on disk."""

    @fuzzed(60, record=replaced({name: value for name, value in manifest.items() if name != "digest"}))
    def test(folder: Path, record: dict[str, Any]) -> None:
        with refused(ValueError):
            content = {**record, "digest": checksum(canonical_json(record))}
            with refused():
                parse_manifest(json.dumps(content).encode(), folder)

    test(tmp_path)


def test_configurations_of_models_are_read_or_refused(tmp_path: Path) -> None:
    from featcache.encoders import load_encoder

    tiny = Path(__file__).parents[2] / "featcache" / "encoders" / "tiny"
    good = json.loads((tiny / "open_clip_config.json").read_text())
    for file in tiny.iterdir():
        if file.is_file() and file.suffix in (".safetensors", ".gz"):
            (tmp_path / file.name).symlink_to(file)

    @fuzzed(8, record=replaced({"preprocess_cfg": good["preprocess_cfg"], "model_cfg": {"embed_dim": 128}}))
    def test(folder: Path, record: dict[str, Any]) -> None:
        record["model_cfg"] = (
            {**good["model_cfg"], **record["model_cfg"]} if isinstance(record["model_cfg"], dict) else 1
        )
        (folder / "open_clip_config.json").write_text(json.dumps(record))
        with refused():
            read_config(folder)
            load_encoder(f"local-dir:{folder}")

    test(tmp_path)


def archive() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in {"a.png": b"x", "a.cls": b"0", "b.jpg": b"y", "b.json": b'{"label": 1}'}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return file.getvalue()


@fuzzed(60, content=damaged(archive()[:4096]), name=st.text(max_size=8), member=st.binary(max_size=20))
def test_shards_are_opened_or_refused(folder: Path, content: bytes, name: str, member: bytes) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for suffix in (".png", ".cls"):
            entry = tarfile.TarInfo(f"{name}{suffix}")
            entry.size = len(member)
            with contextlib.suppress(UnicodeEncodeError):
                tar.addfile(entry, io.BytesIO(member))
    for shard in (content, file.getvalue()):
        with refused():
            open_dataset(f"webdataset:{written(folder, 'x.tar', shard)}", "train")


def foreign_files() -> dict[str, bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    features, labels = np.eye(4, 3, dtype=np.float32), np.arange(4)
    files = {suffix: io.BytesIO() for suffix in (".npz", ".npy", ".pt", ".parquet")}
    np.savez(files[".npz"], features=features, labels=labels)
    np.save(files[".npy"], features)
    torch.save({"features": torch.eye(4, 3), "labels": torch.arange(4)}, files[".pt"])
    pq.write_table(pa.table({"x0": features[:, 0], "x1": features[:, 1], "label": labels}), files[".parquet"])
    found = {suffix: file.getvalue() for suffix, file in files.items()}
    found[".csv"] = b"id,label,x0,x1\na,0,1.0,2.0\nb,1,0.5,-1\n"
    found[".safetensors"] = save({"features": features, "labels": labels})
    return found


FOREIGN = foreign_files()


@fuzzed(60, choice=st.sampled_from(sorted(FOREIGN)).flatmap(lambda s: st.tuples(st.just(s), damaged(FOREIGN[s]))))
def test_files_of_features_are_read_or_refused(folder: Path, choice: tuple[str, bytes]) -> None:
    suffix, content = choice
    path = written(folder, f"x{suffix}", content)
    with refused():
        read_foreign(path)
    if suffix == ".npy":
        with refused():
            load_array(path)
    if suffix in (".csv", ".parquet"):
        with refused():
            open_dataset(f"table:{path}", "train")


@fuzzed(40, content=st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_files_of_any_bytes_are_read_or_refused(folder: Path, content: bytes) -> None:
    parsers: dict[str, Callable[[Path], object]] = {
        ".safetensors": load,
        ".toml": read_plan,
        ".recipe": load_recipe,
        ".json": load_prompt_file,
        ".txt": load_templates,
        ".msgpack": read_flax,
        **dict.fromkeys(READERS, read_foreign),
    }
    for suffix, parse in parsers.items():
        with refused():
            parse(written(folder, f"x{suffix}", content))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a packed store, and the store in the folder formats whose packages are installed."""
    import featcache

    folder = tmp_path_factory.mktemp("exported")
    store = featcache.encode("digits", "val", root=folder / "cache")
    pack(store.path, folder / "packed.tar")
    for kind in FOLDERS:
        with contextlib.suppress(MissingExtraError):
            export(store, folder / kind, kind, np.dtype(np.float16))
    return folder


def test_packed_stores_are_unpacked_or_refused(tmp_path: Path, exported: Path) -> None:
    content = (exported / "packed.tar").read_bytes()
    headers = st.integers(0, content.count(b"ustar") - 1).map(lambda number: nth(content, b"ustar", number) - 257)
    field = st.sampled_from([(0, 100), (124, 12), (136, 12), (148, 8), (156, 1), (157, 100), (345, 155)])

    def replaced(start: int, place: tuple[int, int], new: bytes, *, summed: bool) -> bytes:
        header = bytearray(content[start : start + 512])
        header[place[0] : sum(place)] = new[: place[1]].ljust(place[1], b"\0")
        if summed:
            header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
        return content[:start] + header + content[start + 512 :]

    odd = st.binary(max_size=12) | st.sampled_from(
        [b"77777777777", b"\x80" + b"\xff" * 11, b"../x", b"/x", b"x", b"L", b"S"]
    )

    @fuzzed(30, packed=damaged(content) | st.builds(replaced, headers, field, odd, summed=st.booleans()))
    def test(folder: Path, packed: bytes) -> None:
        with refused(OSError):
            store, there = unpack(written(folder, "x.tar", packed), folder / "root")
            assert there or store.numpy()[0].shape[1] == 128
        shutil.rmtree(folder / "root", ignore_errors=True)

    test(tmp_path)


def nth(content: bytes, what: bytes, number: int) -> int:
    place = -1
    for _ in range(number + 1):
        place = content.index(what, place + 1)
    return place


def test_folders_of_features_are_read_or_refused(tmp_path: Path, exported: Path) -> None:
    good = {
        (kind, path.relative_to(exported / kind)): path.read_bytes()
        for kind in FOLDERS
        for path in sorted((exported / kind).rglob("*"))
        if path.is_file()
    }
    assert {kind for kind, _ in good} >= {"npy", "clip-benchmark", "clip-retrieval"}
    changed = st.sampled_from(sorted(good)).flatmap(
        lambda which: st.tuples(
            st.just(which), damaged(good[which]) | JSON.map(lambda value: json.dumps(value).encode())
        )
    )

    @fuzzed(30, choice=changed)
    def test(folder: Path, choice: tuple[tuple[str, Path], bytes]) -> None:
        (kind, inside), content = choice
        shutil.rmtree(folder / "x", ignore_errors=True)
        shutil.copytree(exported / kind, folder / "x")
        (folder / "x" / inside).write_bytes(content)
        with refused():
            import_features(read_foreign(folder / "x", "val"), Source("m"), name="n", root=folder / "root")
        shutil.rmtree(folder / "root", ignore_errors=True)

    test(tmp_path)


CELLS = JSON | WORD | st.lists(st.sampled_from(["a", "b", 0, 1, 70_000]), max_size=3)


@pytest.mark.filterwarnings("ignore:.*have no image")
@fuzzed(15, rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=4), options=WORD)
def test_multilabel_tables_are_read_or_refused(folder: Path, rows: list[tuple[Any, Any]], options: str) -> None:
    for number in range(len(rows)):
        (folder / f"{number}.png").touch()
    cells = [{"path": f"{number}.png", "a": a, "b": b} for number, (a, b) in enumerate(rows)]
    lines = "\n".join(map(json.dumps, cells))
    quoted, text = io.StringIO(newline=""), "\n".join(["path,a,b", *(",".join(map(str, c.values())) for c in cells)])
    csv.writer(quoted).writerows([["path", "a", "b"], *(c.values() for c in cells)])
    files = {"x.jsonl": lines, "x.csv": quoted.getvalue(), "unquoted.csv": text}
    for name, content in files.items():
        table = written(folder, name, content)
        for option in ("labels=a", "labels=a+b", "labels=a,unknown=b", f"labels=a,separator={options}", options):
            with refused(UnicodeEncodeError):
                found = open_dataset(f"table:{table},{option}", "all").index
                assert found.targets is None or found.targets.shape == (len(found.ids), len(found.classnames))
                assert len(found.ids) == len(rows) or name == "unquoted.csv"  # a cell there may hold a whole row


def flax_file() -> bytes:
    import msgpack

    array = msgpack.packb([(2, 2), "float32", np.eye(2, dtype=np.float32).tobytes()], use_bin_type=True)
    return bytes(msgpack.packb({"params": {"a": msgpack.ExtType(1, array), "b": 1}}, use_bin_type=True))


@fuzzed(80, content=damaged(flax_file()))
def test_msgpack_is_read_or_refused(folder: Path, content: bytes) -> None:
    with refused():
        read_flax(written(folder, "x.msgpack", content))
