"""``featcache evaluate`` beyond tables: groups, intervals, samples, confusion counts, projections; under torchrun."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import NumpyDataset, NumpyEncoder
from pyarrow import parquet

import featcache
from featcache.cli.main import main
from featcache.datasets import SampleIndex
from featcache.errors import FeatcacheWarning
from featcache.prompts import load_objectnet
from heads import KNN, NearestMean, Ridge, compare, evaluate, load, save

ROOT = Path(__file__).parents[3]
CLASSES = ("zero", "one", "two", "three", "four", "five")
STORES = ("shapes/test", "shapes-noisy/test", "shapes-dark/test")


class Shapes(NumpyDataset):
    """Pixels around one picture per class, and the camera that took them."""

    classes: tuple[str, ...] = CLASSES

    def __init__(self, name: str, split: str, n: int, noise: float, seed: int) -> None:
        super().__init__(n)
        self.name, self.split = name, split
        rng, means = np.random.default_rng(seed), np.random.default_rng(0).uniform(0, 255, (6, 4, 4, 3))
        self.labels, self.cameras = rng.integers(0, 6, n), rng.integers(0, 3, n)
        spread = noise * (1 + self.cameras)[:, None, None, None]
        self.pixels = np.clip(means[self.labels] + spread * rng.normal(size=(n, 4, 4, 3)), 0, 255).astype(np.uint8)

    @property
    def index(self) -> SampleIndex:
        n = len(self.labels)
        ids, sizes = [f"{self.name}-{row:04d}" for row in range(n)], np.full(n, 48)
        return SampleIndex(ids, sizes, self.stamps, self.labels, self.classes, metadata={"camera": self.cameras})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A test split and two shifts encoded, three heads fitted."""
    root, encoder = tmp_path_factory.mktemp("root"), NumpyEncoder()
    train = featcache.encode(Shapes("shapes", "train", 300, 30, 1), model=encoder, root=root)
    for seed, (name, noise) in enumerate((("shapes", 30), ("shapes-noisy", 45), ("shapes-dark", 60))):
        featcache.encode(Shapes(name, "test", 500, noise, 7 + seed), model=encoder, root=root, chunk_rows=128)
    save(Ridge().fit(train), root / "ridge.safetensors")
    save(NearestMean().fit(train), root / "mean.safetensors")
    save(KNN(n_neighbors=5).fit(train), root / "knn.safetensors")
    return root


