"""Finding stores by folder, key and short name; the root; progress lines."""

import io
import time
import warnings
from pathlib import Path

import pytest
from fakes import NumpyDataset, NumpyEncoder

from featcache import EncodeOptions, encode_dataset, find_store, list_stores, open_store
from featcache.cli.main import main
from featcache.encoding.texts import embed_prompts
from featcache.errors import FeatcacheError, FeatcacheWarning, ImageReadError, StoreNotFoundError, StoreWriteError
from featcache.progress import Printed
from featcache.store import TextStore, find_path, resolve_root, verify
from featcache.store.manifest import provenance_bytes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    encode_dataset(NumpyDataset(), NumpyEncoder(0), root=tmp_path)
    embed_prompts(["ant", "bee"], ["a {}"], NumpyEncoder(), name="animals", root=tmp_path)
    return tmp_path


def test_a_store_is_found_by_folder_key_and_name(root: Path) -> None:
    [entry, texts] = list_stores(root)
    encoder, dataset = entry.key.split("/")
    for reference in (entry.path, entry.key, f"{encoder[:6]}/{dataset[:4]}", "fake/train", "fake/train@numpy"):
        assert find_store(reference, root).path == entry.path
    assert isinstance(find_store("texts/animals", root), TextStore)
    assert (entry.reference, texts.reference) == ("fake/train@numpy", "texts/animals@numpy")
    assert (entry.rows, entry.finished, entry.split, texts.split) == (40, True, "train", None)


def named(encoder: NumpyEncoder, name: str) -> NumpyEncoder:
    encoder.name = name
    return encoder


def test_stores_of_several_models_have_different_references(root: Path) -> None:
    encode_dataset(NumpyDataset(), named(NumpyEncoder(1), "best"), root=root)
    with pytest.raises(StoreNotFoundError) as caught:
        find_store("fake/train", root)
    assert str(caught.value) == "fake/train: 2 stores match; write one of: fake/train@best, fake/train@numpy"
    assert find_store("fake/train@best", root).encoder_name == "best"


