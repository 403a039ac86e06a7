import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clip_models
import pytest
import torch
from safetensors.torch import load_file, save_file

from featcache.encoders import load_encoder
from featcache.errors import EncoderError, MismatchError, OutputError
from ft.checkpoints.folder import model_folder, read_state, weights_file, write_model_folder, write_state

STATE = {"visual.w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        one[key].dtype == two[key].dtype and torch.equal(one[key], two[key]) for key in one
    )


def test_safetensors_and_torch_files_round_trip(tmp_path: Path) -> None:
    write_state(STATE, tmp_path / "deep" / "a.safetensors")
    torch.save(STATE, tmp_path / "a.pt")
    assert same(read_state(tmp_path / "deep" / "a.safetensors"), STATE)
    assert same(read_state(tmp_path / "a.pt"), STATE)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_reads_training_checkpoints(tmp_path: Path, prefix: str, key: str) -> None:
    state = {prefix + name: value for name, value in STATE.items()}
    torch.save({"epoch": 3, key: state, "optimizer": {"lr": 0.1}}, tmp_path / "epoch_3.pt")
    assert same(read_state(tmp_path / "epoch_3.pt"), STATE)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_reads_openais_archives(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2).half()
    expected = {key: value.clone() for key, value in module.state_dict().items()}
    module.register_buffer("vocab_size", torch.tensor(49408))
    torch.jit.save(torch.jit.script(module), tmp_path / "ViT-B-32.pt")
    assert same(read_state(tmp_path / "ViT-B-32.pt"), expected)


