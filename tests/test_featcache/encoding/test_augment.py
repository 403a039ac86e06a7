"""Augmented views: distributions, bounds, pixels and reproducibility."""

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from featcache.encoders.base import ImageEncoder
from featcache.encoding.augment import AUGMENTATIONS, Augmentation, make_view, view_uniforms
from featcache.errors import DatasetError

N = 4000
WIDE, TALL = (500, 375), (333, 500)
ROOT = Path(__file__).parents[3]
ENV = {"PYTHONPATH": "tests:."}
PINNED = [0.5843636931320827, 0.649549450458802, 0.0781484165070262]


def picture(width: int = 50, height: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def crops(name: str, size: tuple[int, int]) -> np.ndarray:
    """(N, 5): left, top, width, height, flip."""
    return np.array([AUGMENTATIONS[name].crop(*size, 0, 0, f"{i}.jpg") for i in range(N)], dtype=np.int64)


def spread(values: np.ndarray, reference: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance in units of its standard size."""
    from scipy.stats import ks_2samp

    result = ks_2samp(values, reference)
    return float(result.statistic * np.sqrt(len(values) * len(reference) / (len(values) + len(reference))))


@pytest.mark.parametrize("size", [WIDE, TALL, (64, 64), (8, 8), (1000, 30), (3, 400), (1, 1)])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_crops_are_inside_the_image(name: str, size: tuple[int, int]) -> None:
    left, top, width, height, flip = crops(name, size).T
    assert min(left.min(), top.min()) >= 0
    assert min(width.min(), height.min()) >= 1
    assert (left + width).max() <= size[0]
    assert (top + height).max() <= size[1]
    assert set(flip) <= {0, 1}


@pytest.mark.parametrize("size", [WIDE, TALL])
@pytest.mark.parametrize("name", ["wise_ft", "plain"])
def test_torchvisions_crops_have_torchvisions_distribution(name: str, size: tuple[int, int]) -> None:
    spec = AUGMENTATIONS[name]
    torch.manual_seed(0)
    image = torch.empty(3, size[1], size[0])
    theirs = np.array([RandomResizedCrop.get_params(image, list(spec.area), list(spec.aspect)) for _ in range(N)])
    left, top, width, height, _ = crops(name, size).T
    for ours, column in ((top, 0), (left, 1), (height, 2), (width, 3)):
        assert spread(ours, theirs[:, column]) < 2.0  # 1.95 is the one-in-a-thousand mark
    assert spread(width * height, theirs[:, 2] * theirs[:, 3]) < 2.0


def test_lipsums_crops_have_the_right_bounds_and_distribution() -> None:
    left, top, width, height, flip = crops("lipsum", WIDE).T
    fallback = (width == 328) & (height == 328) & (left == 86) & (top == 24)  # int(0.875 * 375), centred
    area, aspect = width * height / (500 * 375), width / height
    assert area[~fallback].min() >= 0.1  # the tenth that must be covered, not 0.08
    assert area.max() <= 1.0
    assert aspect.min() > 0.74
    assert aspect.max() < 1.35
    assert fallback.mean() < 0.01
    given = aspect[~fallback]
    uniform = np.random.default_rng(0).uniform(3 / 4, 4 / 3, N)
    assert spread(given, uniform) < 4.0  # near uniform: the tenth rejects a few small crops
    assert abs(flip.mean() - 0.5) < 5 * 0.5 / N**0.5


def test_lipsums_height_is_uniform_given_the_aspect() -> None:
    spec = Augmentation("tensorflow", area=(0.25, 1.0), aspect=(1.0, 1.0))
    heights = np.array([spec.crop(100, 100, 0, 0, str(i)).height for i in range(N)])
    counts = np.bincount(heights[heights != 87], minlength=101)[50:100]  # 100 is the whole image: the fallback, 87
    expected = N / 51
    assert heights.min() == 50
    assert (counts[np.arange(50, 100) != 87] > 0).all()
    assert np.abs(counts[np.arange(50, 100) != 87] - expected).max() < 5 * expected**0.5
    assert abs((heights == 87).sum() - 2 * expected) < 5 * (2 * expected) ** 0.5


def test_the_central_seven_eighths_if_no_crop_fits() -> None:
    strip = AUGMENTATIONS["lipsum"].crop(1000, 30, 0, 0, "a")
    assert strip[:4] == (487, 2, 26, 26)
    assert AUGMENTATIONS["plain"].crop(1000, 30, 0, 0, "a")[:4] == (480, 0, 40, 30)


def test_flips_follow_their_probability() -> None:
    assert not crops("wise_ft", WIDE)[:, 4].any()
    assert abs(crops("plain", WIDE)[:, 4].mean() - 0.5) < 5 * 0.5 / N**0.5


@pytest.mark.parametrize("name", ["wise_ft", "plain"])
def test_pixels_are_those_of_torchvisions_resized_crop(name: str) -> None:
    image = Image.fromarray(picture(90, 70))
    for view in range(20):
        crop = AUGMENTATIONS[name].crop(90, 70, 5, view, "a")
        box = (crop.top, crop.left, crop.height, crop.width)
        expected = F.resized_crop(image, *box, [24, 24], InterpolationMode.BICUBIC)
        expected = np.asarray(F.hflip(expected) if crop.flip else expected)
        assert np.array_equal(AUGMENTATIONS[name](image, 24, 5, view, "a"), expected)


def test_lipsums_pixels_overshoot_and_float_images_stay_float() -> None:
    image = np.where(picture() > 127, 255, 0).astype(np.uint8)
    views = [AUGMENTATIONS["lipsum"](image, 32, 0, view, "a") for view in range(10)]
    assert all(view.dtype == np.float32 for view in views)
    assert min(view.min() for view in views) < -5
    assert max(view.max() for view in views) > 260
    clipped = [AUGMENTATIONS["plain"](image.astype(np.float32), 32, 0, view, "a") for view in range(10)]
    assert all(view.dtype == np.float32 and view.min() >= 0 and view.max() <= 255 for view in clipped)
    soft = 100 + picture() // 8  # no overshoot that eight bits would cut between the two passes
    of_float, of_bytes = (AUGMENTATIONS["plain"](soft.astype(kind), 32, 0, 0, "a") for kind in (np.float32, np.uint8))
    assert np.abs(of_float - of_bytes).max() <= 1.0


def test_arrays_and_pil_images_give_the_same_view() -> None:
    for spec in AUGMENTATIONS.values():
        views = [spec(image, (20, 24), 1, 2, "a") for image in (picture(), Image.fromarray(picture()))]
        assert views[0].shape == (20, 24, 3)
        assert np.array_equal(*views)


def test_large_photographs_are_reduced_first_without_visible_difference() -> None:
    smooth = Image.fromarray(picture(30, 20)).resize((3000, 2000), Image.Resampling.BICUBIC)
    quick = AUGMENTATIONS["wise_ft"](smooth, 64, 0, 0, "a").astype(np.int64)
    exact = Augmentation(area=(0.9, 1.0), flip=0.0, reducing_gap=1e9)(smooth, 64, 0, 0, "a").astype(np.int64)
    difference = np.abs(quick - exact)
    assert difference.max() > 0  # it was reduced
    assert difference.mean() < 0.5
    assert np.quantile(difference, 0.99) <= 4


def test_a_view_depends_only_on_seed_view_and_id() -> None:
    spec = AUGMENTATIONS["plain"]
    one = spec.crop(*WIDE, 0, 0, "a")
    assert one == spec.crop(*WIDE, 0, 0, "a")
    others = {spec.crop(*WIDE, *key) for key in ((1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (10, 0, "a"), (1, 0, "0 a"))}
    assert len(others | {one}) == 6


def test_views_do_not_depend_on_workers_order_or_process() -> None:
    image, ids = picture(), [f"{i}.png" for i in range(16)]
    spec = AUGMENTATIONS["lipsum"]
    expected = {name: spec(image, 16, 3, 1, name) for name in ids}
    with ThreadPoolExecutor(4) as pool:
        shuffled = ids[::-1]
        views = list(pool.map(lambda name: spec(image, 16, 3, 1, name), shuffled))
    assert all(np.array_equal(view, expected[name]) for name, view in zip(shuffled, views, strict=True))
    script = (
        "import sys, xxhash; from test_featcache.encoding.test_augment import picture\n"
        "from featcache.encoding.augment import AUGMENTATIONS\n"
        f"for name in {ids!r}:\n"
        "    print(xxhash.xxh3_64_hexdigest(AUGMENTATIONS['lipsum'](picture(), 16, 3, 1, name).tobytes()))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT, env=ENV
    )
    assert shown.stdout.split() == [xxhash.xxh3_64_hexdigest(expected[name].tobytes()) for name in ids]


def test_uniforms_are_uniform_and_never_change() -> None:
    values = np.array([view_uniforms(0, 0, str(i), 4) for i in range(N)])
    assert values.min() >= 0
    assert values.max() < 1
    assert np.abs(values.mean(0) - 0.5).max() < 5 / (12 * N) ** 0.5
    assert np.abs(np.corrcoef(values.T) - np.eye(4)).max() < 5 / N**0.5
    assert view_uniforms(0, 0, "a", 3) == pytest.approx(PINNED, abs=1e-15)


def test_augmentations_have_different_identities() -> None:
    assert AUGMENTATIONS["wise_ft"].identity == AUGMENTATIONS["regft"].identity
    assert AUGMENTATIONS["wise_ft"].identity != AUGMENTATIONS["plain"].identity


class Square(ImageEncoder):
    """The attributes of an encoder that views use."""

    image_size = (20, 24)

    def prepare(self, image: np.ndarray) -> np.ndarray:
        return image[:4, :4]

    def encode_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        raise AssertionError("making a view encodes nothing")


def test_a_view_has_the_encoders_size_and_a_full_identity() -> None:
    views = [make_view("plain", Square(), seed) for seed in (0, 1)]
    assert np.array_equal(views[1](picture(), 3, "a"), AUGMENTATIONS["plain"](picture(), (20, 24), 1, 3, "a"))
    assert views[0].identity != views[1].identity
    assert json.loads(json.dumps(views[0].identity)) == views[0].identity
    none = make_view("none", Square(), 0)
    assert np.array_equal(none(picture(), 3, "a"), picture()[:4, :4])


def test_impossible_augmentations_are_refused() -> None:
    with pytest.raises(DatasetError, match="expected one of none, lipsum, wise_ft"):
        make_view("colour", Square(), 0)
    for wrong in ({"area": (0.0, 1.0)}, {"area": (0.5, 1.5)}, {"aspect": (2.0, 1.0)}, {"flip": 2.0}, {"attempts": 0}):
        with pytest.raises(DatasetError, match="expected"):
            Augmentation(**wrong)
