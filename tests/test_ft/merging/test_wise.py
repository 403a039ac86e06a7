"""Merged folders: their contents, and that they can be encoded."""

import json
from pathlib import Path

import clip_models
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from featcache.cli.main import main
from featcache.encoders import load_encoder
from featcache.errors import EncoderError, MismatchError, TrainingError
from ft.checkpoints.folder import write_state
from ft.merging.interpolate import interpolate, soup
from ft.merging.wise import wise

WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and the same with another image tower and an equal text tower."""
    zero, tuned = clip_models.make_model(0), clip_models.make_model(0)
    tuned.visual.load_state_dict(clip_models.make_model(1).visual.state_dict())
    for name, model in (("zero", zero), ("tuned", tuned)):
        clip_models.write_folder(tmp_path / name, model)
    return tmp_path / "zero", tmp_path / "tuned"


def test_every_alpha_has_its_folder_with_the_interpolated_weights(folders: tuple[Path, Path], tmp_path: Path) -> None:
    written = wise(*folders, [0, 0.25, 0.3, 1.0], tmp_path / "out")
    assert [path.name for path in written] == ["alpha=0.000", "alpha=0.250", "alpha=0.300", "alpha=1.000"]
    theta0, theta1 = (load_file(folder / WEIGHTS) for folder in folders)
    for folder, alpha in zip(written, [0, 0.25, 0.3, 1.0], strict=True):
        merged, expected = load_file(folder / WEIGHTS), interpolate(theta0, theta1, alpha)
        assert all(torch.equal(merged[key], expected[key]) for key in theta0)


def test_encoders_of_a_path_share_stores_with_the_parents(folders: tuple[Path, Path], tmp_path: Path) -> None:
    written = wise(*folders, [0, 0.3, 1], tmp_path / "out")
    parents = [load_encoder(f"local-dir:{folder}", device="cpu") for folder in folders]
    start, middle, end = (load_encoder(f"local-dir:{folder}", device="cpu") for folder in written)
    assert start.image_identity == parents[0].image_identity  # alpha 0 and 1 are cache hits
    assert end.image_identity == parents[1].image_identity
    assert middle.image_identity not in (parents[0].image_identity, parents[1].image_identity)
    assert {encoder.text_digest for encoder in (start, middle, end)} == {parents[0].text_digest}
    picture = middle.prepare(np.full((40, 40, 3), 80, dtype=np.uint8))
    assert np.isfinite(middle.encode_images([picture])).all()


def test_a_tilde_is_the_home_folder(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No shell expands it behind ``local-dir:``, nor in a Python string."""
    monkeypatch.setenv("HOME", str(tmp_path))
    models = ["local-dir:~/zero", "~/tuned"]
    assert main(["wise", *models, "--alphas", "0.3", "--on", "digits:test", "--out", "~/out"]) == 0
    merged, expected = load_file(tmp_path / "out" / "alpha=0.300" / WEIGHTS), clip_models.make_model(0).state_dict()
    assert merged.keys() == expected.keys()
    assert load_encoder("~/zero", device="cpu").name == load_encoder(str(folders[0]), device="cpu").name


def test_several_fine_tuned_models_are_a_soup(folders: tuple[Path, Path], tmp_path: Path) -> None:
    third = clip_models.make_model(2).state_dict()
    write_state(third, tmp_path / "third.safetensors")
    (merged,) = wise(folders[0], [folders[1], tmp_path / "third.safetensors"], [0.5], tmp_path / "out")
    theta0, theta1 = (load_file(folder / WEIGHTS) for folder in folders)
    expected = interpolate(theta0, soup([theta1, third]), 0.5)
    assert all(torch.equal(load_file(merged / WEIGHTS)[key], expected[key]) for key in expected)