class Payload:
    """A malicious pickle: it writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_pickles_are_not_executed(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1), "evil": Payload(tmp_path / "owned")}, tmp_path / "evil.pt")
    with pytest.raises(EncoderError, match=r"refuses it \(objects other than tensors\); .*convert --trust"):
        read_state(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


def test_refuses_files_that_are_not_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    for name in ("text.pt", "text.safetensors"):
        with pytest.raises(EncoderError, match=name):
            read_state(tmp_path / name)
    for name in ("list.pt", "numbers.pt"):
        with pytest.raises(EncoderError, match="no state dict"):
            read_state(tmp_path / name)
    with pytest.raises(EncoderError, match="no such checkpoint"):
        read_state(tmp_path / "missing.pt")
    with pytest.raises(EncoderError, match="no weights"):
        read_state(tmp_path.parent)


@pytest.mark.parametrize("read", [read_state, model_folder])
def test_the_best_of_a_run_without_validation_split_is_its_last(tmp_path: Path, read: Callable[[Path], object]) -> None:
    (tmp_path / "last").mkdir()
    with pytest.raises(EncoderError, match=r"no validation split, its model is .*/last$"):
        read(tmp_path / "best")


def test_tied_and_strided_tensors_are_written_separately(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    state = {"a": weight, "b": weight, "c": weight.T, "d": weight[0], "e": torch.nn.Parameter(weight)}
    write_state(state, tmp_path / "tied.safetensors")
    assert same(read_state(tmp_path / "tied.safetensors"), {key: value.detach() for key, value in state.items()})


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_state(STATE, tmp_path / "a.safetensors")
    with pytest.raises(TypeError):
        write_state(STATE, path, {"metadata": 3})  # type: ignore[dict-item]
    assert same(read_state(path), STATE)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    clip_models.write_folder(folder, clip_models.make_model())
    for name in ("bpe_merges.txt.gz", "tokenizer.json", "tokenizer_config.json", "README.md", "notes.txt"):
        (folder / name).write_bytes(name.encode())
    return folder


def test_a_model_folder_has_config_tokenizer_and_the_new_weights(source: Path, tmp_path: Path) -> None:
    state = clip_models.make_model(seed=1).state_dict()
    out = write_model_folder(f"local-dir:{source}", state, tmp_path / "deep" / "new", {"alpha": 0.5})
    config, weights = "open_clip_config.json", "open_clip_model.safetensors"
    tokenizer = ["bpe_merges.txt.gz", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in out.iterdir()) == sorted([config, weights, "provenance.json", *tokenizer])
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in [config, *tokenizer])
    assert same(load_file(out / weights), dict(state))
    record = json.loads((out / "provenance.json").read_text())
    assert record.pop("files").keys() == set(tokenizer)
    assert record == {"alpha": 0.5}
    assert [path.name for path in out.parent.iterdir()] == ["new"]


def test_a_model_folder_loads_as_an_encoder_of_these_weights(tmp_path: Path) -> None:
    models = [clip_models.make_model(seed) for seed in (0, 1)]
    clip_models.write_folder(tmp_path / "a", models[0])
    name = clip_models.write_folder(tmp_path / "b", models[1])
    written = write_model_folder(tmp_path / "a", models[1].state_dict(), tmp_path / "c")
    one, two = load_encoder(name, device="cpu"), load_encoder(f"local-dir:{written}", device="cpu")
    assert one.image_identity == two.image_identity
    assert one.text_identity == two.text_identity


def test_existing_folder_is_kept_unless_overwritten(source: Path, tmp_path: Path) -> None:
    state = clip_models.make_model(seed=1).state_dict()
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(EncoderError, match="exists already"):
        write_model_folder(source, state, out)
    with pytest.raises(OutputError, match="is not a folder of a model, and its files would be lost"):
        write_model_folder(source, state, out, overwrite=True)
    assert (out / "mine.txt").exists()
    (out / "mine.txt").unlink()
    for seed in (1, 2):
        state = clip_models.make_model(seed).state_dict()
        write_model_folder(source, state, out, overwrite=True)
    written: Any = load_encoder(f"local-dir:{out}", device="cpu")
    assert torch.equal(written.model.state_dict()["visual.proj"], state["visual.proj"])
    with pytest.raises(EncoderError, match="never the source"):
        write_model_folder(source, state, source, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir() if "cache" not in path.name) == ["out", "source"]


def test_refuses_weights_of_another_architecture(source: Path, tmp_path: Path) -> None:
    state = clip_models.make_model(embed_dim=8).state_dict()
    with pytest.raises(MismatchError, match=r"text_projection \(16, 24\) against \(16, 8\)"):
        write_model_folder(source, state, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_file_is_the_one_open_clip_takes(tmp_path: Path) -> None:
    for name in ("zzz.bin", "aaa.safetensors", "pytorch_model.bin", "model.safetensors", "open_clip_pytorch_model.bin"):
        save_file({"w": torch.ones(1)}, tmp_path / name)
        from open_clip.factory import _find_checkpoint_in_dir

        assert str(weights_file(tmp_path)) == _find_checkpoint_in_dir(tmp_path)


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="no open_clip_config"):
        model_folder(tmp_path)


def test_config_must_have_the_form_of_open_clips(source: Path, tmp_path: Path) -> None:
    from ft.checkpoints.folder import read_config

    for content in ("not json", "{}"):
        (source / "open_clip_config.json").write_text(content)
        with pytest.raises(EncoderError, match="open_clip_config"):
            read_config(source)


def test_a_configuration_is_enough_for_a_folder(tmp_path: Path) -> None:
    model = clip_models.make_model(3)
    name = clip_models.write_folder(tmp_path / "a", model)
    source = load_encoder(name, device="cpu")
    written = write_model_folder(source.configuration(), model.state_dict(), tmp_path / "b")
    again = load_encoder(f"local-dir:{written}", device="cpu")
    assert again.image_identity == source.image_identity
    assert again.text_identity == source.text_identity
    with pytest.raises(EncoderError, match="model_cfg and preprocess_cfg"):
        write_model_folder({"model_cfg": {}}, model.state_dict(), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_checkpoints_have_the_usual_file_permissions(tmp_path):
    (tmp_path / "other").write_text("x")
    path = write_state({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
