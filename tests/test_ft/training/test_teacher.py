"""The moving average that CaRot distils from: schedule, logits, and the model left unchanged."""

from pathlib import Path

import pytest
import torch
from clip_models import make_model, write_folder
from finetuning import start

from ft.regularizers.carot import SelfDistillation
from ft.training.averages import Teacher
from ft.training.data import training_batches


def test_teacher_follows_every_second_update_with_rising_momentum() -> None:
    term = SelfDistillation(start=0.2, decay=0.8, warmup=0.5, every=2)
    teacher = Teacher({"w": torch.tensor(0.0)}, term, total=8)
    expected = 0.0
    for step, value in enumerate([1.0, 9.0, 3.0, 9.0, 5.0, 9.0, 7.0, 9.0]):
        teacher.follow({"w": torch.tensor(value)}, step)
        if step % 2 == 0:
            m = {0: 0.2, 2: 0.5, 4: 0.8, 6: 0.8}[step]
            expected = m * expected + (1 - m) * value
        assert teacher.state_dict()["w"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("objective", ["contrastive", "cross_entropy"])
def test_teacher_logits_are_those_of_the_averaged_weights(objective: str, tmp_path: Path) -> None:
    model = write_folder(tmp_path / "model", make_model())
    run = start(model, objective=objective, lr=0.01, accumulate=2, regularizers={"self_distillation": 1.0})
    stepper = run.stepper
    assert stepper.teacher is not None
    batches = list(training_batches(run.dataset, run.view, run.order, range(3), "cpu", 1, 0))
    assert float(stepper.update(batches[0], 0.01).terms["self_distillation"]) == pytest.approx(0, abs=1e-7)
    assert float(stepper.update(batches[1], 0.01).terms["self_distillation"]) > 1e-5
    before = {name: value.clone() for name, value in stepper.model.trained().items()}
    taught = stepper._taught(batches[2], batches[2].parts(2))
    assert all(torch.equal(value, before[name]) for name, value in stepper.model.trained().items())
    stepper.model.take(stepper.teacher.state_dict())
    with torch.no_grad():
        features = stepper.model.image_features(batches[2].images)
        expected = stepper.objective(features, batches[2])[1]
    assert taught is not None
    torch.testing.assert_close(taught, expected)
    assert taught.shape == ((8, 8) if objective == "contrastive" else (8, 3))
