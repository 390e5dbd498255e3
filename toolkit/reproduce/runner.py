"""Fills the cells of tables and figures, the most useful first, and goes on where an earlier sitting stopped.

Runs that share a work folder share the steps: each does what no other one is doing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from toolkit.bundle import disk_errors
from toolkit.config import DataConfig, ReproduceConfig
from toolkit.errors import ToolkitError
from toolkit.prepare import set_threads
from toolkit.progress import notice
from toolkit.reproduce import targets
from toolkit.reproduce.estimate import Estimator
from toolkit.reproduce.limits import Limits, Reached, alarm
from toolkit.reproduce.panels import Panel, Place
from toolkit.reproduce.pretrained import read_pretrained
from toolkit.reproduce.protocol import EXPERIMENTS, PROTOCOLS
from toolkit.reproduce.recipes import Planner
from toolkit.reproduce.statistics import first_repeated
from toolkit.reproduce.steps import Step
from toolkit.reproduce.store import Store, default_folder
from toolkit.reproduce.targets import Target
from toolkit.reproduce.work import Bench
from toolkit.reproduce.workers import WORKERS, lacking
from toolkit.reproduce.world import World, open_world
from toolkit.training.distributed import launched

POLL_S = 2.0
"""Seconds between two looks at whether another run has done its step."""


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step that would be done, and for about how long."""

    text: str
    seconds: float


