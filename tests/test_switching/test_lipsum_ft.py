"""Lipsum-FT's files: heads {cls, ctx, raw}, logit_scale.ckpt, projections; read and written from the command line."""

import json
import math
from pathlib import Path
from typing import Any

import clip_models
import msgpack
import numpy as np
import open_clip
import pytest
import torch
from foreign_checkpoints import flax_vision, pack
from small_pictures import write_pictures

from featcache.cli.main import main
from featcache.store import find_store
from ft.checkpoints.folder import read_state
from heads import LinearHead, load, save
from heads.fitted.linear import as_linear

CLASSES, TEMPLATES = ["aircraft_carrier", "The_Eiffel_Tower", "t-shirt"], ["a photo of a {}.", "art of the {}."]


def sines(shape: tuple[int, ...], phase: float) -> np.ndarray:
    """The check values' input: rows of sin(phase + 0.7 k), normalised."""
    rows: np.ndarray = np.sin(phase + 0.7 * np.arange(math.prod(shape))).reshape(shape)
    unit: np.ndarray = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return unit


CLS: Any = np.array(  # of sines((3, 2, 4), 0.2): mean over the templates, normalised, one column per class
    [
        [0.73596974, 0.58022049, 0.10576519],
        [0.50221509, 0.67602119, 0.51042133],
        [0.03226084, 0.45387857, 0.67501834],
        [-0.45286619, 0.01826976, 0.52214369],
    ]
)


def unpack(file: Path) -> Any:
    """A Flax file, by the description of its layout."""

    def array(code: int, payload: bytes) -> np.ndarray:
        shape, kind, content = msgpack.unpackb(payload)
        assert code == 1
        return np.frombuffer(content, kind).reshape(shape)

    return msgpack.unpackb(file.read_bytes(), ext_hook=array)


def write_heads(folder: Path, log_scale: float = 3.0) -> Path:
    """``save/clip/MODEL/TEMPLATES/domainnet.ckpt`` of the check values, and the logit scale of the model."""
    e = sines((3, 2, 4), 0.2)
    raw, mean = e.transpose(2, 1, 0), e.mean(axis=1)
    heads = {"cls": (mean / np.linalg.norm(mean, axis=1, keepdims=True)).T, "ctx": e.mean(axis=0).T, "raw": raw}
    file = folder / "vit" / "openai_imagenet_template" / "domainnet.ckpt"
    file.parent.mkdir(parents=True)
    file.write_bytes(pack({name: torch.tensor(value, dtype=torch.float32) for name, value in heads.items()}))
    (folder / "vit" / "logit_scale.ckpt").write_bytes(pack(torch.tensor(log_scale)))
    return file


@pytest.fixture
def model(tmp_path: Path) -> torch.nn.Module:
    made = clip_models.make_model(4)
    clip_models.write_folder(tmp_path / "model", made)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    return made


def test_a_head_file_becomes_a_head_with_the_logit_scale_beside_it(tmp_path: Path) -> None:
    file, out = write_heads(tmp_path), tmp_path / "zero_shot.safetensors"
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    assert main(["convert", str(file), str(out), "--classes", str(tmp_path / "classes.txt")]) == 0
    head = as_linear(load(out))
    np.testing.assert_allclose(head.weights, math.exp(3.0) * CLS.T, rtol=1e-6, atol=1e-6)
    assert head.classnames == tuple(CLASSES)
    assert not head.bias.any()


def test_a_head_file_alone_needs_the_model_that_made_it(tmp_path: Path, capsys: Any) -> None:
    file, out = write_heads(tmp_path), tmp_path / "out.safetensors"
    (tmp_path / "vit" / "logit_scale.ckpt").unlink()
    assert main(["convert", str(file), str(out)]) == 2
    error = capsys.readouterr().err
    assert "--base" in error
    assert "--trust" not in error
    clip_models.write_folder(tmp_path / "four", clip_models.make_model(1, embed_dim=4), embed_dim=4)
    assert main(["convert", str(file), str(out), "--base", str(tmp_path / "four")]) == 0
    scale = clip_models.make_model(1, embed_dim=4).state_dict()["logit_scale"].exp().item()
    np.testing.assert_allclose(as_linear(load(out)).weights, scale * CLS.T, rtol=1e-6, atol=1e-6)
    assert main(["convert", str(file), str(tmp_path / "folder"), "--base", str(tmp_path / "four")]) == 2
    assert "out.safetensors" not in capsys.readouterr().err


