from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.toys import halves, linear_model, small_network, wrap
from toolkit.artifacts import TorchModel
from toolkit.attacks.threat import PgdPlan, ThreatModel
from toolkit.config import TrainConfig
from toolkit.errors import ToolkitError
from toolkit.training import teacher as teacher_module
from toolkit.training.loop import train
from toolkit.training.teacher import Teacher, check_teacher

PLAN = PgdPlan("pixel", ThreatModel("linf", 0.1, "pixels", clip=True), 20, 0.0125, random_start=True)
SPLIT, VALIDATION = halves(300, seed=1), halves(64, seed=2)


@pytest.fixture
def model() -> TorchModel:
    torch.manual_seed(0)
    return wrap(small_network(batch_norm=True), classes=2, shape=(1, 8, 8))


def test_soft_labels_are_the_teachers_logits(model: TorchModel) -> None:
    made = Teacher(model, "float32")
    images = SPLIT.take(np.arange(300)).images
    expected = model.predict(images)
    assert torch.allclose(made.logits(images).cpu(), expected, atol=1e-5)
    assert made.kept(np.arange(3)) is None
    made.keep_labels(SPLIT)
    positions = np.array([299, 0, 42])
    kept = made.kept(positions)
    assert kept is not None and torch.allclose(kept, expected[torch.from_numpy(positions)], atol=1e-5)


def test_too_many_labels_are_not_kept(model: TorchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_module, "KEPT_LABELS", 599)
    made = Teacher(model, "float32")
    made.keep_labels(SPLIT)
    assert made.kept(np.arange(3)) is None


def test_logits_that_are_no_numbers_are_refused(model: TorchModel) -> None:
    broken = model.copy()
    with torch.no_grad():
        broken.network.get_parameter("4.bias").fill_(float("nan"))
    with pytest.raises(ToolkitError, match="logits that are no numbers") as caught:
        Teacher(broken, "float32").keep_labels(SPLIT)
    assert "512 of 512 logits" in caught.value.found and "--teacher" in caught.value.fix


def test_a_teacher_has_the_students_classes_and_images(model: TorchModel) -> None:
    spec = model.spec
    check_teacher(replace(spec, architecture="another"), spec)
    with pytest.raises(ToolkitError, match="know other classes") as caught:
        check_teacher(replace(spec, class_names=("class 0", "cat")), spec)
    assert "2 and 2 classes; 'cat' and 'class 1'" in caught.value.found and "--teacher" in caught.value.fix
    with pytest.raises(ToolkitError, match="know other classes") as caught:
        check_teacher(replace(spec, class_names=(*spec.class_names, "more")), spec)
    assert "3 and 2 classes; the first 2 are equal" in caught.value.found
    with pytest.raises(ToolkitError, match="images of other shapes") as caught:
        check_teacher(replace(spec, input_shape=(3, 8, 8)), spec)
    assert "[3, 8, 8] and [1, 8, 8]" in caught.value.found and "--teacher" in caught.value.fix


@pytest.mark.parametrize("augment", [False, True])
def test_a_student_learns_what_only_its_teacher_knows(augment: bool) -> None:
    torch.manual_seed(1)
    student = wrap(small_network(), classes=2, shape=(1, 8, 8))
    # the teacher has the classes the wrong way round; nothing but its labels can tell the student
    left = torch.ones(8, 8)
    left[:, 4:] = -1
    weight = torch.stack([-left.flatten(), left.flatten()]) / 4
    liar = replace(linear_model(weight, (1, 8, 8)), training_hashes=halves(7, seed=8).hashes)
    config = TrainConfig(
        objective="distill", epochs=4, batch_size=32, attack_steps=2, precision="float32", augment=augment, ema=0
    )
    result = train(student, SPLIT, VALIDATION, config, PLAN, seed=0, teacher=liar)
    if not augment:  # flips change the class of these images, for the teacher too
        batch = VALIDATION.take(np.arange(64))
        assert float(result.model.predict(batch.images).argmax(1).eq(batch.labels).float().mean()) < 0.1
    assert set(result.model.training_hashes) == {*SPLIT.hashes, *liar.training_hashes}
    assert result.model.spec.training[-1]["teacher_sha256"] == Teacher(liar, "float32").digest


def test_distillation_without_a_teacher_is_a_defect_of_the_caller(model: TorchModel) -> None:
    with pytest.raises(ValueError, match="needs a teacher"):
        train(model, SPLIT, VALIDATION, TrainConfig(objective="distill", batch_size=32), PLAN, seed=0)
