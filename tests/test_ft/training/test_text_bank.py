"""Banks of random texts: contents, cache hits, and agreement with new random texts."""

import json
from pathlib import Path

import clip_models
import numpy as np
import pytest
import torch

from featcache.cli.main import main
from featcache.encoders import load_encoder
from featcache.encoding.banks import embed_random_texts, load_bank, load_moment, random_texts, second_moment
from featcache.errors import EncoderError, MismatchError, PromptError, StoreCorruptError
from featcache.store import find_store, list_stores, open_bank_store
from ft.regularizers.base import Step, unit
from ft.regularizers.lipsum import Lipsum

DRAWS, M = 4000, 2
COMMAND = ["text", "--random", "40", "--length", "4", "--quiet", "--json"]


@pytest.fixture(scope="module")
def tiny():
    return load_encoder("tiny", device="cpu")


def test_rows_are_the_unit_features_of_random_texts(tiny, tmp_path: Path) -> None:
    store = embed_random_texts(300, tiny, length=4, seed=3, root=tmp_path).store
    sot, eot, size, context = tiny.special_tokens
    ids = random_texts(300, 4, sot, eot, torch.Generator().manual_seed(3), vocab_size=size, context_length=context)
    with torch.no_grad():
        expected = unit(tiny.model.encode_text(ids))
    assert np.abs(store.features - expected.numpy()).max() < 1e-6
    assert np.abs(np.linalg.norm(store.features, axis=1) - 1).max() < 1e-6


def test_moment_size_and_error_are_recorded_in_float64(tiny, tmp_path: Path) -> None:
    store = embed_random_texts(200, tiny, root=tmp_path).store
    rows = store.features.astype(np.float64)
    moment = load_moment(200, tiny, tmp_path)
    assert moment.matrix.dtype == torch.float64
    assert np.abs(moment.matrix.numpy() - rows.T @ rows / 200).max() < 1e-14
    outer = rows[:, :, None] * rows[:, None, :]
    expected = np.sqrt(outer.var(axis=0, ddof=1).sum() / 200) / np.linalg.norm(rows.T @ rows / 200)
    assert moment.size == 200
    assert moment.error == pytest.approx(expected, rel=1e-6)


def test_exact_mode_on_a_stored_bank_is_the_sum_over_its_texts(tiny, tmp_path: Path) -> None:
    moment, bank = load_moment(100, tiny, tmp_path), load_bank(100, tiny, tmp_path).double()
    generator = torch.Generator().manual_seed(0)
    step = Step(*torch.randn(2, 6, tiny.dim, dtype=torch.float64, generator=generator))
    v, v0 = unit(step.features), unit(step.frozen_features)
    expected = (50.0 * (v - v0) @ bank.T).square().sum(1).mean() / (2 * 100)
    assert Lipsum.exact(moment, 50.0)(step).item() == pytest.approx(expected.item(), rel=1e-10)


