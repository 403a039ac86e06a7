"""Text towers on shortened batches: the same features as open_clip's own forward pass over the whole context."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from featcache.encoders import load_encoder
from featcache.encoders.openclip.encoder import OpenClipEncoder
from featcache.encoders.openclip.texts import TEXT_BATCH, needed_length

VISION = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
EOS = {**TEXT, "pool_type": "eos", "eos_id": 49407}
CONFIGS: Mapping[str, tuple[dict[str, Any], bool]] = {  # text tower, and whether it may be shortened
    "CLIP": (TEXT, True),
    "CLIP, eos": (EOS, True),
    "custom": (TEXT, True),
    "custom, eos": (EOS, True),
    "custom, appended class token": ({**TEXT, "embed_cls": True}, False),
    "custom, bidirectional": ({**TEXT, "no_causal_mask": True}, False),
    "custom, last token": ({**TEXT, "pool_type": "last"}, False),
}
TEXTS = ["a photo of a cat.", "x", "a blurry photo of one large golden retriever", "x", " ".join(["a"] * 18), "a dog"]


def encoder_of(kind: str) -> OpenClipEncoder:
    text, _ = CONFIGS[kind]
    torch.manual_seed(0)
    family = open_clip.model.CLIP if kind.startswith("CLIP") else open_clip.CustomTextCLIP
    model = family(embed_dim=24, vision_cfg=VISION, text_cfg=text)
    open_clip.model.set_model_preprocess_cfg(model, open_clip.transform.PreprocessCfg(size=32).__dict__)
    config = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": text}
    return OpenClipEncoder(model, config, open_clip.SimpleTokenizer(context_length=20), kind)


@pytest.mark.parametrize("kind", CONFIGS)
def test_features_are_those_of_the_whole_context(kind: str) -> None:
    encoder = encoder_of(kind)
    wide = encoder.model.double()
    with torch.inference_mode():
        truth = wide.encode_text(encoder.tokenize(TEXTS)).numpy()
    encoder.model.float()
    found = encoder.encode_texts(TEXTS)
    assert np.abs(found - truth).max() <= 2e-6 * np.abs(truth).max()
    np.testing.assert_array_equal(found[1], found[3])


@pytest.mark.parametrize("kind", CONFIGS)
def test_only_towers_that_end_at_the_text_are_shortened(kind: str) -> None:
    encoder, (_, shortened) = encoder_of(kind), CONFIGS[kind]
    assert needed_length(encoder.model, encoder.tokenize(["x", "a dog"])) == (4 if shortened else 20)


def test_equal_texts_are_encoded_once_and_short_ones_without_long_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder("tiny")
    shapes: list[tuple[int, ...]] = []

    def counted(model: object, ids: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return torch.zeros(len(ids), encoder.dim)

    monkeypatch.setattr("featcache.encoders.openclip.encoder.encode_text", counted)
    short, long = [f"a {i}" for i in range(TEXT_BATCH)], ["a photo of a very large dog in a park"] * 50
    interleaved = [text for pair in zip(short, long * 6, strict=False) for text in pair]
    assert encoder.encode_texts(interleaved).shape == (len(interleaved), encoder.dim)
    assert [rows for rows, _ in shapes] == [TEXT_BATCH, 1]
    assert shapes[0][1] < shapes[1][1] < 20


def test_rows_come_back_in_their_order() -> None:
    encoder = load_encoder("tiny")
    texts = [f"a {'very ' * (i % 7)}small dog {i}" for i in range(40)]
    one_by_one = np.concatenate([encoder.encode_texts([text]) for text in texts])
    np.testing.assert_allclose(encoder.encode_texts(texts), one_by_one, atol=2e-6)
