"""The trials of a search in a data base that several processes share.

Who asks for a trial holds it as long as his process lives and his heart beats: a trial whose process died is failed and
asked again, and whatever that process might still tell of it is refused. So every result counts once.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from toolkit.errors import ToolkitError
from toolkit.locks import locked
from toolkit.progress import notice
from toolkit.search.database import (
    FAILURES,
    is_sqlite,
    open_storage,
    patiently,
    quiet,
    storage_errors,
    storage_lock,
    without_password,
)
from toolkit.search.ownership import this_process, vanished
from toolkit.search.sampler import SeededSampler
from toolkit.search.space import Dimension, Parameters, Space, digest
from toolkit.search.untried import Untried

HEARTBEAT_S = 5
GRACE_S = 60
"""After so many seconds without a heartbeat a process counts as dead, on whatever machine it was."""
OPENING_S = 3
"""For so long is the opening of a storage tried again that another process is making, or that is not there yet."""
ATTEMPTS = 3
"""So often a trial may end with the death of its process."""
REPEATS = 5
"""After so many points in a row that were tried already, an untried one is looked for."""
DIRECTIONS: dict[str, Literal["maximize", "minimize"]] = {
    "clean": "maximize",
    "robust": "maximize",
    "ratio": "minimize",
    "bytes": "minimize",
}
IDENTITY, OWNER, DIGEST, ATTEMPT, RESULT, REASON = "identity", "owner", "digest", "attempt", "result", "reason"
SKIPPED = "skipped"
"""Why a trial ended that neither has a result nor died."""
DIED = f"its process died, {ATTEMPTS} times"


@dataclass(frozen=True)
class Ticket:
    """A trial that this process holds."""

    number: int
    parameters: Parameters


@dataclass(frozen=True)
class Tried:
    """A trial that is done: it has a result, or a reason why it has none."""

    number: int
    parameters: Parameters
    result: Any | None
    reason: str | None


class Study:
    """A search in its storage.

    Args:
        url: of the data base, in SQLAlchemy's words.
        name: of the study in it.
        space: what may be tried.
        identity: plain data that names the search; results of another cannot be compared.
        seed: of the proposals.
        excess: by how much a result oversteps each limit, at most 0 where it keeps it; steers the proposals.

    Raises:
        ToolkitError: the storage cannot be used, or holds another study of this name.
    """

    def __init__(
        self,
        url: str,
        name: str,
        space: Space,
        identity: Mapping[str, Any],
        seed: int,
        excess: Callable[[Any], Mapping[str, float]] = lambda _: {},
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._seed, self._excess = space, seed, excess
        self._asking: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        if is_sqlite(url):  # which would give two who ask at once the same waiting trial
            self._asking = partial(locked, storage_lock(url))
        self._distributions = {dimension.name: _distribution(dimension) for dimension in space.dimensions}
        self._held: dict[int, optuna.Trial] = {}
        self._unsigned: dict[int, float] = {}
        """When a trial without an owner was first seen."""
        self._untried = Untried(space, seed)
        self._owner = {**this_process(), "study": uuid.uuid4().hex}
        # Optuna's making of a data base fails, and may fail for ever, where two make it at once
        self._identity = json.loads(json.dumps(identity))
        with storage_errors(url), locked(storage_lock(url)):
            self._storage, self._study = patiently(lambda: self._open(url, name), seconds=OPENING_S)
            self._check(name)
        if not self._trials():
            self._study.enqueue_trial(dict(space.start()), skip_if_exists=True)
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def _open(self, url: str, name: str) -> tuple[optuna.storages.RDBStorage, optuna.Study]:
        storage = open_storage(url, self._gone, heartbeat_s=HEARTBEAT_S, grace_s=GRACE_S)
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=list(DIRECTIONS.values()),
            sampler=SeededSampler(self._seed, self._excess_of),
            load_if_exists=True,
        )
        return storage, study

    def _excess_of(self, trial: FrozenTrial) -> Mapping[str, float]:
        result = trial.user_attrs.get(RESULT)
        return self._excess(json.loads(result)) if result else {}

    def close(self) -> None:
        """End the heartbeat, and give back what is still held, as far as the storage takes it."""
        for number in tuple(self._held):
            # another process may have ended it, or the storage be gone
            with contextlib.suppress(*FAILURES, optuna.exceptions.UpdateFinishedTrialError, ToolkitError):
                self.release(number)
        self._stop.set()
        self._heart.join()
        self._storage.engine.dispose()

    def ask(self, wanted: int) -> Ticket | None:
        """A trial that nobody has made or is making; None if `wanted` are made or under way, or none is left.

        Raises:
            ToolkitError: another process began the study anew.
        """
        repeats = 0
        if self._known() != self._identity:
            raise _begun_anew(self._study.study_name)
        self.reap()
        while len(self._counted()) < wanted:
            over = repeats >= REPEATS or self._untried.is_exhausted(self._tried())
            if over and not self._is_waiting() and not self._enqueue_untried():
                return None
            with quiet(), self._asking():
                trial = self._study.ask(self._distributions)
            self._storage.record_heartbeat(trial._trial_id)  # first: whoever dies later has a heart that stopped
            if not self._sign(trial):
                continue
            name = digest(self._space.config(trial.params))
            trial.set_user_attr(DIGEST, name)
            self._held[trial.number] = trial
            earlier = [other for other in self._counted() if other.number < trial.number]
            if any(self._digest(other) == name for other in earlier):
                self._skip(trial, "tried already")
                repeats += 1
            elif len(earlier) >= wanted:
                self._skip(trial, "others made enough meanwhile")
            else:
                return Ticket(trial.number, dict(trial.params))
        return None

    def _sign(self, trial: optuna.Trial) -> bool:
        """Write down whose a trial is; False: another process was given the same, and was there before."""
        if self._is_others(trial):
            return False
        trial.set_user_attr(OWNER, self._owner)
        return not self._is_others(trial)

    def _is_others(self, trial: optuna.Trial) -> bool:
        return bool(self._trial(trial.number).user_attrs.get(OWNER, self._owner) != self._owner)

    def tell(self, ticket: Ticket, values: Mapping[str, float], result: Any) -> bool:
        """Keep the result of a trial; False if it is held no more, and the result does not count.

        Args:
            ticket: from `ask`.
            values: one per objective (`DIRECTIONS`).
            result: plain JSON data.
        """
        trial = self._held[ticket.number]
        keep = partial(patiently, seconds=GRACE_S)  # it was dear
        counted = keep(lambda: self._note(trial, RESULT, json.dumps(result)))
        counted = counted and keep(lambda: self._finish(ticket.number, [values[name] for name in DIRECTIONS]))
        del self._held[ticket.number]
        return counted

    def refuse(self, ticket: Ticket, reason: str) -> bool:
        """Keep that a trial cannot be made, and why; it is not asked for again."""
        trial = self._held.pop(ticket.number)
        return self._note(trial, REASON, reason) and self._finish(ticket.number, None)

    def release(self, number: int) -> None:
        """Give a trial back, to be made by whoever asks next."""
        held, trial = self._held.pop(number), self._trial(number)
        # noted, or its last attempt would pass for a death
        if self._note(held, SKIPPED, "given back") and self._finish(number, None):
            self._enqueue_again(trial, int(trial.user_attrs.get(ATTEMPT, 1)))

    def _note(self, trial: optuna.Trial, name: str, text: str) -> bool:
        """Write something down with a trial; False if this process holds it no more."""
        known = next((other for other in self._trials() if other._trial_id == trial._trial_id), None)
        # a study begun anew gives the same numbers, and in SQLite the same keys, to other trials
        if known is None or known.state != TrialState.RUNNING or known.user_attrs.get(OWNER) != self._owner:
            return False
        try:
            trial.set_user_attr(name, text)
        except (KeyError, optuna.exceptions.UpdateFinishedTrialError):  # another process ended it at this moment
            return False
        return True

    def reap(self) -> None:
        """Release the trials of processes that died."""
        for held in tuple(self._held.values()):  # however long this one stood still
            self._storage.record_heartbeat(held._trial_id)
        with quiet():
            optuna.storages.fail_stale_trials(self._study)
        for trial in self._trials():
            theirs = trial.state == TrialState.RUNNING and trial.number not in self._held
            if theirs and self._is_dead(trial) and self._finish(trial.number, None):
                self._gone(self._study, trial)

    def _is_dead(self, trial: FrozenTrial) -> bool:
        """Whether a running trial's process is gone, as far as can be told without its heartbeat.

        A process that dies between asking and signing leaves a trial without an owner, which is dead once this process
        has seen it so for long enough: clocks and time zones of two machines may differ.
        """
        owner = trial.user_attrs.get(OWNER)
        if owner is not None:
            return vanished(owner)
        now = time.monotonic()
        return now - self._unsigned.setdefault(trial.number, now) > GRACE_S

    def others(self, wanted: int) -> int:
        """How many trials other processes are making, or, while fewer than `wanted` are counted, have left to make."""
        wait = len(self._counted()) < wanted
        states = (TrialState.RUNNING, TrialState.WAITING) if wait else (TrialState.RUNNING,)
        return sum(trial.state in states and trial.number not in self._held for trial in self._trials())

    @property
    def made(self) -> int:
        """How many trials are done, by whatever process."""
        return len(self.tried())

    def tried(self) -> tuple[Tried, ...]:
        """All trials that are done, each configuration once."""
        found: dict[str, Tried] = {}
        for trial in self._counted():
            if trial.state != TrialState.RUNNING:
                result = trial.user_attrs.get(RESULT) if trial.state == TrialState.COMPLETE else None
                reason = trial.user_attrs.get(REASON, DIED) if trial.state == TrialState.FAIL else None
                done = Tried(trial.number, dict(trial.params), json.loads(result) if result else None, reason)
                found.setdefault(str(trial.user_attrs.get(DIGEST)), done)
        return tuple(found.values())

    def _check(self, name: str) -> None:
        """Claim a fresh study, or see that this one is the same search."""
        ours, theirs = self._identity, self._known()
        same = [one.name.lower() for one in self._study.directions] == list(DIRECTIONS.values())
        if same and theirs is None and not self._trials():
            self._study.set_user_attr(IDENTITY, ours)
            return
        if theirs != ours:
            theirs = theirs or {}
            differing = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
            anew = ", or begin anew with --force" if same_network(theirs, ours) else ""
            raise ToolkitError(
                "the storage holds another study",
                found=f"study '{name}', which differs in: {', '.join(differing)}",
                fix=f"give the same arguments as before, or another name with --study{anew}",
            )

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            for trial in tuple(self._held.values()):
                try:
                    self._storage.record_heartbeat(trial._trial_id)
                except Exception as error:  # a data base that is busy or restarting; the grace period bridges it
                    notice(f"the storage did not take a heartbeat: {type(error).__name__}")

    def _trials(self) -> list[FrozenTrial]:
        try:
            return self._study.get_trials(deepcopy=False)
        except KeyError as error:
            raise _begun_anew(self._study.study_name) from error

    def _known(self) -> Any:
        """Whose the storage says that the study is."""
        try:
            return self._study.user_attrs.get(IDENTITY)
        except KeyError as error:
            raise _begun_anew(self._study.study_name) from error

    def _counted(self) -> list[FrozenTrial]:
        """Trials that are made, under way, or impossible; neither skipped nor asked again."""
        return [
            trial
            for trial in self._trials()
            if trial.state in (TrialState.COMPLETE, TrialState.RUNNING) or _is_hopeless(trial)
        ]

    def _digest(self, trial: FrozenTrial) -> str | None:
        """Names what a trial tries; while its process is about to write that down, its parameters tell."""
        known = trial.user_attrs.get(DIGEST)
        if known is None and set(trial.params) == set(self._distributions):
            return digest(self._space.config(trial.params))
        return None if known is None else str(known)

    def _trial(self, number: int) -> FrozenTrial:
        return next(trial for trial in self._trials() if trial.number == number)

    def _finish(self, number: int, values: list[float] | None) -> bool:
        """End a trial; False if somebody ended it before."""
        state = TrialState.FAIL if values is None else TrialState.COMPLETE
        try:
            self._study.tell(number, values, state=state)
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            return False
        return True

    def _skip(self, trial: optuna.Trial, why: str) -> None:
        trial.set_user_attr(SKIPPED, why)
        self._held.pop(trial.number)
        self._finish(trial.number, None)

    def _gone(self, _study: optuna.Study, trial: FrozenTrial) -> None:
        """Ask a trial again that was failed because its process is gone."""
        attempt = int(trial.user_attrs.get(ATTEMPT, 1))
        if attempt < ATTEMPTS:
            self._enqueue_again(trial, attempt + 1)

    def _enqueue_again(self, trial: FrozenTrial, attempt: int) -> None:
        if set(trial.params) == set(self._distributions):  # else its process died while it was being drawn
            self._study.enqueue_trial(dict(trial.params), user_attrs={ATTEMPT: attempt})

    def _is_waiting(self) -> bool:
        return any(trial.state == TrialState.WAITING for trial in self._trials())

    def _tried(self) -> frozenset[str | None]:
        """Names of all that is made, under way or impossible."""
        return frozenset(map(self._digest, self._counted()))

    def _enqueue_untried(self) -> bool:
        """Ask a point next that nobody has tried; False: none is found."""
        point = self._untried.find(self._tried(), draw=len(self._trials()))
        if point is None:
            return False
        self._study.enqueue_trial(dict(point))
        return True


def _begun_anew(name: str) -> ToolkitError:
    return ToolkitError(
        "the study was begun anew during this search",
        found=f"study '{name}' is another now, or removed: a search with --force on the same storage",
        fix="give this search a name of its own with --study, or the same arguments as that one",
    )


def forget(url: str, name: str, identity: Mapping[str, Any]) -> None:
    """Remove a search on the network of `identity` from its storage, if it is there.

    Raises:
        ToolkitError: the storage cannot be used, or the study of that name is somebody else's, or under way.
    """
    with storage_errors(url), contextlib.suppress(KeyError):
        storage = open_storage(url, lambda _study, _trial: None, heartbeat_s=HEARTBEAT_S, grace_s=GRACE_S)
        study = optuna.load_study(study_name=name, storage=storage)
        if not same_network(study.user_attrs.get(IDENTITY, {}), identity):
            raise ToolkitError(
                "--force does not remove another study",
                found=f"study '{name}' in {without_password(url)}, of another network or another program",
                fix="give this search another name with --study",
            )
        if _is_under_way(study):
            raise ToolkitError(
                "--force would remove the trials of a search that is under way",
                found=f"another process makes trials of study '{name}' in {without_password(url)}",
                fix="wait for it, or end it first; without --force both share the trials",
            )
        optuna.delete_study(study_name=name, storage=storage)


def _is_under_way(study: optuna.Study) -> bool:
    """Whether a living process makes a trial, as far as can be told from here."""
    with quiet():
        optuna.storages.fail_stale_trials(study)
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    owners = [trial.user_attrs[OWNER] for trial in running if OWNER in trial.user_attrs]
    return any(not vanished(owner) for owner in owners)


def same_network(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Whether two identities are of searches on one network."""
    return "weights" in theirs and theirs["weights"] == ours.get("weights")


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.step is None:
        return CategoricalDistribution(dimension.values)
    numbers = [float(value) for value in dimension.values]
    return FloatDistribution(min(numbers), max(numbers), step=dimension.step)


def _is_hopeless(trial: FrozenTrial) -> bool:
    """Whether a trial was refused, or ended with the death of its process too often."""
    died = int(trial.user_attrs.get(ATTEMPT, 1)) >= ATTEMPTS and SKIPPED not in trial.user_attrs
    return trial.state == TrialState.FAIL and (REASON in trial.user_attrs or died)
