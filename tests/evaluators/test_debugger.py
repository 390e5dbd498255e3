from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.toys import wrap
from toolkit.artifacts import Batch, Int64Array, OnnxModel, Split
from toolkit.config import ExportConfig, QuantizeConfig
from toolkit.data.images import ArrayImages
from toolkit.evaluators.debugger import Explanation, LayerBlame, TensorNoise, decibel, explain
from toolkit.evaluators.judge import Judge
from toolkit.evaluators.sensitivity import LayerSensitivity
from toolkit.exporters import calibration
from toolkit.exporters.onnx import export_onnx, load_onnx
from toolkit.exporters.quantize import Quantizer


def noise_images(count: int, seed: int = 0) -> Split:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)
    labels = np.zeros(count, np.int64)
    return Split(ArrayImages("noise", tuple("abcd"), pixels, labels), np.arange(count, dtype=np.int64))


def network(second: Callable[[nn.Conv2d], None] = lambda _: None) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    )  # fmt: skip
    second(layers[2])  # type: ignore[arg-type]
    return layers


def explained(folder: Path, layers: nn.Sequential, **how: object) -> Explanation:
    path = folder / "fp32.onnx"
    export_onnx(wrap(layers, classes=4, shape=(1, 8, 8)), path, ExportConfig())
    images = noise_images(200)
    config = QuantizeConfig.model_validate({"int8": True, **how})
    quantizer = Quantizer(OnnxModel(path, "fp32"), images, config)
    made = quantizer.write(folder / "int8.onnx").model.path
    return explain(quantizer, made, images, Judge(path, images, None))


def test_memory_is_bounded_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = explained(tmp_path, network())
    sizes = list[int]()
    take = Split.take

    def noted(split: Split, rows: Int64Array) -> Batch:
        sizes.append(len(rows))
        return take(split, rows)

    monkeypatch.setattr(Split, "take", noted)
    monkeypatch.setattr(calibration, "MAX_BATCH_BYTES", 100_000)
    again = explained(tmp_path, network())
    assert 1 < min(size for size in sizes if size > 1) < 8, "so many images whose tensors fit"
    assert [noise.tensor for noise in again.tensors] == [noise.tensor for noise in found.tensors]
    for one, other in zip(again.tensors, found.tensors, strict=True):
        assert one.snr == pytest.approx(other.snr, abs=1e-6) and one.clipped == other.clipped


def test_a_file_that_takes_a_fixed_number_of_images_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "fp32.onnx"
    proto = load_onnx(export_onnx(wrap(network(), classes=4, shape=(1, 8, 8)), path, ExportConfig()).path)
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 3
    del proto.graph.value_info[:]
    path.write_bytes(proto.SerializeToString())
    images = noise_images(50)
    quantizer = Quantizer(OnnxModel(path, "fp32"), images, QuantizeConfig(int8=True))
    made = quantizer.write(tmp_path / "int8.onnx").model.path
    assert explain(quantizer, made, images, Judge(path, images, None)).tensors[0].own_snr > 20


def test_rounding_of_evenly_spread_values_has_the_noise_of_theory(tmp_path: Path) -> None:
    """Signal E[x^2], noise step^2 / 12; the image's own quantiser is exact for pixels of 8 bits."""
    found = explained(tmp_path, network(), reduce_range=True)  # so that no machine's sums saturate
    assert next(noise.tensor for noise in found.tensors) in ("image", "relu") and found.images == 200
    for noise in found.tensors:
        assert noise.clipped == 0 and noise.snr <= noise.own_snr + 0.5 and noise.own_snr > 35
    assert found.logit_error == pytest.approx(0, abs=1e-3)
    assert not any(blame.advice for blame in found.layers), "nothing is worth a remedy"
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["images"] == 200


def test_tensors_are_compared_with_those_that_were_rounded(tmp_path: Path) -> None:
    """Scaled between layers, the float twin's own would look like noise."""

    def spread(layer: nn.Conv2d) -> None:
        with torch.no_grad():
            layer.weight *= torch.logspace(0, 2, 8).view(-1, 1, 1, 1)

    found = explained(tmp_path, network(spread), reduce_range=True)
    assert {noise.tensor for noise in found.tensors} >= {"relu", "relu_1"}
    assert min(noise.snr for noise in found.tensors) > 30 and found.logit_error < 1e-3


def test_a_layer_of_one_huge_filter_is_found_guilty(tmp_path: Path) -> None:
    """Quantised per tensor, all other filters of the layer round to nothing."""

    def spoil(layer: nn.Conv2d) -> None:
        with torch.no_grad():
            layer.weight[0] *= 300
            layer.weight[0] -= layer.weight[0].abs().max()  # its output is negative: behind the ReLU it says nothing

    found = explained(tmp_path, network(spoil), per_channel=False)
    guilty = found.layers[0]
    assert guilty.layer == "node_conv2d_1" and guilty.relief > 0.9 and found.logit_error > 0.01
    assert guilty.advice == "--keep-float node_conv2d_1"
    assert [blame.relief for blame in found.layers] == sorted((b.relief for b in found.layers), reverse=True)
    whole = explained(tmp_path, network(spoil), per_channel=True)
    assert whole.logit_error < found.logit_error / 10


def test_what_is_clipped_is_told(tmp_path: Path) -> None:
    found = explained(tmp_path, network(), calibrate="percentile", percentile=60.0)
    relu = next(noise for noise in found.tensors if noise.tensor == "relu")
    assert relu.clipped > 0.05 and relu.own_snr < 20
    blamed = next(blame for blame in found.layers if blame.source is not None and blame.source.tensor == "relu")
    assert "clipped" in blamed.advice and "minmax" in blamed.advice


@pytest.mark.parametrize(
    ("relief", "gone", "own", "clipped", "advice"),
    [
        (0.5, 0.1, 40.0, 0.0, "--keep-float a"),
        (0.5, 0.1, 20.0, 0.0, "long tail"),
        (0.5, 0.1, 20.0, 0.01, "clipped"),
        (0.0, 0.0, 20.0, 0.01, "clipped"),
        (0.05, 0.1, 40.0, 0.01, ""),
        (0.5, 1e-4, 40.0, 0.01, ""),
    ],
)
def test_advice_fits_what_was_found(relief: float, gone: float, own: float, clipped: float, advice: str) -> None:
    blame = LayerBlame("a", relief, TensorNoise("t", own, own, clipped), gone)
    assert advice in blame.advice and bool(advice) == bool(blame.advice)


def test_where_accuracy_is_lost_the_attack_says_which_layer_to_leave_float() -> None:
    layer = LayerSensitivity("a", relief=0.5, logits=0.0)
    blames = [LayerBlame("a", 0.0, None, 0.0, layer, costly) for costly in (True, False)]
    assert [blame.advice for blame in blames] == ["--keep-float a", ""] and blames[0].guilt == 0.5
    harmless = LayerSensitivity("a", relief=0.05, logits=0.0)
    assert LayerBlame("a", 0.0, None, 0.0, harmless, True).advice == ""


def test_a_single_layer_is_not_to_be_left_float(tmp_path: Path) -> None:
    found = explained(tmp_path, network(), keep_float=("node_conv2d", "node_linear"))
    assert [blame.layer for blame in found.layers] == ["node_conv2d_1"] and found.layers[0].advice == ""
    assert (found.images, found.tensor_images, found.margin_images) == (200, 200, 0)


def test_decibels() -> None:
    assert decibel(100, 1) == pytest.approx(20) and decibel(1, 2) == pytest.approx(-3.0103, abs=1e-4)
    assert decibel(1, 0) == math.inf and decibel(0, 1) == -math.inf
