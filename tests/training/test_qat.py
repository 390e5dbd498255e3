from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from tests.sums import exact_sums
from tests.toys import GREY, halves, small_network, wrap
from tests.training.runs import cut_after
from toolkit.artifacts import TorchModel
from toolkit.attacks.threat import PgdPlan, ThreatModel
from toolkit.config import ExportConfig, HardenConfig, QuantizeConfig, TrainConfig
from toolkit.errors import ToolkitError
from toolkit.evaluators.rounding import quantise_weights
from toolkit.exporters.observer import exposed_session
from toolkit.exporters.onnx import export_onnx, load_onnx
from toolkit.exporters.quantize import Quantizer
from toolkit.exporters.session import OnnxPredictor
from toolkit.training import loop
from toolkit.training.fake_quantisers import activation_quantisers, fit_range, span
from toolkit.training.loop import TrainingResult, train
from toolkit.training.qat import (
    LearntRanges,
    Rounding,
    Schedule,
    check_qat,
    fit,
    graph_ranges,
    prepare,
    simulate,
    split_state,
)
from toolkit.training.run import Run

PLAN = PgdPlan("pixel", ThreatModel("linf", 0.1, "pixels", clip=True), 20, 0.0125, random_start=True)
TRAIN, VALIDATION, TEST = halves(256, seed=1), halves(64, seed=2), halves(64, seed=3)
CONFIG = TrainConfig(epochs=2, batch_size=32, attack_steps=2, precision="float32", ema=0)
INT8 = Rounding()


