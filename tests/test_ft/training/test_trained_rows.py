"""A fine-tuned head knows which samples it was trained and chosen on, whatever their split is called."""

from pathlib import Path

import numpy as np
import pytest
from clip_models import make_model, write_folder
from finetuning import N, Pictures, options

from featcache.datasets.base import SampleIndex
from featcache.encoders import load_encoder
from featcache.encoding.encode import encode
from featcache.errors import HeadError
from featcache.progress import Silent
from featcache.store import ImageStore
from ft.training.data import TrainedRows
from ft.training.loop import finetune
from heads import evaluate, load
from heads.fitted.provenance import rows_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_folder(tmp_path_factory.mktemp("model"), make_model())


class Mixed(Pictures):
    """Under another name: four pictures of the training split, two of the selection split, six new ones."""

    name, split = "others", "test"

    def __init__(self) -> None:
        parts = [Pictures().pixels[3:7], Pictures(12, 5, "val").pixels[:2], Pictures(6, 9).pixels]
        self.pixels, self.broken = np.concatenate(parts), -1
        n = len(self.pixels)
        zero = np.zeros(n, np.int64)
        names = ("cat", "crane", "crane")
        self.index = SampleIndex([f"other-{row}" for row in range(n)], zero + 3072, zero, np.arange(n) % 3, names)


def test_rows_trained_or_chosen_on_are_refused_under_any_name(model: str, tmp_path: Path) -> None:
    val = Pictures(12, 5, "val")
    run = finetune(Pictures(), model, out=tmp_path / "run", val=val, options=options(steps=6), device="cpu")
    store = encode(Mixed(), model=load_encoder(f"local-dir:{run.last}"), root=tmp_path)
    assert isinstance(store, ImageStore)
    last, best = load(run.last_head), load(run.best_head)
    with pytest.raises(HeadError, match=r"4 of the 12 rows of others/test are among those of pictures/train"):
        evaluate([last], [store])
    assert evaluate([last], [store], seen="exclude")[0]["others:n_excluded"] == 4
    hashes = [rows_of(entry) for entry in (last.provenance.fitted_on[0], best.provenance.chosen_on[0])]
    assert [len(rows) for rows in hashes if rows is not None] == [N, 12]
    assert np.isin(store.row_hashes, hashes[0]).tolist() == [True] * 4 + [False] * 8
    assert np.isin(store.row_hashes, hashes[1]).tolist() == [False] * 4 + [True] * 2 + [False] * 6
    assert last.provenance.chosen_on == []


class Killing(Silent):
    """Ends the run after two updates."""

    done = 0

    def advance(self, rows: int) -> None:
        self.done += 1
        if self.done == 2:
            raise KeyboardInterrupt


def test_a_head_records_the_rows_of_all_earlier_updates_across_restarts(model: str, tmp_path: Path) -> None:
    once = options(steps=3, save_every=1, shuffle=False)  # three batches are the N samples in order
    with pytest.raises(KeyboardInterrupt):
        finetune(Pictures(), model, out=tmp_path, options=once, device="cpu", progress=Killing())
    first = rows_of(load(tmp_path / "last_head.safetensors").provenance.fitted_on[0])
    assert first is not None
    assert 16 <= len(first) <= N
    run = finetune(Pictures(), model, out=tmp_path, options=once, device="cpu")
    rows = rows_of(load(run.last_head).provenance.fitted_on[0])
    assert rows is not None
    assert len(rows) == N
    assert set(first) <= set(rows)
    assert rows_of(load(run.start_head).provenance.fitted_on[0]) is None


def test_rows_are_unknown_if_an_earlier_attempt_kept_no_hashes() -> None:
    rows = TrainedRows(3)
    rows.add(1, b"content")
    known = rows.hashes()
    assert known is not None
    assert len(known) == 1
    rows.before = None
    assert rows.hashes() is None
