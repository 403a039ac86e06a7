"""Stored v0: the second run skips the frozen tower and follows the same trajectory."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from finetuning import options, start

from featcache.errors import StoreCorruptError, StoreIncompleteError, TrainingError
from featcache.store import find_store, list_stores, open_prior_store, verify
from ft.prior.prior import OnlinePrior, StoredPrior
from ft.regularizers.base import Step
from ft.regularizers.lipsum import Lipsum
from ft.training.loop import finetune

ROOT = Path(__file__).parents[3]
N, DIM, PIXELS, BATCH = 50, 12, 8, 16
IDENTITY = {"tower": {"weights": "abc", "precision": "fp32"}, "view": {"kind": "crop", "seed": 0}, "dataset": "d"}

LIPSUM = {"weight": 0.1, "mode": "exact", "bank": 200}


class Tower:
    """A frozen tower that counts the images it sees."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.weights = torch.randn(PIXELS, DIM, generator=generator)
        self.images = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.images += len(images)
        return torch.tanh(images @ self.weights)


def views(epoch: int) -> torch.Tensor:
    """(N, PIXELS): the augmented view of every sample in an epoch."""
    return torch.randn(N, PIXELS, generator=torch.Generator().manual_seed(100 + epoch))


class Uneven(Tower):
    """A tower whose last bits depend on the batch size, as those of real towers may."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return super().__call__(images) + 1e-6 * len(images)


def batches(epoch: int, drop_last: bool = False) -> list[np.ndarray]:
    order = np.random.default_rng(epoch).permutation(N)
    found = [order[start : start + BATCH] for start in range(0, N, BATCH)]
    return [rows for rows in found if len(rows) == BATCH or not drop_last]


def train(prior: OnlinePrior, epochs: int = 3, drop_last: bool = False) -> list[float]:
    """Fine-tune a small tower with Lipsum regularisation; returns every loss."""
    torch.manual_seed(0)
    model = torch.nn.Linear(PIXELS, DIM)
    lipsum = Lipsum.exact(torch.randn(40, DIM, generator=torch.Generator().manual_seed(2)), 10.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for epoch in range(epochs):
        for rows in batches(epoch, drop_last):
            images = views(epoch)[rows]
            features = model(images)
            loss = features.square().mean() + lipsum(
                Step(features=features, frozen_features=prior.features(rows, epoch, images))
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    prior.close()
    return losses


def stored(root: Path, network: Tower | None = None, one_view: bool = False, **changes: object) -> StoredPrior:
    return StoredPrior(network or Tower(), IDENTITY | changes, N, DIM, root, one_view=one_view)


@pytest.mark.parametrize("drop_last", [False, True])
def test_second_run_skips_the_tower_and_has_the_same_losses(tmp_path: Path, drop_last: bool) -> None:
    online = train(OnlinePrior(Tower()), drop_last=drop_last)
    towers = [Tower(), Tower()]
    first, second = (train(stored(tmp_path, tower), drop_last=drop_last) for tower in towers)
    assert first == online
    assert second == online
    assert towers[0].images == 3 * (48 if drop_last else 50)
    assert towers[1].images == 0


def test_store_holds_the_towers_float32_features(tmp_path: Path) -> None:
    train(stored(tmp_path))
    entries = list_stores(tmp_path)
    assert [entry.reference for entry in entries] == [f"priors/prior-epoch{epoch}@frozen" for epoch in range(3)]
    for epoch, entry in enumerate(entries):
        store = open_prior_store(entry.path)
        assert store.valid.all()
        assert store.info["recorded"] == N
        expected = torch.cat([Tower()(views(epoch)[rows]) for rows in batches(epoch)]).numpy()
        assert np.array_equal(store.gather(np.concatenate(batches(epoch))), expected)
        assert verify(entry.path, deep=True).ok
        assert sorted(path.name for path in Path(entry.path).glob("journal*")) == []
    assert find_store("priors/prior-epoch1", tmp_path).kind == "priors"


def test_another_tower_precision_view_seed_or_data_set_is_another_store(tmp_path: Path) -> None:
    train(stored(tmp_path), 1)
    for change in (
        {"tower": {"weights": "abd", "precision": "fp32"}},
        {"tower": {"weights": "abc", "precision": "bf16"}},
        {"view": {"kind": "crop", "seed": 1}},
        {"dataset": "e"},
    ):
        tower = Tower()
        train(stored(tmp_path, tower, **change), 1)
        assert tower.images == N
    assert len(list_stores(tmp_path)) == 5


def test_files_that_were_edited_in_place_are_computed_again(tmp_path: Path) -> None:
    first, second = np.arange(N), np.arange(N) + (np.arange(N) == 7)  # one file of equal size, written later
    computed = []
    for stamps in (None, first, first, second, second, first):  # None: a store of earlier versions, with no times
        tower = Tower()
        prior = StoredPrior(tower, IDENTITY, N, DIM, tmp_path, stamps=stamps)
        train(prior, 1)
        computed.append(tower.images)
    assert computed == [N, 0, 0, N, 0, 0]
    assert all(verify(entry.path, deep=True).ok for entry in list_stores(tmp_path))


def test_a_batch_with_missing_rows_is_computed_and_recorded(tmp_path: Path) -> None:
    train(stored(tmp_path), 1, drop_last=True)  # two rows were never seen
    tower = Tower()
    prior = stored(tmp_path, tower)
    assert train(prior, 1) == train(OnlinePrior(Tower()), 1)
    assert (prior.read, prior.computed, tower.images) == (48, 2, 2)
    prior = stored(tmp_path, tower := Tower())
    assert train(prior, 1) == train(OnlinePrior(Tower()), 1)
    assert (prior.read, tower.images) == (50, 0)
    mixed = np.arange(10)
    prior = stored(tmp_path / "other", tower := Tower())
    prior.features(mixed[:4], 0, views(0)[:4])
    features = prior.features(mixed, 0, views(0)[:10])
    assert tower.images == 14
    assert torch.equal(features, Tower()(views(0)[:10]))
    prior.close()
    assert open_prior_store(list_stores(tmp_path / "other")[0].path).valid.sum() == 10


def test_stored_rows_are_used_bit_for_bit_in_mixed_batches(tmp_path: Path) -> None:
    """The recording run and the reading runs see the same bits."""
    rows = np.arange(10)
    prior = stored(tmp_path, Uneven())
    few = prior.features(rows[:4], 0, views(0)[:4])
    mixed = prior.features(rows, 0, views(0)[:10])
    assert torch.equal(mixed[:4], few)
    assert torch.equal(mixed[4:], Uneven()(views(0)[:10])[4:])
    prior.close()
    later = stored(tmp_path, tower := Uneven())
    assert torch.equal(later.features(rows, 0, views(0)[:10]), mixed)
    assert tower.images == 0


@pytest.mark.parametrize("drop_last", [False, True])
def test_epochs_that_show_the_same_view_share_one_store(tmp_path: Path, drop_last: bool) -> None:
    towers, seen = [Uneven(), Uneven()], []
    for tower in towers:
        prior = stored(tmp_path, tower, one_view=True)
        steps = [(epoch, rows) for epoch in range(3) for rows in batches(epoch, drop_last)]
        seen.append([prior.features(rows, epoch, views(0)[rows]) for epoch, rows in steps])
        prior.close()
    (entry,) = list_stores(tmp_path)
    assert entry.reference == "priors/prior-epoch0@frozen"
    assert open_prior_store(entry.path).valid.all()
    assert all(torch.equal(one, two) for one, two in zip(*seen, strict=True))
    assert towers[0].images == N if not drop_last else N < towers[0].images < 3 * 48
    assert towers[1].images == 0


def test_one_view_is_the_first_epoch_of_many(tmp_path: Path) -> None:
    train(stored(tmp_path), 1)
    tower = Tower()
    prior = stored(tmp_path, tower, one_view=True)
    prior.features(np.arange(N), 7, views(0))
    assert tower.images == 0


def test_a_kill_while_a_chunk_is_completed_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(stored(tmp_path), 1, drop_last=True)
    prior = stored(tmp_path)
    prior.features(batches(0)[-1], 0, views(0)[batches(0)[-1]])

    def killed(*arguments: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("featcache.store.writer.StoreWriter.write_chunk", killed)
        with pytest.raises(KeyboardInterrupt):
            prior.close()
    tower = Tower()
    assert train(stored(tmp_path, tower), 1) == train(OnlinePrior(Tower()), 1)
    assert tower.images == 0


def test_features_get_no_gradient(tmp_path: Path) -> None:
    tower = Tower()
    tower.weights.requires_grad_()
    for prior in (OnlinePrior(tower), stored(tmp_path, tower)):
        assert not prior.features(np.arange(3), 0, views(0)[:3]).requires_grad


def test_unclosed_run_loses_at_most_one_step(tmp_path: Path) -> None:
    prior = stored(tmp_path)
    for rows in batches(0):
        prior.features(rows, 0, views(0)[rows])
    (entry,) = list_stores(tmp_path)
    assert not entry.finished
    with pytest.raises(StoreIncompleteError, match="run the same finetune command again"):
        open_prior_store(entry.path)
    tower = Tower()
    assert train(stored(tmp_path, tower), 1) == train(OnlinePrior(Tower()), 1)
    assert tower.images == len(batches(0)[-1])


def test_torn_journal_rows_are_ignored(tmp_path: Path) -> None:
    prior = stored(tmp_path)
    for rows in batches(0):
        prior.features(rows, 0, views(0)[rows])
    (entry,) = list_stores(tmp_path)
    journal = np.memmap(entry.path / "journal.rows", "<f4", "r+", shape=(N, DIM))  # type: ignore[call-overload]
    torn = batches(0)[0][:3]
    journal[torn, 0] += 1
    journal.flush()
    tower = Tower()
    assert train(stored(tmp_path, tower), 1) == train(OnlinePrior(Tower()), 1)
    assert tower.images == BATCH + len(batches(0)[-1])


KILLED = """
import sys, time
from pathlib import Path
from test_ft.prior import test_frozen as t
class Slow(t.Tower):
    def __call__(self, images):
        time.sleep(0.03)
        return super().__call__(images)
