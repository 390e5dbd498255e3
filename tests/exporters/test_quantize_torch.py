from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from toolkit.artifacts import OnnxModel, Split, TorchModel
from toolkit.attacks.planned import PlannedAttack
from toolkit.attacks.threat import PgdPlan, ThreatModel
from toolkit.config import ExportConfig, QuantizeConfig
from toolkit.errors import ToolkitError
from toolkit.evaluators.calibration_choice import choose_calibration
from toolkit.evaluators.cost import integer_coverage
from toolkit.evaluators.debugger import tensor_noise
from toolkit.evaluators.judge import Judge
from toolkit.evaluators.surrogate import build_twin, twin_model
from toolkit.exporters.calibration import AdversarialShare
from toolkit.exporters.engines import check_engine, make_writer
from toolkit.exporters.onnx import export_onnx, load_onnx
from toolkit.exporters.quantize import Quantizer
from toolkit.exporters.quantize_torch import METHODS, TorchQuantizer
from toolkit.exporters.session import OnnxPredictor
from toolkit.exporters.variants import Variant

from .small import GREY, Pictures, pictures, tiny, wrap
from .test_quantize import constants_of

pytest.importorskip("neural_compressor", reason="pip install -c constraints.txt '.[dev]'")
pytest.importorskip("torchao")
SHAPE, MARGIN = (1, 8, 8), 0.1
INC = QuantizeConfig(engine="inc")


def images() -> Split:
    """Three batches, the first one the darkest."""
    rng = np.random.default_rng(0)
    pixels = [
        rng.integers(0, 90 + 60 * part, (count, *SHAPE), dtype=np.uint8) for part, count in enumerate((64, 64, 9))
    ]
    return Split(Pictures(np.concatenate(pixels)), np.arange(137, dtype=np.int64))


@dataclass(frozen=True)
class Made:
    """A network, its float twin, and what Neural Compressor found by all its methods."""

    model: TorchModel
    twin: OnnxModel
    quantizer: TorchQuantizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    model = wrap(tiny(filters=8), SHAPE, GREY)
    path = tmp_path_factory.mktemp("inc") / "float.onnx"
    twin = export_onnx(model, path, ExportConfig(), metadata={"classes": "a b c"})
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    quantizer = TorchQuantizer(model, twin, images(), INC.model_copy(update={"calibrate": "auto"}))
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    return Made(model, twin, quantizer)


def relu_scale(path: Path) -> float:
    return float(constants_of(path)["relu_scale"])


def test_the_file_is_an_integer_graph_like_any_other(made: Made, tmp_path: Path) -> None:
    written = made.quantizer.with_calibration("minmax").write(tmp_path / "q.onnx")
    assert (written.engine, written.calibration, written.calibration_images) == ("neural-compressor", "minmax", 137)
    assert [(layer.name, layer.precision) for layer in written.layers] == [
        ("node_conv2d", "int8"),
        ("node_linear", "int8"),
    ]
    assert made.quantizer.layers == ("node_conv2d", "node_linear") and made.quantizer.kept == ()
    assert integer_coverage(tmp_path / "q.onnx").share == 1
    batch = images().take(np.arange(137)).images
    wanted, found = made.model.predict(batch), OnnxPredictor(tmp_path / "q.onnx").predict(batch)
    assert (found - wanted).square().mean().sqrt() < 0.05 * wanted.std()
    assert {noise.tensor for noise in tensor_noise(load_onnx(made.twin.path), load_onnx(tmp_path / "q.onnx"), images())}
    twin = twin_model(build_twin(tmp_path / "q.onnx"), ("a", "b", "c"))
    assert (twin.predict(batch) - found).abs().max() < 0.05 * wanted.std()


def test_minmax_is_neural_compressors_moving_average(made: Made, tmp_path: Path) -> None:
    made.quantizer.with_calibration("minmax").write(tmp_path / "q.onnx")
    activations = nn.Sequential(*list(made.model.network.children())[:2])
    top = None
    for start in (0, 64, 128):
        batch = images().take(np.arange(start, min(start + 64, 137))).images
        with torch.no_grad():
            largest = float(activations((batch - 0.5) / 0.5).max())
        for _ in range(2):  # one observer looks at the tensor and at its flattened form
            top = largest if top is None else top + 0.01 * (largest - top)
    assert top is not None
    assert relu_scale(tmp_path / "q.onnx") == pytest.approx(top / 255, rel=1e-5)


def test_methods_differ_and_auto_chooses_one_of_them(made: Made, tmp_path: Path) -> None:
    scales = {}
    for method in METHODS:
        made.quantizer.with_calibration(method).write(tmp_path / f"{method}.onnx")
        scales[method] = relu_scale(tmp_path / f"{method}.onnx")
    assert len(set(scales.values())) == 2
    chosen = choose_calibration(made.quantizer, tmp_path, Judge(made.twin.path, images(), None))
    assert [score.method for score in chosen.scores] == list(METHODS) and chosen.chosen in METHODS
    with pytest.raises(ValueError, match="no calibration method"):
        made.quantizer.write(tmp_path / "open.onnx")
    with pytest.raises(ValueError, match="statistics were gathered"):
        made.quantizer.with_calibration("mse")


def test_layers_stay_float_that_are_to(made: Made, tmp_path: Path) -> None:
    written = made.quantizer.with_calibration("minmax").write(tmp_path / "q.onnx", keep_float=("node_conv2d",))
    assert [layer.precision for layer in written.layers] == ["float32", "int8"]
    assert written.input_range is None


