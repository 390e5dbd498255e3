from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from tests.exporters.small import pictures, tiny, wrap
from tests.graphs import node, qdq_classifier, save
from toolkit.artifacts import OnnxModel, Proportion, Split
from toolkit.attacks.planned import PlannedAttack
from toolkit.attacks.threat import PgdPlan, ThreatModel
from toolkit.config import ExportConfig, QuantizeConfig
from toolkit.errors import ToolkitError
from toolkit.evaluators.portability import (
    IMAGES,
    LIMIT,
    OPSETS,
    VARIANTS,
    Answers,
    Elsewhere,
    JudgedImages,
    Portability,
    measure_portability,
    writer_of,
)
from toolkit.exporters.onnx import export_onnx
from toolkit.exporters.quantize import Quantizer
from toolkit.exporters.session import OnnxPredictor
from toolkit.reports.portability import elsewhere_rows, portability_record, portability_section, warnings

pytestmark = pytest.mark.usefixtures("quiet")
PLAN = PgdPlan("test", ThreatModel("linf", 0.1, "pixels", True), 3, 0.05, False)


@pytest.fixture(scope="module")
def split() -> Split:
    return pictures(120, (1, 8, 8))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, split: Split) -> Quantizer:
    """A network whose filters are all near their largest weight: 16-bit sums cannot hold its products."""
    network: Any = tiny()
    with torch.no_grad():
        signs = network[0].weight.sign()
        network[0].weight.copy_(signs * (0.9 + 0.1 * torch.rand(network[0].weight.shape)))
    exported = export_onnx(
        wrap(network, (1, 8, 8)), tmp_path_factory.mktemp("planted") / "f.onnx", ExportConfig(), metadata={"a": "b"}
    )
    return Quantizer(exported, split, QuantizeConfig())


@pytest.fixture(scope="module")
def found(planted: Quantizer, split: Split) -> Portability:
    with tempfile.TemporaryDirectory() as folder:
        deployed = Path(folder) / "m.onnx"
        planted.write(deployed)
        network = wrap(tiny(), (1, 8, 8))
        attack = PlannedAttack(network, PLAN, seed=0, precision="float32")
        images = JudgedImages.of(split, attack)
        return measure_portability(deployed, images, Path(folder), writer_of(planted))


def test_large_weights_change_labels_without_vnni_and_seven_bits_cure_it(found: Portability) -> None:
    there = found.row("with_vnni" if found.saturates_here else "without_vnni")
    assert there is not None and there.changed is not None and there.changed_attacked is not None
    assert there.changed.value > 0.1 and there.warns
    saturated = found.row("without_vnni")
    assert saturated is not None and saturated.overflows
    if found.saturates_here:  # the emulation of this very machine
        assert saturated.changed == Proportion(0, 120) and saturated.max_difference == pytest.approx(0, abs=1e-3)
    assert found.layers[0].share > 0.1 and found.layers[0].layer == "node_conv2d"
    cured, there_cured = found.row("reduce_range"), found.row("reduce_range_without_vnni")
    assert cured is not None and there_cured is not None
    assert there_cured.overflows == 0 and not there_cured.warns
    assert there_cured.changed == cured.changed and there_cured.max_difference == pytest.approx(
        cured.max_difference, abs=1e-4
    )


def test_all_settings_are_compared_on_all_images(found: Portability) -> None:
    assert (found.images, found.attacked) == (120, 120)
    assert [row.opset for row in found.rows if row.setting == "opset"] == list(OPSETS)
    settings = {
        "unoptimised",
        "without_vnni",
        "opset",
        "reduce_range",
        "reduce_range_without_vnni",
        "s8s8",
        "float_bias",
    }
    assert {row.setting for row in found.rows} == settings | ({"with_vnni"} if found.saturates_here else set())
    for row in found.rows:
        assert row.changed is not None and row.changed.total == 120, row
        assert row.changed_attacked is not None and row.changed_attacked.total == 120
        assert row.accuracy is not None and row.robust_accuracy is not None
        assert row.robust_accuracy.value <= row.accuracy.value
    assert found.twin_agreement == Proportion(240, 240)