t.train(t.stored(Path(sys.argv[1]), Slow()), epochs=20)
"""


@pytest.mark.parametrize("delay", [0.1, 0.4, 0.9])
def test_next_run_resumes_a_killed_run(tmp_path: Path, delay: float) -> None:
    environment = {**os.environ, "PYTHONPATH": "tests:."}
    run = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("priors/*/*/journal.marks")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(delay)
    run.send_signal(signal.SIGKILL)
    run.wait()
    recorded = sum(not entry.finished or entry.rows == N for entry in list_stores(tmp_path))
    assert recorded >= 1
    tower = Tower()
    assert train(stored(tmp_path, tower), 20) == train(OnlinePrior(Tower()), 20)
    assert tower.images < 20 * N
    assert all(entry.finished and verify(entry.path, deep=True).ok for entry in list_stores(tmp_path))


def test_two_processes_of_one_machine_record_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ft.prior.prior.rank_and_size", lambda: (0, 2))
    priors = [stored(tmp_path), stored(tmp_path)]
    for rows in batches(0):
        for rank, prior in enumerate(priors):
            prior.features(rows[rank::2], 0, views(0)[rows[rank::2]])
    monkeypatch.setattr("ft.prior.prior.rank_and_size", lambda: (1, 2))
    priors[1].close()
    assert not list_stores(tmp_path)[0].finished
    monkeypatch.setattr("ft.prior.prior.rank_and_size", lambda: (0, 2))
    priors[0].close()
    assert open_prior_store(list_stores(tmp_path)[0].path).valid.all()


def test_processes_read_what_others_recorded_in_earlier_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ft.prior.prior.rank_and_size", lambda: (0, 2))
    towers = [Uneven(), Uneven()]
    first, second = (stored(tmp_path, tower, one_view=True) for tower in towers)
    shares = np.arange(0, N, 2), np.arange(1, N, 2)
    told = [prior.features(rows, 0, views(0)[rows]) for prior, rows in zip((first, second), shares, strict=True)]
    for prior in (first, second):
        prior.settle()
    assert torch.equal(second.features(shares[0], 1, views(0)[::2]), told[0])
    assert torch.equal(first.features(shares[1], 1, views(0)[1::2]), told[1])
    assert [tower.images for tower in towers] == [N // 2, N // 2]


def test_first_process_keeps_rows_that_only_others_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = stored(tmp_path)
    prior.features(np.arange(40), 0, views(0)[:40])
    prior.close()
    monkeypatch.setattr("ft.prior.prior.rank_and_size", lambda: (0, 2))
    first, second = stored(tmp_path), stored(tmp_path)
    first.features(np.arange(10), 0, views(0)[:10])
    second.features(np.arange(40, N), 0, views(0)[40:])
    for prior in (first, second):
        prior.settle()
    first.close()
    assert open_prior_store(list_stores(tmp_path)[0].path).valid.all()


def test_damage_is_refused_and_can_be_repaired(tmp_path: Path, run: Callable[..., int]) -> None:
    train(stored(tmp_path), 1)
    (entry,) = list_stores(tmp_path)
    chunk = Path(entry.path / "features" / "c" / "0" / "0")
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(StoreCorruptError, match="--repair"):
        train(stored(tmp_path), 1)
    assert run("verify", str(entry.path), "--repair") == 4
    tower = Tower()
    assert train(stored(tmp_path, tower), 1) == train(OnlinePrior(Tower()), 1)
    assert tower.images == N
    assert verify(entry.path, deep=True).ok


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., int]:
    from featcache.cli.main import main

    return lambda *arguments: main(list(arguments))


def test_late_process_loses_nothing_if_all_settle_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the last step are pending when training ends; the first process writes chunks of all rows."""
    monkeypatch.setattr("ft.prior.prior.rank_and_size", lambda: (0, 2))
    priors = [stored(tmp_path), stored(tmp_path)]
    for rank, prior in enumerate(priors):
        prior.features(np.arange(rank, N, 2), 0, views(0)[rank::2])
    for prior in priors:
        prior.settle()
    priors[0].close()  # before the other one
    assert open_prior_store(list_stores(tmp_path)[0].path).valid.all()
    priors[1].close()
    assert open_prior_store(list_stores(tmp_path)[0].path).valid.all()


