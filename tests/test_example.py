"""examples/featcache_in_one_file.py, the library's main job in plain code, gives the library's results."""

import runpy
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import open_clip
import pytest
from clip_models import make_model, write_folder
from PIL import Image

import featcache
import heads
from featcache.datasets import open_dataset
from featcache.encoders.openclip import TINY
from featcache.encoders.openclip.loading import MERGES

EXAMPLE = Path(__file__).parents[1] / "examples" / "featcache_in_one_file.py"
TEMPLATES = ("{}", 'a photo of the number: "{}".')


@pytest.fixture(scope="module")
def plain() -> ModuleType:
    spec = spec_from_file_location("featcache_in_one_file", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Class folders of digits: 300 to fit on, 100 to test on."""
    root = tmp_path_factory.mktemp("digits")
    for split, wanted in (("train", 300), ("test", 100)):
        data = open_dataset("digits", split)
        for row in range(wanted):
            place = root / split / data.index.classnames[data.index.labels[row]]
            place.mkdir(parents=True, exist_ok=True)
            picture = data.decode(data.read(row), row)
            (picture if isinstance(picture, Image.Image) else Image.fromarray(np.asarray(picture, np.uint8))).save(
                place / f"{row:04d}.png"
            )
    return {split: root / split for split in ("train", "test")}


def test_features_heads_and_accuracy_are_those_of_the_library(
    plain: ModuleType, folders: dict[str, Path], tmp_path: Path
) -> None:
    train, test = (featcache.encode(f"imagefolder:{folder}", "all", model="tiny") for folder in folders.values())
    text = featcache.embed_text(train.classnames, TEMPLATES, model="tiny", name="numbers")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{TINY}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{TINY}", bpe_path=str(TINY / MERGES))
    model.eval()
    X, labels, classes = plain.encode(model, preprocess, folders["train"], tmp_path / "train.npz")
    assert tuple(classes) == train.classnames
    np.testing.assert_array_equal(labels, train.labels)
    np.testing.assert_allclose(X.astype(np.float32), train.numpy()[0], atol=2e-3)

    zero_shot, ridge = heads.ZeroShot().fit(text), heads.Ridge().fit(train)
    prompt_weights = plain.zero_shot(model, tokenizer, classes, TEMPLATES)
    np.testing.assert_allclose(prompt_weights, zero_shot.coef_, rtol=1e-3, atol=1e-2)
    stored, _ = train.numpy()
    weights, intercept, alpha = plain.ridge(stored, labels, len(classes), np.array(ridge.alphas_))
    assert alpha == ridge.alpha_
    np.testing.assert_allclose(weights, ridge.coef_, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(intercept, ridge.intercept_, rtol=1e-6, atol=1e-9)

    rows = heads.evaluate([zero_shot, ridge], [test])
    stored, labels = test.numpy()
    for row, scores in zip(rows, (stored @ prompt_weights.T, stored @ weights.T + intercept), strict=True):
        assert row[f"{test.name}:top1"] == pytest.approx((scores.argmax(axis=1) == labels).mean())


def test_the_example_has_at_most_80_lines_and_runs(folders: dict[str, Path], tmp_path: Path) -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 80
    model = write_folder(tmp_path / "model", make_model())
    command = [sys.executable, str(EXAMPLE), model, str(folders["train"]), str(folders["test"]), "a {}", "the {}"]
    for _ in range(2):  # the second time from the cached features
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "zero-shot: " in done.stdout
        assert "of 100 images" in done.stdout


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("script", "least"), [("probe", 0.95), ("robustness", 0.9), ("own_model", 0.7), ("own_features", 0.9)]
)
def test_the_notebooks_run(script: str, least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each notebook runs in an empty folder and prints a good accuracy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEATCACHE_ROOT", str(tmp_path / "cache"))
    scope = runpy.run_path(str(EXAMPLE.parent / f"{script}.py"))
    if script == "robustness":
        assert max(row["digits:top1"] for row in scope["rows"]) >= least
        assert scope["best"].alpha > 0
    elif script == "own_features":
        assert scope["search"].score(scope["X_test"], scope["y_test"]) >= least
    else:
        assert scope["ridge"].score(*scope["test"].numpy()) >= least
