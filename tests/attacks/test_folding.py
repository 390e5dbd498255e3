from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.toys import RGB, wrap
from toolkit.attacks.folding import find_pairs, fold, write_folded
from toolkit.attacks.surrogate import Surrogate
from toolkit.models.networks import resnet18


def lively(network: nn.Module) -> nn.Module:
    """In evaluation mode, with statistics and weights of batch norm that are not those of the start."""
    generator = torch.Generator().manual_seed(3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
                nn.init.uniform_(module.bias, -1, 1, generator=generator)
    return network.eval()


def images(side: int = 8) -> Tensor:
    return torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """One convolution and one batch norm, read as the argument says."""

    def __init__(self, how: str = "plain", **norm: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1, bias=how == "biased")
        self.norm = nn.BatchNorm2d(3, **norm)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        z: Tensor = self.norm(y)
        if self.how == "read twice":
            return z + y
        if self.how == "used twice":
            again: Tensor = self.norm(self.first(z))
            return again
        if self.how == "branches" and float(x.sum()) > 0:
            return -z
        return z


def test_every_batch_norm_of_the_papers_resnet_is_folded_and_nothing_else_changes() -> None:
    network = lively(resnet18(10, (3, 32, 32)))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    folded, pairs = fold(network, images(32))
    assert len(pairs) == 20 == sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert torch.allclose(folded(images(32)), network(images(32)), rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("how", ["plain", "biased"])
@pytest.mark.parametrize("affine", [True, False])
def test_a_pair_is_folded_exactly(how: str, affine: bool) -> None:
    network = lively(Block(how, affine=affine)).double()
    folded, pairs = fold(network, images().double())
    assert [(pair.convolution, pair.norm) for pair in pairs] == [("first", "norm")]
    assert torch.allclose(folded(images().double()), network(images().double()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ["read twice", "used twice", "branches"])
def test_what_cannot_be_folded_stays(how: str) -> None:
    network = lively(Block(how))
    assert find_pairs(network) == () and fold(network, images()) == (network, ())


def _hooked(block: Block) -> None:
    block.first.register_forward_hook(lambda _module, _inputs, output: output.round())


def _tied(block: Block) -> None:
    block.second = nn.Conv2d(3, 3, 3)
    block.second.weight = block.first.weight


def _parametrized(block: Block) -> None:
    parametrizations.weight_norm(block.first)


@pytest.mark.parametrize("change", [_hooked, _tied, _parametrized])
def test_layers_that_do_more_than_torchs_own_stay(change: Callable[[Block], None]) -> None:
    network = Block()
    change(network)
    assert find_pairs(lively(network)) == ()


def test_batch_norm_without_statistics_stays() -> None:
    assert find_pairs(Block(track_running_stats=False).eval()) == ()


class Keeping(Block):
    """Keeps what it computed, for whoever looks."""

    seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.seen = super().forward(x)
        return self.seen


def test_what_a_network_keeps_is_not_replaced_by_the_search() -> None:
    network = lively(Keeping())
    with torch.no_grad():
        seen = network(images())
    assert len(find_pairs(network)) == 1 and network.seen is seen


class Grown(Block):
    """Reads its weights itself, which no graph of modules shows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.first.weight.detach().mean()


def test_a_network_that_is_another_one_when_folded_stays() -> None:
    network = lively(Grown())
    assert len(find_pairs(network)) == 1
    assert fold(network, images()) == (network, ())


def test_new_weights_and_statistics_are_written_into_the_folded_network() -> None:
    network = Block("biased").eval()
    folded, pairs = fold(network, images())
    lively(network)
    assert not torch.allclose(folded(images()), network(images()), atol=1e-2)
    write_folded(folded, network, pairs)
    assert torch.allclose(folded(images()), network(images()), rtol=1e-4, atol=1e-5)


def test_a_surrogate_of_folded_layers_follows_training() -> None:
    model = wrap(nn.Sequential(Block(), nn.Flatten(), nn.Linear(192, 10)), shape=(3, 8, 8), normalization=RGB)
    surrogate = Surrogate(model.module, RGB, input_shape=(3, 8, 8))
    later = copy.deepcopy(model.module)
    lively(later)
    surrogate.refresh(later)
    labels = torch.tensor([0, 1, 2, 3])
    leaf = images().requires_grad_(True)
    loss = nn.functional.cross_entropy(later(leaf), labels, reduction="sum")
    (expected,) = torch.autograd.grad(loss, leaf)
    assert torch.allclose(surrogate.gradient(images(), labels).cpu(), expected, rtol=1e-3, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in surrogate._network.modules())
