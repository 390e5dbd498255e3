from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from tests.tiny import World
from tests.toys import GREY, halves, linear_model, small_network, wrap
from toolkit.artifacts import Split, TorchModel
from toolkit.attacks.surrogate import Surrogate
from toolkit.config import DataConfig, ExportConfig, ModelConfig, ModelRunConfig, QuantizeConfig
from toolkit.errors import ToolkitError
from toolkit.evaluators.accuracy import correct
from toolkit.evaluators.fake_quantised import QuantisedReLU, RangeRecorder, fake_quantise
from toolkit.evaluators.rounding import pixel_grid, quantise_weights
from toolkit.exporters.onnx import export_onnx
from toolkit.exporters.quantize import quantize_int8
from toolkit.exporters.session import OnnxPredictor
from toolkit.prepare import Prepared, prepare

SHAPE = (1, 8, 8)


def small(*, batch_norm: bool = False) -> TorchModel:
    torch.manual_seed(0)
    model = wrap(small_network(batch_norm=batch_norm), classes=2, shape=SHAPE)
    for module in model.module.modules():
        if isinstance(module, nn.BatchNorm2d):  # as if trained, with scales of both signs
            nn.init.normal_(module.weight)
            nn.init.normal_(module.get_buffer("running_mean"), std=0.1)
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 2)
    return model


def images(split: Split) -> torch.Tensor:
    return split.take(np.arange(len(split), dtype=np.int64)).images


def test_a_linear_network_in_closed_form() -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    split = halves(20)
    found = fake_quantise(linear_model(weight, SHAPE), split).predict(images(split)).double().numpy()
    grid = pixel_grid(GREY, 0.0, 8)
    pixels = (images(split).double().numpy().reshape(20, 64) - 0.5) / 0.5
    rounded = np.clip(np.rint(pixels / grid.step), grid.lowest, grid.highest) * grid.step
    scale = np.abs(weight.double().numpy()).max(1, keepdims=True) / 127
    assert np.allclose(found, rounded @ (np.rint(weight.double().numpy() / scale) * scale).T, atol=1e-4)


def test_activations_are_rounded_once_where_the_relu_makes_them() -> None:
    model, split = small(), halves(40)
    found = fake_quantise(model, split)
    first, relu, _, last = found.network.children()
    assert isinstance(relu, QuantisedReLU) and not last._forward_pre_hooks and len(first._forward_pre_hooks) == 1
    with torch.no_grad():
        activations = torch.relu(model.network.get_submodule("0")((images(split) - 0.5) / 0.5))
    assert relu.grid.step == pytest.approx(float(activations.max()) / 255)
    assert (relu.grid.lowest, relu.grid.highest) == (0, 255)


