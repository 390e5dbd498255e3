from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.evaluators.greys import PLAIN, SIDE, a_plan, noise_images
from tests.toys import wrap
from toolkit.artifacts import OnnxModel, TorchModel
from toolkit.attacks.planned import PlannedAttack
from toolkit.config import ExportConfig, QuantizeConfig
from toolkit.evaluators.judge import Judge
from toolkit.evaluators.sensitivity import LayerSensitivity, measure_sensitivity, ranked
from toolkit.exporters.onnx import export_onnx
from toolkit.exporters.quantize import Quantizer

CLASSES = 4


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * SIDE * SIDE, CLASSES))


def spoil(layers: nn.Sequential, at: int) -> None:
    """One filter that is never active: quantised per tensor, it leaves a few levels for all others of its layer."""
    layer = layers[at]
    assert isinstance(layer, nn.Conv2d) and layer.bias is not None
    with torch.no_grad():
        layer.weight[0] = -40 * layer.weight.abs().max()
        layer.bias[0] = -100.0


def measured(
    folder: Path,
    model: TorchModel,
    *,
    eps: float | None = 0.05,
    keep_float: tuple[str, ...] = (),
    seconds: float | None = None,
) -> tuple[LayerSensitivity, ...]:
    path = export_onnx(model, folder / "fp32.onnx", ExportConfig()).path
    images = noise_images(200, model, classes=CLASSES)
    config = QuantizeConfig(int8=True, per_channel=False, reduce_range=True, keep_float=keep_float)
    quantizer = Quantizer(OnnxModel(path, "fp32"), images, config, input_margin=eps or 0.0)
    attack = PlannedAttack(model, a_plan(eps=eps), seed=0, precision="float32") if eps else None
    layers = [name for name in quantizer.layers if name not in quantizer.kept]
    return measure_sensitivity(quantizer, layers, Judge(path, images, attack), seconds=seconds)


def model_of(change: Callable[[nn.Sequential], None] = lambda _: None) -> TorchModel:
    layers = network()
    change(layers)
    return wrap(layers, classes=CLASSES, shape=(1, SIDE, SIDE), normalization=PLAIN)


@pytest.mark.parametrize(("at", "guilty"), [(0, "node_conv2d"), (2, "node_conv2d_1")])
def test_the_layer_that_rounds_badly_is_found(tmp_path: Path, at: int, guilty: str) -> None:
    found = {one.layer: one for one in measured(tmp_path, model_of(lambda layers: spoil(layers, at)))}
    assert list(found) == ["node_conv2d", "node_conv2d_1", "node_linear"]
    first = ranked(found.values())[0]
    assert first.layer == guilty and first.relief > 0.9
    assert first.drop is not None and first.drop.worst > 0.05
    others = [one.drop for one in found.values() if one.layer != guilty]
    assert all(drop is not None and drop.robust is not None and drop.worst <= 0.02 for drop in others)


def test_time_is_spent_on_the_guilty_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(lambda layers: spoil(layers, 2))
    assert all(one.drop is None for one in measured(tmp_path, model, seconds=0.0))
    clock = itertools.count()
    monkeypatch.setattr("toolkit.evaluators.sensitivity.time.monotonic", lambda: float(next(clock)))
    some = measured(tmp_path, model, seconds=1.5)  # begun at 0, the first is looked at at 1, and the second too late
    assert [one.layer for one in some if one.drop] == ["node_conv2d_1"]


def test_without_an_attack_clean_accuracy_is_told(tmp_path: Path) -> None:
    found = measured(tmp_path, model_of(lambda layers: spoil(layers, 2)), eps=None)
    assert all(one.drop is not None and one.drop.robust is None for one in found)
    assert ranked(found)[0].layer == "node_conv2d_1" and all(one.relief == one.logits for one in found)


def test_what_the_user_keeps_float_is_no_question(tmp_path: Path) -> None:
    spoilt = model_of(lambda layers: spoil(layers, 2))
    found = measured(tmp_path, spoilt, keep_float=("node_conv2d_1",))
    assert [one.layer for one in found] == ["node_conv2d", "node_linear"]
    alone = measured(tmp_path, spoilt, keep_float=("node_conv2d", "node_linear"))
    assert [one.layer for one in alone] == ["node_conv2d_1"] and alone[0].relief == 1
