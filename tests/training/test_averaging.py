from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.toys import GREY
from toolkit.artifacts import Normalized
from toolkit.training.averaging import WeightAverage


def networks(count: int) -> list[Normalized]:
    """Networks of one architecture with batch norm, each with other weights and statistics."""
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
        network(torch.randn(4, 1, 8, 8) * (seed + 1))
        made.append(Normalized(network, GREY))
    return made


@pytest.mark.parametrize("decay", [0.05, 0.9])
def test_the_average_is_the_weighted_sum_of_all_weights(decay: float) -> None:
    first, *later = networks(5)
    average = WeightAverage(first, decay)
    for step, module in enumerate(later, start=1):
        average.update(module, step)
    # in closed form: every state enters with (1 - decay) at its step, and loses a decay at each step after it
    decays = [min(decay, (1 + step) / (10 + step)) for step in range(1, len(later) + 1)]
    shares = [1.0] + [1 - d for d in decays]
    for index in range(len(shares)):
        for d in decays[index:]:
            shares[index] *= d
    assert sum(shares) == pytest.approx(1)
    states = [module.network.state_dict() for module in (first, *later)]
    for name, mine in average.module.network.state_dict().items():
        if mine.is_floating_point():
            parts = [share * state[name] for share, state in zip(shares, states, strict=True)]
            assert torch.allclose(mine, torch.stack(parts).sum(0), atol=1e-6), name


def test_weights_that_stay_are_their_own_average() -> None:
    (module,) = networks(1)
    average = WeightAverage(module, 0.9)
    for step in range(1, 4):
        average.update(module, step)
    pairs = zip(average.state().values(), module.network.state_dict().values(), strict=True)
    assert all(torch.allclose(mine, theirs) for mine, theirs in pairs)


def test_statistics_are_averaged_and_counters_are_copied() -> None:
    first, second = networks(2)
    second.network(torch.randn(2, 1, 8, 8))
    average = WeightAverage(first, 0.5)
    average.update(second, 100)
    one, two, mean = (module.network.state_dict() for module in (first, second, average.module))
    assert torch.allclose(mean["1.running_var"], (one["1.running_var"] + two["1.running_var"]) / 2)
    assert int(mean["1.num_batches_tracked"]) == int(two["1.num_batches_tracked"]) == 2


def test_the_network_in_training_is_not_changed() -> None:
    first, second = networks(2)
    before = {name: value.clone() for name, value in second.network.state_dict().items()}
    average = WeightAverage(first, 0.9)
    average.update(second, 1)
    average.update(first, 2)
    assert all(torch.equal(before[name], value) for name, value in second.network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in average.module.parameters())


def test_a_restored_average_goes_on_equally() -> None:
    first, second, third = networks(3)
    whole = WeightAverage(first, 0.9)
    whole.update(second, 1)
    again = WeightAverage(third, 0.9)
    again.restore({name: value.clone() for name, value in whole.state().items()})
    for average in (whole, again):
        average.update(third, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.state().values(), again.state().values(), strict=True))
