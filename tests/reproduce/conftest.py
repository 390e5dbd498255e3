from __future__ import annotations

import pytest

from tests.reproduce import small
from toolkit import progress


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every data set is small, and every training short."""
    small.shrink(monkeypatch.setattr)
    monkeypatch.setattr(progress, "_quiet", True)