def test_equal_weights_are_found_under_every_name(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, digest = find_store("fake/train", root), (find_store("fake/train", root).path / "manifest.json").read_bytes()
    for name in ("alpha=1.000", "best", "x/y"):
        assert encode_dataset(NumpyDataset(), named(NumpyEncoder(0), name), root=root).hit
        assert embed_prompts(["ant", "bee"], ["a {}"], named(NumpyEncoder(), name), root=root).hit
        assert find_store(f"fake/train@{name}", root).path == store.path
        assert find_store(f"texts/animals@{name}", root).path == find_store("texts/animals@numpy", root).path
    assert (store.path / "manifest.json").read_bytes() == digest
    assert [entry.other_models for entry in list_stores(root)] == [("alpha=1.000", "best", "x/y")] * 2
    assert verify(store.path, deep=True).ok
    assert main(["info", "fake/train@best", "--root", str(root)]) == main(["list", "--root", str(root)]) == 0
    said = capsys.readouterr().out
    assert "also found   @alpha=1.000, @best, @x/y" in said
    assert "= @best" in said


def test_the_newest_of_several_stores_of_one_model_is_found_and_the_others_are_named(root: Path) -> None:
    first = find_store("fake/train", root)
    grown = encode_dataset(NumpyDataset(50), NumpyEncoder(0), root=root).store
    provenance = first.provenance | {"written": "2020-01-01T00:00:00Z"}
    Path(first.path / "provenance.json").write_bytes(provenance_bytes(provenance, first.manifest.key))
    key = first.manifest.dataset_key[:8]
    for reference in ("fake/train", "fake/train@numpy"):
        with pytest.warns(FeatcacheWarning, match=rf"2 stores .* to use another, write fake/train@numpy#{key}$"):
            assert find_store(reference, root).path == grown.path
        assert find_store(f"{reference}#{key}", root).path == first.path
        with pytest.raises(StoreNotFoundError, match=rf"2 stores match; write one of: .*#{key}"):
            find_path(reference, root, only=True)
    with pytest.raises(StoreNotFoundError, match="no store of that name"):
        find_store("fake/train@numpy#0000", root)


def test_of_several_texts_of_one_name_those_asked_for_last_are_found(root: Path) -> None:
    def ask(templates: list[str]) -> Path:
        return Path(embed_prompts(["ant", "bee"], templates, NumpyEncoder(), name="animals", root=root).store.path)

    both = (["a {}"], ["a {}", "one {}"])
    made = [ask(templates) for templates in both]
    for path in made:
        provenance = open_store(path).provenance | {"written": "2020-01-01T00:00:00Z"}
        (path / "provenance.json").write_bytes(provenance_bytes(provenance, open_store(path).manifest.key))
    for which in (0, 1, 0):  # all of them cache hits
        time.sleep(0.02)  # file times have steps of some milliseconds
        assert ask(both[which]) == made[which]
        with pytest.warns(FeatcacheWarning, match="2 stores have this name; the latest is used"):
            assert find_store("texts/animals", root).path == made[which]
    assert all(verify(path, deep=True).ok for path in made)


def test_a_model_in_a_folder_is_found_by_the_end_of_its_path(root: Path) -> None:
    for seed, folder in enumerate(("old/RUN1/best", "old/RUN2/best"), start=1):
        encoder = named(NumpyEncoder(seed), "best")  # as named before; the folder is in the record of how it was made
        encoder.source = {"model": f"local-dir:{folder}"}
        encode_dataset(NumpyDataset(), encoder, root=root)
    new = encode_dataset(NumpyDataset(), named(NumpyEncoder(3), "RUN3/best"), root=root).store
    found = {find_store(f"fake/train@RUN{k}/best", root).path for k in (1, 2, 3)}
    assert len(found) == 3
    assert new.path in found
    assert find_store("fake/train@old/RUN2/best", root).path == find_store("fake/train@RUN2/best", root).path
    with pytest.warns(FeatcacheWarning, match="3 stores have this name"):
        assert find_store("fake/train@best", root).path in found
    with pytest.raises(StoreNotFoundError, match="no store of that name"):
        find_store("fake/train@RUN4/best", root)


def test_a_name_without_a_model_never_means_an_interpolated_model(root: Path) -> None:
    store = find_store("fake/train", root)
    for seed, name in enumerate(("alpha=0.250", "WISE/alpha=0.500", ".soup"), start=1):
        encode_dataset(NumpyDataset(), named(NumpyEncoder(seed), name), root=root)
    encode_dataset(NumpyDataset(), named(NumpyEncoder(2), "WISE/best"), root=root)  # the one that was chosen
    assert ("WISE/best",) in [entry.other_models for entry in list_stores(root)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_store("fake/train", root).path == store.path
        assert find_store("fake/train@alpha=0.500", root).encoder_name == "WISE/alpha=0.500"


def test_preferred_stores_come_first(root: Path) -> None:
    other = encode_dataset(NumpyDataset(), named(NumpyEncoder(1), "other"), root=root).store
    for store in (find_store("fake/train@numpy", root), other):
        key = store.encoder_key
        assert find_store("fake/train", root, fits=lambda entry, key=key: entry.encoder_key == key).path == store.path
    with pytest.raises(StoreNotFoundError, match="write one of"):  # none fits: as without
        find_store("fake/train", root, fits=lambda entry: False)


def test_python_finds_stores_below_the_default_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATCACHE_ROOT", str(root))
    store = find_store("fake/train")
    assert [entry.path for entry in list_stores(str(root))] == [entry.path for entry in list_stores()]
    assert open_store("fake/train").path == open_store(str(store.path)).path == store.path
    with pytest.raises(StoreNotFoundError, match="similar: fake/train@numpy"):
        open_store("fake/trian")


def test_a_hit_on_a_read_only_store_records_no_name(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, content: bytes) -> bool:
        raise StoreWriteError(f"cannot write {path}")

    monkeypatch.setattr("featcache.store.catalogue.create", refuse)
    assert encode_dataset(NumpyDataset(), named(NumpyEncoder(0), "best"), root=root).hit
    assert list_stores(root)[0].other_models == ()


def test_no_match_suggests_similar_names(root: Path) -> None:
    with pytest.raises(StoreNotFoundError, match=r"similar: fake/train@numpy; `featcache list` shows all 2$"):
        find_store("fake/test", root)
    with pytest.raises(StoreNotFoundError, match=r"similar: texts/animals@numpy; "):
        find_store("texts/animal", root)
    with pytest.raises(StoreNotFoundError, match=rf"no store of that name below {root}; `featcache list` shows all 2$"):
        find_store("other/test", root)
    with pytest.raises(StoreNotFoundError, match=r"there is none at all$"):
        find_store("fake/test", root / "empty")


def test_no_store_is_suggested_for_deletion(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gc", "fake/tran", "--root", str(root)]) == 3
    assert "similar: fake/train@numpy" in capsys.readouterr().err
    assert main(["gc", "fake/tran", "--delete", "--root", str(root)]) == 3
    assert "similar" not in capsys.readouterr().err


def test_a_data_folder_of_the_same_name_does_not_hide_a_store(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    (root / "fake" / "train").mkdir(parents=True)
    assert find_store("fake/train", root).path == list_stores(root)[0].path
    (root / "fake" / "test").mkdir()
    with pytest.raises(StoreNotFoundError, match=r"fake/test: holds no store, .* similar: fake/train@numpy"):
        find_store("fake/test", root)


def test_unfinished_and_damaged_stores_are_listed_as_such(root: Path) -> None:
    with pytest.raises(ImageReadError):
        encode_dataset(NumpyDataset(50, broken=[3]), NumpyEncoder(), root=root, options=EncodeOptions(chunk_rows=8))
    finished = find_store("fake/train", root).path
    Path(finished / "manifest.json").write_text("{")
    names = sorted(entry.name for entry in list_stores(root) if not entry.finished)
    assert names == ["(damaged)", "(unfinished)"]


def test_the_root_is_the_flag_then_the_environment_then_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEATCACHE_ROOT", str(tmp_path / "mine"))
    assert resolve_root(tmp_path / "flag") == tmp_path / "flag"
    assert resolve_root() == tmp_path / "mine"
    monkeypatch.delenv("FEATCACHE_ROOT")
    assert resolve_root() == tmp_path / "cache"
    (tmp_path / "file").touch()
    with pytest.raises(FeatcacheError, match="expected a folder, got a file"):
        resolve_root(tmp_path / "file")


def test_progress_counts_rows_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = Printed(stream)
    progress.start("digits/train", total=100, done=40)
    for _ in range(3):
        now[0] += 10.0
        progress.advance(15)
    assert stream.getvalue().splitlines()[-1].strip() == "digits/train: 85/100 rows, 2 rows/s, 10.0 s left"
    now[0] += 10.0
    progress.advance(15)
    progress.finish()
    assert stream.getvalue().splitlines()[-1].strip() == "digits/train: 100/100 rows, 2 rows/s, 40.0 s"