class Residual(nn.Module):
    """Convolutions, a sum and a pooling between batch norms, one ReLU for all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.pool, self.head = nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 2)

    def forward(self, image: Tensor) -> Tensor:
        first = self.relu(self.bn1(self.conv1(image)))
        second = self.bn2(self.conv2(first))
        second += first
        result: Tensor = self.head(self.pool(self.relu(second)).flatten(1))
        return result


def toy(network: nn.Module | None = None) -> TorchModel:
    torch.manual_seed(0)
    return wrap(network or small_network(batch_norm=True), classes=2, shape=(1, 8, 8))


def run(model: TorchModel, rounding: Rounding | None = INT8, **options: Any) -> TrainingResult:
    changed = {name: options.pop(name) for name in tuple(options) if name in {*TrainConfig.model_fields} - {"teacher"}}
    return train(
        model, TRAIN, VALIDATION, CONFIG.model_copy(update=changed), PLAN, seed=0, rounding=rounding, **options
    )


def accuracy(model: TorchModel) -> float:
    batch = TEST.take(np.arange(len(TEST)))
    return float(model.predict(batch.images).argmax(dim=1).eq(batch.labels).float().mean())


def integers(result: TrainingResult, folder: Path, margin: float = 0.0, *, reduced: bool = False) -> Path:
    """The integer graph of a training."""
    assert result.learnt is not None
    fp32 = export_onnx(result.model, folder / "float.onnx", ExportConfig())
    ranges = graph_ranges(result.model, result.learnt, fp32.path, VALIDATION)
    config = QuantizeConfig(reduce_range=reduced)
    quantizer = Quantizer(fp32, VALIDATION, config, input_margin=margin, ranges=ranges)
    made = quantizer.write(folder / "int8.onnx")
    assert made.learnt_ranges == len(ranges) > 0
    return made.model.path


def tensor_behind(path: Path, images: Tensor, wanted: torch.Size, folder: Path) -> Tensor:
    """The last tensor of this shape (flattening aside) that comes out of a quantiser of an integer graph."""
    graph = load_onnx(path)
    names = [node.output[0] for node in graph.graph.node if node.op_type == "DequantizeLinear"]
    session = exposed_session(graph, names, folder / "exposed.onnx", optimized=False)
    found = [value for value in session.run(names, {"image": images.numpy()}) if value.size == wanted.numel()]
    return torch.from_numpy(found[-1]).view(wanted)


@pytest.fixture
def exact() -> Iterator[None]:
    with exact_sums():
        yield


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("margin", [0.0, 0.05])
@pytest.mark.parametrize("kind", ["chain", "residual"])
def test_the_integer_graph_computes_what_was_trained(kind: str, margin: float, tmp_path: Path) -> None:
    """What the head reads is equal but for one step where a sum of integers and one of floats fall on both sides of a
    tie; the logits differ accordingly.
    """
    torch.manual_seed(0)
    result = run(toy(Residual() if kind == "residual" else None), Rounding(margin=margin))
    assert result.learnt is not None
    images, path = TEST.take(np.arange(len(TEST))).images, integers(result, tmp_path, margin)
    trained, read = simulate(result.model, result.learnt), []
    head = next(module for module in reversed(list(trained.network.modules())) if isinstance(module, nn.Linear))
    head.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))
    logits = trained.predict(images)
    apart = (tensor_behind(path, images, read[0].shape, tmp_path) - read[0]).abs()
    low, high = [ends for calls in result.learnt.ends.values() for ends in calls][0 if kind == "chain" else 1]
    assert float(apart.max()) <= 1.01 * (high - low) / 255 and float((apart > 1e-4).float().mean()) < 0.02
    deployed = OnnxPredictor(path).predict(images)
    expected = apart @ head.weight.detach().abs().T
    assert bool(((logits - deployed).abs() <= 1.05 * expected + 1e-3 * logits.std()).all())
    assert float((result.model.predict(images) - deployed).abs().max()) > 0


@pytest.mark.parametrize("reduced", [False, True])
def test_weights_are_rounded_in_training_as_in_the_file(reduced: bool, tmp_path: Path) -> None:
    """The head follows no batch norm, so its weights are the same numbers in both."""
    bits = QuantizeConfig(reduce_range=reduced).int8_bits
    result = run(toy(), Rounding(weight_bits=bits))
    graph = load_onnx(integers(result, tmp_path, reduced=reduced)).graph
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    head = next(module for module in reversed(list(result.model.network.modules())) if isinstance(module, nn.Linear))
    rounded = quantise_weights(head.weight.detach(), bits).numpy()
    found = [
        constants[node.input[0]].astype(np.float32) * constants[node.input[1]].reshape(-1, 1)
        for node in graph.node
        if node.op_type == "DequantizeLinear"
        and node.input[0] in constants
        and constants[node.input[0]].shape == rounded.shape
    ]
    assert len(found) == 1 and np.allclose(found[0], rounded, rtol=1e-5, atol=1e-7)


def test_learnt_ranges_are_those_of_the_graph(tmp_path: Path) -> None:
    result = run(toy())
    assert result.learnt is not None
    (((low, high),),) = result.learnt.ends.values()
    path = integers(result, tmp_path)
    names = [node.output[0] for node in load_onnx(path).graph.node if node.op_type == "DequantizeLinear"]
    session = exposed_session(load_onnx(path), names, tmp_path / "exposed.onnx", optimized=False)
    images = TEST.take(np.arange(len(TEST))).images.numpy() * 50 - 25  # so that everything saturates
    ends = [(float(v.min()), float(v.max())) for v in session.run(names, {"image": images}) if v.shape[:1] == (64,)]
    assert low == 0 and any(end == pytest.approx((0, high), rel=1e-3) for end in ends)


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "standard"},
        {"objective": "adversarial", "ema": 0.9},
        {"objective": "fgsm"},
        {"objective": "trades"},
        {"objective": "distill", "clean_share": 0.5},
        {"precision": "bfloat16"},
    ],
)
def test_every_objective_learns_to_be_rounded(changes: dict[str, Any]) -> None:
    result = run(toy(), Rounding(weight_bits=4, activation_bits=4), teacher=run(toy(), None).model, **changes)
    assert result.learnt is not None and accuracy(simulate(result.model, result.learnt)) > 0.9
    plain = toy()
    assert result.model.network.state_dict().keys() == plain.network.state_dict().keys()
    assert not any(module._forward_pre_hooks for module in result.model.network.modules())
    assert result.model.spec.training[-1]["rounding"] == {
        "weight_bits": 4,
        "activation_bits": 4,
        "margin": 0.0,
        "per_channel": True,
    }


def test_training_for_two_bits_beats_rounding_afterwards() -> None:
    """Same network, seed and number of epochs; the ranges of the second are of least squared error."""
    coarse = Rounding(weight_bits=2, activation_bits=2)
    images = TEST.take(np.arange(len(TEST)))
    torch.manual_seed(0)
    start = Residual()
    aware, plain = (run(toy(start), rounding, epochs=12, attack_steps=1) for rounding in (coarse, None))
    assert aware.learnt is not None
    rounded = plain.model.copy()
    switch = prepare(rounded, coarse)
    with torch.no_grad():
        fit(rounded.network, switch, lambda: rounded.module(images.images))
    after = simulate(plain.model, split_state(rounded.network.state_dict(), coarse)[1])
    loss, worse = (
        float(nn.functional.cross_entropy(model.predict(images.images), images.labels))
        for model in (simulate(aware.model, aware.learnt), after)
    )
    assert loss < worse / 2


class Watched(Run):
    """Notes at every step what rounds, what learns and what stands still."""

    seen: list[tuple[bool, bool, Tensor, Tensor]]

    def advance(self) -> None:
        super().advance()
        assert self.schedule is not None
        state = self.module.network.state_dict()
        rounding = self.schedule.switch.rounding
        norms = [module for module in self.module.network.modules() if isinstance(module, nn.BatchNorm2d)]
        ends = torch.cat([quantiser.ends for quantiser in activation_quantisers(self.module.network).values()])
        self.seen.append((rounding, norms[0].training, state["1.running_mean"].clone(), ends.clone()))


def test_rounding_begins_and_statistics_and_ranges_come_to_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "Run", Watched)
    Watched.seen = []
    result = run(toy(), epochs=5)
    steps = len(Watched.seen)
    assert [step[0] for step in Watched.seen] == [False] * (steps // 2) + [True] * (steps // 2)
    still = [step for step in Watched.seen if not step[1]]
    assert len(still) == steps // 5 and [step[1] for step in Watched.seen[-len(still) :]] == [False] * len(still)
    settled = Watched.seen[-len(still) - 1]
    assert all(torch.equal(step[2], settled[2]) and torch.equal(step[3], settled[3]) for step in still)
    assert not torch.equal(Watched.seen[0][2], settled[2]) and not torch.equal(Watched.seen[steps // 2][3], settled[3])
    assert result.best_epoch > 2  # epochs in float are not kept


def test_rounding_may_begin_with_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "Run", Watched)
    Watched.seen = []
    result = run(toy(), epochs=2, qat_from=0.0)
    assert [step[0] for step in Watched.seen] == [True] * len(Watched.seen)
    assert result.learnt and not torch.equal(Watched.seen[0][3], Watched.seen[-1][3]), "ranges go on learning"


def test_ranges_may_span_all_values_and_follow_them_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "Run", Watched)
    moved = {}
    for extremes in (False, True):
        Watched.seen = []
        result = run(toy(), Rounding(extremes=extremes), qat_from=0.0)
        assert result.learnt is not None
        ends = [step[3] for step in Watched.seen[: int(0.8 * len(Watched.seen))]]
        moved[extremes] = np.mean([not torch.equal(*pair) for pair in pairwise(ends)])
    assert moved == {False: pytest.approx(0.1, abs=0.1), True: 1.0}
    assert "extremes" not in Rounding().record() and Rounding(extremes=True).record()["extremes"] is True


def test_a_span_holds_every_value_and_zero() -> None:
    assert span(torch.tensor([[3.0, 7.0]])) == (0.0, 7.0)
    values = torch.cat([torch.rand(5000), torch.tensor([40.0])])
    assert span(values)[1] == 40 > 1.5 * fit_range(values, 4)[1]


def test_weights_may_share_one_scale() -> None:
    result = run(toy(), Rounding(weight_bits=3, per_channel=False), qat_from=0.0)
    assert result.learnt
    rounded = simulate(result.model, result.learnt)
    layer = next(module for module in rounded.network.modules() if isinstance(module, nn.Conv2d))
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda module, _: seen.append(module.weight.detach()))  # behind the one that lends
    rounded.predict(TEST.take(np.arange(2)).images)
    assert len(set(seen[0].flatten().tolist())) <= 7 < len(set(layer.weight.flatten().tolist()))


def test_one_step_is_one_that_rounds() -> None:
    switch = prepare(toy(), INT8)
    schedule = Schedule(switch, 1, 0.5)
    schedule.enter(0, nn.Identity())
    assert switch.rounding and schedule.counts(1) and not schedule.counts(0)


@pytest.mark.parametrize("steps", [3, 8, 9, 14])  # in float, where rounding begins, behind it, at rest
@pytest.mark.parametrize("changes", [{"ema": 0.9}, {"objective": "fgsm"}])
def test_an_interrupted_run_goes_on_to_the_same_weights_and_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, changes: dict[str, Any]
) -> None:
    whole = run(toy(), **changes)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "SAVE_EVERY_S", -1.0)
        cut_after(patched, steps)
        with pytest.raises(KeyboardInterrupt):
            run(toy(), checkpoint=tmp_path / "cut.pt", **changes)
    assert torch.load(tmp_path / "cut.pt", weights_only=True)["step"] == steps
    resumed = run(toy(), checkpoint=tmp_path / "cut.pt", resume=True, **changes)
    pairs = zip(whole.model.network.state_dict().values(), resumed.model.network.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert whole.learnt == resumed.learnt and whole.epochs == resumed.epochs


def test_a_training_that_does_not_round_is_another(tmp_path: Path) -> None:
    run(toy(), checkpoint=tmp_path / "a.pt")
    with pytest.raises(ToolkitError, match="other settings, data or weights"):
        run(toy(), None, checkpoint=tmp_path / "a.pt", resume=True)


def test_attacks_are_made_through_the_rounding() -> None:
    """At two bits the gradient of the rounded network is another one than that of the float network."""
    model = toy()
    copied = model.copy()
    switch = prepare(copied, Rounding(weight_bits=2, activation_bits=2))
    images = TEST.take(np.arange(8)).images.requires_grad_(True)
    with torch.no_grad():
        fit(copied.network, switch, lambda: copied.module(images))
    gradients = []
    for switch.rounding in (True, False):
        (gradient,) = torch.autograd.grad(copied.module(images)[:, 0].sum(), images)
        gradients.append(gradient)
    (plain,) = torch.autograd.grad(model.module(images)[:, 0].sum(), images)
    assert torch.equal(gradients[1], plain)
    assert not torch.allclose(gradients[0], plain, rtol=0.1) and bool(gradients[0].any())


def test_a_state_is_weights_and_ranges() -> None:
    model = toy(Residual())
    prepare(model, INT8)
    weights, learnt = split_state(model.network.state_dict(), INT8)
    assert weights.keys() == Residual().state_dict().keys()
    assert learnt == LearntRanges(
        INT8,
        {"bn2.fake_quantised_output": ((-1.0, 1.0),), "head.fake_quantised_input": ((-1.0, 1.0),)}
        | {"relu.fake_quantised_output": ((-1.0, 1.0), (-1.0, 1.0))},
    )


@pytest.mark.parametrize("bits", [{"weight_bits": 1}, {"activation_bits": 17}])
def test_bits_out_of_range_are_refused(bits: dict[str, Any]) -> None:
    with pytest.raises(ToolkitError, match=r"cannot round (weights|activations) to so many bits") as caught:
        Rounding(**bits)
    assert f"{next(iter(bits.values()))} bits" in caught.value.found


@pytest.mark.parametrize(
    ("changes", "problem", "found"),
    [
        ({"quantize": {"int8": False}}, "trains for an integer graph", "--qat without --int8"),
        ({"finetune": {"objective": "none"}}, "is a way of fine-tuning", "--finetune none"),
        ({"finetune": {"epochs": 0}}, "is a way of fine-tuning", "--epochs 0"),
        ({"quantize": {"per_channel": False}}, "scale for every output channel", "--per-tensor"),
        ({"quantize": {"engine": "inc"}}, "the engine ort writes", "--engine inc"),
        ({"quantize": {"calibrate_adversarial": 0.5}}, "would change nothing", "--calibrate-adversarial 0.5"),
    ],
)
def test_what_qat_does_not_go_together_with(changes: dict[str, dict[str, Any]], problem: str, found: str) -> None:
    values: dict[str, dict[str, Any]] = {"model": {"path": "x"}, "quantize": {"int8": True}, "finetune": {"qat": True}}
    check_qat(HardenConfig.model_validate(values))
    for part, settings in changes.items():
        values[part] = values[part] | settings
    with pytest.raises(ToolkitError, match=problem) as caught:
        check_qat(HardenConfig.model_validate(values))
    assert found in caught.value.found


def test_the_normalisation_of_the_toys_is_folded() -> None:
    assert toy().spec.normalization == GREY  # so that the comparison above is one with a folded input quantiser