def test_the_input_quantiser_and_the_activations_behind_cover_the_margin(made: Made, tmp_path: Path) -> None:
    quantizer = TorchQuantizer(made.model, made.twin, images(), INC, input_margin=(MARGIN,))
    written = quantizer.write(tmp_path / "q.onnx")
    assert written.input_range is not None
    assert written.input_range[0] <= -MARGIN + 1e-6 and written.input_range[1] >= 1 + MARGIN - 1e-6
    made.quantizer.with_calibration("minmax").write(tmp_path / "without.onnx")
    assert relu_scale(tmp_path / "q.onnx") > 1.02 * relu_scale(tmp_path / "without.onnx")


def test_images_are_streamed_and_attacked_ones_counted(made: Made, tmp_path: Path) -> None:
    plan = PgdPlan("pixel", ThreatModel("linf", 0.3, "pixels", clip=True), 3, 0.1, random_start=False)
    share = AdversarialShare(PlannedAttack(made.model, plan, seed=0, precision="float32"), 1.0)
    split, config = images(), INC.model_copy(update={"calibrate_adversarial": 1.0, "per_channel": False})
    writer = make_writer(made.twin, split, config, network=made.model, adversarial=share)
    written = writer.write(tmp_path / "q.onnx")
    assert (written.adversarial_images, written.per_channel) == (137, False)
    assert constants_of(tmp_path / "q.onnx")["network.0.weight_scale"].size == 1
    made.quantizer.with_calibration("minmax").write(tmp_path / "clean.onnx")
    assert relu_scale(tmp_path / "q.onnx") != pytest.approx(relu_scale(tmp_path / "clean.onnx"), rel=1e-3)
    assert isinstance(split.images, Pictures) and split.images.largest_request == 64


def test_variants_hold_the_same_ranges(made: Made, tmp_path: Path) -> None:
    chosen = made.quantizer.with_calibration("minmax")
    chosen.write(tmp_path / "q.onnx")
    for name, variant in (("narrow", Variant(reduce_range=True)), ("signed", Variant(signed=True))):
        chosen.write_variant(tmp_path / f"{name}.onnx", variant)
    narrow, signed = (constants_of(tmp_path / f"{name}.onnx") for name in ("narrow", "signed"))
    assert max(int(np.abs(value).max()) for value in narrow.values() if value.dtype == np.int8 and value.size > 3) <= 64
    assert relu_scale(tmp_path / "narrow.onnx") == relu_scale(tmp_path / "q.onnx")
    assert float(signed["relu_scale"]) == pytest.approx(relu_scale(tmp_path / "q.onnx") * 255 / 127, rel=1e-4)


def test_the_default_engine_is_onnx_runtimes(made: Made) -> None:
    writer = make_writer(made.twin, pictures(8, SHAPE), QuantizeConfig(), network=made.model)
    assert isinstance(writer, Quantizer)


def test_a_file_alone_cannot_be_calibrated(made: Made) -> None:
    with pytest.raises(ToolkitError, match="calibrates the torch network") as caught:
        make_writer(made.twin, images(), INC, network=None)
    assert str(made.twin.path) in caught.value.found and "quantize MODEL.pt" in caught.value.fix


@pytest.mark.parametrize("method", ["percentile", "mse", "moving-average"])
def test_methods_that_it_has_not_are_refused_before_work_begins(method: Any) -> None:
    with pytest.raises(ToolkitError, match="does not have this calibration method") as caught:
        check_engine(INC.model_copy(update={"calibrate": method}))
    assert method in caught.value.found and "minmax, entropy or auto" in caught.value.fix
    check_engine(QuantizeConfig(calibrate=method))


@pytest.mark.parametrize("package", ["neural_compressor", "torchao"])
def test_a_missing_engine_is_refused_before_work_begins(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ToolkitError, match="not installed") as caught:
        check_engine(INC)
    assert package in caught.value.found and "[inc]" in caught.value.fix
    check_engine(QuantizeConfig())


class Branching(nn.Module):
    """Takes a branch by the values of a tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :3] if x.sum() > 0 else x.flatten(1)[:, 3:6]


def test_networks_that_cannot_be_traced_are_refused(made: Made) -> None:
    with pytest.raises(ToolkitError, match="Neural Compressor cannot handle") as caught:
        TorchQuantizer(wrap(Branching(), SHAPE, GREY), made.twin, images(), INC)
    assert "--engine ort" in caught.value.fix


def test_adversarial_images_need_an_attack(made: Made) -> None:
    config = INC.model_copy(update={"calibrate_adversarial": 0.5})
    with pytest.raises(ToolkitError, match="needs the torch network"):
        TorchQuantizer(made.model, made.twin, images(), config)


def _with(model: TorchModel, values: Mapping[str, float]) -> TorchModel:
    changed = replace(model.copy())
    with torch.no_grad():
        for name, value in values.items():
            changed.network.get_parameter(name).fill_(value)
    return changed


@pytest.mark.parametrize("value", [math.inf, 3e38])
def test_activations_that_are_no_numbers_are_refused(made: Made, value: float) -> None:
    broken = _with(made.model, {"3.weight": value})
    with pytest.raises(ToolkitError, match="no finite numbers"):
        TorchQuantizer(broken, made.twin, images(), INC)


@pytest.mark.parametrize("bits", [{"activation_bits": 16}, {"weight_bits": 4}])
def test_other_bits_are_refused_before_work_begins(bits: dict[str, int]) -> None:
    with pytest.raises(ToolkitError, match="quantises to 8 bits"):
        check_engine(QuantizeConfig.model_validate({"int8": True, "engine": "inc", **bits}))
