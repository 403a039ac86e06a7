"""Normalising rows of any float32 length: equal to float64, and bit for bit the plain path for ordinary rows."""

import numpy as np
import pytest

from featcache.encoding.chunks import normalise
from featcache.errors import DatasetError
from featcache.transfer.formats import Foreign
from featcache.transfer.import_features import Source, import_features


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-20, 1e-15, 1.0, 1e15, 1e18, 1e20, 1e37])
def test_rows_are_normalised_at_every_scale(scale: float) -> None:
    rows = (np.random.default_rng(0).standard_normal((50, 64)) * scale).astype(np.float32)
    exact = rows.astype(np.float64)
    lengths = np.linalg.norm(exact / np.float64(scale), axis=1) * np.float64(scale)
    unit, norm = normalise(rows)
    assert unit.dtype == norm.dtype == np.float32
    np.testing.assert_allclose(unit, exact / lengths[:, None], rtol=0, atol=2e-7)
    np.testing.assert_allclose(norm, lengths, rtol=1e-6, atol=1.5e-45)


def test_ordinary_rows_keep_their_bytes_and_zeros_and_nan_are_unchanged() -> None:
    rows = np.random.default_rng(0).standard_normal((20, 16)).astype(np.float32)
    rows[3], rows[7] = 0, np.nan
    unit, norm = normalise(rows)
    plain = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    np.testing.assert_array_equal(norm, plain)
    np.testing.assert_array_equal(unit, rows / np.maximum(plain, np.finfo(np.float32).tiny)[:, None])
    assert not unit[3].any()
    assert np.isnan(unit[7]).all()


@pytest.mark.parametrize(
    ("features", "said"),
    [
        (np.array([[1.0, 2.0], [1e-50, 0.0]]), "row 1: its values, at most 1e-50"),
        (np.array([[1.0, 2.0], [1e50, 0.0]]), "row 1: its values, at most 1e.50"),
        (np.full((2, 400), 3e38, np.float32), "row 0: its values, at most 3e.38"),
        (np.array([[1.0, np.nan]]), "in 1 row, first"),
        (np.array([["1", "2"]]), "expected real numbers"),
        (np.array([[1 + 2j, 0]]), "features are complex128; expected real numbers"),
    ],
)
def test_rows_beyond_float32_are_refused_by_name(features: np.ndarray, said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        import_features(Foreign(features, np.zeros(len(features), int)), Source("x"), name="x")


def test_extreme_rows_are_imported_as_unit_rows(tmp_path) -> None:
    rows = np.random.default_rng(1).standard_normal((8, 32))
    for scale in (1e-38, 1e20):
        found = Foreign((rows * scale).astype(np.float32), np.arange(8) % 2)
        features, _ = import_features(found, Source(f"{scale}"), name="x", root=tmp_path).numpy()
        assert np.abs(np.linalg.norm(features.astype(np.float64), axis=1) - 1).max() < 1e-3
        assert np.abs(features - rows / np.linalg.norm(rows, axis=1, keepdims=True)).max() < 2e-3