def test_finetune_starts_from_their_head(model: torch.nn.Module, tmp_path: Path, monkeypatch: Any) -> None:
    """scripts/Lipsum-FT.py --clip_cls_init save/clip/MODEL/TEMPLATES/DATA.ckpt"""
    monkeypatch.chdir(tmp_path)
    data = write_pictures(tmp_path / "pictures")
    cls = sines((24, 2), 0.4)
    Path("heads.ckpt").write_bytes(pack({"cls": torch.tensor(cls, dtype=torch.float32)}))
    command = ["finetune", data, "--model", "model", "--head", "heads.ckpt", "--out", "run", "--steps", "1", "--quiet"]
    command += ["--split", "all"]
    assert main([*command, "--batch-size", "8", "--workers", "1", "--augment", "none"]) == 0
    scale = model.state_dict()["logit_scale"].exp().item()  # neither in the file nor beside it: the model's own
    np.testing.assert_allclose(
        as_linear(load("run/start_head.safetensors")).weights, scale * cls.T, rtol=1e-5, atol=1e-5
    )


def test_scale_and_projections_are_read(model: torch.nn.Module, tmp_path: Path) -> None:
    other = clip_models.make_model(5).state_dict()
    (tmp_path / "logit_scale.ckpt").write_bytes(pack(torch.tensor(1.25)))
    for stem, key in (("visual_projection", "visual.proj"), ("text_projection", "text_projection")):
        (tmp_path / f"{stem}.ckpt").write_bytes(pack({"kernel": other[key]}))
    expected = {"logit_scale": torch.tensor(1.25)}
    expected |= {"visual.proj": other["visual.proj"], "text_projection": other["text_projection"]}
    stems = {"logit_scale": "logit_scale", "visual_projection": "visual.proj", "text_projection": "text_projection"}
    for stem, key in stems.items():
        out = tmp_path / f"with_{stem}"
        assert main(["convert", str(tmp_path / f"{stem}.ckpt"), str(out), "--base", str(tmp_path / "model")]) == 0
        for name, value in read_state(out).items():
            assert torch.equal(value, expected[key] if name == key else model.state_dict()[name]), name


def test_an_unknown_file_gets_no_advice_to_trust_it(tmp_path: Path, capsys: Any) -> None:
    for name, tree in (("a", {"weights": torch.ones(2)}), ("b", torch.ones(3)), ("c", [1, 2])):
        (tmp_path / f"{name}.ckpt").write_bytes(pack(tree))
        assert main(["convert", str(tmp_path / f"{name}.ckpt"), str(tmp_path / "out.safetensors")]) == 2
        assert "--trust" not in capsys.readouterr().err


def test_a_head_file_cannot_be_merged_as_a_model(model: torch.nn.Module, tmp_path: Path, capsys: Any) -> None:
    file = write_heads(tmp_path)
    assert main(["wise", str(tmp_path / "model"), str(file), "--out", str(tmp_path / "out")]) == 2
    assert "no image tower" in capsys.readouterr().err


def test_a_text_store_is_written_as_setup_py_does(model: torch.nn.Module, tmp_path: Path, monkeypatch: Any) -> None:
    """scripts/setup.py --data_name domainnet"""
    monkeypatch.chdir(tmp_path)
    Path("templates.txt").write_text("\n".join(TEMPLATES))
    command = ["text", "classes.txt", "--templates", "templates.txt", "--model", "model", "--name", "domainnet"]
    assert main([*command, "--quiet"]) == 0
    assert main(["export", "texts/domainnet", "save/domainnet.ckpt"]) == 0
    found = unpack(tmp_path / "save" / "domainnet.ckpt")
    tokens = open_clip.SimpleTokenizer(context_length=16)([t.format(c) for c in CLASSES for t in TEMPLATES])
    with torch.no_grad():
        e = model.double().eval().encode_text(tokens).numpy().reshape(3, 2, 24)  # type: ignore[operator]
    e /= np.linalg.norm(e, axis=-1, keepdims=True)
    cls, ctx = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (e.mean(axis=1), e.mean(axis=0)))
    expected = {"cls": cls.T, "ctx": ctx.T, "raw": e.transpose(2, 1, 0)}
    assert {name: rows.shape for name, rows in found.items()} == {"cls": (24, 3), "ctx": (24, 2), "raw": (24, 2, 3)}
    for name, rows in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], rows, rtol=0, atol=1e-6)
    assert main(["export", "texts/domainnet", "x.csv"]) == 2


