"""Multi-label metrics against scikit-learn's, with ties and unknown entries."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score, roc_auc_score

from featcache.errors import HeadError
from heads.evaluation.multilabel import multilabel_metrics
from heads.kernels.ranking import Ranked, best_thresholds, binary_nll

NAMES = ("ant", "bee", "cow", "dog")


def scored(unknown: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    targets = (rng.random((400, 4)) < (0.5, 0.2, 0.05, 0.3)).astype(np.int8)
    scores = np.round(targets + rng.normal(size=targets.shape), 1)  # many ties
    targets[rng.random(targets.shape) < unknown] = -1
    return scores, targets


def test_every_metric_is_scikit_learns() -> None:
    scores, targets = scored()
    cuts = np.array([0.3, 0.5, 0.9, -0.1])
    found, said = multilabel_metrics(scores, targets, NAMES, cuts), scores >= cuts
    wanted = {
        "map_macro": average_precision_score(targets, scores, average="macro"),
        "map_micro": average_precision_score(targets, scores, average="micro"),
        "map_weighted": average_precision_score(targets, scores, average="weighted"),
        "auroc_macro": roc_auc_score(targets, scores, average="macro"),
        "f1_macro": f1_score(targets, said, average="macro"),
        "f1_micro": f1_score(targets, said, average="micro"),
        "precision_micro": precision_score(targets, said, average="micro"),
        "recall_micro": recall_score(targets, said, average="micro"),
        "subset_accuracy": (targets == said).all(axis=1).mean(),
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-12)


def test_unknown_entries_count_for_nothing() -> None:
    scores, targets = scored(unknown=0.3)
    found = multilabel_metrics(scores, targets, NAMES)
    for column, name in enumerate(NAMES):
        known = targets[:, column] >= 0
        y, s = targets[known, column], scores[known, column]
        assert found["class_ap"][name] == pytest.approx(average_precision_score(y, s), abs=1e-12)
        assert found["class_auroc"][name] == pytest.approx(roc_auc_score(y, s), abs=1e-12)
        assert found["class_f1"][name] == pytest.approx(f1_score(y, s >= 0), abs=1e-12)
    known = targets >= 0
    assert found["map_micro"] == pytest.approx(average_precision_score(targets[known], scores[known]), abs=1e-12)
    p = 1 / (1 + np.exp(-scores[known]))
    wanted = -np.where(targets[known] == 1, np.log(p), np.log1p(-p)).mean()
    assert binary_nll(scores, targets) == pytest.approx(wanted, rel=1e-12)


def test_classes_without_a_positive_are_left_out_and_named() -> None:
    scores, targets = scored()
    targets[:, 2] = np.where(np.arange(400) % 2, 0, -1)
    targets[:, 3] = 1
    found = multilabel_metrics(scores, targets, NAMES)
    assert (found["left_out"], found["ap_classes"], found["auroc_classes"]) == (["cow"], 3, 2)
    assert found["class_ap"]["cow"] is found["class_auroc"]["cow"] is found["class_auroc"]["dog"] is None
    assert found["map_macro"] == pytest.approx(np.mean([found["class_ap"][name] for name in ("ant", "bee", "dog")]))


def test_thresholds_have_the_largest_f1_of_all() -> None:
    scores, targets = scored(unknown=0.2)
    for per_class in (True, False):
        cuts = best_thresholds(scores, targets, per_class=per_class)
        every = np.linspace(-4, 5, 1801)
        if per_class:
            for column in range(4):
                known = targets[:, column] >= 0
                y, s = targets[known, column], scores[known, column]
                best = max(f1_score(y, s >= cut, zero_division=0) for cut in every[::5])
                assert f1_score(y, s >= cuts[column]) == pytest.approx(best, abs=1e-12)
        else:
            known = targets >= 0
            best = max(f1_score(targets[known], scores[known] >= cut, zero_division=0) for cut in every[::5])
            assert f1_score(targets[known], scores[known] >= cuts[0]) == pytest.approx(best, abs=1e-12)
            assert len(set(cuts)) == 1


def test_a_class_without_positives_or_negatives_takes_the_common_threshold() -> None:
    scores, targets = scored()
    targets[:, 0], targets[:, 1] = 0, 1
    cuts, common = best_thresholds(scores, targets), best_thresholds(scores, targets, per_class=False)
    assert cuts[0] == cuts[1] == common[0]
    assert (best_thresholds(scores, 0 * targets) == np.inf).all()


def test_rounding_never_moves_a_threshold_above_its_score() -> None:
    close = np.array([1.0, np.nextafter(1.0, 0.0)])
    assert close[1] < Ranked.of(close, np.array([1, 0])).best_threshold() <= close[0]


@pytest.mark.parametrize(
    ("scores", "targets", "message"),
    [
        (np.eye(2), 2 * np.eye(2, dtype=int), "the target of row 0 for class 0 is 2; expected 1, 0 or -1"),
        (np.eye(2), 0.5 * np.eye(2), "is 0.5; expected 1, 0 or -1"),
        (np.full((2, 2), np.nan), np.eye(2, dtype=int), r"scores \(2, 2\) with 4 NaN"),
        (np.eye(2), np.eye(2, 1, dtype=int), r"targets \(2, 1\) and 2 class names do not match"),
    ],
)
def test_targets_and_scores_without_a_ranking_are_refused(
    scores: np.ndarray, targets: np.ndarray, message: str
) -> None:
    """A target of 2 made an average precision of 2, and NaN ranked somewhere."""
    with pytest.raises(HeadError, match=message):
        multilabel_metrics(scores, targets, ("cat", "dog"))


def test_unknown_targets_may_be_nan_and_scores_a_list() -> None:
    scores, targets = np.array([[2.0, -1.0], [1.0, -2.0], [-1.0, 3.0]]), np.array([[1, 0], [0, -1], [1, 1]])
    found = multilabel_metrics(scores.tolist(), np.where(targets < 0, np.nan, targets), ("cat", "dog"))
    assert found == multilabel_metrics(scores, targets, ("cat", "dog"))
