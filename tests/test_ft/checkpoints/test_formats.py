"""Checkpoints of other systems: equal features after conversion, and no code runs without trust."""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import clip_models
import msgpack
import numpy as np
import pytest
import torch
from foreign_checkpoints import pack, pickled_classifier, write_ckpt

from featcache.cli.main import main
from featcache.encoders import load_encoder
from featcache.errors import EncoderError, MismatchError
from featcache.transfer.flax import is_flax, read_flax
from ft.checkpoints.convert import convert, read_checkpoint
from ft.checkpoints.folder import read_state
from ft.checkpoints.formats.huggingface import from_huggingface, huggingface_config, to_huggingface, write_huggingface
from ft.checkpoints.formats.lipsum import read_lipsum
from ft.merging.interpolate import interpolate
from ft.merging.wise import wise
from heads import load

PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[49406, 5, 7, 49407] + [0] * 12, [49406, 900, 49407] + [0] * 13])


def same(first: Any, second: Any) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def configuration(**changes: Any) -> dict[str, Any]:
    return {"model_cfg": clip_models.CONFIG | changes, "preprocess_cfg": clip_models.PREPROCESS}


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_transformers_computes_the_same_features(tmp_path: Path, quick_gelu: bool) -> None:
    transformers = pytest.importorskip("transformers")
    changes = {"quick_gelu": True} if quick_gelu else {}
    model = clip_models.make_model(4, **changes).eval()
    out = write_huggingface(configuration(**changes), model.state_dict(), tmp_path / "hf")
    theirs, report = transformers.CLIPModel.from_pretrained(str(out), output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        vision = theirs.visual_projection(theirs.vision_model(pixel_values=PIXELS).pooler_output)
        mask = torch.arange(16)[None] <= (IDS == 49407).int().argmax(1)[:, None]
        text = theirs.text_projection(theirs.text_model(input_ids=IDS, attention_mask=mask.long()).pooler_output)
        torch.testing.assert_close(vision, model.encode_image(PIXELS), rtol=0, atol=1e-5)
        torch.testing.assert_close(text, model.encode_text(IDS), rtol=0, atol=1e-5)
    assert theirs.logit_scale.item() == pytest.approx(model.logit_scale.item())


@pytest.mark.parametrize("mode", ["squash", "shortest"])
def test_transformers_prepares_images_alike(tmp_path: Path, mode: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = clip_models.make_model()
    given = configuration()
    given["preprocess_cfg"] = {**clip_models.PREPROCESS, "resize_mode": mode, "interpolation": "bicubic", "size": 32}
    folder = tmp_path / "oc"
    clip_models.write_folder(folder, model)
    (folder / "open_clip_config.json").write_text(json.dumps(given))
    encoder = load_encoder(f"local-dir:{folder}", device="cpu")
    write_huggingface(given, model.state_dict(), tmp_path / "hf")
    processor = transformers.CLIPImageProcessor.from_pretrained(str(tmp_path / "hf"))
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    theirs = torch.as_tensor(np.asarray(processor(images=[picture], return_tensors="pt")["pixel_values"]))
    ours = encoder.pixels(torch.from_numpy(np.stack([encoder.prepare(picture)])))
    assert (theirs - ours).abs().max() < 0.03  # a step of 8 bits: libraries round at different places


def test_names_round_trip() -> None:
    state = clip_models.make_model(1).state_dict()
    assert same(from_huggingface(to_huggingface(state)), state)
    with pytest.raises(EncoderError, match="no such tensor"):
        to_huggingface({"visual.layer1.0.conv1.weight": torch.zeros(1)})
    with pytest.raises(EncoderError, match="expected its names"):
        from_huggingface({"vision_model.head.weight": torch.zeros(1)})
    with pytest.raises(EncoderError, match="lacks k_proj, v_proj"):
        from_huggingface({"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)})


def test_architectures_without_a_clipmodel_are_refused(tmp_path: Path) -> None:
    for model_cfg in (
        {**clip_models.CONFIG, "vision_cfg": {**clip_models.CONFIG["vision_cfg"], "pool_type": "avg"}},
        {**clip_models.CONFIG, "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}},
    ):
        with pytest.raises(EncoderError, match="only plain ViTs"):
            huggingface_config({"model_cfg": model_cfg, "preprocess_cfg": {}})


@pytest.mark.parametrize("nested", [False, True])
def test_lipsum_checkpoint_round_trips(tmp_path: Path, nested: bool) -> None:
    base, tuned = clip_models.make_model(0), clip_models.make_model(0)
    tuned.visual.load_state_dict(clip_models.make_model(7).visual.state_dict())
    clip_models.write_folder(tmp_path / "base", base)
    cls = write_ckpt(tmp_path / "best_acc.ckpt", tuned.state_dict(), nested=nested)
    assert is_flax(tmp_path / "best_acc.ckpt")
    command = ["convert", str(tmp_path / "best_acc.ckpt"), str(tmp_path / "out"), "--base", str(tmp_path / "base")]
    assert main(command) == 0
    assert same(read_state(tmp_path / "out"), tuned.state_dict())
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    encoder = load_encoder(f"local-dir:{tmp_path / 'out'}", device="cpu")
    own = load_encoder(clip_models.write_folder(tmp_path / "tuned", tuned), device="cpu")
    features = [model.encode_images([model.prepare(picture)]) for model in (encoder, own)]
    assert np.array_equal(*features)
    assert encoder.text_digest == load_encoder(f"local-dir:{tmp_path / 'base'}", device="cpu").text_digest
    head: Any = load(tmp_path / "out_head.safetensors").linear()
    np.testing.assert_allclose(head.weights, tuned.logit_scale.exp().item() * cls.T.numpy(), rtol=1e-6)


def test_wise_accepts_lipsums_checkpoint(tmp_path: Path) -> None:
    base, tuned = clip_models.make_model(0), clip_models.make_model(0)
    tuned.visual.load_state_dict(clip_models.make_model(7).visual.state_dict())
    clip_models.write_folder(tmp_path / "base", base)
    write_ckpt(tmp_path / "best_acc.ckpt", tuned.state_dict())
    (merged,) = wise(tmp_path / "base", tmp_path / "best_acc.ckpt", [0.25], tmp_path / "out")
    assert same(read_state(merged), interpolate(base.state_dict(), tuned.state_dict(), 0.25))


def test_other_msgpack_files_are_refused(tmp_path: Path) -> None:
    contents = {
        "truncated": pack({"cls": torch.ones(3)})[:-4],
        "list": msgpack.packb([1, 2]),
        "extension": msgpack.packb({"a": msgpack.ExtType(5, b"x")}),
        "object": msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(([1], "object", b"12345678")))}),
        "short": msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(([4], "float32", b"1234")))}),
        "garbage": b"\x81\xc1",
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.ckpt").write_bytes(content)
        with pytest.raises(EncoderError):
            read_flax(tmp_path / f"{name}.ckpt")
    (tmp_path / "other.ckpt").write_bytes(pack({"weights": torch.ones(3, 2)}))
    with pytest.raises(EncoderError, match="no vision_model"):
        read_lipsum(tmp_path / "other.ckpt")


