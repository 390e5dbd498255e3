from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from toolkit.artifacts import OnnxModel
from toolkit.config import QuantizeConfig
from toolkit.errors import ToolkitError
from toolkit.exporters.calibration import CalibrationReader
from toolkit.exporters.equalization import LARGEST, Pair, equalized, pairs
from toolkit.exporters.integers import preprocess
from toolkit.exporters.observer import channel_peaks
from toolkit.exporters.quantize import quantize_int8
from toolkit.exporters.session import OnnxPredictor

from .small import onnx_file, pictures, wrap
from .test_quantize import export

SHAPE = (3, 12, 12)


def plain(network: nn.Module, tmp_path: Path) -> tuple[OnnxModel, ModelProto]:
    twin = export(wrap(network, SHAPE), tmp_path)
    return twin, preprocess(onnx.load(twin.path))


def peaks_of(model: ModelProto, found: tuple[Pair, ...]) -> dict[Pair, npt.NDArray[np.float64]]:
    reader = CalibrationReader(pictures(40, SHAPE), "image", batch_size=16)
    peaks = channel_peaks(model, [pair.tensor for pair in found], reader)
    return {pair: peaks[pair.tensor] for pair in found}


def answers(model: ModelProto, path: Path) -> Tensor:
    onnx.save(model, path)
    return OnnxPredictor(path).predict(pictures(16, SHAPE, seed=1).take(np.arange(16)).images)


def node(kind: str, *inputs: str, to: str, **attributes: Any) -> NodeProto:
    return helper.make_node(kind, inputs, [to], name=f"node_{to}", **attributes)


def graph(folder: Path, *between: NodeProto, last: str = "b", **constants: Any) -> ModelProto:
    """Two convolutions, `a` and `c`, with something in between that turns `a` into `last`."""
    draw = np.random.default_rng(0).normal
    values = {"w": draw(size=(8, 3, 3, 3)), "v": draw(size=8), "u": draw(size=(5, 8, 1, 1)), **constants}
    nodes = [node("Conv", "image", "w", "v", to="a"), *between, node("Conv", last, "u", to="c")]
    tail = [node("Sigmoid", "c", to="d"), node("GlobalAveragePool", "d", to="e"), node("Flatten", "e", to="logits")]
    arrays = {name: np.asarray(value, None if name == "sizes" else np.float32) for name, value in values.items()}
    return onnx.load(onnx_file(folder / "graph.onnx", [*nodes, *tail], ["n", *SHAPE], **arrays))


GROUPED = np.random.default_rng(1).normal(size=(8, 4, 3, 3))
DEPTHWISE = np.random.default_rng(1).normal(size=(8, 1, 3, 3))
RELU = node("Relu", "a", to="b")


@pytest.mark.parametrize(
    ("between", "constants", "found"),
    [
        ([node("Identity", "a", to="b")], {}, 1),
        ([RELU], {}, 1),
        ([node("LeakyRelu", "a", to="x"), node("MaxPool", "x", to="b", kernel_shape=[2, 2])], {}, 1),
        ([node("Relu", "a", to="x"), node("AveragePool", "x", to="b", kernel_shape=[2, 2])], {}, 1),
        ([node("Relu", "a", to="x"), node("Conv", "x", "k", to="b", group=8)], {"k": DEPTHWISE}, 2),
        ([node("Relu", "a", to="x"), node("Conv", "x", "k", to="b", group=2)], {"k": GROUPED}, 2),
        ([node("Clip", "a", "least", "most", to="b")], {"least": 0.0, "most": 6.0}, 0),
        ([node("Sigmoid", "a", to="b")], {}, 0),
        ([node("HardSwish", "a", to="b")], {}, 0),
        ([node("Softmax", "a", to="b", axis=1)], {}, 0),
        ([node("Relu", "a", to="x"), node("Add", "x", "a", to="b")], {}, 0),  # read twice
        ([node("Sigmoid", "a", to="s"), node("Relu", "a", to="x"), node("Conv", "x", "k", to="y", group=8),
          node("Add", "y", "s", to="b")], {"k": DEPTHWISE[:, :, :1, :1]}, 0),  # read before, too
        ([node("Relu", "a", to="x"), node("Mul", "x", "w_of_nothing", to="b")], {"w_of_nothing": 2.0}, 0),
        ([node("Relu", "a", to="x"), node("Reshape", "x", "sizes", to="b")], {"sizes": [-1, 8, 50, 2]}, 0),
        ([node("Relu", "a", to="x"), node("Conv", "x", "u8", to="y"), node("Conv", "y", "u8", to="b")],
         {"u8": np.eye(8).reshape(8, 8, 1, 1)}, 0),  # one weight, two layers
    ],
)  # fmt: skip
def test_channels_are_scaled_where_the_function_stays(
    between: list[NodeProto], constants: dict[str, Any], found: int, tmp_path: Path
) -> None:
    model = graph(tmp_path, *between, **constants)
    between_layers = pairs(model)
    assert len(between_layers) == found
    made = equalized(model, {pair: np.geomspace(1e-3, 1, pair.channels) for pair in between_layers})
    assert (made != model) == bool(found)
    wanted = answers(model, tmp_path / "before.onnx")
    torch.testing.assert_close(answers(made, tmp_path / "after.onnx"), wanted, rtol=1e-4, atol=1e-5)