@pytest.mark.parametrize(("name", "kind"), [("online", OnlinePrior), ("store", StoredPrior)])
def test_the_prior_option_decides_between_online_and_stored(name: str, kind: type[OnlinePrior]) -> None:
    assert isinstance(start("tiny", regularizers={"feature_distillation": 1.0}, prior=name).stepper.prior, kind)
    with pytest.raises(TrainingError, match="'online' or 'store'"):
        options(prior="cached")


def test_the_training_loop_follows_the_same_trajectory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`finetune` with v0 online, recorded, and read, the frozen tower gone: one sequence of losses, bit for bit."""
    options = {"steps": 4, "batch_size": 8, "log_every": 1, "lr": 1e-4, "regularizers": {"lipsum": LIPSUM}}
    logs = []
    for number, prior in enumerate(("online", "store", "store")):
        if number == 2:
            monkeypatch.setattr("ft.training.model.Frozen.image_features", None)
        out = tmp_path / f"run{number}"
        finetune("digits", "tiny", out=out, options={**options, "prior": prior}, root=tmp_path / "cache", device="cpu")
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        logs.append([(line["step"], line["loss"], line["terms"]) for line in lines])
    assert len(logs[0]) == 4
    assert logs[0][-1][2]["lipsum"] > 0
    assert logs[0] == logs[1] == logs[2]
