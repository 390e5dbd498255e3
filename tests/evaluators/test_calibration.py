from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.toys import halves, small_network, wrap
from toolkit.artifacts import Split, TorchModel
from toolkit.attacks.planned import PlannedAttack
from toolkit.attacks.threat import PgdPlan, ThreatModel
from toolkit.config import ExportConfig, QuantizeConfig
from toolkit.data.images import ArrayImages
from toolkit.evaluators import calibration
from toolkit.evaluators.calibration import compare_calibrations, judge
from toolkit.evaluators.surrogate import UnconvertibleGraph
from toolkit.exporters.calibration import AdversarialShare
from toolkit.exporters.engine import QuantizedModel
from toolkit.exporters.onnx import export_onnx
from toolkit.exporters.quantize import quantize_int8
from toolkit.exporters.session import OnnxPredictor
from toolkit.statistics import Mcnemar, mcnemar

PLAN = PgdPlan("pixel", ThreatModel("linf", 0.2, "pixels", clip=True), 5, 0.1, random_start=True, restarts=2)


def test_the_verdict_follows_the_tests_that_say_something() -> None:
    better, worse = Mcnemar(20, 2, 0.0001), Mcnemar(2, 20, 0.0001)
    even, weak = Mcnemar(3, 3, 1.0), Mcnemar(0, 5, 0.0625)
    assert judge(even, even) == judge(even, weak) == "no_difference"
    assert judge(even, better) == judge(better, weak) == judge(better, better) == "helps"
    assert judge(even, worse) == judge(worse, even) == "hurts"
    assert judge(better, worse) == judge(worse, better) == "trades"


@pytest.fixture(scope="module")
def model() -> TorchModel:
    """The mean of the right half against that of the left, by a network with a convolution."""
    torch.manual_seed(0)
    model, split = wrap(small_network(), classes=2, shape=(1, 8, 8)), halves(300)
    batch = split.take(np.arange(300, dtype=np.int64))
    optimizer = torch.optim.Adam(model.module.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.module(batch.images), batch.labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def attack(model: TorchModel) -> PlannedAttack:
    return PlannedAttack(model, PLAN, seed=0, precision="float32")


@pytest.fixture(scope="module")
def pair(
    model: TorchModel, attack: PlannedAttack, tmp_path_factory: pytest.TempPathFactory
) -> tuple[QuantizedModel, QuantizedModel]:
    folder = tmp_path_factory.mktemp("pair")
    twin = export_onnx(model, folder / "float.onnx", ExportConfig())
    some, none = QuantizeConfig(calibrate_adversarial=0.5), QuantizeConfig()
    share = AdversarialShare(attack, 0.5)
    bright = halves(40, seed=2)
    pixels = bright.images.pixels(bright.indices)
    # of so little contrast that other images drive the activations beyond the ranges
    dim = Split(ArrayImages("dim", ("left", "right"), 110 + pixels // 8, bright.labels), bright.indices)
    first = quantize_int8(twin, folder / "some.onnx", bright, some, adversarial=share)
    return first, quantize_int8(twin, folder / "none.onnx", dim, none)


def test_both_graphs_are_scored_on_the_same_attacked_images(
    pair: tuple[QuantizedModel, QuantizedModel], attack: PlannedAttack
) -> None:
    split = halves(300, seed=1)
    found = compare_calibrations(*pair, attack, split)
    flags = []
    for graph in pair:
        predictor = OnnxPredictor(graph.model.path)
        clean, robust = [], []
        for number, batch in enumerate(split.batches()):
            right = predictor.predict(batch.images).argmax(1) == batch.labels
            clean.append(right)
            for restart in range(2):
                attacked = attack.attack(batch, number, restart)
                right = right & (predictor.predict(attacked).argmax(1) == batch.labels)
            robust.append(right)
        flags.append((torch.cat(clean), torch.cat(robust)))
    for side, (clean_flags, robust_flags) in zip((found.adversarial, found.plain), flags, strict=True):
        assert (side.clean.correct, side.clean.total) == (int(clean_flags.sum()), 300)
        assert (side.robust.correct, side.robust.total) == (int(robust_flags.sum()), 300)
    assert found.clean_test == mcnemar(flags[0][0], flags[1][0])
    assert found.robust_test == mcnemar(flags[0][1], flags[1][1])
    assert found.attack == "pgd-5"
    assert found.verdict == judge(found.clean_test, found.robust_test)


def test_clipped_activations_are_counted_on_clean_and_attacked_images(
    pair: tuple[QuantizedModel, QuantizedModel], attack: PlannedAttack
) -> None:
    found = compare_calibrations(*pair, attack, halves(60, seed=1))
    shares = (found.adversarial.clipped_attacked, found.plain.clipped_attacked)
    assert shares[0] is not None and shares[1] is not None
    assert 0 <= shares[0] < shares[1] < 1
    assert found.plain.clipped_clean is not None and found.plain.clipped_clean > 0


def test_at_most_so_many_images_are_compared(
    pair: tuple[QuantizedModel, QuantizedModel], attack: PlannedAttack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "COMPARED_IMAGES", 24)
    assert compare_calibrations(*pair, attack, halves(60, seed=1)).plain.clean.total == 24


def test_a_graph_without_a_twin_is_compared_all_the_same(
    pair: tuple[QuantizedModel, QuantizedModel], attack: PlannedAttack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, **_: object) -> None:
        raise UnconvertibleGraph(path, ("Strange",))

    monkeypatch.setattr(calibration, "twin_of_session", refuse)
    found = compare_calibrations(*pair, attack, halves(24, seed=1))
    assert found.plain.clipped_clean is None and found.adversarial.clipped_attacked is None
    assert found.adversarial.clean.total == 24
