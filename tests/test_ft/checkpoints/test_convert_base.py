"""What a conversion takes from its base and compares with it; nothing is written if they differ."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_models import CONFIG, make_model, write_folder
from foreign_checkpoints import known_architecture, write_ckpt

from featcache.cli.main import main
from featcache.encoders import load_encoder
from featcache.errors import EncoderError, MismatchError
from ft.checkpoints.convert import convert
from ft.checkpoints.folder import read_state
from ft.checkpoints.formats.huggingface import from_huggingface


@pytest.fixture(autouse=True)
def _architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    known_architecture(monkeypatch, "small", CONFIG)


@pytest.fixture
def tuned(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Weights of a model whose image tower is in best_acc.ckpt, and whose other tensors are in base.pt."""
    base, model = make_model(0), make_model(0)
    model.visual.load_state_dict(make_model(7).visual.state_dict())
    write_ckpt(tmp_path / "best_acc.ckpt", model.state_dict())
    torch.save(base.state_dict(), tmp_path / "base.pt")
    return model.state_dict()


def same(first: Any, second: Any) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("words", [["out"], ["out", "--to", "huggingface"], ["out.safetensors"]])
def test_architecture_without_weights_cannot_complete_a_checkpoint(
    tuned: dict[str, torch.Tensor], tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(tmp_path)
    out, *flags = words
    assert main(["convert", str(tmp_path / "best_acc.ckpt"), str(tmp_path / out), "--base", "small", *flags]) == 5
    error = capsys.readouterr().err
    lacking = sorted(key for key in tuned if not key.startswith("visual.") and key != "logit_scale")
    assert f"lacks {len(lacking)} tensors ({', '.join(lacking[:3])}, ...) of small" in error
    assert "--pretrained" in error
    assert names(tmp_path) == before


@pytest.mark.parametrize("layout", ["open_clip", "huggingface"])
def test_architecture_with_weights_completes_a_checkpoint(
    tuned: dict[str, torch.Tensor], tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(tmp_path / "best_acc.ckpt"), str(tmp_path / "out"), "--to", layout]
    assert main([*command, "--base", "small", "--pretrained", str(tmp_path / "base.pt"), "--json"]) == 0
    text = sum(not key.startswith("visual.") and key != "logit_scale" for key in tuned)
    record = json.loads(capsys.readouterr().out)
    assert (record["tensors"], record["from_base"]) == (len(tuned), text)
    if layout == "open_clip":
        assert same(read_state(tmp_path / "out"), tuned)
        base = load_encoder("small", str(tmp_path / "base.pt"), device="cpu")
        converted = load_encoder(f"local-dir:{tmp_path / 'out'}", device="cpu")
        assert np.array_equal(converted.encode_texts(["a cat"]), base.encode_texts(["a cat"]))
    else:
        assert same(from_huggingface(read_state(tmp_path / "out" / "model.safetensors")), tuned)


def test_tensors_from_the_base_are_reported(
    tuned: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "base", make_model(0))
    command = ["convert", str(tmp_path / "best_acc.ckpt"), str(tmp_path / "out"), "--base", str(tmp_path / "base")]
    assert main(command) == 0
    assert f"of them from {tmp_path / 'base'}" in capsys.readouterr().out
    assert same(read_state(tmp_path / "out"), tuned)


@pytest.mark.parametrize("base", ["small", "folder"])
@pytest.mark.parametrize("layout", ["open_clip", "huggingface"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 8}, r"different shapes.*text_projection \(16, 24\) against \(16, 8\)"),
        ({"vision_cfg": {**CONFIG["vision_cfg"], "layers": 3}}, r"12 tensors \(visual.*are not tensors of"),
    ],
)
def test_another_architecture_is_refused_before_anything_is_written(
    tmp_path: Path, base: str, layout: str, changes: dict[str, Any], message: str
) -> None:
    torch.save(make_model(1, **changes).state_dict(), tmp_path / "state.pt")
    write_folder(tmp_path / "folder", make_model(0))
    before = names(tmp_path)
    chosen = base if base == "small" else str(tmp_path / base)
    with pytest.raises(MismatchError, match=message):
        convert(tmp_path / "state.pt", tmp_path / "out", base=chosen, layout=layout)
    assert names(tmp_path) == before


def test_fewer_tensors_than_the_architecture_has_are_refused(tmp_path: Path) -> None:
    state = make_model(1).state_dict()
    del state["visual.proj"]
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(MismatchError, match=r"lacks 1 tensors \(visual\.proj\) of small"):
        convert(tmp_path / "state.pt", tmp_path / "out", base="small")
    assert names(tmp_path) == ["state.pt"]


def test_class_names_must_be_those_of_the_head(tuned: dict[str, torch.Tensor], tmp_path: Path) -> None:
    write_folder(tmp_path / "base", make_model(0))
    before = names(tmp_path)
    with pytest.raises(MismatchError, match="2 class names for a head of 5 classes"):
        convert(tmp_path / "best_acc.ckpt", tmp_path / "out", base=str(tmp_path / "base"), classnames=["a", "b"])
    assert names(tmp_path) == before


def test_weights_of_a_base_belong_to_an_architecture(tuned: dict[str, torch.Tensor], tmp_path: Path) -> None:
    write_folder(tmp_path / "base", make_model(0))
    with pytest.raises(EncoderError, match="name it with --base"):
        convert(tmp_path / "best_acc.ckpt", tmp_path / "out", pretrained="openai")
    with pytest.raises(EncoderError, match="has weights of its own"):
        convert(tmp_path / "best_acc.ckpt", tmp_path / "out", base=str(tmp_path / "base"), pretrained="openai")