def test_fisher_weights_its_keys(folders: tuple[Path, Path], tmp_path: Path) -> None:
    theta0, theta1 = (load_file(folder / WEIGHTS) for folder in folders)
    paths = []
    for number, factor in enumerate((1.0, 3.0)):
        fisher = {"visual.conv1.weight": torch.full_like(theta0["visual.conv1.weight"], factor)}
        paths.append(write_state(fisher, tmp_path / f"fisher{number}.safetensors"))
    (merged,) = wise(*folders, [0.5], tmp_path / "out", fisher=(paths[0], paths[1]))
    key, state = "visual.conv1.weight", load_file(merged / WEIGHTS)
    torch.testing.assert_close(state[key], (theta0[key] + 3 * theta1[key]) / 4)
    torch.testing.assert_close(state["visual.proj"], (theta0["visual.proj"] + theta1["visual.proj"]) / 2)
    record = json.loads((merged / "provenance.json").read_text())
    assert [entry["file"].rpartition("/")[2] for entry in record["fisher"]] == [path.name for path in paths]
    assert record["fisher_floor"] == 1e-8


def test_provenance_names_the_parents(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (merged,) = wise(*folders, [0.5], tmp_path / "out")
    record = json.loads((merged / "provenance.json").read_text())
    assert record["alpha"] == 0.5
    assert record["zero_shot"]["file"] == f"zero/{WEIGHTS}"
    assert [len(entry["sha256"]) for entry in record["fine_tuned"]] == [64]
    assert str(tmp_path) not in json.dumps(record)


@pytest.mark.parametrize(
    ("alphas", "message"),
    [([], "at least one"), ([0.5, 0.5], "each once"), ([0.1, float("nan")], "finite"), ([0.1, float("inf")], "finite")],
)
def test_refuses_alphas_before_writing(
    folders: tuple[Path, Path], tmp_path: Path, alphas: list[float], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        wise(*folders, alphas, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refuses_extrapolation_with_fisher_before_writing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    fisher = write_state({"visual.proj": torch.ones(32, 24)}, tmp_path / "fisher.safetensors")
    with pytest.raises(TrainingError, match=r"\[1\.5\].*in \[0, 1\]"):
        wise(*folders, [0.5, 1.5], tmp_path / "out", fisher=(fisher, fisher))
    assert not (tmp_path / "out").exists()


def test_refuses_existing_folders_before_writing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    wise(*folders, [0.5], tmp_path / "out")
    with pytest.raises(EncoderError, match=r"alpha=0\.500: already exists"):
        wise(*folders, [0.25, 0.5], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["alpha=0.500"]
    wise(*folders, [0.25, 0.5], tmp_path / "out", overwrite=True)


def test_refuses_models_of_another_preprocessing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    config = json.loads((folders[1] / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["interpolation"] = "bicubic"
    (folders[1] / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError, match="differ in preprocess_cfg"):
        wise(*folders, [0.5], tmp_path / "out")
    assert wise(folders[0], folders[1] / WEIGHTS, [0.5], tmp_path / "out")


def test_refuses_a_missing_fine_tuned_model(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no fine-tuned model"):
        wise(folders[0], [], [0.5], tmp_path / "out")


def test_verb_prints_json_and_text(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["wise", str(folders[0]), str(folders[1]), "--alpha", "0.25", "0.5", "--out"]
    assert main([*command, str(tmp_path / "a"), "--json"]) == 0
    models = json.loads(capsys.readouterr().out)
    assert [model["alpha"] for model in models] == [0.25, 0.5]
    assert models[1]["model"] == f"local-dir:{tmp_path / 'a' / 'alpha=0.500'}"
    assert Path(models[1]["folder"], WEIGHTS).is_file()
    assert main([*command, str(tmp_path / "b")]) == 0
    assert f"--model local-dir:{tmp_path / 'b' / 'alpha=0.250'}" in capsys.readouterr().out


def test_verb_reports_a_mismatch_with_its_exit_code(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_state({"w": torch.ones(1)}, tmp_path / "other.safetensors")
    assert main(["wise", str(folders[0]), str(other), "--out", str(tmp_path / "out")]) == 5
    assert "different keys" in capsys.readouterr().err
