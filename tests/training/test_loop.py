from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.toys import GREY, halves, small_network, wrap
from tests.training.runs import (
    CONFIG,
    PLAN,
    STANDARD,
    TEST,
    TRAIN,
    VALIDATION,
    Weights,
    equal,
    robust_share,
    run,
    weights,
)
from toolkit.artifacts import Proportion, TorchModel
from toolkit.config import TrainConfig
from toolkit.errors import ToolkitError
from toolkit.models.checkpoint import save_checkpoint
from toolkit.models.loading import assemble, read_model_file
from toolkit.training.adversary import training_attack
from toolkit.training.batches import augment
from toolkit.training.loop import train
from toolkit.training.run import Run


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_standard_training_learns(model: TorchModel, precision: str) -> None:
    result = run(model, STANDARD.model_copy(update={"precision": precision}))
    batch = TEST.take(np.arange(len(TEST)))
    assert float(result.model.predict(batch.images).argmax(dim=1).eq(batch.labels).float().mean()) > 0.95
    assert result.precision == precision and all(epoch.robust is None for epoch in result.epochs)
    assert result.epochs[-1].loss < result.epochs[0].loss


def test_adversarial_training_learns_and_is_robust(model: TorchModel) -> None:
    result = run(model, CONFIG)
    best = result.epochs[result.best_epoch - 1]
    assert robust_share(result.model) > 0.9
    assert best.robust is not None and best.robust.value > 0.9 and best.accuracy.total == len(VALIDATION)


@pytest.mark.parametrize(
    "config", [CONFIG, STANDARD, CONFIG.model_copy(update={"precision": "bfloat16", "augment": True})]
)
def test_one_seed_gives_one_set_of_weights(model: TorchModel, config: TrainConfig) -> None:
    first, second, other = (run(model, config, seed) for seed in (3, 3, 4))
    assert equal(weights(first.model), weights(second.model)) and first.epochs == second.epochs
    assert not equal(weights(first.model), weights(other.model))


@pytest.mark.parametrize("objective", ["fgsm", "trades"])
def test_every_objective_learns_and_is_robust(model: TorchModel, objective: str) -> None:
    result = run(model, CONFIG.model_copy(update={"objective": objective}))
    assert robust_share(result.model) > 0.9
    assert result.model.spec.training[-1]["threat"] == PLAN.record()


def test_a_student_is_as_robust_as_its_teacher(model: TorchModel) -> None:
    strong = run(model, CONFIG).model
    torch.manual_seed(5)
    student = wrap(small_network(), classes=2, shape=(1, 8, 8))
    result = run(student, CONFIG.model_copy(update={"objective": "distill", "epochs": 6}), teacher=strong)
    assert robust_share(result.model) > 0.9


def test_averaged_weights_are_validated_and_returned(model: TorchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Weights, Weights]] = []
    original = Run._validate

    def validate(self: Run) -> Any:
        assert self.average is not None
        raw, averaged = (
            {name: value.clone() for name, value in part.state_dict().items()}
            for part in (self.module.network, self.average.module.network)
        )
        seen.append((raw, averaged))
        return original(self)

    monkeypatch.setattr(Run, "_validate", validate)
    result = run(model, STANDARD.model_copy(update={"ema": 0.9}))
    raw, averaged = seen[result.best_epoch - 1]
    assert equal(weights(result.model), averaged) and not equal(raw, averaged)
    assert result.model.spec.training[-1]["ema"] == 0.9


@pytest.mark.parametrize("epochs", [1, 3])
def test_divergence_stops_with_advice(model: TorchModel, epochs: int) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    plain = replace(wrap(network, classes=2, shape=(1, 8, 8)), spec=model.spec)
    with pytest.raises(ToolkitError, match="the training diverged") as caught:
        run(plain, STANDARD.model_copy(update={"learning_rate": 1e30, "epochs": epochs}))
    assert "loss" in caught.value.found and "--learning-rate (now 1e+30)" in caught.value.fix


def test_weights_that_become_nan_in_the_very_last_step_are_not_returned(model: TorchModel) -> None:
    hidden = nn.Linear(64, 8)
    nn.init.constant_(hidden.weight, 100.0)
    plain = replace(
        wrap(nn.Sequential(nn.Flatten(), hidden, nn.Linear(8, 2)), classes=2, shape=(1, 8, 8)), spec=model.spec
    )
    config = STANDARD.model_copy(update={"learning_rate": 3e38, "epochs": 1, "batch_size": 256})
    with pytest.raises(ToolkitError, match="the training diverged"):
        run(plain, config)