def test_the_same_graph_answers_the_same_under_every_opset(found: Portability) -> None:
    for row in found.rows:
        if row.setting == "opset":
            assert row.changed == Proportion(0, 120) and row.max_difference == 0


def test_variants_are_other_graphs_and_close(found: Portability) -> None:
    for setting in ("reduce_range", "s8s8", "float_bias"):
        row = found.row(setting)
        assert row is not None and row.changed is not None and row.max_difference is not None
        # where sums saturate, what the others are compared with is far from exact
        near = row.changed.value < 0.2 or (found.saturates_here and setting != "s8s8")
        assert row.max_difference > 0 and near and row.integer_coverage is not None


def constants_of(path: Path) -> dict[str, Any]:
    return {item.name: numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer}


def test_variants_are_what_they_are_called(planted: Quantizer, tmp_path: Path) -> None:
    write = writer_of(planted)
    for setting, variant in VARIANTS.items():
        write(tmp_path / f"{setting}.onnx", variant)
    weights = {
        setting: [value for value in constants_of(tmp_path / f"{setting}.onnx").values() if value.dtype == np.int8]
        for setting in VARIANTS
    }
    assert max(np.abs(value.astype(int)).max() for value in weights["reduce_range"]) == 64
    assert max(np.abs(value.astype(int)).max() for value in weights["s8s8"]) == 127
    signed = onnx.load(tmp_path / "s8s8.onnx")
    points = constants_of(tmp_path / "s8s8.onnx")
    quantisers = [entry for entry in signed.graph.node if entry.op_type == "QuantizeLinear"]
    assert quantisers and all(points[entry.input[2]] == 0 for entry in quantisers)
    assert all(points[entry.input[2]].dtype == np.int8 for entry in quantisers)
    biases = constants_of(tmp_path / "float_bias.onnx")
    assert not [value for value in biases.values() if value.dtype == np.int32]
    assert {entry.key for entry in signed.metadata_props} == {"a"}
    white = torch.ones(1, 1, 8, 8)
    twin = OnnxPredictor(planted_path(planted)).predict(white)
    exact = OnnxPredictor(tmp_path / "s8s8.onnx", optimized=False)  # no machine saturates there
    assert (exact.predict(white) - twin).abs().max() < 0.1 * twin.std()


def planted_path(quantizer: Quantizer) -> Path:
    return quantizer._path


def test_reduce_range_is_what_the_configuration_asks_for(planted: Quantizer, tmp_path: Path, split: Split) -> None:
    config = QuantizeConfig(reduce_range=True)
    made = Quantizer(OnnxModel(planted_path(planted), "fp32"), split, config).write(tmp_path / "m.onnx")
    values = [value for value in constants_of(made.model.path).values() if value.dtype == np.int8 and value.ndim > 1]
    assert max(np.abs(value.astype(int)).max() for value in values) == 64
    result = measure_portability(made.model.path, JudgedImages.of(split), tmp_path)
    there = result.row("without_vnni")
    assert there is not None and there.overflows == 0 and there.changed == Proportion(0, 120)
    assert result.robust_accuracy is None and there.changed_attacked is None and result.attacked == 0


def test_float_graphs_have_nothing_to_emulate(planted: Quantizer, tmp_path: Path, split: Split) -> None:
    result = measure_portability(planted_path(planted), JudgedImages.of(split), tmp_path)
    assert result.row("without_vnni") is None and not result.layers and result.twin_agreement is None
    record = portability_record(result)
    assert record is not None and "16 bits" not in portability_section(record)


