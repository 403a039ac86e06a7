"""raw, cls and ctx as Lipsum-FT defines them; prompt files; cache hits and resumes."""

import sys
from pathlib import Path

import numpy as np
import pytest
from fakes import NumpyEncoder

from featcache import TextStore, open_store
from featcache.encoding.chunks import normalise
from featcache.encoding.texts import class_means, context_means, embed_prompts
from featcache.errors import MismatchError, PromptError, StoreIncompleteError
from featcache.store import open_image_store, verify

NAMES = ("ant", "bee", "The_Eiffel_Tower")
TEMPLATES = ("a photo of a {}.", "a sketch of the {}.")


def golden(shape: tuple[int, ...], phase: float, size: float) -> np.ndarray:
    """The test vectors S(shape, phase, size) = size * sin(phase + 0.7 k)."""
    return size * np.sin(phase + 0.7 * np.arange(np.prod(shape))).reshape(shape)


CLS = [
    [0.73596974, 0.58022049, 0.10576519],
    [0.50221509, 0.67602119, 0.51042133],
    [0.03226084, 0.45387857, 0.67501834],
    [-0.45286619, 0.01826976, 0.52214369],
]
CTX = [[-0.35759686, 0.56011047], [0.13647831, 0.1040266], [0.5663656, -0.40098261], [0.7298823, -0.71740343]]


@pytest.mark.parametrize(("dtype", "atol"), [(np.float64, 5.1e-9), (np.float32, 2e-7)])
def test_cls_and_ctx_equal_the_published_values(dtype: type[np.floating], atol: float) -> None:
    """To all eight digits printed in float64; stores keep float32."""
    e = golden((3, 2, 4), 0.2, 1.0)
    raw = (e / np.linalg.norm(e, axis=-1, keepdims=True)).astype(dtype)
    for means, published in ((class_means, CLS), (context_means, CTX)):
        found = means(raw).T
        assert found.dtype == dtype
        np.testing.assert_allclose(found, published, rtol=0, atol=atol)
    unnormalised = class_means(e.astype(dtype)).T[0]
    np.testing.assert_allclose(unnormalised, [0.733739, 0.53721692, 0.15543942], rtol=0, atol=atol)  # not what we want


def test_a_store_holds_every_prompt_normalised_by_itself(tmp_path: Path) -> None:
    encoder = NumpyEncoder()
    store = embed_prompts(NAMES, TEMPLATES, encoder, root=tmp_path).store
    texts = [template.replace("{}", name) for name in NAMES for template in TEMPLATES]
    raw = normalise(encoder.encode_texts(texts))[0].reshape(3, 2, -1)
    np.testing.assert_array_equal(store.raw, raw)
    np.testing.assert_array_equal(store.cls, class_means(raw))
    assert store.ctx is not None
    np.testing.assert_array_equal(store.ctx, context_means(raw))
    assert (store.classnames, store.templates, store.counts.tolist()) == (NAMES, TEMPLATES, [2, 2, 2])
    assert (store.logit_scale, store.text_digest) == (10.0, "characters")
    assert verify(store.path, deep=True).ok


def test_the_same_prompts_are_a_hit_and_others_are_not(tmp_path: Path) -> None:
    encoder = NumpyEncoder()
    first = embed_prompts(NAMES, TEMPLATES, encoder, root=tmp_path)
    again = embed_prompts(NAMES, TEMPLATES, encoder, root=tmp_path)
    other = embed_prompts(NAMES, TEMPLATES[:1], encoder, root=tmp_path)
    assert [result.hit for result in (first, again, other)] == [False, True, False]
    assert first.store.path == again.store.path != other.store.path


def test_a_prompt_file_may_have_more_sentences_for_some_classes(tmp_path: Path) -> None:
    prompts = {"ant": ["An ant is small."], "bee": ["A bee flies.", "A bee hums."], "The Eiffel Tower": ["Paris."]}
    store = embed_prompts(NAMES, None, NumpyEncoder(), prompts=prompts, root=tmp_path).store
    assert store.raw.shape == (3, 2, 16)
    assert store.counts.tolist() == [1, 2, 1]
    assert np.isnan(store.raw[0, 1]).all()
    assert np.isfinite(store.raw[1]).all()
    np.testing.assert_allclose(store.cls[0], store.raw[0, 0], atol=1e-7)
    assert (store.ctx, store.templates) == (None, None)


def test_many_classes_are_chunked_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["featcache.encoding.texts"], "CHUNK_NBYTES", 2 * 2 * 16 * 4)  # two per chunk
    names = [f"class {number}" for number in range(7)]
    whole = embed_prompts(names, TEMPLATES, NumpyEncoder(), root=tmp_path / "whole").store
    assert whole.manifest.arrays["raw"].n_chunks == 4

    class Dies(NumpyEncoder):
        def encode_texts(self, texts):
            if "class 4" in texts[0]:
                raise KeyboardInterrupt
            return super().encode_texts(texts)

    with pytest.raises(KeyboardInterrupt):
        embed_prompts(names, TEMPLATES, Dies(), root=tmp_path / "torn")
    with pytest.raises(StoreIncompleteError, match="4 of 7 rows; run the same text command again"):
        open_store(tmp_path / "torn" / "texts" / whole.manifest.key)
    resumed = embed_prompts(names, TEMPLATES, NumpyEncoder(), root=tmp_path / "torn")
    assert resumed.encoded_rows == 3
    for name in ("raw", "cls", "ctx", "counts"):
        np.testing.assert_array_equal(resumed.store.array(name), whole.array(name))


def test_missing_or_conflicting_prompts_are_refused(tmp_path: Path) -> None:
    encoder = NumpyEncoder()
    with pytest.raises(PromptError, match="no class names"):
        embed_prompts([], TEMPLATES, encoder, root=tmp_path)
    with pytest.raises(PromptError, match="both given"):
        embed_prompts(NAMES, TEMPLATES, encoder, prompts={"ant": ["x"]}, root=tmp_path)
    with pytest.raises(PromptError):
        embed_prompts(NAMES, ["no place for the name"], encoder, root=tmp_path)
    with pytest.raises(PromptError):
        embed_prompts(NAMES, None, encoder, prompts={"ant": ["x"]}, root=tmp_path)


def test_a_text_store_is_not_an_image_store(tmp_path: Path) -> None:
    store = embed_prompts(NAMES, TEMPLATES, NumpyEncoder(), root=tmp_path).store
    assert isinstance(open_store(store.path), TextStore)
    with pytest.raises(MismatchError, match="expected a store of images"):
        open_image_store(store.path)
