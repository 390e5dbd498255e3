"""A real cluster on this machine: worker processes of Ray, one of which is killed midway."""

from __future__ import annotations

import ast
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.search.fakes import FakeWork, a_space, a_study, noted, plan
from toolkit.errors import ToolkitError
from toolkit.search import cluster
from toolkit.search.cluster import Needs, RayCluster
from toolkit.search.objective import Job, Outcome
from toolkit.search.runner import run_trials

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


def test_workers_share_the_trials_and_one_that_is_killed_costs_none(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log, space = tmp_path / "log", a_space()
    study = a_study(f"sqlite:///{tmp_path / 'study.sqlite'}", space)
    workers = RayCluster("local", FakeWork(str(log), seconds=0.3, dies_at=2), Needs(cpus=1), workers=2)
    try:
        assert workers.slots == 2
        run_trials(study, space, workers, plan(6, seeds=(0, 1)))
    finally:
        workers.close()
    tried = study.tried()
    study.close()
    assert capfd.readouterr().out == "", "stdout is for results"
    assert len(tried) == 6 and all(one.result is not None and len(one.result) == 2 for one in tried)
    begun, ended = noted(log, "begin"), noted(log, "end")
    assert Path(f"{log}.died").exists()
    killed = {process for trial, _, process in begun if trial == 2} - {
        process for trial, _, process in ended if trial == 2
    }
    assert len(killed) == 1, "one worker began trial 2 and never ended it"
    results = [(trial, seed) for trial, seed, _ in ended]
    assert sorted(results) == sorted((one.number, seed) for one in tried for seed in (0, 1)), "each once"
    assert len({process for _, _, process in ended}) >= 2, "several processes did the work"


class Dying(RayCluster):
    """A cluster on which every worker dies, however often a trial is tried."""

    def __init__(self) -> None:
        import ray

        def get(_: object) -> object:
            raise ray.exceptions.WorkerCrashedError

        self._running, self.slots, self._work = {}, 2, cast("Any", None)
        self._ray = SimpleNamespace(wait=lambda all_, **_: (all_[:1], all_[1:]), get=get, exceptions=ray.exceptions)
        self._task = cast("Any", SimpleNamespace(remote=lambda *_: object()))


def test_a_cluster_whose_workers_all_die_does_not_use_up_the_trials(tmp_path: Path) -> None:
    study = a_study(f"sqlite:///{tmp_path / 'study.sqlite'}")
    with pytest.raises(ToolkitError, match="3 trials in a row met a defect") as caught:
        run_trials(study, a_space(), Dying(), plan(12))
    assert "its worker died, 4 times: WorkerCrashedError" in caught.value.found
    assert len(study.tried()) == 3
    study.close()


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "nowhere"])
def test_an_address_where_no_cluster_is(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ToolkitError, match="the Ray cluster cannot be reached") as caught:
        RayCluster(address.format(port=port), FakeWork(str(tmp_path / "log")), Needs(1))
    assert "--address" in caught.value.found and "ray start --head" in caught.value.fix


def test_something_else_listens_at_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dashboard's port, say: Ray would try for minutes."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "ANSWER_S", 3)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ToolkitError, match="the Ray cluster cannot be reached") as caught:
            RayCluster(address, FakeWork(str(tmp_path / "log")), Needs(1))
    assert "no head of Ray, whose port is 6379" in caught.value.found


@pytest.mark.parametrize("accepted", [True, False])
def test_a_cluster_that_wants_a_token(accepted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray start` protects a cluster where a token lies about; who joins it by HOST:PORT has to say that he has it."""
    asked = list[str | None]()

    def ask(_address: str) -> str:
        asked.append(os.environ.get(cluster.AUTH_MODE))
        return "" if accepted and asked[-1] == "token" else f"ray.exceptions.{cluster.REFUSED}: missing or incorrect"

    monkeypatch.setenv(cluster.AUTH_MODE, "")
    monkeypatch.delenv(cluster.AUTH_MODE)
    monkeypatch.setattr(cluster, "_ask_head", ask)
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        address = f"127.0.0.1:{head.getsockname()[1]}"
        if accepted:
            cluster._check_answers(address)
        else:
            with pytest.raises(ConnectionError, match="wants the token that lies in"):
                cluster._check_answers(address)
    assert asked == [None, "token"]


class Lacking:
    """What a worker without the toolkit comes to."""

    def __call__(self, job: Job) -> Outcome:
        raise ModuleNotFoundError(f"No module named 'toolkit' (trial {job.trial})")


def test_a_worker_without_the_toolkit(tmp_path: Path) -> None:
    space = a_space()
    study = a_study(f"sqlite:///{tmp_path / 'study.sqlite'}", space)
    workers = RayCluster("local", Lacking(), Needs(cpus=1), workers=1)
    try:
        with pytest.raises(ToolkitError, match="a worker lacks the toolkit") as caught:
            run_trials(study, space, workers, plan(1))
    finally:
        workers.close()
        study.close()
    assert "No module named 'toolkit'" in caught.value.found and "on every machine" in caught.value.fix


def test_no_cluster_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: object, **__: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr("ray.init", nothing)  # another test's cluster may be there
    with pytest.raises(ToolkitError, match="the Ray cluster cannot be reached") as caught:
        RayCluster("auto", FakeWork(str(tmp_path / "log")), Needs(1))
    assert "--address auto" in caught.value.found


def test_a_trial_that_no_worker_has_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cluster._room([{"CPU": 4.0}], Needs(3)) == 1
    assert cluster._room([{"CPU": 8.0, "GPU": 1.0}, {"CPU": 3.0, "GPU": 1.0}], Needs(2, 0.5)) == 3
    assert cluster._room([{"CPU": 8.0}], Needs(2, 1.0)) == 0
    assert cluster._room([{"CPU": 8.0}, {"CPU": 8.0}], Needs(16)) == 0, "no trial runs on two machines"
    monkeypatch.setattr(cluster, "_connect", lambda *_: None)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 1.0}}])
    with pytest.raises(ToolkitError, match="no worker of the cluster has room") as caught:
        RayCluster("auto", FakeWork(str(tmp_path / "log")), Needs(2, 0.5))
    assert "2 CPU(s) and 0.5 GPU(s)" in caught.value.found and "--threads" in caught.value.fix


def test_ray_is_imported_only_where_a_cluster_is_made() -> None:
    body = ast.parse(Path(cluster.__file__).read_text()).body
    names = [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
    assert "socket" in names and "ray" not in names
    assert cluster.is_installed()