def test_what_has_no_twin_or_no_other_opset_is_said(tmp_path: Path) -> None:
    """Hardmax has no twin, and Gelu no form before opset 20."""
    made = qdq_classifier(tail=False)
    made.graph.node.extend(
        [
            node("Gelu", ["raw"], ["activated"]),
            node("Hardmax", ["activated"], ["hard"]),
            node("Add", ["activated", "hard"], ["logits"]),
        ]
    )
    path = save(made, tmp_path / "m.onnx")
    images = torch.rand(30, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    result = measure_portability(path, JudgedImages([images], [], torch.zeros(30, dtype=torch.int64)), tmp_path)
    there = result.row("without_vnni")
    assert there is not None and there.changed is None and "Hardmax" in there.note
    opsets = {row.opset: row for row in result.rows if row.setting == "opset"}
    assert "cannot be converted" in opsets[18].note and opsets[18].changed is None and not opsets[18].warns
    assert opsets[20].changed == Proportion(0, 30)
    record = portability_record(result)
    assert record is not None
    cells = {row[0]: row for row in elsewhere_rows(record)}
    assert cells["opset 18"][1] == "not measured" and "opset 20 to 23" in cells
    assert "Hardmax" in portability_section(record)


def test_a_form_that_cannot_be_written_is_a_row_with_the_reason(tmp_path: Path) -> None:
    def fail(_: Path, variant: Any) -> None:
        if variant.signed:
            raise ToolkitError("no", found="no such kernel\nand more", fix="none")
        raise RuntimeError

    path = save(qdq_classifier(), tmp_path / "m.onnx")
    images = torch.rand(10, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    result = measure_portability(path, JudgedImages([images], [], torch.zeros(10, dtype=torch.int64)), tmp_path, fail)
    notes = {row.setting: row.note for row in result.rows if row.changed is None}
    assert notes["s8s8"] == "cannot be written or run: no such kernel"
    assert notes["reduce_range"] == notes["float_bias"] == "cannot be written or run: RuntimeError"


def row(setting: Any, changed: int, attacked: int | None = None, total: int = 500) -> Elsewhere:
    shares = Proportion(changed, total), None if attacked is None else Proportion(attacked, total)
    return Elsewhere(setting, None, *shares, 0.5, Proportion(0, total), None)


@pytest.mark.parametrize(
    ("found", "warns"),
    [
        (row("without_vnni", 3), True),
        (row("without_vnni", 2), False),
        (row("unoptimised", 0, 3), True),
        (row("unoptimised", 5, total=1000), False),  # exactly at the limit
        (row("unoptimised", 2, total=100), False),  # too few to tell
        (row("s8s8", 100), False),  # another file, by choice
    ],
)
def test_warnings_need_more_than_half_a_percent(found: Elsewhere, warns: bool) -> None:
    assert LIMIT == 0.005
    assert found.warns is warns


def test_the_warning_names_the_cure_and_its_cost(found: Portability) -> None:
    record = portability_record(found)
    assert record is not None
    other = "x86 with VNNI" if found.saturates_here else "x86 without VNNI"
    lines = [line for line in warnings(record) if line.startswith(f"{other} (emulated): ")]
    assert len(lines) == 1 and "--reduce-range leaves 0 overflows and costs" in lines[0]
    section = portability_section(record)
    assert f"> **WARNING**: {lines[0]}." in section and "| opset 18 to 23 |" in section
    assert portability_section(None) == "" and warnings(None) == []


def test_large_images_are_fewer() -> None:
    class Large:
        shape = (3, 512, 512)
        labels = np.zeros(1000, np.int64)
        hashes = np.zeros(1000, np.uint64)
        name, class_names = "large", ("a",)

        def pixels(self, indices: Any) -> Any:
            return np.zeros((len(indices), *self.shape), np.uint8)

    images = JudgedImages.of(Split(Large(), np.arange(1000, dtype=np.int64)))
    assert len(images.labels) == 2**24 // (3 * 512 * 512) < IMAGES


def test_answers_without_attacks_are_compared_clean() -> None:
    first = Answers(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), None)
    second = Answers(torch.tensor([[0.0, 1.0], [0.0, 1.5]]), None)
    assert first.changed(second) == (Proportion(1, 2), None)
    assert first.difference(second) == 1.0
    assert first.accuracy(torch.tensor([0, 1])) == (Proportion(2, 2), None)
    both = Answers(first.clean, second.clean)
    assert both.accuracy(torch.tensor([0, 1])) == (Proportion(2, 2), Proportion(1, 2))
