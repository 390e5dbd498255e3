from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from tests.toys import wrap
from toolkit.artifacts import Split
from toolkit.config import ExportConfig, PruneConfig, QuantizeConfig
from toolkit.data.images import ArrayImages
from toolkit.errors import ToolkitError
from toolkit.evaluators import widths
from toolkit.evaluators.latency import Stopclock
from toolkit.evaluators.timing import FloatArray
from toolkit.evaluators.widths import (
    FIRST_FLOAT,
    FLOAT,
    INTEGER,
    Candidates,
    RoundingChoice,
    choose_rounding,
    fingerprint,
    pick,
)

SIDE = 10


def chosen(work: Mapping[int, int], time: Mapping[int, float], noise: float = 0.0) -> int:
    """The choice among float graphs of these times; every file has noise of its own."""
    random = np.random.default_rng(0)
    rounds = {m: {FLOAT: t * np.exp(noise * random.standard_normal(12))} for m, t in time.items()}
    return pick(work, rounds).chosen


@pytest.mark.parametrize(
    ("work", "time", "expected"),
    [
        ({1: 100, 8: 96}, {1: 1.0, 8: 0.9}, 8),  # faster by more than it is smaller
        ({1: 100, 8: 92}, {1: 1.0, 8: 0.95}, 1),  # faster merely because it is smaller
        ({1: 100, 8: 104}, {1: 1.0, 8: 1.01}, 8),  # slower by less than it is larger
        ({1: 100, 8: 80}, {1: 1.0, 8: 0.5}, 1),  # far from what was asked for
        ({1: 100, 8: 150}, {1: 1.0, 8: 0.99}, 8),  # wider for nothing
        ({1: 100, 8: 150}, {1: 1.0, 8: 1.01}, 1),  # wider, and that costs time
        ({1: 100, 4: 98, 8: 104}, {1: 1.0, 4: 0.98, 8: 1.04}, 1),  # all alike: as asked
    ],
)
def test_time_per_multiply_accumulate_decides(
    work: Mapping[int, int], time: Mapping[int, float], expected: int
) -> None:
    assert chosen(work, time) == expected


def test_what_noise_hides_is_no_reason_to_leave_the_asked_widths() -> None:
    work = {1: 100, 4: 106, 8: 103}
    assert chosen(work, {1: 1.0, 4: 1.055, 8: 1.027}, noise=0.05) == 1
    assert chosen(work, {1: 1.0, 4: 1.0, 8: 0.8}, noise=0.05) == 8


def test_the_graph_that_ships_counts_and_float_only_where_no_integers_are_asked_for() -> None:
    ones = np.ones(12)
    times = {
        1: {FLOAT: 0.1 * ones, INTEGER: 1.0 * ones, FIRST_FLOAT: 0.9 * ones},
        8: {FLOAT: 0.2 * ones, INTEGER: 0.4 * ones, FIRST_FLOAT: 0.5 * ones},
    }
    found = pick({1: 100, 8: 100}, times)
    assert found.chosen == 8
    assert [one.graph for one in found.tried] == [FIRST_FLOAT, INTEGER]
    assert found.tried[1].time.value == pytest.approx(0.4 / 0.9)
    assert found.tried[1].float_time.value == pytest.approx(2.0)


class Blocks:
    """A clock whose kernels compute whole blocks of output channels: read off the weights in the files."""

    def __init__(self, block: int) -> None:
        self._block = block
        self.foreign_load = 0.1
        self.files: dict[str, Path] = {}

    def rounds(self, files: Mapping[str, Path], count: int) -> dict[str, FloatArray]:
        self.files = dict(files)
        return {name: np.full(count, self._time(path)) for name, path in files.items()}

    def _time(self, path: Path) -> float:
        weights = [numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer]
        blocks = ((math.ceil(w.shape[0] / self._block), w[0].size) for w in weights if w.ndim == 4)
        return float(sum(count * self._block * size for count, size in blocks))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 52, 3), nn.ReLU(), nn.Conv2d(52, 96, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


def candidates(folder: Path, **quantize: object) -> Candidates:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 1, SIDE, SIDE), dtype=np.uint8)
    images = ArrayImages("noise", tuple(map(str, range(10))), pixels, np.arange(40) % 10)
    how = QuantizeConfig.model_validate(quantize)
    calibration = Split(images, np.arange(40, dtype=np.int64))
    return Candidates(PruneConfig(ratio=0.4, round_to="auto"), ExportConfig(), how, calibration, folder)