def test_the_best_epoch_on_validation_is_kept(model: TorchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit.artifacts import Proportion

    scores = iter([60, 90, 70])
    seen: list[Weights] = []

    def validate(self: Any) -> tuple[Proportion, None]:
        seen.append({key: value.clone() for key, value in self.module.network.state_dict().items()})
        return Proportion(next(scores), 100), None

    monkeypatch.setattr(Run, "_validate", validate)
    result = run(model, STANDARD)
    assert result.best_epoch == 2
    assert equal(weights(result.model), seen[1]) and not equal(seen[1], seen[2])


def test_the_callers_model_is_unchanged(model: TorchModel) -> None:
    model.module.requires_grad_(False)
    before = weights(model)
    result = run(model, STANDARD)
    assert equal(weights(model), before) and not model.module.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.module.parameters())
    assert not equal(weights(result.model), before)
    assert not result.model.module.training
    assert {value.dtype for value in result.model.module.parameters()} == {torch.float32}


def test_no_training_gives_a_copy(model: TorchModel) -> None:
    for config in (TrainConfig(objective="none"), TrainConfig(epochs=0)):
        result = run(model, config)
        assert result.epochs == () and equal(weights(result.model), weights(model))
        assert result.model.module is not model.module and len(result.model.training_hashes) == 0


def test_the_training_is_recorded_with_its_images(model: TorchModel, tmp_path: Path) -> None:
    earlier = replace(model, training_hashes=halves(10, seed=8).hashes)
    result = run(earlier, CONFIG)
    assert set(result.model.training_hashes) == {*TRAIN.hashes, *earlier.training_hashes}
    record = result.model.spec.training[-1]
    assert record["images_sha256"] == TRAIN.digest and record["images"] == len(TRAIN)
    assert record["threat"] == PLAN.record() and record["seed"] == 0
    again = run(result.model, STANDARD).model
    assert [entry["objective"] for entry in again.spec.training] == ["adversarial", "standard"]
    assert again.spec.training[-1]["threat"] is None
    save_checkpoint(replace(again, spec=replace(again.spec, architecture=a_builder(tmp_path))), tmp_path / "model.pt")
    loaded = assemble(
        read_model_file(tmp_path / "model.pt"),
        arch=None,
        class_names=(),
        input_shape=(1, 1, 1),
        normalization=GREY,
        dataset=None,
    )
    assert loaded.spec.training == again.spec.training
    assert np.array_equal(loaded.training_hashes, again.training_hashes)


def a_builder(folder: Path) -> str:
    (folder / "net.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    body = nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())\n"
        "    return nn.Sequential(body, nn.Dropout(0.1), nn.Linear(96, 2))\n"
    )
    return f"{folder}/net.py:net"