def test_arrays_of_every_dtype_round_trip(tmp_path: Path) -> None:
    tree: Any = {
        "f": torch.randn(2, 3),
        "h": torch.ones(2).half(),
        "b": torch.ones(2, 2).bfloat16() * 3,
        "n": {"i": IDS},
    }
    (tmp_path / "a.ckpt").write_bytes(pack(tree))
    found: Any = read_flax(tmp_path / "a.ckpt")
    assert all(torch.equal(found[key], tree[key]) and found[key].dtype == tree[key].dtype for key in "fhb")
    assert torch.equal(found["n"]["i"], IDS)


@pytest.mark.parametrize("plain", [False, True])  # by torch.save, by pickle.dump
def test_a_pickled_classifier_is_read_only_on_trust(tmp_path: Path, plain: bool) -> None:
    model = clip_models.make_model(3)
    head = pickled_classifier(tmp_path / "finetuned.pt", model, plain=plain)
    clip_models.write_folder(tmp_path / "base", clip_models.make_model(0))
    command = ["convert", str(tmp_path / "finetuned.pt"), str(tmp_path / "out"), "--base", str(tmp_path / "base")]
    assert main(command) == 2
    assert not (tmp_path / "out").exists()
    assert main([*command, "--trust"]) == 0
    assert same(read_state(tmp_path / "out"), model.state_dict())
    written: Any = load(tmp_path / "out_head.safetensors").linear()
    np.testing.assert_array_equal(written.weights, head.weight.detach().numpy())
    assert written.provenance["encoder_key"]


class Payload:
    """A file that runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_nothing_in_a_file_runs_without_trust_and_nothing_in_this_process_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(
        sys.modules, "ft.checkpoints.formats.trusted", raising=False
    )  # doctests may have been collected from it
    torch.save({"w": torch.ones(2), "evil": Payload(tmp_path / "ran")}, tmp_path / "evil.pt")
    for name in ("evil.pt", "old.pkl"):
        if name == "old.pkl":
            (tmp_path / name).write_bytes(pickle.dumps({"evil": Payload(tmp_path / "ran")}))
        with pytest.raises(EncoderError, match=r"pickled|torch\.load"):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    state = read_checkpoint(tmp_path / "evil.pt", trust=True).state
    assert (tmp_path / "ran").exists()  # that is what trust means
    assert torch.equal(state["w"], torch.ones(2))
    assert "ft.checkpoints.formats.trusted" not in sys.modules


def test_unpickling_errors_give_the_reason(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("hello")
    torch.save([1, Payload(tmp_path / "ran")], tmp_path / "list.pt")
    for name in ("text.pt", "list.pt"):
        with pytest.raises(EncoderError, match="cannot be unpickled"):
            read_checkpoint(tmp_path / name, trust=True)


def test_a_model_folder_to_a_file_and_to_hugging_face(tmp_path: Path) -> None:
    model = clip_models.make_model(2)
    clip_models.write_folder(tmp_path / "a", model)
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "a.safetensors")]) == 0
    assert same(read_state(tmp_path / "a.safetensors"), model.state_dict())
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "hf"), "--to", "huggingface"]) == 0
    assert same(from_huggingface(read_state(tmp_path / "hf" / "model.safetensors")), model.state_dict())
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "hf"), "--to", "huggingface"]) == 2
    assert main(["convert", "tiny", str(tmp_path / "b"), "--to", "huggingface"]) == 2  # average pooling


def test_a_state_dict_needs_a_base_that_fits(tmp_path: Path) -> None:
    clip_models.write_folder(tmp_path / "a", clip_models.make_model())
    torch.save(clip_models.make_model(1).state_dict(), tmp_path / "state.pt")
    with pytest.raises(EncoderError, match="--base"):
        convert(tmp_path / "state.pt", tmp_path / "out")
    convert(tmp_path / "state.pt", tmp_path / "out", base=str(tmp_path / "a"))
    assert same(read_state(tmp_path / "out"), clip_models.make_model(1).state_dict())
    with pytest.raises((EncoderError, MismatchError)):
        convert(tmp_path / "state.pt", tmp_path / "tiny", base="tiny")
    with pytest.raises(EncoderError, match="open_clip, huggingface"):
        convert(tmp_path / "state.pt", tmp_path / "x", base="tiny", layout="onnx")
