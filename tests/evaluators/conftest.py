from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from toolkit import progress


@pytest.fixture
def quiet() -> Iterator[None]:
    """No progress, and one thread: networks this small only wait for a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    progress.set_quiet(True)
    yield
    progress.set_quiet(False)
    torch.set_num_threads(before)