def test_fresh_texts_agree_with_a_bank_within_both_errors(tiny, tmp_path: Path) -> None:
    """Gradient over 4,000 draws of new texts against the bank's, with the bank's own error: |z| < 5."""
    bank = load_bank(2000, tiny, tmp_path).double()
    generator = torch.Generator().manual_seed(1)
    features, frozen = torch.randn(2, 3, tiny.dim, dtype=torch.float64, generator=generator)
    sot, eot, size, context = tiny.special_tokens
    ids = random_texts(DRAWS * M, 8, sot, eot, generator, vocab_size=size, context_length=context)
    fresh = torch.cat([torch.from_numpy(tiny.encode_tokens(part)) for part in ids.split(2000)])
    of_bank = per_text_gradients(features, frozen, unit(bank))
    of_fresh = per_text_gradients(features, frozen, unit(fresh.double())).reshape(DRAWS, M, -1).mean(1)
    expected = autograd(Lipsum.exact(second_moment(unit(bank)), 10.0), features, frozen)
    torch.testing.assert_close(of_bank.mean(0), expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
    error = (of_fresh.var(0) / DRAWS + of_bank.var(0) / len(bank)).sqrt()
    assert error.min() > 0
    assert ((of_fresh.mean(0) - expected) / error).abs().max() < 5


def per_text_gradients(features: torch.Tensor, frozen: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """(M, N D): gradient of R by the features, text by text, written out by hand."""
    norm = features.norm(dim=1, keepdim=True)
    v, v0 = features / norm, frozen / frozen.norm(dim=1, keepdim=True)
    difference = (v - v0) @ texts.T  # (N, M)
    by_v = 10.0**2 * difference.T[:, :, None] * texts[:, None, :] / len(features)  # (M, N, D)
    tangent = by_v - (by_v * v).sum(-1, keepdim=True) * v
    return (tangent / norm).reshape(len(texts), -1)


def autograd(lipsum: Lipsum, features: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor:
    inputs = features.clone().requires_grad_()
    return torch.autograd.grad(lipsum(Step(inputs, frozen)), inputs)[0].reshape(-1)


def test_the_command_makes_a_bank_and_finds_it_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = ["--root", str(tmp_path)]
    records = []
    for _ in range(2):
        assert main([*COMMAND, *root]) == 0
        records.append(json.loads(capsys.readouterr().out))
    assert [record["hit"] for record in records] == [False, True]
    assert records[0]["texts"] == 40
    assert 0 < records[0]["error"] < 1
    assert find_store("banks/random-40", tmp_path).path == Path(records[0]["store"])
    assert main(["info", "banks/random-40", *root]) == 0
    assert "float64 (128, 128)" in capsys.readouterr().out.replace("<f8", "float64")
    assert main(["verify", "banks/random-40", "--deep", *root]) == 0
    assert main(["text", *root]) == 2
    assert main(["text", "digits", "--random", "3", *root]) == 2


def test_another_seed_length_or_number_is_another_bank(tiny, tmp_path: Path) -> None:
    for arguments in ({}, {"seed": 1}, {"length": 3}):
        assert not embed_random_texts(20, tiny, root=tmp_path, **arguments).hit
    assert not embed_random_texts(21, tiny, root=tmp_path).hit
    assert len(list_stores(tmp_path)) == 4


def test_a_bank_is_found_by_reference(tiny, tmp_path: Path) -> None:
    made = embed_random_texts(20, tiny, root=tmp_path).store
    for reference in (20, "20", "banks/random-20", str(made.path), made.manifest.key):
        assert torch.equal(load_bank(reference, tiny, tmp_path), torch.from_numpy(made.features))


def test_invalid_banks_are_refused(tiny, tmp_path: Path) -> None:
    other = load_encoder(clip_models.write_folder(tmp_path / "model", clip_models.make_model()), device="cpu")
    embed_random_texts(20, other, root=tmp_path, name="foreign")
    with pytest.raises(MismatchError, match="another text tower"):
        load_bank("banks/foreign", tiny, tmp_path)
    with pytest.raises(PromptError, match="takes texts of 14 ids"):
        embed_random_texts(20, other, length=15, root=tmp_path)
    with pytest.raises(EncoderError, match="no text side"):
        embed_random_texts(20, NoText(), root=tmp_path)


class NoText:
    name, text_identity = "vision", None


def test_damage_is_refused(tiny, tmp_path: Path) -> None:
    store = embed_random_texts(20, tiny, root=tmp_path).store
    chunk = Path(store.path / "moment" / "c" / "0" / "0")
    content = bytearray(chunk.read_bytes())
    content[7] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(StoreCorruptError):
        load_moment(20, tiny, tmp_path)


def test_a_bank_of_one_text_has_an_infinite_error(tiny, tmp_path: Path) -> None:
    assert open_bank_store(embed_random_texts(1, tiny, root=tmp_path).store.path).error == float("inf")