class Runner:
    """One call of `toolkit reproduce`.

    Args:
        config: tables, data, seeds, protocol and limits.

    Raises:
        ToolkitError: an unknown table, a repeated seed, a data set that was named and is not there, none of those
            that the tables name, cells that no table has, or a work folder of another protocol.
    """

    def __init__(self, config: ReproduceConfig) -> None:
        self.config, self.protocol = config, PROTOCOLS[config.protocol]
        self.targets = targets.find_targets(config.target)
        _check_seeds(config.seeds)
        _check_pretrained(config)
        self.threads = set_threads(config.threads)
        self._planners: dict[tuple[str, int], Planner] = {}
        self.panels = self._open_panels()
        self.targets = tuple(dict.fromkeys(panel.target for panel in self.panels))
        self._places = self._choose()
        self.store = Store(config.work or default_folder(config.protocol), self.protocol)
        self.failed: dict[Step, str] = {}
        """What went wrong in this sitting."""

    def _open_panels(self) -> list[Panel]:
        worlds: dict[str, World | ToolkitError] = {}
        panels = []
        for target in self.targets:
            for data in [self.config.data.source] if self.config.data.source else target.data:
                if data not in worlds:
                    worlds[data] = self._open(data)
                panels.append(self._panel(target, data, worlds[data]))
        missing = [world for world in worlds.values() if isinstance(world, ToolkitError)]
        if len(missing) == len(worlds):
            raise missing[0]
        if self.config.target == targets.ALL and self.config.data.source:
            # of tables of one data set, that of another one would be the same once more
            panels = [p for p in panels if p.target.kind != "main" or p.experiment.data in p.target.data]
        return panels

    def _open(self, data: str) -> World | ToolkitError:
        config: DataConfig = self.config.data.model_copy(update={"source": data})
        try:
            return open_world(config, self.protocol)
        except ToolkitError as error:
            if self.config.data.source is not None:
                raise
            return error

    def _panel(self, target: Target, data: str, world: World | ToolkitError) -> Panel:
        if isinstance(world, ToolkitError):
            experiment = EXPERIMENTS[data]
            return Panel(target, experiment, self.config.network or experiment.network, None, world.problem)
        experiment = world.experiment
        network = self.config.network or experiment.network
        planners = {}
        for seed in self.config.seeds:
            key = (world.source.name, seed)
            if key not in self._planners:
                splits, images = world.splits(seed), self.config.attack_images
                if self.config.pretrained is not None:
                    read_pretrained(self.config.pretrained, network, world, splits)
                self._planners[key] = Planner(
                    experiment,
                    self.protocol,
                    network,
                    world.source.name,
                    splits,
                    seed,
                    images,
                    self.config.pretrained,
                )
            planners[seed] = self._planners[key]
        return Panel(target, experiment, network, world, planners=planners)

    def _choose(self) -> list[tuple[Place, World]]:
        """The places that `--only` names, or all."""
        places = [(place, panel.world) for panel in self.panels for place in panel.places() if panel.world]
        if self.config.only is None:
            return places
        wanted = self.config.only.casefold()
        chosen = [(place, world) for place, world in places if wanted in place.name.casefold()]
        if places and not chosen:
            names = " | ".join(dict.fromkeys(place.name for place, _ in places))
            raise ToolkitError(
                "no cell is called so", found=f"--only '{self.config.only}'", fix=f"name a part of one of: {names}"
            )
        return chosen

    def plan(self) -> list[PlannedStep]:
        """The steps that would be done, in their order, with estimates."""
        estimator, planned, done = Estimator(), [], set[Step]()
        for place, world in self._in_order(estimator, done):
            for step in self._missing(place):
                if step not in done:
                    planned.append(PlannedStep(step.label, estimator.seconds(step, place.planner, world)))
                    done.add(step)
        return planned

    def _in_order(self, estimator: Estimator, done: set[Step]) -> Iterator[tuple[Place, World]]:
        """Places that are not filled, the most useful first: by tier, then seed, then by what they still cost.

        What one place needs makes others cheaper, so the order is found anew after each.
        """
        waiting = [item for item in self._places if lacking(item[0].step, item[0].planner.splits.evaluation) is None]
        needs = {place: self._missing(place) for place, _ in waiting}

        def cost(item: tuple[Place, World]) -> tuple[int, int, float]:
            place, world = item
            steps = [step for step in needs[place] if step not in done]
            seconds = sum(estimator.seconds(step, place.planner, world) for step in steps)
            return place.tier, place.rank, seconds

        while waiting:
            waiting = [item for item in waiting if needs[item[0]] and item[0].step not in done]
            if not waiting:
                return
            best = min(waiting, key=cost)
            waiting.remove(best)
            yield best

    def _missing(self, place: Place) -> list[Step]:
        if place.result_only and self.store.result(place.step) is not None:
            return []
        return self.store.missing(place.step)

    def run(self, show: Callable[[], object] = lambda: None) -> str:
        """Do steps until all are done, or the limits are reached; says why it stopped.

        Args:
            show: shows what is known; called at the beginning and after every step.

        Raises:
            ToolkitError: the work folder cannot be written, or torchrun started this.
        """
        if self.config.max_runs == 0:
            return "--max-runs 0: nothing was run"
        if launched():
            raise ToolkitError(
                "runs of tables are not shared by torchrun",
                found="reproduce started by torchrun",
                fix="start it without torchrun; several processes, each started like this, share the work folder",
            )
        self.store.begin()
        show()
        limits = Limits(self.config.max_runs, self.config.budget)
        with alarm(limits.minutes) as expired:
            try:
                while busy := self._sweep(limits, show):
                    self._wait(busy, limits)
            except Reached as reached:
                return str(reached)
            except KeyboardInterrupt:
                if not expired():
                    raise
                return limits.spent
        return "everything that can be run is done"

    def _sweep(self, limits: Limits, show: Callable[[], object]) -> list[Step]:
        """Do everything that no other run is doing; gives what others are doing, on which cells still wait.

        Raises:
            Reached: a limit is.
        """
        done, busy = set[Step](), dict[Step, None]()
        for place, world in self._in_order(Estimator(), done):
            for step in self._missing(place):
                limits.check()
                with self.store.claim(step) as ours:
                    if not ours:
                        busy[step] = None
                        break
                    if not self.store.has(step):  # or another run has done it since
                        if not self._do(step, place.planner, world):
                            break
                        limits.runs += 1
                        show()
                done.add(step)
            done.add(place.step)
        return list(busy)

    def _wait(self, busy: Sequence[Step], limits: Limits) -> None:
        """Until one of these steps is nobody's any more."""
        notice(f"waiting for another run: {busy[0].label}{f', and {len(busy) - 1} more' if busy[1:] else ''}")
        while True:
            for step in busy:
                with self.store.claim(step) as free:
                    if free:
                        return
            limits.check()
            time.sleep(POLL_S)

    def _do(self, step: Step, planner: Planner, world: World) -> bool:
        """Do one step; False if it failed, which another sitting may try again."""
        if step in self.failed or any(parent in self.failed for parent in step.walk()):
            return False
        notice(step.label)
        bench = Bench(self.store, world, planner.splits, self.config.pretrained)
        try:
            with disk_errors(self.store.root, "--work"):
                with self.store.sitting(step) as sittings:
                    result = WORKERS[step.kind](step, bench)
                self.store.finish(step, result, sittings)
        except ToolkitError as error:
            self.failed[step] = f"{error.problem}: {error.found}"
            notice(f"failed: {error.problem}: {error.found}; fix: {error.fix}")
            return False
        return True

    def impossible(self) -> list[str]:
        """Why some cells cannot be filled here, each reason once."""
        reasons = {f"{panel.experiment.title}: {panel.missing}" for panel in self.panels if panel.missing}
        for panel in self.panels:
            for place in panel.places():
                reasons |= {lacks for lacks in [lacking(place.step, place.planner.splits.evaluation)] if lacks}
        return sorted(reasons)

    def reason(self, panel: Panel, step: Step | None) -> str:
        """Why a cell is empty."""
        if panel.missing:
            return panel.missing
        assert step is not None and panel.planners  # every panel with a world has steps
        lacks = lacking(step, next(iter(panel.planners.values())).splits.evaluation)
        if lacks:
            return lacks
        failed = next((self.failed[needed] for needed in step.walk() if needed in self.failed), None)
        if failed or step in {place.step for place, _ in self._places}:
            return failed or "not yet: run the same command again"
        return "not yet: --only leaves it out"


def _check_pretrained(config: ReproduceConfig) -> None:
    if config.pretrained is not None and config.data.source is None:
        raise ToolkitError(
            "a pretrained network is of one data set",
            found=f"--pretrained {config.pretrained} without --data",
            fix="name the data set that it was trained on with --data",
        )


def _check_seeds(seeds: Sequence[int]) -> None:
    repeated = first_repeated(seeds)
    if repeated is not None:
        raise ToolkitError(
            f"the seed {repeated} is named twice",
            found=f"--seeds {','.join(map(str, seeds))}",
            fix="name every seed once: a repeated run adds nothing to a mean but makes its error look smaller",
        )