class Functional(nn.Module):
    """A ReLU that is no module, one that is used twice, one whose output is changed in place, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.third, self.fourth = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.other = nn.ReLU(inplace=True), nn.ReLU()
        self.last = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = x + self.relu(self.second(x))
        y = self.other(self.third(self.relu(x)))
        y += 1
        logits: torch.Tensor = self.last(self.fourth(y).mean((2, 3)))
        return logits


def test_what_no_single_relu_made_is_rounded_where_it_is_read() -> None:
    torch.manual_seed(0)
    model, split = wrap(Functional(), classes=2, shape=SHAPE), halves(40)
    found = fake_quantise(model, split)
    assert not any(isinstance(module, QuantisedReLU) for module in found.network.modules())
    assert all(len(layer._forward_pre_hooks) == 1 for layer in found.network.modules() if isinstance(layer, nn.Conv2d))
    spread = model.predict(images(split)).std()
    assert 0 < (found.predict(images(split)) - model.predict(images(split))).abs().max() < 0.1 * spread


def test_sixteen_bits_are_nearly_float_and_fewer_bits_are_further_away() -> None:
    model, split = small(batch_norm=True), halves(60)
    wanted = model.predict(images(split))
    errors = []
    for bits in (16, 8, 4, 2):
        found = fake_quantise(model, split, weight_bits=bits, activation_bits=bits).predict(images(split))
        errors.append(float((found - wanted).abs().max() / wanted.std()))
    assert errors[0] < 1e-3
    assert errors == sorted(errors)


def test_weights_are_rounded_per_channel_or_per_tensor() -> None:
    model = small()
    for per_channel in (True, False):
        found = fake_quantise(model, halves(8), weight_bits=1, per_channel=per_channel)
        for name in ("0.weight", "3.weight"):
            wanted = quantise_weights(model.network.get_parameter(name), 1, per_channel=per_channel)
            assert torch.equal(found.network.get_parameter(name), wanted)


def test_the_model_given_stays_as_it_was() -> None:
    model = small()
    before = copy.deepcopy(model.module.state_dict())
    model.module.train()
    fake_quantise(model, halves(8))
    assert model.module.training and all(parameter.requires_grad for parameter in model.module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.module.modules())


def test_a_margin_is_not_clipped() -> None:
    model, split = small(), halves(200)
    outside = images(split) * 1.4 - 0.2
    wanted = model.predict(outside)
    for margin, follows in ((0.0, False), (0.2, True)):
        found = fake_quantise(model, split, margin=margin).predict(outside)
        assert bool((found - wanted).abs().max() < 0.1 * wanted.std()) is follows


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_it_is_attacked_like_any_network(precision: str, batch_norm: bool) -> None:
    model, split = small(batch_norm=batch_norm), halves(50)
    found = fake_quantise(model, split).copy()
    batch = split.take(np.arange(50, dtype=np.int64))
    ours, plain = (
        Surrogate(each.module, each.spec.normalization, precision, input_shape=SHAPE)  # type: ignore[arg-type]
        for each in (found, model)
    )
    assert (ours.precision, ours.memory_format) == (precision, "channels-last")
    mine, theirs = (each.gradient(batch.images, batch.labels).flatten(1) for each in (ours, plain))
    assert float(torch.cosine_similarity(mine, theirs).mean()) > 0.95
    # pixels of 0 and 1 lie at the ends of the pixels' grid: they are not masked
    ends = batch.images.round()
    assert bool((ours.gradient(ends, batch.labels) != 0).flatten(1).any(dim=0).all())


def test_a_parametrised_layer_keeps_its_rounded_weights() -> None:
    torch.manual_seed(0)
    network = small_network()
    wanted = quantise_weights(network.get_parameter("0.weight"), 4)
    parametrizations.weight_norm(network[0])
    found = fake_quantise(wrap(network, classes=2, shape=SHAPE), halves(8), weight_bits=4)
    assert torch.allclose(found.network.get_parameter("0.weight"), wanted, atol=1e-6)


@pytest.fixture(scope="module")
def prepared(world: World) -> Prepared:
    path, data = world.folder / "model.pt", f"npz:{world.folder / 'data.npz'}"
    config = ModelRunConfig(model=ModelConfig(path=path), data=DataConfig(source=data), threads=1)
    return prepare(config)


@pytest.mark.parametrize("per_channel", [True, False])
def test_labels_agree_with_the_integer_graph(prepared: Prepared, tmp_path: Path, per_channel: bool) -> None:
    model, splits = prepared.model, prepared.splits
    twin = export_onnx(model, tmp_path / "float.onnx", ExportConfig())
    how = QuantizeConfig(per_channel=per_channel, equalize=False)  # the simulation rounds weights as they are
    integer = OnnxPredictor(quantize_int8(twin, tmp_path / "q.onnx", splits.calibration, how).model.path)
    simulated = fake_quantise(model, splits.calibration, per_channel=per_channel)
    seen, labels = images(splits.evaluation), torch.from_numpy(splits.evaluation.labels)
    wanted, found, exact = (each.predict(seen) for each in (integer, simulated, model))
    assert (found.argmax(1) == wanted.argmax(1)).float().mean() >= 0.99
    assert (found - wanted).square().mean() < 0.5 * (exact - wanted).square().mean(), "nearer than the float network"
    assert correct(simulated, seen, labels).float().mean() > 0.8


@pytest.mark.parametrize("bits", [{"weight_bits": 0}, {"activation_bits": 17}])
def test_bits_out_of_range_are_refused(bits: dict[str, int]) -> None:
    with pytest.raises(ToolkitError, match="cannot be quantised to so many bits") as caught:
        fake_quantise(small(), halves(8), **bits)  # type: ignore[arg-type]
    assert caught.value.found in ("0 bits", "17 bits")


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(ToolkitError, match="nothing to quantise"):
        fake_quantise(wrap(nn.Flatten(), classes=64, shape=SHAPE), halves(8))


def test_activations_that_are_no_numbers_are_refused() -> None:
    model = small()
    with torch.no_grad():
        model.network.get_parameter("0.bias").fill_(float("inf"))
    with pytest.raises(ToolkitError, match="activations are no finite numbers") as caught:
        fake_quantise(model, halves(8))
    assert "'1'" in caught.value.found


def test_no_images_are_refused() -> None:
    with pytest.raises(ToolkitError, match="no calibration images"):
        fake_quantise(small(), halves(8).first(0))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_ranges_recorded_in_training_are_those_of_the_images_seen(batch_norm: bool) -> None:
    model, split = small(batch_norm=batch_norm), halves(40)
    recorder = RangeRecorder(model)
    copied = model.copy()
    recorder.attach(copied.network)
    copied.predict(10 * images(split))
    assert not recorder.ranges, "in evaluation mode nothing counts"
    copied.network.train()
    for module in copied.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # the statistics of evaluation, so that both see the same activations
    copied.module(images(split))
    found = fake_quantise(model, halves(1), ranges=recorder.ranges)
    assert torch.equal(found.predict(images(split)), fake_quantise(model, split).predict(images(split)))


def test_recorded_ranges_survive_an_interruption() -> None:
    model, split = small(), halves(40)
    first, second = RangeRecorder(model), RangeRecorder(model)
    copied = model.copy()
    first.attach(copied.network.train())
    copied.module(images(split))
    second.restore(first.state())
    assert second.ranges == first.ranges and first.ranges
    copied.module(10 * images(split))
    assert first.ranges != second.ranges, "ranges grow with what is seen"
