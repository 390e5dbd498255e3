"""The threat model of a file, and the attack that it allows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from tests.evaluators.greys import SIDE, flat_images, threshold
from toolkit.artifacts import Normalization, TorchModel
from toolkit.config import ExportConfig, ThreatConfig
from toolkit.data.images import ArrayImages
from toolkit.data.sources import DataSource
from toolkit.errors import ToolkitError
from toolkit.exporters.onnx import export_onnx, load_onnx, save_onnx
from toolkit.file_threat import attack_on_float, normalization_inside, plan_of_file, threat_of_file

PLAIN = Normalization((0.0,), (1.0,))
METADATA = {
    "threat_model": json.dumps({"preset": "paper", "norm": "linf", "eps": 0.1, "space": "normalised", "clip": False}),
    "normalization": json.dumps({"mean": [0.5], "std": [0.25]}),
}


def source(classes: int = 2, key: str | None = None) -> DataSource:
    pixels = np.repeat(np.array([10, 240, 30, 200], np.uint8), SIDE * SIDE).reshape(-1, 1, SIDE, SIDE)
    images = ArrayImages("flat", tuple(map(str, range(classes))), pixels, np.array([0, 1, 0, 1], np.int64))
    return DataSource("flat", images, images, PLAIN, holdout=1, threat_key=key)


def test_what_the_user_sets_comes_before_the_file_and_the_file_before_the_data_set() -> None:
    known = plan_of_file(ThreatConfig(), METADATA, source(key="fashion-mnist"))
    assert known is not None and (known.preset, known.threat.eps, known.threat.clip) == ("paper", 0.1, False)
    assert known.threat.margin(normalization_inside(METADATA) or PLAIN) == pytest.approx(0.025)
    smaller = plan_of_file(ThreatConfig(eps=0.05), METADATA, source())
    assert smaller is not None and (smaller.preset, smaller.threat.eps) == ("paper", 0.05)
    preset = plan_of_file(ThreatConfig(), {}, source(key="fashion-mnist"))
    assert preset is not None and preset.preset == "pixel" and preset.threat.clip
    assert threat_of_file(ThreatConfig(), {}) == ThreatConfig() and normalization_inside({}) is None


def test_without_any_threat_model_there_is_no_plan_unless_the_user_asked_for_one() -> None:
    assert plan_of_file(ThreatConfig(), {}, source()) is None
    with pytest.raises(ToolkitError, match="no linf preset"):
        plan_of_file(ThreatConfig(preset="paper"), {}, source())


def attacked(path: Path, data: DataSource, network: TorchModel | None = None, eps: float | None = 0.1) -> bool:
    plan = plan_of_file(ThreatConfig(eps=eps) if eps else ThreatConfig(), {}, data)
    found = attack_on_float(path, network, data, plan, PLAIN, seed=0)
    if found is None:
        return False
    images = found.attack(next(flat_images([140, 250]).batches()), 0)
    assert images.mean(dim=(1, 2, 3)).tolist() == pytest.approx([140 / 255 - 0.1, 250 / 255 - 0.1])
    return True


def test_a_file_is_attacked_itself_or_the_network_that_it_came_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = export_onnx(threshold(0.5), tmp_path / "float.onnx", ExportConfig()).path
    assert attacked(path, source()) and attacked(path, source(), threshold(0.5))
    assert not attacked(path, source(), eps=None)
    assert "neither file nor data set names a threat model" in capsys.readouterr().err
    assert not attacked(path, source(classes=3))
    assert "knows 2 classes, the data 3" in capsys.readouterr().err


def test_a_file_that_cannot_be_made_differentiable_is_judged_on_clean_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_onnx(export_onnx(threshold(0.5), tmp_path / "float.onnx", ExportConfig()).path)
    (output,) = model.graph.output
    for node in model.graph.node:
        for number, name in enumerate(node.output):
            if name == output.name:
                node.output[number] = "before"
    model.graph.node.append(helper.make_node("Det", ["before"], ["det"]))
    model.graph.node.append(helper.make_node("Add", ["before", "det"], [output.name]))
    save_onnx(model, tmp_path / "strange.onnx")
    assert not attacked(tmp_path / "strange.onnx", source())
    said = capsys.readouterr().err
    assert "clean accuracy alone is looked at" in said and "Det" in said
