"""Jobs as Ray tasks, on as many machines as there are. The only module that imports Ray.

Ray starts a task again whose worker died; whoever waits for it gets one result, so nothing is counted twice.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from toolkit import __version__, progress
from toolkit.errors import ToolkitError
from toolkit.evaluators.environment import allowed_cpus
from toolkit.search.executors import Work
from toolkit.search.objective import Job, Outcome
from toolkit.search.problems import Problem

RETRIES = 3
"""So often a job is begun again whose worker died."""
CONNECT_S = 10
"""Seconds in which a cluster must answer."""
ANSWER_S = 30
"""And say that it is one; half of it is Ray's own start."""
AUTH_MODE, REFUSED = "RAY_AUTH_MODE", "AuthenticationError"
PACKAGE = "ray"


def is_installed() -> bool:
    """Whether the extra `scale` is there."""
    return importlib.util.find_spec(PACKAGE) is not None


@dataclass(frozen=True)
class Needs:
    """What one job takes."""

    cpus: int
    gpus: float = 0.0


class RayCluster:
    """Does jobs on a Ray cluster.

    Args:
        address: `local` starts workers on this machine, `auto` joins the cluster that runs here, HOST:PORT another.
        work: does one job; is sent to the workers.
        needs: of one job.
        workers: jobs at a time; None: as many as the cluster has room for.

    Raises:
        ToolkitError: no cluster there, or one with no room for a single job.
    """

    def __init__(self, address: str, work: Work, needs: Needs, workers: int | None = None) -> None:
        try:
            _check_answers(address)  # before Ray is imported, which then reads how to sign in
        except (OSError, ValueError) as error:
            raise _unreachable(address, error) from error
        import ray

        self._ray: Any = ray  # parts of its interface have no types
        cpus = workers * needs.cpus if workers else max(allowed_cpus(), needs.cpus)
        # Ray reports workers that died on stdout, where results belong
        self._redirected = contextlib.ExitStack()
        self._redirected.enter_context(contextlib.redirect_stdout(sys.stderr))
        try:
            _connect(address, cpus)
        except BaseException:
            self._redirected.close()
            raise
        self._running: dict[Any, Job] = {}
        room = _room([node["Resources"] for node in self._ray.nodes() if node["Alive"]], needs)
        if room < 1:
            self.close()
            raise ToolkitError(
                "no worker of the cluster has room for a trial",
                found=f"a trial needs {needs.cpus} CPU(s) and {needs.gpus:g} GPU(s)",
                fix="lower --threads or --trial-gpus, or add larger machines to the cluster",
            )
        self.slots = min(room, workers or room)
        self._task = ray.remote(work_on).options(
            num_cpus=needs.cpus, num_gpus=needs.gpus, max_retries=RETRIES, retry_exceptions=False
        )
        self._work = ray.put(work)
        progress.notice(f"Ray: {self.slots} trial(s) at a time, {needs.cpus} CPU(s) and {needs.gpus:g} GPU(s) each")

    def submit(self, job: Job) -> None:
        self._running[self._task.remote(self._work, job)] = job

    def next(self) -> Outcome:
        (done,), _ = self._ray.wait(list(self._running), num_returns=1)
        job = self._running.pop(done)
        try:
            outcome: Outcome = self._ray.get(done)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ImportError) or "failed to import" in str(error):
                raise ToolkitError(
                    "a worker lacks the toolkit, or has another version of it",
                    found=str(error).strip().splitlines()[-1],
                    fix=f"install toolkit {__version__} and its extra `scale` on every machine of the cluster",
                ) from error
            raise RuntimeError(f"a worker met a defect: {error}") from error
        except self._ray.exceptions.RayError as error:
            reason = f"its worker died, {RETRIES + 1} times: {type(error).__name__}"
            problem = Problem("the trial cannot be made", reason, "see the workers' logs", fatal=False, died=True)
            return Outcome(job, problem=problem)
        return outcome

    def close(self) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        self._ray.shutdown()
        self._redirected.close()


def work_on(work: Work, job: Job) -> Outcome:
    """Do a job in a worker; a problem says which worker met it."""
    progress.set_quiet(True)
    outcome = work(job)
    if outcome.problem is None or not outcome.problem.fatal:
        return outcome
    found = f"on the worker {platform.node()}: {outcome.problem.found}"
    fix = f"{outcome.problem.fix}; every worker needs the model's file and the data set, at the same place"
    return replace(outcome, problem=replace(outcome.problem, found=found, fix=fix))


def _connect(address: str, cpus: int) -> None:
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if address == "local":
        options |= {"num_cpus": cpus, "include_dashboard": False}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent home
    try:
        ray.init(address=address, **options)
    except Exception as error:  # ConnectionError, OSError, RuntimeError, ValueError, as versions of Ray go
        ray.shutdown()
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> ToolkitError:
    return ToolkitError(
        "the Ray cluster cannot be reached",
        found=f"--address {address}: {type(error).__name__}: {str(error).splitlines()[0]}",
        fix="start one with `ray start --head`, or let workers run on this machine with --address local",
    )


def _check_answers(address: str) -> None:
    """Ray itself would try for minutes.

    Raises:
        OSError: nobody listens there.
        ValueError: no address.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("give auto, local or HOST:PORT")
    socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    if address.startswith("ray://"):
        return
    found = _ask_head(address)
    if REFUSED in found and AUTH_MODE not in os.environ:  # `ray start` wants the token that an earlier one left
        os.environ[AUTH_MODE] = "token"
        found = _ask_head(address)
    if REFUSED in found:
        raise ConnectionError("it wants the token that lies in ~/.ray/auth_token on its head: copy it to this machine")
    if found:
        raise ConnectionError("what listens there is no head of Ray, whose port is 6379 unless told otherwise")


def _ask_head(address: str) -> str:
    """What is wrong with the head at HOST:PORT, or with what listens there; empty: nothing.

    Asked in a process of its own, because a listener that is no head would keep Ray for minutes.
    """
    main = "from ray.scripts.scripts import main; main()"
    try:
        found = subprocess.run(
            [sys.executable, "-c", main, "health-check", "--address", address],
            capture_output=True,
            text=True,
            timeout=ANSWER_S,
        )
    except subprocess.TimeoutExpired:
        return "no answer"
    return "" if found.returncode == 0 else found.stderr or "not healthy"


def _room(nodes: Sequence[Mapping[str, float]], needs: Needs) -> int:
    """Jobs that fit a cluster at a time, each on one machine."""
    return sum(_room_on(resources, needs) for resources in nodes)


def _room_on(resources: Mapping[str, float], needs: Needs) -> int:
    room = resources.get("CPU", 0.0) // needs.cpus
    if needs.gpus:
        room = min(room, resources.get("GPU", 0.0) // needs.gpus)
    return int(room)
