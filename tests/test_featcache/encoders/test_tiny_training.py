"""The parts of the tiny model's training that need no fonts: vocabulary, captions, drawing, loss."""

import doctest
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3]))  # tools/ is not part of the distribution

from tools.train_tiny import augment, bpe, captions, summarise, train
from tools.train_tiny import glyphs as glyph_bank
from tools.train_tiny.glyphs import BANK_SIZE, CHARS, read_font_list
from tools.train_tiny.train import contrastive_loss


@pytest.fixture(scope="module")
def texts():
    return captions.corpus(2000, seed=0)


@pytest.fixture(scope="module")
def merges(texts):
    return bpe.learn(texts, 500)


def look(count, seed=0):
    return augment.sample_look(count, np.random.default_rng(seed))


def glyphs(count):
    masks = np.zeros((count, BANK_SIZE, BANK_SIZE), np.uint8)
    masks[:, 12:52, 26:38] = 255
    return masks


def attributes(**values):
    row = np.zeros(len(captions.ATTRIBUTES), np.int64)
    for name, value in values.items():
        row[captions.COLUMN[name]] = value
    return row


def test_merges_round_trip_through_open_clip(texts, merges, tmp_path):
    path = tmp_path / "merges.txt.gz"
    bpe.write(merges, path)
    tokenizer = open_clip.SimpleTokenizer(bpe_path=str(path), context_length=48)
    assert tokenizer.vocab_size == bpe.vocabulary_size(len(merges))
    assert list(tokenizer.bpe_ranks) == merges
    assert (tokenizer.sot_token_id, tokenizer.eot_token_id) == (tokenizer.vocab_size - 2, tokenizer.vocab_size - 1)
    ids = tokenizer.encode("a photo of the number: zero")
    assert len(ids) == 7, "frequent words should be one token each"
    assert tokenizer.decode(ids).strip() == "a photo of the number : zero"
    tokens = tokenizer(texts[:50])
    assert (tokens.argmax(1) == (tokens == tokenizer.eot_token_id).int().argmax(1)).all()


def test_vocabulary_file_is_reproducible(texts, merges, tmp_path):
    bpe.write(merges, tmp_path / "a.gz")
    bpe.write(bpe.learn(texts, 500), tmp_path / "b.gz")
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


def test_captions_follow_the_seed(texts):
    assert captions.corpus(200, seed=0) == texts[:200]
    assert captions.corpus(200, seed=1) != texts[:200]
    assert len(set(texts)) > 1500


def test_captions_describe_their_image():
    rng = np.random.default_rng(0)
    image = attributes(char=CHARS.index("3"), style=3, light=1, lowres=1)
    for _ in range(200):
        text, asserted = captions.caption(image, rng)
        assert "three" in text or "3" in text
        said = asserted != captions.UNASSERTED
        assert (asserted[said] == image[said]).all()
        assert any(w in text for w in captions.ADJECTIVES["lowres", 1]) == (asserted[captions.COLUMN["lowres"]] == 1)


def test_true_pairs_reject_what_is_unclear():
    asserted = np.full((1, len(captions.ATTRIBUTES)), captions.UNASSERTED)
    asserted[0, captions.COLUMN["char"]] = 3
    asserted[0, captions.COLUMN["blur"]] = 1
    images = np.stack([attributes(char=3, blur=b) for b in (1, 0, captions.UNCLEAR)] + [attributes(char=4, blur=1)])
    assert captions.true_pairs(asserted, images)[:, 0].tolist() == [True, False, False, False]


def test_drawing_is_repeatable_and_in_range():
    first, again, other = (
        augment.draw(glyphs(16), look(16, seed), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert first.shape == (16, 3, 32, 32)
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert -0.1 <= first.min() <= first.max() <= 1.1


@pytest.mark.parametrize("count", [1, 2, 33])
def test_drawing_takes_any_batch(count):
    assert augment.draw(glyphs(count), look(count), torch.Generator().manual_seed(0)).isfinite().all()


def test_low_resolution_keeps_the_mean_and_loses_detail():
    stripes = torch.zeros(1, 1, 64, 64)
    stripes[..., ::4] = 1
    small, full = augment.resample(stripes, 8), augment.resample(stripes, 32)
    assert small.shape == full.shape == (1, 1, 32, 32)
    torch.testing.assert_close(small.mean(), full.mean(), atol=1e-4, rtol=0)
    assert small.std() < 0.01 < full.std()


def test_loss_takes_every_true_pair_as_positive():
    features = torch.eye(4)[[0, 0, 1, 2]]
    truth = torch.eye(4, dtype=torch.bool)
    twins = truth.clone()
    twins[0, 1] = twins[1, 0] = True
    scale = torch.tensor(10.0)
    # The first two are the same picture and caption: telling them apart is impossible, and must not be asked for.
    floor = np.log(2) / 2
    assert contrastive_loss(features, features, twins, scale).item() == pytest.approx(floor, abs=1e-3)
    opposite = torch.eye(4)[[1, 1, 0, 3]]
    assert contrastive_loss(features, opposite, twins, scale) > 5


@pytest.mark.parametrize("module", [bpe, captions, glyph_bank, train])
def test_examples_in_docstrings(module):
    failed, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failed == 0


def test_spread_is_refused_over_different_recipes():
    first = dict.fromkeys(summarise.SHARED, 1) | {
        "seed": 0,
        "digits": dict.fromkeys(summarise.FIGURES, 0.5),
        "held_out_fonts": {"mean": 0.4},
    }
    second = first | {"seed": 1, "digits": dict.fromkeys(summarise.FIGURES, 0.7)}
    spread = summarise.gather([first, second])["spread"]["ridge_top1"]
    assert spread == {"mean": 0.6, "lowest": 0.5, "highest": 0.7}
    with pytest.raises(ValueError, match="recipe"):
        summarise.gather([first, second | {"recipe": 2}])


def test_font_list_has_each_package_once_and_holds_some_out():
    packages, dropped = read_font_list()
    names = [name for name, _, _ in packages]
    assert len(set(names)) == len(names) > 30
    assert {style for _, style, _ in packages} <= {"auto", "sans", "serif", "mono", "handwritten"}
    assert 4 <= sum(held for _, _, held in packages) <= 12
    assert dropped
