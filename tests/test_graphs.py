from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from toolkit import graphs, locks
from toolkit.config import HardenConfig, ModelConfig
from toolkit.evaluators import latency
from toolkit.evaluators.latency import Stopclock


class _Parts:
    """Has whatever part of a run is looked for, of no account here."""

    def __init__(self, path: Path) -> None:
        self.path = self.assignment = path / "assignment"
        self.splits = self.validation = self.calibration = self


@pytest.mark.parametrize("which", ["find_assignment", "choose_rounding"])
def test_a_search_by_time_times_while_no_other_run_does(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, seen = tmp_path / "stopwatch", list[str]()

    def measure(files: Any, *_: object) -> dict[tuple[str, int], list[Any]]:
        with pytest.raises(BlockingIOError):
            locks.take(lock)
        seen.append("timed")
        return {(name, 1): [np.ones(3)] for name in files}

    def search(*parts: Any, **_: object) -> Any:
        (clock,) = (part for part in parts if isinstance(part, Stopclock))
        locks.give_back(locks.take(lock))  # attacks between two looks at the times keep nobody waiting
        assert clock.rounds({"a": tmp_path}, 1)["a"] == pytest.approx([1.0])
        return SimpleNamespace(write=lambda *_: None)

    monkeypatch.setattr(graphs, "stopwatch_lock", lambda: lock)
    monkeypatch.setattr(graphs, "some_pixels", lambda *_: np.zeros((1, 1, 4, 4), dtype=np.float32))
    monkeypatch.setattr(graphs, which, search)
    monkeypatch.setattr(latency, "_measure", measure)
    monkeypatch.setattr(graphs, "fingerprint", lambda *_: "")
    monkeypatch.setattr("toolkit.graphs.Assignment.read", lambda *_: None)
    values: dict[str, Any] = {"prune": {"round_to": "auto"}, "benchmark": {"batches": (1,)}, "threads": 1}
    config = HardenConfig(model=ModelConfig(path=Path("model.pt")), **values)
    parts: Any = _Parts(tmp_path)
    calls: dict[str, Callable[[], object]] = {
        "find_assignment": lambda: graphs._assign(config, parts, parts, parts, parts, parts),
        "choose_rounding": lambda: graphs.search_rounding(config, parts, parts.splits),
    }
    calls[which]()
    assert seen == ["timed"]