def test_the_multiple_of_the_kernels_blocks_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widths, "MULTIPLES", (1, 4, 8, 64))
    model, clock = wrap(network(), shape=(1, SIDE, SIDE)), Blocks(8)
    before = {key: value.clone() for key, value in model.network.state_dict().items()}
    found = choose_rounding(model, candidates(tmp_path), cast("Stopclock", clock))
    assert found.foreign_load == 0.1
    assert found.chosen == 4, "32 and 56 filters take their own time, 31 and 58 that of 32 and 64"
    assert [one.round_to for one in found.tried] == [1, 4, 64], "8 leads to the same widths as 4"
    assert [one.admitted for one in found.tried] == [True, True, False]
    assert all(torch.equal(value, before[key]) for key, value in model.network.state_dict().items())
    assert list(clock.files) == ["1 float", "4 float", "64 float"]


def test_integer_graphs_are_written_where_they_ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widths, "MULTIPLES", (1,))
    model, clock = wrap(network(), shape=(1, SIDE, SIDE)), Blocks(1)
    choose_rounding(model, candidates(tmp_path, int8=True, calibrate="auto"), cast("Stopclock", clock))
    assert {name.partition(" ")[2] for name in clock.files} == {FLOAT, INTEGER, FIRST_FLOAT}
    float_layers = {
        name: sum(node.op_type == "Conv" for node in onnx.load(path).graph.node)
        - sum(
            item.data_type == onnx.TensorProto.INT8 and len(item.dims) == 4
            for item in onnx.load(path).graph.initializer
        )
        for name, path in clock.files.items()
        if name.startswith("1 ")
    }
    assert float_layers == {"1 float": 2, "1 integer": 0, "1 first layer float": 1}
    choose_rounding(model, candidates(tmp_path, int8=True, precision="int8"), cast("Stopclock", clock))
    assert {name.partition(" ")[2] for name in clock.files} == {FLOAT, INTEGER}


def test_a_ratio_that_removes_nothing_is_an_error(tmp_path: Path) -> None:
    how = candidates(tmp_path)
    tiny = Candidates(PruneConfig(ratio=0.001, round_to="auto"), how.export, how.quantize, how.calibration, tmp_path)
    with pytest.raises(ToolkitError, match="pruning removed nothing"):
        choose_rounding(wrap(network(), shape=(1, SIDE, SIDE)), tiny, cast("Stopclock", Blocks(8)))


def test_what_was_found_is_kept_for_its_network_and_ratio_alone(tmp_path: Path) -> None:
    found = pick({1: 100, 8: 96}, {1: {FLOAT: np.ones(12)}, 8: {FLOAT: np.full(12, 0.9)}})
    model, path = wrap(network(), shape=(1, SIDE, SIDE)), tmp_path / "rounding.json"
    key = fingerprint(model, PruneConfig(ratio=0.4))
    assert RoundingChoice.read(path, key) is None
    found.write(path, key)
    assert RoundingChoice.read(path, key) == found
    assert RoundingChoice.read(path, fingerprint(model, PruneConfig(ratio=0.5))) is None
    assert RoundingChoice.read(path, fingerprint(model, PruneConfig(ratio=0.4, scope="global"))) is None
    with torch.no_grad():
        next(model.network.parameters()).add_(1)
    assert RoundingChoice.read(path, fingerprint(model, PruneConfig(ratio=0.4))) is None
    path.write_text("{cut sh")
    assert RoundingChoice.read(path, key) is None