@pytest.fixture
def cli(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setenv("FEATCACHE_ROOT", str(root))
    monkeypatch.chdir(tmp_path)
    for head in ("mean", "ridge", "knn"):
        os.symlink(root / f"{head}.safetensors", tmp_path / f"{head}.safetensors")

    def run(*arguments: str, as_json: bool = True) -> tuple[int, Any, str]:
        code = main([*arguments, *(["--json"] if as_json else [])])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if as_json and captured.out else captured.out, captured.err

    return run


def cameras() -> np.ndarray:
    return Shapes("shapes-dark", "test", 500, 60, 9).cameras


def test_worst_domain_and_worst_class(cli: Any) -> None:
    command = ("evaluate", "mean.safetensors", "ridge.safetensors", "--on", *STORES, "--group", "label")
    code, rows, error = cli(*command)
    assert code == 0, error
    for row in rows:
        by_class = row["shapes:group_top1"]
        assert set(by_class) == set(CLASSES)
        assert np.mean(list(by_class.values())) == pytest.approx(row["shapes:mean_per_class_recall"])
        shifted = [row["shapes-noisy:top1"], row["shapes-dark:top1"]]
        assert row["shifted_worst_top1"] == min(shifted)
        assert row["shifted_mean_top1"] == pytest.approx(np.mean(shifted))
    code, text, _ = cli(*command, "--reference", "shapes-dark", as_json=False)
    assert code == 0
    assert "worst domain of ridge: shapes-noisy" in text
    assert "worst group of nearest_mean on shapes-dark: " in text
    code, [row, _], error = cli(*command[:-1], "camera")
    assert code == 0, error
    assert row["shapes-dark:group_rows"] == {str(c): n for c, n in enumerate(np.bincount(cameras()))}
    assert row["shapes-dark:worst_group"] == "2"  # it adds three times the noise
    code, _, error = cli(*command[:-1], "lens")
    assert code == 2
    assert "no metadata column 'lens'; expected one of camera, label" in error


def test_intervals_and_files(cli: Any, root: Path) -> None:
    heads = ("mean.safetensors", "ridge.safetensors", "--alphas", "0.5")
    for name in ("s.npz", "s.parquet"):
        kind = name[1:]
        files = ("--per-sample", name, "--confusion", f"c{kind}", "--intervals", "200")
        code, rows, error = cli("evaluate", *heads, "--on", *STORES[:2], *files)
        assert code == 0, error
    low, high = rows[2]["shapes:top1_interval"]
    assert low < rows[2]["shapes:top1"] < high
    _, text, _ = cli("evaluate", *heads, "--on", STORES[0], "--intervals", "200", as_json=False)
    assert f"on shapes: top1 {100 * low:.1f} to {100 * high:.1f} %, nll " in text
    samples, counts = np.load("s.npz"), np.load("c.npz")
    assert samples["heads"].tolist() == ["nearest_mean", "ridge", "nearest_mean+ridge"]
    assert samples["alphas"][2] == 0.5
    table, pairs = parquet.read_table("s.parquet").to_pandas(), parquet.read_table("c.parquet").to_pandas()
    assert len(table) == 3 * 2 * 500
    store: Any = featcache.open_store(featcache.find_store("shapes/test", root).path)
    for h, (row, alpha) in enumerate(zip(rows, (None, None, 0.5), strict=True)):
        assert samples["shapes/nll"][h].mean(dtype=float) == pytest.approx(row["shapes:nll"], rel=1e-6)
        assert counts["shapes"][h].trace() / 500 == pytest.approx(row["shapes:top1"])
        own = table[(table.store == "shapes") & (table["head"] == row["head"])]
        assert (own["rank"].to_numpy() == samples["shapes/rank"][h]).all()
        assert own["id"].tolist() == store.ids == samples["shapes/ids"].tolist()
        assert own["class"].tolist() == [store.classnames[label] for label in store.labels]
        assert own.alpha.isna().all() if alpha is None else (own.alpha == alpha).all()
        some = pairs[(pairs.store == "shapes-noisy") & (pairs["head"] == row["head"])]
        rebuilt = np.zeros((6, 6), int)
        rebuilt[some.label, some.predicted] = some["count"]
        np.testing.assert_array_equal(rebuilt, counts["shapes-noisy"][h])
        assert all(store.classnames[i] == name for i, name in zip(some.predicted, some.predicted_class, strict=True))
    code, _, error = cli("evaluate", "mean.safetensors", "--on", STORES[0], "--per-sample", "s.csv")
    assert code == 2
    assert "must end in .npz or .parquet" in error


def test_projections_by_file_for_one_data_set(cli: Any, root: Path) -> None:
    parity = {"even": ["zero", "two", "four"], "odd": [1, 3, 5]}
    Path("parity.json").write_text(json.dumps(parity))
    command = ("evaluate", "ridge.safetensors", "--on", *STORES[:2], "--projection")
    code, [row], error = cli(*command, "shapes=parity.json")
    assert code == 0, error
    store: Any = featcache.find_store("shapes/test", root)
    guess = load(root / "ridge.safetensors").logits(store.numpy()[0])
    even = guess[:, ::2].max(1) >= guess[:, 1::2].max(1)
    assert row["shapes:top1"] == ((store.labels % 2 == 0) == even).mean()
    assert row["shapes:top1"] > 0.9
    noisy: Any = featcache.find_store("shapes-noisy/test", root)
    (plain,) = evaluate([load(root / "ridge.safetensors")], [noisy])
    assert row["shapes-noisy:top1"] == plain["shapes-noisy:top1"]  # six classes as ever
    code, _, error = cli(*command, "mnist=parity.json")
    assert code == 2
    assert "no data set 'mnist' among shapes, shapes-noisy" in error
    code, _, error = cli(*command, "parity.json", "shapes=parity.json")
    assert code == 2
    assert "name the data set for each" in error
    Path("classes.txt").write_text("\n".join(CLASSES))
    code, _, error = cli(*command, "shapes=parity.json", "--class-subset", "shapes=classes.txt")
    assert code == 2
    assert "already" in error
    code, _, error = cli("evaluate", "ridge.safetensors", "--on", STORES[0], "--class-subset", "imagenet-r")
    assert code == 2
    assert "imagenet-r is a subset of ImageNet's 1,000 classes, and ridge has 6" in error


def test_two_processes_equal_one(cli: Any, root: Path, tmp_path: Path) -> None:
    """Counts exactly, sums up to their rounding, and each sample in its place."""
    heads = ("mean.safetensors", "ridge.safetensors")
    arguments = ["evaluate", *heads, "knn.safetensors", "--on", *STORES, "--group", "label", "--json"]
    files = ["--per-sample", "two.npz", "--confusion", "two_counts.npz", "--results", "two.jsonl"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(
        [*torchrun, "-m", "featcache", *arguments, *files], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    together = json.loads(ran.stdout)
    assert len(Path("two.jsonl").read_text().splitlines()) == 3  # rank 0 alone writes
    code, alone, error = cli(*arguments[:-1], "--per-sample", "one.npz", "--confusion", "one_counts.npz")
    assert code == 0, error
    for two, one in zip(together, alone, strict=True):
        assert two.keys() == one.keys()
        for key, value in one.items():
            if key.endswith(("top1", "top5", "recall", "rows", "worst_group", "domain", "head")):
                assert two[key] == value, key
            elif isinstance(value, float):
                assert two[key] == pytest.approx(value, rel=1e-6), key  # products of other shapes round otherwise
    for name in ("rank", "labels", "rows"):
        np.testing.assert_array_equal(np.load("two.npz")[f"shapes/{name}"], np.load("one.npz")[f"shapes/{name}"])
    np.testing.assert_allclose(np.load("two.npz")["shapes/nll"], np.load("one.npz")["shapes/nll"], rtol=1e-6, atol=5e-7)
    np.testing.assert_array_equal(np.load("two_counts.npz")["shapes"], np.load("one_counts.npz")["shapes"])


def test_python_and_command_line_agree(cli: Any, root: Path) -> None:
    code, rows, error = cli("evaluate", "mean.safetensors", "knn.safetensors", "--on", *STORES)
    assert code == 0, error
    stores = [featcache.find_store(name, root) for name in STORES]
    wanted = evaluate([load(root / "mean.safetensors"), load(root / "knn.safetensors")], stores)
    assert [row["shapes-dark:nll"] for row in rows] == [row["shapes-dark:nll"] for row in wanted]


def test_two_heads_compared(cli: Any, root: Path) -> None:
    command = ("compare", "mean.safetensors", "ridge.safetensors", *STORES[:2], "--draws", "200", "--group", "camera")
    code, records, error = cli(*command)
    assert code == 0, error
    stores = [featcache.find_store(name, root) for name in STORES[:2]]
    wanted = compare(
        load(root / "mean.safetensors"), load(root / "ridge.safetensors"), stores, draws=200, groups=["camera"]
    )
    assert records == wanted
    code, text, _ = cli(*command, as_json=False)
    assert code == 0
    assert "shapes, 500 rows; 95 % intervals of ridge minus nearest_mean" in text
    assert "McNemar's exact p = " in text
    assert {line.split()[-1] for line in text.splitlines() if "top1" in line} == {"points"}
    assert text.count("  2: ") == 2  # a line for each camera and store
    code, _, error = cli(*command[:3], "shapes/train", "--level", "2")
    assert code == 2
    assert "level 2.0" in error


def test_objectnets_own_mapping_files(cli: Any, root: Path) -> None:
    """Their four files, made small: the lines of the label list are in another order than the classes."""
    files = Path("objectnet/mappings")
    files.mkdir(parents=True)
    folders = {"b_box": "Box", "a_can": "Can", "c_cup": "Cup (not in ImageNet)"}
    (files / "folder_to_objectnet_label.json").write_text(json.dumps(folders))
    (files / "objectnet_to_imagenet_1k.json").write_text(json.dumps({"Box": "five; one", "Can": "four"}))
    (files / "imagenet_to_label_2012_v2").write_text("five\nfour\nthree\ntwo\none\nzero\n")
    (files / "pytorch_to_imagenet_2012_id.json").write_text(json.dumps({str(i): 5 - i for i in range(6)}))
    parsed = load_objectnet("objectnet")
    assert (parsed.classnames, parsed.imagenet) == (("Can", "Box"), ((4,), (5, 1)))
    data = Shapes("objectnet", "test", 200, 40, 3)
    keep = np.isin(data.labels, [1, 4, 5])
    data.pixels, data.stamps, data.cameras = data.pixels[keep], data.stamps[keep], data.cameras[keep]
    data.labels = np.where(data.labels[keep] == 4, 0, 1)  # as that data set labels them: sorted by folder
    data.classes = ("Can", "Box")
    store = featcache.encode(data, model=NumpyEncoder(), root=root)
    command = ("evaluate", "ridge.safetensors", "--on", "shapes/test", "objectnet/test")
    code, [row], error = cli(*command, "--projection", "objectnet=objectnet:objectnet")
    assert code == 0, error
    logits = load(root / "ridge.safetensors").logits(store.numpy()[0])
    guess = (np.maximum(logits[:, 5], logits[:, 1]) > logits[:, 4]).astype(int)
    assert row["objectnet:top1"] == pytest.approx((guess == data.labels).mean())
    code, _, error = cli(*command)
    assert code == 5
    assert "'zero'" in error
    assert "'Can', 'Box'" in error


def test_training_rows_do_not_count_in_the_means_of_shifts(cli: Any) -> None:
    on = ("--on", "shapes/test", "shapes-dark/test", "shapes/train")
    code, [row], error = cli("evaluate", "ridge.safetensors", *on)
    assert code == 0, error
    assert row["shifted_left_out"] == ["shapes/train"]
    assert row["shifted_mean_top1"] == row["shapes-dark:top1"]
    _, text, _ = cli("evaluate", "ridge.safetensors", *on, as_json=False)
    assert "reference: shapes/test (the first of --on" in text
    assert "the means of ridge leave out shapes/train" in text
    titles, _, line = text.splitlines()[:3]  # one head: no column is marked
    first, dark, _, mean = (float(value) for value in line.split()[1::2][:4])
    assert re.split(r"\s{2,}", titles.strip()) == [
        "shapes/test",
        "shapes-dark",
        "shapes/train",
        "shifted mean",
        "drop / rise",
    ]
    assert mean == dark == round(100 * row["shapes-dark:top1"], 1) != first


def test_a_metric_without_a_selection_is_refused(cli: Any) -> None:
    code, _, error = cli("evaluate", "ridge.safetensors", "--on", "shapes/test", "--metric", "nll")
    assert code == 2
    assert "--metric nll: it is what --select compares" in error


def test_stores_of_the_heads_encoder_are_preferred(cli: Any, root: Path) -> None:
    other = NumpyEncoder(1)
    other.name = "other"
    store = featcache.encode(Shapes("shapes-dark", "test", 500, 60, 9), model=other, root=root)
    try:
        code, _, error = cli("info", "shapes-dark/test")
        assert (code, "2 stores match" in error) == (3, True)
        code, [row], error = cli("evaluate", "ridge.safetensors", "--on", "shapes-dark/test")
        assert code == 0, error
        assert row["encoder"] == "numpy"
        code, _, error = cli("fit", "ridge", "shapes/train", "--select", "shapes-dark/test", "-o", "r.safetensors")
        assert code == 0, error
    finally:
        assert cli("rm", str(store.path), "--yes")[0] == 0


def test_a_sweep_on_its_training_rows_says_so(cli: Any) -> None:
    with pytest.warns(FeatcacheWarning, match="^shapes/train: --on is --train"):
        code, rows, error = cli("sweep", "ridge", "--train", "shapes/train", "--on", "shapes/train", "shapes/test")
    assert code == 0, error
    assert "1/1 ridge on shapes/train" in error
    assert rows[0]["leak"] == "shapes/train: evaluated on its training rows"
    code, rows, error = cli("sweep", "ridge", "--train", "shapes/train", "--on", "shapes/test")
    assert "leak" not in rows[0]
