"""Messages of the command line that point out likely mistakes."""

import argparse
import json
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import NumpyDataset, NumpyEncoder
from huggingface_hub import constants
from PIL import Image

import featcache
from featcache import encode_dataset, list_stores
from featcache.cli.encode import class_counts
from featcache.cli.main import VERBS, _plain_warnings, main
from featcache.encoders.openclip import loading
from featcache.encoders.torch_images import PRECISIONS
from featcache.encoding.options import EncodeOptions
from featcache.errors import DatasetError, EncoderError, FeatcacheWarning
from featcache.parameters import described
from featcache.parameters import parameters_of as declared_by
from featcache.progress import Bar
from ft.generation import GenerateOptions
from ft.generation.diffusion import DTYPES
from ft.merging import MERGES
from ft.merging.merge import settings_of
from heads.estimators.catalogue import HEADS, parameters_of


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_argument_has_a_help_text(verb: str) -> None:
    parser = argparse.ArgumentParser()
    import_module(VERBS[verb][0]).add_arguments(parser)
    assert [action.dest for action in parser._actions if not action.help] == []


def flags(verb: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    import_module(VERBS[verb][0]).add_arguments(parser)
    return {action.dest: action for action in parser._actions}


def test_flags_have_the_defaults_and_limits_of_the_declared_options() -> None:
    for verb, options in (("encode", EncodeOptions), ("generate", GenerateOptions)):
        found = flags(verb)
        for name, option in declared_by(options).items():
            if name in found:
                assert found[name].default == option.default, (verb, name)
    for name, bad in (("views", "10001"), ("max_bad", "-1"), ("holdout", "1"), ("chunk_rows", "1.5"), ("workers", "x")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{bad}', expected a "):
            flags("encode")[name].type(bad)


def test_every_precision_flag_has_the_same_choices() -> None:
    choices = [tuple(found["precision"].choices) for verb in VERBS if "precision" in (found := flags(verb))]
    assert len(choices) > 5
    assert {*choices, tuple(PRECISIONS), tuple(DTYPES)} == {("fp32", "bf16", "fp16")}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["encoed", "digits"], "unknown verb 'encoed'; did you mean 'encode'?"),
        (["list", "--rot", "x"], "unrecognized arguments: --rot x; did you mean '--root'?"),
        (["encode", "digits-noisy", "--split", "test"], "did you mean 'digits:noisy'?"),
        (["list", "--root", "cahce"], "no such folder; did you mean"),
        (["encode", "digits", "--model", "ViT-B32", "--pretrained", "openai"], "did you mean ViT-B-32?"),
    ],
)
def test_the_nearest_name_is_suggested(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").mkdir()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_help_of_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "rm"]) == 0
    assert "usage: featcache rm" in capsys.readouterr().out


@pytest.mark.parametrize("words", [*(["fit", head] for head in HEADS), *(["merge", method] for method in MERGES)])
def test_help_of_a_plug_in_lists_its_parameters_and_what_they_allow(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--help"]) == 0
    usage, _, listed = capsys.readouterr().out.partition(f"\nparameters of {words[1]}, for --set:\n")
    assert f"usage: featcache {words[0]}" in usage
    declared = (parameters_of if words[0] == "fit" else settings_of)(words[1])
    assert listed.splitlines() == described(declared).splitlines()
    assert all(f"  {name} " in listed and found.expected in listed for name, found in declared.items())
    assert main(["help", *words]) == 0
    assert listed in capsys.readouterr().out


def test_encode_shows_the_rows_of_each_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, n in (("cat", 3), ("dog", 2), ("dgo", 1)):
        (tmp_path / "pets" / folder).mkdir(parents=True)
        for k in range(n):
            pixels = np.random.default_rng([n, k]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / folder / f"{k}.png")
    where = ["--split", "all", "--root", str(tmp_path / "c")]
    assert main(["encode", f"imagefolder:{tmp_path / 'pets'}", *where]) == 0
    assert "3 classes: cat 3, dgo 1, dog 2" in capsys.readouterr().out
    assert main(["encode", f"imagefolder:{tmp_path / 'pets'}", *where, "--quiet"]) == 0
    assert "classes" not in capsys.readouterr().out
    labels, names = np.repeat(np.arange(20), np.arange(1, 21)), [f"c{c}" for c in range(20)]
    assert class_counts(labels, names).endswith("of 1 to 20 rows; the smallest: c0 1, c1 2, c2 3")


def test_names_mean_the_same_in_python_and_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = featcache.encode("digits", "val", root=tmp_path, name="mine", progress=True)
    assert store.reference == "mine/val@tiny"
    assert "297/297 rows" in capsys.readouterr().err
    with pytest.warns(FeatcacheWarning, match=r"keeps it; to change it: featcache rename mine/val@tiny other/val"):
        assert featcache.encode("digits", "val", root=tmp_path, name="other").name == "mine"
    with pytest.raises(DatasetError, match="leave name out"):
        featcache.encode(NumpyDataset(), model=NumpyEncoder(), root=tmp_path, name="x")


def test_a_bar_counts_rows(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar()
    bar.start("digits/train", 100, 40)
    bar.advance(60)
    bar.finish()
    said = capsys.readouterr().err
    assert "digits/train" in said
    assert "100/100" in said


def test_images_need_no_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise OSError("no file named tokenizer.json in the folder")

    monkeypatch.setattr("featcache.encoders.openclip.loading.open_clip.get_tokenizer", missing)
    encoder = loading.load_tiny("tiny", device="cpu")
    assert len(featcache.encode("digits", "val", model=encoder, root=tmp_path)) == 297
    with pytest.raises(EncoderError, match=r"texts need its tokenizer.*no file named tokenizer\.json"):
        featcache.embed_text(["one", "two"], model=encoder, root=tmp_path)


def test_a_list_fits_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    store = encode_dataset(NumpyDataset(), NumpyEncoder(), root=tmp_path).store
    monkeypatch.setattr("featcache.cli.list.terminal_width", lambda: 70)
    assert main(["list", "--root", str(tmp_path)]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert len(line) <= 70
    assert line.split()[:6] == ["fake/train@numpy", "40", "x", "16", str(len(store.classnames)), "classes"]
    assert main(["list", "--root", str(tmp_path), "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["dim"], record["classes"]) == (16, len(store.classnames))
    assert record["key"] == list_stores(tmp_path)[0].key


def test_an_unreachable_hub_is_detected_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    began = time.perf_counter()
    for words in (["--model", "hf-hub:org/none"], ["--model", "ViT-B-32", "--pretrained", "laion2b_s34b_b79k"]):
        assert main(["encode", "digits", *words, "--root", str(tmp_path), "--quiet"]) == 2
        said = capsys.readouterr().err
        assert "127.0.0.1 cannot be reached, and the local cache" in said
    assert time.perf_counter() - began < 30  # each file was tried for over a minute
    assert not constants.HF_HUB_OFFLINE


def test_a_repeated_warning_is_printed_once() -> None:
    with _plain_warnings():
        said = [warnings.formatwarning(text, UserWarning, "x.py", 1) for text in ("twice", "twice", "other")]
    assert said == ["featcache: warning: twice\n", "", "featcache: warning: other\n"]