def test_fewer_images_than_a_batch_are_one_step(model: TorchModel, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(model, TRAIN.first(5), VALIDATION, STANDARD, PLAN, seed=0)
    assert len(result.epochs) == STANDARD.epochs
    assert "all 5 training images make one batch: fewer than --batch-size 32" in capsys.readouterr().err
    train(model, TRAIN.first(32), VALIDATION, STANDARD, PLAN, seed=0)
    assert "--batch-size" not in capsys.readouterr().err


def test_a_batch_far_larger_than_the_data_is_refused(model: TorchModel) -> None:
    with pytest.raises(ToolkitError, match="larger than the training data") as caught:
        run(model, STANDARD.model_copy(update={"batch_size": 10_000_000}))
    assert "--batch-size 10000000, 256 training images" in caught.value.found
    assert caught.value.fix == "pass --batch-size 128"


def test_standard_training_needs_no_threat_model(model: TorchModel) -> None:
    with_plan, without = run(model, STANDARD), train(model, TRAIN, VALIDATION, STANDARD, None, seed=0)
    assert equal(weights(with_plan.model), weights(without.model)) and without.epochs == with_plan.epochs
    with pytest.raises(ValueError, match="needs a threat model"):
        train(model, TRAIN, VALIDATION, CONFIG, None, seed=0)


def test_the_attack_of_training_keeps_the_threat_model() -> None:
    attack = training_attack("adversarial", PLAN.threat, 7)
    assert (attack.threat, attack.steps, attack.start) == (PLAN.threat, 7, "uniform")
    assert attack.step_size == pytest.approx(2.5 * 0.1 / 7)


def reference_step(model: TorchModel, config: TrainConfig, rate: float, order: list[int]) -> Weights:
    """SGD with momentum and weight decay on one batch, from its textbook definition (first step: no momentum yet)."""
    module = copy.deepcopy(model.module).train()
    batch = TRAIN.take(np.array(order))
    loss = functional.cross_entropy(module(batch.images), batch.labels)
    parameters = dict(module.network.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    pairs = zip(parameters.items(), gradients, strict=True)
    return {name: value - rate * (gradient + config.weight_decay * value) for (name, value), gradient in pairs}


def test_one_step_is_textbook_descent() -> None:
    torch.manual_seed(0)
    model = wrap(small_network(), classes=2, shape=(1, 8, 8))
    config = STANDARD.model_copy(update={"epochs": 1, "batch_size": 256, "schedule": "stepped"})
    expected = reference_step(model, config, config.learning_rate, list(range(256)))
    trained = weights(run(model, config).model)
    assert all(torch.allclose(trained[name], value, atol=1e-6) for name, value in expected.items())


def test_augmentation_is_a_shift_and_a_flip_of_each_image() -> None:
    images = torch.rand(40, 2, 16, 8, generator=torch.Generator().manual_seed(0)) + 0.1
    augmented = augment(images, torch.Generator().manual_seed(1))
    assert augmented.shape == images.shape and augmented.dtype == images.dtype
    reach = 2
    found: set[tuple[int, int, bool]] = set()
    for image, result in zip(images, augmented, strict=True):
        matches = [
            (down, right, flip)
            for down in range(-reach, reach + 1)
            for right in range(-reach, reach + 1)
            for flip in (False, True)
            if torch.equal(result, shifted(image, down, right, flip))
        ]
        assert len(matches) == 1
        found.update(matches)
    assert len(found) > 15 and {flip for _, _, flip in found} == {False, True}


def shifted(image: Tensor, down: int, right: int, flip: bool) -> Tensor:
    """Plain loops: pixel (y, x) comes from (y - down, x - right), 0 from outside, then the row may be turned round."""
    _, height, width = image.shape
    result = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                result[:, y, x] = image[:, y - down, x - right]
    return result.flip(2) if flip else result


@pytest.mark.parametrize("objective", ["adversarial", "fgsm", "trades"])
def test_training_may_use_a_larger_radius_than_is_validated(model: TorchModel, objective: str) -> None:
    wider = Run(model, TRAIN, VALIDATION, CONFIG.model_copy(update={"objective": objective, "radius": 1.5}), PLAN, 0)
    same = Run(model, TRAIN, VALIDATION, CONFIG.model_copy(update={"objective": objective}), PLAN, 0)
    assert wider.attack.threat.eps == pytest.approx(0.15)
    assert wider.attack.step_size == pytest.approx(1.5 * same.attack.step_size)
    assert all(attack.threat == PLAN.threat for attack in wider.attacks)
    assert wider.fingerprint != same.fingerprint, "a run with one radius is not resumed with another"


def test_the_last_epoch_is_kept_where_that_is_asked_for(model: TorchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    config = STANDARD.model_copy(update={"epochs": 2, "learning_rate": 1e-6})

    def kept(keep: str) -> int:
        under_way = Run(model, TRAIN, VALIDATION, config.model_copy(update={"keep": keep}), None, seed=0)
        found = iter([Proportion(64, 64), Proportion(0, 64)])  # the second epoch is clearly worse
        with monkeypatch.context() as patched:
            patched.setattr(under_way, "_validate", lambda: (next(found), None))
            for _ in range(2):
                for _ in range(under_way.steps_per_epoch):
                    under_way.advance()
                under_way.finish_epoch()
        return under_way.result().best_epoch

    assert (kept("best"), kept("last")) == (1, 2)


def test_training_by_the_attack_that_measures(model: TorchModel) -> None:
    config = CONFIG.model_copy(update={"attack_schedule": "threat", "attack_steps": None, "radius": 2.0})
    attack = Run(model, TRAIN, VALIDATION, config, PLAN, seed=0).attack
    assert (attack.steps, attack.step_size, attack.threat.eps) == (PLAN.steps, PLAN.step_size, 0.2)


@pytest.mark.parametrize("objective", ["fgsm", "trades"])
def test_an_objective_with_its_own_attack_takes_no_schedule(model: TorchModel, objective: str) -> None:
    config = CONFIG.model_copy(update={"objective": objective, "attack_schedule": "threat"})
    with pytest.raises(ToolkitError, match="has an attack of its own") as error:
        run(model, config)
    assert "--attack-schedule threat" in error.value.found
