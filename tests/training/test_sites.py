from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.toys import small_network, wrap
from toolkit.artifacts import TorchModel
from toolkit.errors import ToolkitError
from toolkit.models.registry import build_network
from toolkit.training.sites import Sites, find_sites


def tiny_model(network: nn.Module) -> TorchModel:
    return wrap(network, classes=2, shape=(1, 8, 8))


class Block(nn.Module):
    """A residual block whose one ReLU is used three times, or is a function."""

    def __init__(self, *, functions: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(64, 2)
        self.relu = nn.ReLU(inplace=True)
        self.functions = functions

    def forward(self, image: Tensor) -> Tensor:
        relu = functional.relu if self.functions else self.relu
        first = relu(self.bn1(self.conv1(image)))
        second = relu(self.bn2(self.conv2(first)) + first)
        result: Tensor = self.head(functional.max_pool2d(relu(second), 2).flatten(1))
        return result


def test_a_chain_rounds_the_image_and_every_relu() -> None:
    found = find_sites(tiny_model(small_network(batch_norm=True)))
    assert found == Sites(inputs={}, outputs={"2": (True,)}, pixels=("0",), layers=("0", "4"))


def test_pooling_and_flattening_keep_the_grid() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
    assert find_sites(tiny_model(network)).inputs == {}
    network[2] = nn.AvgPool2d(2)
    assert find_sites(tiny_model(network)).inputs == {"4": (True,)}


def test_both_sides_of_a_sum_are_rounded_and_what_only_a_norm_reads_is_not() -> None:
    found = find_sites(tiny_model(Block(functions=False)))
    assert found.outputs == {"relu": (True, True, True), "bn2": (True,)}
    assert found.inputs == {"head": (True,)}  # max_pool2d as a function is not seen through
    assert found.layers == ("conv1", "conv2", "head")


def test_functions_are_rounded_where_layers_read_what_they_make() -> None:
    found = find_sites(tiny_model(Block(functions=True)))
    assert found.outputs == {"bn2": (True,)} and found.inputs == {"conv2": (True,), "head": (True,)}


def test_a_sum_in_place_counts() -> None:
    network = build_network("resnet18", 2, (1, 8, 8))
    found = find_sites(tiny_model(network))
    assert found.outputs["layer1.0.bn2"] == (True,) and found.outputs["layer2.0.downsample.1"] == (True,)
    assert found.outputs["layer1.0.relu"] == (True, True) and found.outputs["relu"] == (True,)
    assert "layer1.0.bn1" not in found.outputs and found.inputs == {"fc": (True,)}
    assert len(found.layers) == 21


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(64, 2)

    def forward(self, image: Tensor) -> Tensor:
        tokens = image.flatten(1, 2)
        result: Tensor = self.last(self.norm(tokens + self.first(tokens)).flatten(1))
        return result


def test_what_a_layer_norm_reads_is_left_float() -> None:
    assert find_sites(tiny_model(Transformer())).outputs == {}


def test_the_network_is_left_as_it_was() -> None:
    model = tiny_model(Block(functions=False))
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    find_sites(model)
    assert all(torch.equal(before[name], value) for name, value in model.network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.network.modules())


class Matrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(2, 64))

    def forward(self, image: Tensor) -> Tensor:
        return functional.linear(image.flatten(1), self.weight)


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(ToolkitError, match="nothing to round in training") as caught:
        find_sites(tiny_model(Matrix()))
    assert "leave --qat away" in caught.value.fix


def test_weights_that_other_code_computes_are_refused() -> None:
    network = small_network()
    nn.utils.parametrizations.weight_norm(network[0])
    with pytest.raises(ToolkitError, match="weights cannot be rounded in training") as caught:
        find_sites(tiny_model(network))
    assert "'0'" in caught.value.found and "remove_parametrizations" in caught.value.fix
