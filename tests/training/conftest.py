from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tests.toys import small_network, wrap
from toolkit.artifacts import TorchModel


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only wait for a second thread, above all while other tests run beside them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model() -> TorchModel:
    torch.manual_seed(0)
    network = nn.Sequential(small_network(batch_norm=True)[:-1], nn.Dropout(0.1), nn.Linear(96, 2))
    return wrap(network, classes=2, shape=(1, 8, 8))
