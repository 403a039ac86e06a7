"""The activation of converted checkpoints: refused if known to differ, reported if assumed."""

import hashlib
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_models import CONFIG, make_model, write_folder
from foreign_checkpoints import known_architecture, openai_archive, pickled_classifier, write_ckpt

from featcache.cli.main import main
from featcache.encoders import load_encoder
from featcache.encoders.openclip import OpenClipEncoder
from featcache.errors import ActivationMismatchError
from ft.checkpoints.convert import convert
from ft.checkpoints.folder import read_state
from ft.checkpoints.formats import activation
from ft.merging.interpolate import interpolate
from ft.merging.wise import wise

PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[49406, 5, 7, 49407] + [0] * 12, [49406, 900, 49407] + [0] * 13])


@pytest.fixture(autouse=True)
def _architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip knows a small model with and without QuickGELU."""
    known_architecture(monkeypatch, "small", CONFIG)
    known_architecture(monkeypatch, "small-quickgelu", CONFIG | {"quick_gelu": True})


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    openai_archive(tmp_path / "ViT-S-16.pt", make_model(1, quick_gelu=True))
    return tmp_path / "ViT-S-16.pt"


def loaded(folder: Path) -> OpenClipEncoder:
    encoder = load_encoder(f"local-dir:{folder}", device="cpu")
    assert isinstance(encoder, OpenClipEncoder)
    return encoder


def features(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model.eval().encode_image(PIXELS), model.encode_text(IDS)  # type: ignore[operator]


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("ft.")]


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
@pytest.mark.parametrize("layout", ["open_clip", "huggingface"])
def test_openais_archive_is_refused_by_a_base_without_quickgelu(
    archive: Path, out: str, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(archive), str(archive.parent / out), "--base", "small", "--to", layout]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "trained with QuickGELU, small computes GELU" in error
    assert error.endswith("use --base small-quickgelu\n")
    assert [path.name for path in archive.parent.iterdir()] == [archive.name]


def test_a_folder_without_quickgelu_is_refused_as_base_too(archive: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "gelu", make_model())
    with pytest.raises(ActivationMismatchError, match="use --base with a model that computes QuickGELU, such as ViT-B"):
        convert(archive, tmp_path / "out", base=str(tmp_path / "gelu"))
    with pytest.raises(ActivationMismatchError, match="ZERO_SHOT with a model that computes QuickGELU"):
        wise(tmp_path / "gelu", archive, [0.5], tmp_path / "merged")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "merged").exists()


def test_openais_files_are_known_by_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "plain.pt"
    openai_archive(file, make_model(1), extras=False)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    convert(file, tmp_path / "unknown", base="small")
    (line,) = warned(caplog)
    assert "TorchScript archive of unknown origin does not say its activation; GELU is assumed, which small" in line
    caplog.clear()
    monkeypatch.setattr(activation, "openai_file_digests", lambda: {digest: "ViT-S-16"})
    with pytest.raises(ActivationMismatchError, match="use --base small-quickgelu"):
        convert(file, tmp_path / "known", base="small")
    convert(file, tmp_path / "known", base="small-quickgelu")
    assert warned(caplog) == []


@pytest.mark.parametrize("quick", [False, True])
def test_model_folders_keep_their_activation(tmp_path: Path, quick: bool, caplog: pytest.LogCaptureFixture) -> None:
    changes = {"quick_gelu": True} if quick else {}
    write_folder(tmp_path / "source", make_model(1, **changes), **changes)
    right, wrong = ("small-quickgelu", "small") if quick else ("small", "small-quickgelu")
    with pytest.raises(ActivationMismatchError, match=f"use --base {right}$"):
        convert(tmp_path / "source", tmp_path / "out", base=wrong)
    convert(tmp_path / "source", tmp_path / "out", base=right)
    assert loaded(tmp_path / "out").image_identity["activation"] == ("quick_gelu" if quick else "gelu")
    assert warned(caplog) == []


@pytest.mark.parametrize("kind", ["ckpt", "state dict", "pickled tensors", "archive"])
@pytest.mark.parametrize("base", ["small", "small-quickgelu"])
def test_assumed_activation_is_reported_in_one_line(
    tmp_path: Path, kind: str, base: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, file = make_model(1), tmp_path / ("best_acc.ckpt" if kind == "ckpt" else "file.pt")
    if kind == "ckpt":
        write_ckpt(file, model.state_dict())
    elif kind == "archive":
        openai_archive(file, model, extras=False)
    else:
        torch.save(model.state_dict() | ({"epoch": Path("x")} if kind == "pickled tensors" else {}), file)
    torch.save(make_model(0).state_dict(), tmp_path / "base.pt")
    convert(file, tmp_path / "out", base=base, pretrained=str(tmp_path / "base.pt"), trust=kind == "pickled tensors")
    (line,) = [line for line in warned(caplog) if "--trust" not in line]
    assert line.startswith(f"{file}: ")
    assert "\n" not in line
    quick = base.endswith("quickgelu")
    assert f"{'QuickGELU' if quick else 'GELU'} is assumed, which {base} computes" in line
    assert ("name a base with QuickGELU" in line) is not quick


def test_archive_in_openais_layout_is_assumed_to_need_quickgelu(
    archive: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    convert(archive, tmp_path / "out", base="small-quickgelu")
    (line,) = warned(caplog)
    assert "but none of OpenAI's files" in line
    assert "QuickGELU is assumed" in line


def test_a_pickled_modules_layers_name_its_activation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, quick in (("gelu", False), ("quick", True)):
        pickled_classifier(tmp_path / f"{name}.pt", make_model(3, quick_gelu=quick))
    convert(tmp_path / "quick.pt", tmp_path / "out", base="small-quickgelu", trust=True)
    assert [line for line in warned(caplog) if "assumed" in line] == []
    for file, wrong, right in (("quick", "small", "small-quickgelu"), ("gelu", "small-quickgelu", "small")):
        with pytest.raises(ActivationMismatchError, match=f"use --base {right}$"):
            convert(tmp_path / f"{file}.pt", tmp_path / "other", base=wrong, trust=True)
    assert not (tmp_path / "other").exists()


def test_openais_archive_has_equal_features_through_convert_and_wise(tmp_path: Path) -> None:
    file = tmp_path / "ViT-S-16.pt"
    kept = openai_archive(file, make_model(1, quick_gelu=True))
    assert {value.dtype for value in read_state(file).values()} == {torch.float16, torch.float32}
    assert read_state(file).keys() == kept.keys()
    reference = make_model(0, quick_gelu=True)
    zero = {name: value.clone() for name, value in reference.state_dict().items()}
    write_folder(tmp_path / "zero", reference, quick_gelu=True)
    reference.load_state_dict(kept)
    assert main(["convert", str(file), str(tmp_path / "out"), "--base", "small-quickgelu"]) == 0
    merged = wise(tmp_path / "zero", file, [0.5, 1.0], tmp_path / "merged")
    for found in (loaded(tmp_path / "out"), loaded(merged[1])):
        assert all(map(torch.equal, features(found.model), features(reference)))
    reference.load_state_dict(interpolate(zero, kept, 0.5))
    assert all(map(torch.equal, features(loaded(merged[0]).model), features(reference)))
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    own, converted = load_encoder("small-quickgelu", str(file), device="cpu"), loaded(tmp_path / "out")
    images = [encoder.encode_images([encoder.prepare(picture)]) for encoder in (own, converted)]
    assert np.array_equal(*images)
    assert np.array_equal(own.encode_texts(["a cat"]), converted.encode_texts(["a cat"]))
    assert own.image_identity == converted.image_identity


def test_warnings_go_to_the_log(archive: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Logged at a level that Python shows on stderr without any logging configuration."""
    convert(archive, tmp_path / "out", base="small-quickgelu")
    assert [record.levelno for record in caplog.records if record.name == "ft.checkpoints.convert"] == [logging.WARNING]
