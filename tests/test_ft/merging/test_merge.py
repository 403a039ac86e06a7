"""``featcache merge`` and ``featcache moments``: folders, heads, layer inputs, refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_models import make_model, write_folder
from finetuning import Pictures, weights

import ft
from featcache.cli.main import main
from featcache.encoders import load_encoder
from featcache.encoders.openclip import TINY
from featcache.errors import EncoderError, FeatcacheError, MismatchError
from ft.checkpoints.parents import load_open_clip
from ft.merging.merge import merge_heads
from ft.merging.moments import layer_moments
from heads import LinearHead, load, save


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    """A base and two models whose image towers differ from it."""
    base = make_model(0)
    names = [write_folder(tmp_path / "start", base)]
    for number in (1, 2):
        torch.manual_seed(number)
        with torch.no_grad():
            for value in base.visual.parameters():
                value.add_(0.01 * torch.randn_like(value))
        names.append(write_folder(tmp_path / f"m{number}", base))
    return names


def run(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    code = main([*words, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def head(seed: int, width: int = 24) -> LinearHead:
    rng = np.random.default_rng(seed)
    return LinearHead(rng.normal(size=(3, width)), rng.normal(size=3), ("a", "b", "c"), name=f"head{seed}")


def test_a_merged_model_is_a_folder_that_loads_with_its_record(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    words = ["merge", "ties", *models[1:], "--base", models[0], "-o", str(out), "--set", "keep=0.5"]
    assert run(capsys, *words) == {"model": str(out)}
    states = [weights(Path(name.removeprefix("local-dir:"))) for name in models]
    expected = ft.MERGES["ties"](states[1:], states[0], keep=0.5)
    assert all(torch.equal(value, expected[key]) for key, value in weights(out).items())
    encoder, start = load_encoder(f"local-dir:{out}", device="cpu"), load_encoder(models[0], device="cpu")
    assert encoder.text_digest == start.text_digest  # every text store stays valid
    record = json.loads((out / "provenance.json").read_text())
    assert record["method"] == "ties"
    assert record["settings"] == {"keep": 0.5}
    assert [entry["file"].partition("/")[0] for entry in record["models"]] == ["m1", "m2"]
    with pytest.raises(EncoderError, match="already exists"):
        ft.merge("ties", models[1:], out, base=models[0])


def test_heads_follow_the_formula_of_the_method(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(save(head(seed), tmp_path / f"h{seed}.safetensors")) for seed in range(3)]
    words = ["merge", "task_arithmetic", *models[1:], "--base", models[0], "-o", str(tmp_path / "out")]
    found: Any = load(run(capsys, *words, "--set", "scale=0.3", "--heads", *files)["head"]).linear()
    start, one, two = (head(seed).weights.astype(np.float64) for seed in range(3))
    np.testing.assert_allclose(found.weights, start + 0.3 * (one + two - 2 * start), rtol=1e-6)
    assert found.provenance.params == {"method": "task_arithmetic", "scale": 0.3, "heads": ["head1", "head2", "head0"]}
    assert main([*words, "--overwrite", "--heads", *files[1:]]) == 2
    assert "expected 3, that of the base first" in capsys.readouterr().err


def test_moments_are_those_of_the_inputs_of_every_layer(models: list[str]) -> None:
    """Against forward hooks of modules, and attention written out in numpy."""
    encoder, data = load_open_clip(models[1], device="cpu"), Pictures(6)
    found = layer_moments(encoder, data, [["a cat"], ["a dog", "a cat"]])
    block, seen = encoder.model.visual.transformer.resblocks[0], dict[str, torch.Tensor]()
    hooks = [
        block.mlp.c_proj.register_forward_pre_hook(lambda _, args: seen.update(c_proj=args[0])),
        block.attn.register_forward_pre_hook(
            lambda _, args, kw: seen.update(x=kw["query"] if "query" in kw else args[0]), with_kwargs=True
        ),
    ]
    images = torch.from_numpy(np.stack([encoder.prepare(data.decode(data.read(row), row)) for row in range(6)]))
    with torch.no_grad():
        features = encoder.model.encode_image(encoder.pixels(images))
    for hook in hooks:
        hook.remove()

    def gram(rows: torch.Tensor) -> np.ndarray[Any, Any]:
        flat = rows.reshape(-1, rows.shape[-1]).double().numpy()
        return flat.T @ flat

    name = "visual.transformer.resblocks.0"
    np.testing.assert_allclose(found[f"{name}.mlp.c_proj.weight@1"], gram(seen["c_proj"]), rtol=1e-4, atol=1e-4)
    x = seen["x"].double().numpy()
    np.testing.assert_allclose(found[f"{name}.attn.in_proj_weight@1"], gram(seen["x"]), rtol=1e-4, atol=1e-4)
    weight, bias = (value.detach().double().numpy() for value in (block.attn.in_proj_weight, block.attn.in_proj_bias))
    q, k, v = np.split(x @ weight.T + bias, 3, axis=-1)
    heads = []
    for part in np.split(np.arange(32), 2):  # two heads of width 16
        scores = q[..., part] @ np.swapaxes(k[..., part], -1, -2) / 4
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        heads.append(p / p.sum(axis=-1, keepdims=True) @ v[..., part])
    attended = np.concatenate(heads, axis=-1).reshape(-1, 32)
    np.testing.assert_allclose(found[f"{name}.attn.out_proj.weight@1"], attended.T @ attended, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["head.weight@1"], gram(features / features.norm(dim=1, keepdim=True)), rtol=1e-4)
    assert found["visual.proj@0"].shape == (32, 32)
    # 2 blocks of 4 layers, the projection and the head; 1 block and the projection of the text tower
    assert len(found) == 2 * 4 + 2 + 4 + 1
    assert float(found["text_projection@0"].trace()) > 0


def test_regmean_reads_the_moments_beside_the_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        assert main(["merge", "soup", "tiny", "-o", str(tmp_path / f"m{number}")]) == 0
    folders = [str(tmp_path / f"m{number}") for number in (1, 2)]
    words = ["merge", "regmean", *folders, "-o", str(tmp_path / "out")]
    assert main(words) == 2
    assert "no such file; make it with `featcache moments DATASET:SPLIT --model" in capsys.readouterr().err
    made = [
        run(capsys, "moments", "digits:val", "--limit", "4", "--model", f"local-dir:{folder}", "--quiet")
        for folder in folders
    ]
    assert made[0] == {"file": f"{folders[0]}_moments.safetensors", "images": 4, "layers": 18}
    run(capsys, *words)
    assert torch.equal(weights(tmp_path / "out")["visual.proj"], weights(tmp_path / "m1")["visual.proj"])
    state = weights(tmp_path / "m2")
    ft.write_state(state | {"logit_scale": state["logit_scale"] + 1}, tmp_path / "m2" / "open_clip_model.safetensors")
    with pytest.raises(MismatchError, match="computed with other weights"):
        ft.merge("regmean", folders, tmp_path / "again")


def test_moments_of_the_embedded_model_are_not_written_into_the_package() -> None:
    assert main(["moments", "digits:val", "--limit", "2"]) == 0
    assert Path("tiny_moments.safetensors").is_file()  # in the working directory
    assert not TINY.with_name("tiny_moments.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mean", "A", "B"], "expected one of soup, wise, fisher"),
        (["ties", "A", "B", "--set", "keep=2"], "keep is 2, expected a number above 0 and at most 1"),
        (["ties", "A", "B", "--set", "k=2"], "ties has no parameter 'k'; it has keep, scale"),
        (["model_stock", "A", "B", "--set", "k=2"], "it has none"),
        (["ties", "A", "B", "--set", "keep"], "expected NAME=VALUE with a value in JSON"),
        (["ties", "A", "B"], "fine-tuned from; give it (--base)"),
        (["fisher", "A", "B"], "0 Fisher files (--fisher); expected 2"),
        (["soup", "A", "B", "--pretrained", "openai"], "--pretrained belongs to --base"),
        (["soup", "A", "B", "--preprocess", "central-crop"], "give --heads too"),
    ],
)
def test_refusals_say_what_is_expected(
    words: list[str], message: str, models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [{"A": models[1], "B": models[2]}.get(word, word) for word in words]
    assert main(["merge", *named, "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_heads_of_other_classes_or_without_the_bases_are_refused(models: list[str]) -> None:
    encoder = load_open_clip(models[0], device="cpu")
    with pytest.raises(FeatcacheError, match="the base's head"):
        merge_heads("ties", [head(0), head(1)], encoder)
    other = LinearHead(np.ones((3, 24)), np.ones(3), ("x", "y", "z"))
    with pytest.raises(MismatchError, match="different classes"):
        merge_heads("soup", [head(0), other], encoder)
