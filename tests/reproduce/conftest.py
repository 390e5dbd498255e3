from __future__ import annotations

import pytest

from tests.reproduce import small
from toolkit import progress
from toolkit.models import registry
from toolkit.reproduce import runner, world


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every data set is small, and every training short."""
    monkeypatch.setattr(world, "load_source", small.source)
    monkeypatch.setattr(runner, "PROTOCOLS", small.protocols())
    monkeypatch.setattr(registry, "ARCHITECTURES", {**registry.ARCHITECTURES, "cnn8": small.network})
    monkeypatch.setattr(progress, "_quiet", True)
