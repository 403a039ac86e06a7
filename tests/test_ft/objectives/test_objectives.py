import math

import pytest
import torch
import torch.nn.functional as F
from golden import LABELS, SCALE, V0, WEIGHTS, V, rows, sines

from featcache.errors import TrainingError
from ft.objectives import caption_ids, contrastive, cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_definitions_of_label_smoothing_are_equal(smoothing: float) -> None:
    logits = SCALE * V @ WEIGHTS.T
    logp, classes = logits.log_softmax(-1), logits.shape[1]
    targets = (1 - smoothing) * F.one_hot(LABELS, classes).double() + smoothing / classes
    smoothed_targets = -(targets * logp).sum(-1).mean()
    two_losses = (1 - smoothing) * F.nll_loss(logp, LABELS) + smoothing * -logp.mean(-1).mean()
    for other in (smoothed_targets, two_losses, F.cross_entropy(logits, LABELS, label_smoothing=smoothing)):
        torch.testing.assert_close(cross_entropy(logits, LABELS, smoothing), other, rtol=1e-13, atol=0)


def test_smoothing_over_the_other_classes_is_the_same_family() -> None:
    logits, ls, classes = SCALE * V @ WEIGHTS.T, 0.1, 3
    others = (1 - ls) * F.one_hot(LABELS, classes) + ls / (classes - 1) * (1 - F.one_hot(LABELS, classes))
    expected = -(others * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(cross_entropy(logits, LABELS, ls * classes / (classes - 1)), expected)


def test_cross_entropy_of_saturated_half_precision_is_finite_and_wide() -> None:
    value = cross_entropy(torch.tensor([[100.0, 0.0, 0.0]], dtype=torch.float16), torch.tensor([1]))
    assert value.dtype == torch.float32
    assert value.item() == 100.0


def test_cross_entropy_refuses_mismatched_shapes() -> None:
    with pytest.raises(TrainingError, match=r"\[0, 1\)"):
        cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), 1.0)
    with pytest.raises(TrainingError, match=r"\(3,\)"):
        cross_entropy(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))


def test_contrastive_is_plain_infonce_where_no_caption_repeats() -> None:
    logits, targets = 7.0 * V @ V0.T, torch.arange(4)
    plain = 0.5 * (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets))
    for captions in (None, torch.tensor([3, 1, 4, 15])):
        torch.testing.assert_close(contrastive(2 * V, 3 * V0, 7.0, captions), plain)


def five_of_each() -> tuple[torch.Tensor, torch.Tensor]:
    """Two captions with five pairs each, and every image at its caption: the loss should be 0."""
    captions = torch.arange(2).repeat_interleave(5)
    return torch.eye(2, dtype=torch.float64)[captions], captions


def test_plain_targets_reproduce_the_floor_of_ln_5() -> None:
    features, _ = five_of_each()
    assert contrastive(features, features, 100.0).item() == pytest.approx(math.log(5), rel=1e-12)


def test_identical_captions_are_positives() -> None:
    features, captions = five_of_each()
    assert contrastive(features, features, 100.0, captions).item() == pytest.approx(0, abs=1e-12)


def test_contrastive_follows_its_formula() -> None:
    captions = torch.tensor([0, 1, 0, 0])
    logits = 7.0 * V @ V0.T
    total = 0.0
    for scores in (logits, logits.T):
        for i in range(4):
            same = [j for j in range(4) if captions[j] == captions[i]]
            others = [k for k in range(4) if captions[k] != captions[i]]
            total += sum(math.log1p(sum(math.exp(scores[i, k] - scores[i, j]) for k in others)) for j in same) / len(
                same
            )
    assert contrastive(V, V0, 7.0, captions).item() == pytest.approx(total / 8, rel=1e-12)


def test_uniform_soft_targets_equal_plain_targets() -> None:
    _, captions = five_of_each()
    images, texts = rows(sines((10, 4), 0.2)), rows(sines((2, 4), 1.1))[captions]
    logits = 7.0 * images @ texts.T
    same = (captions[:, None] == captions).double()
    soft = 0.5 * (F.cross_entropy(logits, same / 5) + F.cross_entropy(logits.T, same / 5))
    torch.testing.assert_close(soft, contrastive(images, texts, 7.0))
    assert contrastive(images, texts, 7.0, captions) < soft - 0.5


@pytest.mark.parametrize("captions", [None, [0, 1, 0, 0], [5, 5, 5, 5]])
def test_contrastive_gradients(captions: list[int] | None) -> None:
    ids = None if captions is None else torch.tensor(captions)
    scale = torch.tensor(7.0, dtype=torch.float64)
    inputs = [value.clone().requires_grad_() for value in (V, V0, scale)]
    assert torch.autograd.gradcheck(lambda v, t, s: contrastive(v, t, s, ids), inputs)


def test_one_caption_for_all_gives_neither_loss_nor_gradient() -> None:
    features = V.clone().requires_grad_()
    value = contrastive(features, V0, 100.0, torch.zeros(4, dtype=torch.int64))
    value.backward()
    assert value.item() == 0
    assert features.grad is not None
    assert (features.grad == 0).all()


def test_caption_ids_tell_captions_apart() -> None:
    ids = caption_ids(["a photo of a 1.", "a photo of a 7.", "a photo of a 1.", ""])
    assert (ids[:, None] == ids[None]).sum() == 6
    assert ids.min() >= 0
    assert ids.tolist() == caption_ids(["a photo of a 1.", "a photo of a 7.", "a photo of a 1.", ""]).tolist()


def test_contrastive_refuses_mismatched_shapes() -> None:
    with pytest.raises(TrainingError, match="two of"):
        contrastive(V, V0[:3], 1.0)
    with pytest.raises(TrainingError, match="for 4 pairs"):
        contrastive(V, V0, 1.0, torch.zeros(3, dtype=torch.int64))