def test_nodes_need_no_names(tmp_path: Path) -> None:
    depthwise = node("Conv", "x", "k", to="b", group=8)
    model = graph(tmp_path, node("Relu", "a", to="x"), depthwise, k=DEPTHWISE)
    for one in model.graph.node:
        one.name = ""
    made = equalized(model, {pair: np.geomspace(1e-3, 1, pair.channels) for pair in pairs(model)})
    wanted = answers(model, tmp_path / "before.onnx")
    torch.testing.assert_close(answers(made, tmp_path / "after.onnx"), wanted, rtol=1e-4, atol=1e-5)


def test_a_tensor_that_is_given_out_is_left_alone(tmp_path: Path) -> None:
    model = graph(tmp_path, RELU)
    assert len(pairs(model)) == 1
    model.graph.output.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, None))
    assert not pairs(model)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ModelProto:
    """Ordinary, grouped and linear layers, one without a bias, flattened in between."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(96, 7), nn.ReLU(), nn.Linear(7, 4, bias=False),
    )  # fmt: skip
    return plain(network, tmp_path_factory.mktemp("whole"))[1]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_factors_leave_a_whole_network_as_it_was(
    data: st.DataObject, whole: ModelProto, tmp_path_factory: pytest.TempPathFactory
) -> None:
    found = pairs(whole)
    assert [pair.channels for pair in found] == [6, 6, 7]
    sizes = {found[0]: 6, found[1]: 96, found[2]: 7}  # flattened: 16 places of each channel
    peaks = st.floats(0, 1e4, width=32)
    drawn = {pair: np.array(data.draw(st.lists(peaks, min_size=n, max_size=n))) for pair, n in sizes.items()}
    made, folder = equalized(whole, drawn, data.draw(st.floats(0, 1))), tmp_path_factory.mktemp("equalised")
    wanted = answers(whole, folder / "before.onnx")
    torch.testing.assert_close(answers(made, folder / "after.onnx"), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_ranges_come_as_near_to_the_widest_as_was_asked_for(strength: float, tmp_path: Path) -> None:
    """By the definition: of ranges r, the widest R, there is left r (R / r)^strength."""
    model = graph(tmp_path, RELU)
    before = peaks_of(model, pairs(model))
    after = peaks_of(equalized(model, before, strength), pairs(model))
    ((pair, peaks),) = before.items()
    assert np.ptp(peaks) > 0.1
    np.testing.assert_allclose(after[pair], peaks * (peaks.max() / peaks) ** strength, rtol=1e-5)


def test_channels_without_values_and_next_to_none_keep_sane_weights(tmp_path: Path) -> None:
    model = graph(tmp_path, RELU)
    (pair,) = pairs(model)
    peaks = np.array([1.0, 0.0, 1e-30, 1.0, 0.25, 1.0, 1.0, 1.0])
    before, after = (
        next(numpy_helper.to_array(item) for item in one.graph.initializer if item.name == "w")
        for one in (model, equalized(model, {pair: peaks}))
    )
    factors = (after / before).reshape(8, -1).mean(axis=1)
    np.testing.assert_allclose(factors, [1, 1, LARGEST, 1, 2, 1, 1, 1], rtol=1e-5)
    assert equalized(model, {pair: np.zeros(8)}) == model


def test_activations_that_overflow_are_named(tmp_path: Path) -> None:
    model = graph(tmp_path, RELU)
    next(item for item in model.graph.initializer if item.name == "v").CopyFrom(
        numpy_helper.from_array(np.full(8, np.inf, np.float32), "v")
    )
    with pytest.raises(ToolkitError, match="no finite numbers"):
        peaks_of(model, pairs(model))


def uneven() -> nn.Sequential:
    """A network whose hidden channels differ by up to 100 times in range, and all matter to the logits alike."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 4)
    )
    scale = torch.logspace(0, 2, 16)
    with torch.no_grad():
        for first, second, repeats in ((network[0], network[2], 1), (network[2], network[5], 64)):
            assert isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d | nn.Linear)
            first.weight *= scale.view(-1, 1, 1, 1)
            assert first.bias is not None
            first.bias *= scale
            factors = scale.repeat_interleave(repeats)
            second.weight /= factors.view(1, -1, *(1,) * (second.weight.ndim - 2))
    return network


@pytest.mark.parametrize(
    ("how", "equal"),
    [({}, 2), ({"equalize": False}, 0), ({"per_channel": False}, 0), ({"weight_bits": 4}, 1)],
)
def test_the_settings_decide(how: dict[str, object], equal: int, tmp_path: Path) -> None:
    twin, _ = plain(uneven(), tmp_path)
    config = QuantizeConfig(**{"int8": True, **how})
    assert quantize_int8(twin, tmp_path / "int8.onnx", pictures(64, SHAPE), config).equalized == equal


def test_uneven_channels_lose_less(tmp_path: Path) -> None:
    twin, model = plain(uneven(), tmp_path)
    wanted = answers(model, tmp_path / "float.onnx")
    errors = []
    for equalize in (False, True):
        config, path = QuantizeConfig(int8=True, equalize=equalize), tmp_path / f"{equalize}.onnx"
        quantize_int8(twin, path, pictures(64, SHAPE), config)
        found = OnnxPredictor(path).predict(pictures(16, SHAPE, seed=1).take(np.arange(16)).images)
        errors.append(float((found - wanted).square().mean()))
    assert errors[1] < errors[0] / 5