def test_a_model_is_written_as_their_checkpoints(model: torch.nn.Module, tmp_path: Path) -> None:
    state, folder = model.state_dict(), str(tmp_path / "model")
    assert main(["convert", folder, str(tmp_path / "theirs"), "--to", "lipsum"]) == 0
    assert unpack(tmp_path / "theirs" / "logit_scale.ckpt").item() == pytest.approx(state["logit_scale"].item())
    for stem, key in (("visual_projection", "visual.proj"), ("text_projection", "text_projection")):
        assert np.array_equal(unpack(tmp_path / "theirs" / f"{stem}.ckpt")["kernel"], state[key].numpy())
    file = write_heads(tmp_path)
    clip_models.write_folder(tmp_path / "model4", clip_models.make_model(2, embed_dim=4), embed_dim=4)
    assert main(["convert", str(file), str(tmp_path / "model4_head.safetensors")]) == 0
    best, small = tmp_path / "best_acc.ckpt", clip_models.make_model(2, embed_dim=4).state_dict()
    assert main(["convert", str(tmp_path / "model4"), str(best), "--to", "lipsum"]) == 0  # with the head beside it
    tree = unpack(best)
    np.testing.assert_allclose(tree["cls"], CLS * math.exp(3.0) / small["logit_scale"].exp().item(), rtol=1e-5)
    assert_same(tree["ext"]["vision_model"], flax_vision(small))
    assert np.array_equal(tree["ext"]["visual_projection"], small["visual.proj"].numpy())
    again = tmp_path / "again"
    assert main(["convert", str(best), str(again), "--base", str(tmp_path / "model4")]) == 0
    assert all(torch.equal(value, small[name]) for name, value in read_state(again).items())
    provenance = json.loads((again / "provenance.json").read_text())
    assert provenance["converted_from"] == "best_acc.ckpt"


def assert_same(found: Any, expected: Any) -> None:
    """Two trees of equal arrays."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    else:
        assert np.array_equal(found, expected.numpy())


def test_the_last_line_of_their_log(model: torch.nn.Module, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """``DomainNetReal/acc 8.246e-01, DomainNetReal/nll 7.305e-01, ...``, the NLL with 1e-8 in its logarithm."""
    monkeypatch.chdir(tmp_path)
    head = LinearHead(300 * sines((2, 24), 0.5).astype(np.float32), np.zeros(2, np.float32), ("cat", "dog"))
    save(head, "head.safetensors")
    expected = []
    for name, n in (("DomainNetReal", 12), ("DomainNetSketch", 20)):
        data = write_pictures(tmp_path / name, n)
        command = ["encode", data, "--split", "all", "--name", f"{name}_x224", "--model", "model", "--quiet"]
        assert main([*command, "--preprocess", "central-crop"]) == 0
        X, y = find_store(f"{name}_x224/all", tmp_path / "cache").numpy(np.float64)
        logits = X @ head.weights.astype(np.float64).T
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p = (p / p.sum(axis=1, keepdims=True))[np.arange(n), y]
        expected += [
            f"{name}/acc {(logits.argmax(axis=1) == y).mean():.3e}",
            f"{name}/nll {-np.log(p + 1e-8).mean():.3e}",
        ]
    capsys.readouterr()
    command = ["evaluate", "head.safetensors", "--on", "DomainNetReal_x224/all", "DomainNetSketch_x224/all"]
    assert main([*command, "--name", "DomainNetReal", "DomainNetSketch", "--log-line"]) == 0
    assert ", ".join(expected) in capsys.readouterr().out.splitlines()
