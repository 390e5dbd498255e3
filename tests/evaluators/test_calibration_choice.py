from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn

from tests.toys import wrap
from toolkit.artifacts import OnnxModel, Split
from toolkit.config import CalibrationName, ExportConfig, QuantizeConfig
from toolkit.data.images import ArrayImages
from toolkit.evaluators.calibration_choice import MethodScore, best_method, choose_calibration
from toolkit.evaluators.judge import Drop, Judge
from toolkit.exporters.calibration import CalibrationReader
from toolkit.exporters.onnx import export_onnx
from toolkit.exporters.quantize import Quantizer
from toolkit.exporters.ranges import METHODS


def score(method: str, clean: float, robust: float | None, disturbance: float) -> MethodScore:
    return MethodScore(cast("CalibrationName", method), Drop(clean, robust), disturbance)


def test_what_loses_least_is_taken_and_ties_are_told_apart_by_the_logits() -> None:
    far = [score("minmax", 0.01, 0.02, 0.1), score("mse", 0.005, 0.0, 0.9), score("entropy", -0.01, 0.04, 0.0)]
    assert best_method(far) == "mse", "clean and robust count together"
    near = [*far, score("percentile", 0.006, 0.0, 0.3)]
    assert best_method(near) == "percentile"
    assert best_method([score("minmax", 0.02, None, 0.1), score("mse", 0.0, None, 5.0)]) == "mse"


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Split]:
    """One of 256 images is 50 times as bright as the rest behind the first layer: extremes say little of the others."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    path = tmp_path_factory.mktemp("network") / "fp32.onnx"
    export_onnx(wrap(layers, classes=4, shape=(1, 8, 8)), path, ExportConfig())
    pixels = np.random.default_rng(0).integers(0, 6, (256, 1, 8, 8), dtype=np.uint8)
    pixels[7] = 255
    labels = np.zeros(256, np.int64)
    return path, Split(ArrayImages("dim", tuple("abcd"), pixels, labels), np.arange(256, dtype=np.int64))


def test_every_method_is_judged_and_the_images_are_read_no_oftener_than_needed(
    network: tuple[Path, Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, split = network
    passes = Counter[str]()
    rewind = CalibrationReader.rewind

    def counting(self: CalibrationReader) -> None:
        passes["rewound"] += 1
        rewind(self)

    monkeypatch.setattr(CalibrationReader, "rewind", counting)

    quantizer = Quantizer(OnnxModel(path, "fp32"), split, QuantizeConfig(int8=True, calibrate="auto"))
    found = choose_calibration(quantizer, tmp_path, Judge(path, split, None))
    assert passes["rewound"] == 3, "channels to equalise, ends, histograms"
    assert [score.method for score in found.scores] == list(METHODS) and found.images == 256
    assert len({score.disturbance for score in found.scores}) >= 3, "the methods make different graphs"
    assert found.chosen == best_method(list(found.scores))
    own = Quantizer(OnnxModel(path, "fp32"), split, QuantizeConfig(int8=True, calibrate=found.chosen))
    made = own.write(tmp_path / "own.onnx")
    assert (tmp_path / "own.onnx").read_bytes() == (tmp_path / f"{found.chosen}.onnx").read_bytes()
    assert made.calibration == found.chosen
    with pytest.raises(ValueError, match="no calibration method"):
        quantizer.write(tmp_path / "none.onnx")
    with pytest.raises(ValueError, match="gathered for"):
        own.with_calibration("minmax" if found.chosen != "minmax" else "mse")
