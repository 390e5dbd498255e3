from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from toolkit.training import crowd
from toolkit.training.crowd import CrowdWatch


@pytest.mark.parametrize(("threads", "load", "told"), [(2, 0.5, True), (1, 0.5, False), (2, 0.01, False)])
def test_several_threads_beside_other_work_are_told_once(
    threads: int, load: float, told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def foreign() -> Iterator[Callable[[], float]]:
        yield lambda: load

    monkeypatch.setattr(crowd, "foreign_load", foreign)
    monkeypatch.setattr(crowd, "own_cpus", lambda: [0, 1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    now = [0.0]
    monkeypatch.setattr("toolkit.training.crowd.time.monotonic", lambda: now[0])
    watch = CrowdWatch()
    watch.look()
    assert "CPU" not in capsys.readouterr().err, "not yet"
    now[0] = crowd.LOOK_AFTER_S
    watch.look()
    watch.look()
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("50% of the CPU time: 2 threads") == told and ("--threads 1" in said) == told
