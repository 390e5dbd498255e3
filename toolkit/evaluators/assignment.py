"""Which layers are integer: the assignment that is fastest on this machine, found by measuring whole graphs.

Times of single layers do not add up: fusions and changes of layout between integer and float layers decide, and a
first layer of few channels is faster in float. So every candidate is written and timed as the file that would ship,
side by side with the others in every round. The search begins with all layers in integers and leaves one more layer
float, or one fewer, as long as that is faster beyond doubt. Then accuracy is looked after: where the integer graph
loses more than is allowed, as many layers become float as it needs, beginning with those whose rounding disturbs the
margins of attacked images most.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from toolkit.evaluators.judge import Drop, Judge
from toolkit.evaluators.latency import Stopclock
from toolkit.evaluators.sensitivity import LayerSensitivity, measure_sensitivity, ranked
from toolkit.evaluators.timing import Interval, ratio_interval
from toolkit.exporters.engine import Writer
from toolkit.progress import task

Kept = frozenset[str]
"""Names of the layers that an assignment leaves float."""
SCREENING_ROUNDS, DECIDING_ROUNDS = 5, 12
"""Rounds in which all neighbours of an assignment are timed, and those in which the best of them is confirmed."""
SHORTLIST, RANKED = 8, 16
"""Layers that are compared again after each one that is to become float, and how many of these are chosen so."""
SENSITIVITY_S = 60.0
"""Seconds for the accuracy that single layers lose, about: a table for users, which the search itself does not need."""
SEARCH_S = 300.0
"""Seconds for the search of the fastest."""
FIRST_SHARE = 0.6
"""Of these, for the search from all integers on, at most."""
FEW_S = 120.0
"""Seconds for the search from the float twin on, judging included."""
ROOM = 2**30
"""Bytes of candidates on disk from which on those that lost are removed."""
REFERENCE = "reference"


@dataclass(frozen=True)
class Assignment:
    """Which layers stay float, and what that is worth."""

    keep_float: tuple[str, ...]
    """In the order of the graph."""
    ratio: Interval
    """Time of the graph over that of its float twin, geometric mean over the batch sizes; below 1: faster."""
    all_integer: Interval
    """The same of the graph with all layers in integers."""
    drop: Drop
    drop_all_integer: Drop
    images: int
    tried: int
    """Assignments that were written, and timed or judged."""
    for_accuracy: tuple[str, ...] = ()
    """Of `keep_float` those that accuracy asks for, whether or not they are faster so as well."""
    sensitivity: tuple[LayerSensitivity, ...] = ()
    """Of every layer that could be integer."""
    margin_images: int = 0
    """Attacked images on whose margins `sensitivity` looks; 0: on clean logits."""
    foreign_load: float = 0.0
    """Share of the CPU time that other processes took while graphs were timed."""

    max_drop: float = 1.0
    """The largest loss that was allowed."""

    @property
    def pays(self) -> bool:
        """Whether the integer graph is faster than the float twin beyond doubt."""
        return self.ratio.high < 1

    @property
    def holds(self) -> bool:
        """Whether it loses no more than was allowed: at least one layer is integer, and may be one too many."""
        return self.drop.worst <= self.max_drop

    def write(self, path: Path, fp32: Path, conditions: str) -> None:
        """Keep it in a JSON file, for this float twin and these conditions alone."""
        kept = {"fp32": _digest(fp32), "conditions": conditions, "found": asdict(self)}
        path.write_text(json.dumps(kept), encoding="utf-8")

    @classmethod
    def read(cls, path: Path, fp32: Path, conditions: str) -> Assignment | None:
        """What was kept for this float twin and these conditions; None: nothing."""
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if (kept["fp32"], kept.get("conditions")) != (_digest(fp32), conditions):
            return None
        found = kept["found"]
        if set(found) != {field.name for field in fields(cls)}:  # of another version
            return None
        intervals = {name: Interval(**found[name]) for name in ("ratio", "all_integer")}
        drops = {name: Drop(**found[name]) for name in ("drop", "drop_all_integer")}
        layers = {name: tuple(found[name]) for name in ("keep_float", "for_accuracy")}
        rows = [{**row, "drop": Drop(**row["drop"]) if row["drop"] else None} for row in found["sensitivity"]]
        sensitivity = {"sensitivity": tuple(LayerSensitivity(**row) for row in rows)}
        return cls(**{**found, **intervals, **drops, **layers, **sensitivity})


def fewest(exceeds: Callable[[int], bool], most: int) -> int:
    """The least number up to `most` that does not exceed, by doubling and then by halving; `most` is not asked."""
    too_few, enough = -1, 0
    while enough < most and exceeds(enough):
        too_few, enough = enough, min(most, 2 * enough or 1)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (middle, enough) if exceeds(middle) else (too_few, middle)
    return enough


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def find_assignment(
    quantizer: Writer,
    fp32: Path,
    folder: Path,
    judge: Judge,
    clock: Stopclock,
    *,
    max_drop: float,
    seconds: float = SEARCH_S,
    seed: int = 0,
) -> Assignment:
    """Search the fastest assignment that loses no more than `max_drop`.

    Args:
        quantizer: writes the graphs; layers that its configuration leaves float stay so.
        fp32: the float twin.
        folder: where candidates are written; the caller's to remove.
        judge: of accuracy.
        clock: times the files.
        max_drop: the largest loss of clean and of robust accuracy against the float twin, as a share.
        seconds: for the search of the fastest, about; what is found by then counts.
        seed: of the bootstrap.
    """
    search = _Search(quantizer, fp32, folder, clock, seed)
    with task("fastest integer layers", len(search.layers)) as bar:
        fastest = search.fastest(seconds, bar.advance)
    with task("sensitivity of layers", len(search.layers)) as bar:
        sensitivity = measure_sensitivity(quantizer, search.layers, judge, seconds=SENSITIVITY_S, advance=bar.advance)
    order = [one.layer for one in ranked(sensitivity)]
    with task("accuracy of integer layers", 2 * len(search.layers).bit_length()) as bar:
        chosen, added = search.accurate(fastest, order, judge, max_drop, bar.advance)
        if added:
            lighter = search.lighter(chosen, (1 - FIRST_SHARE) * seconds, bar.advance)
            if lighter != chosen and not judge.exceeds(search.file(lighter), max_drop):
                chosen = lighter
        if added and not search.beats(chosen, None):
            chosen = search.few(judge, max_drop, FEW_S, bar.advance) or chosen
        needed = search.needed(chosen, tuple(name for name in added if name in chosen), order, judge, max_drop)
    everything: Kept = frozenset()
    speeds = search.ratios(dict.fromkeys((everything, chosen)), DECIDING_ROUNDS, to=None)
    return Assignment(
        keep_float=search.ordered(chosen),
        ratio=speeds[chosen],
        all_integer=speeds[everything],
        drop=judge.drop(search.file(chosen)),
        drop_all_integer=judge.drop(search.file(everything)),
        images=judge.images,
        tried=search.written,
        for_accuracy=needed,
        sensitivity=sensitivity,
        margin_images=judge.margin_images,
        foreign_load=clock.foreign_load,
        max_drop=max_drop,
    )


class _Search:
    """Assignments are named by the layers that they leave float beyond those of the configuration."""

    def __init__(self, quantizer: Writer, fp32: Path, folder: Path, clock: Stopclock, seed: int) -> None:
        self._quantizer, self._fp32, self._folder, self._clock, self._seed = quantizer, fp32, folder, clock, seed
        self.layers = tuple(name for name in quantizer.layers if name not in quantizer.kept)
        self._timing = self._writing = 0.0
        """Seconds that one file takes in one round, and that the last one took to be written."""
        self.files: dict[Kept, Path] = {}
        self.written = 0

    def ordered(self, kept: Collection[str]) -> tuple[str, ...]:
        return tuple(name for name in self.layers if name in kept)

    def file(self, kept: Kept) -> Path:
        """The graph with these layers float, written once."""
        if kept not in self.files:
            path = self._folder / f"assignment-{self.written}.onnx"
            start = time.perf_counter()
            self._quantizer.write(path, keep_float=kept)
            self._writing = time.perf_counter() - start
            self.files[kept] = path
            self.written += 1
        return self.files[kept]

    def ratios(self, candidates: Iterable[Kept], rounds: int, *, to: Kept | None) -> dict[Kept, Interval]:
        """Times over that of the assignment `to`, or (None) of the float twin."""
        files = {str(number): (kept, self.file(kept)) for number, kept in enumerate(candidates)}
        reference = self._fp32 if to is None else self.file(to)
        start = time.perf_counter()
        times = self._clock.rounds({**{name: path for name, (_, path) in files.items()}, REFERENCE: reference}, rounds)
        self._timing = (time.perf_counter() - start) / (len(times) * rounds)
        return {kept: ratio_interval(times[name], times[REFERENCE], self._seed) for name, (kept, _) in files.items()}

    def fastest(self, seconds: float, advance: Callable[[], object]) -> Kept:
        """From all integers on, and where that leads to nothing faster than the float twin, from a single one as well.

        A float layer between integer ones costs two changes between the kinds, so that on a machine where integers are
        slow the way from all of them is blocked at once, though few would do less harm.
        """
        start, everything = time.monotonic(), Kept()
        self.ratios([everything], 1, to=everything)  # what a round costs
        best = self._descend(everything, start + FIRST_SHARE * seconds, advance)
        lone = [Kept(self.layers) - {name} for name in self.layers[: self._affordable(start + seconds)]]
        if len(self.layers) < 3 or not lone or self.beats(best, None):
            return best
        screened = self.ratios(lone, SCREENING_ROUNDS, to=best)
        other = self._descend(min(lone, key=lambda kept: screened[kept].value), start + seconds, advance)
        return other if self.beats(other, best) else best

    def lighter(self, kept: Kept, seconds: float, advance: Callable[[], object]) -> Kept:
        """With more layers float where that is faster now that accuracy made others so; it hardly costs accuracy."""
        return self._descend(kept, time.monotonic() + seconds, advance, back=False)

    def few(self, judge: Judge, max_drop: float, seconds: float, advance: Callable[[], object]) -> Kept | None:
        """With as many integer layers as make it faster than the float twin and lose no more than is allowed.

        From none on: where accuracy leaves few integers, those that disturb it least need not be those that pay.

        Returns:
            The layers that are float; None: no integer layer is both faster beyond doubt and accurate enough.
        """
        end = time.monotonic() + seconds
        lone = [Kept(self.layers) - {name} for name in self.layers[: self._affordable(end)]]
        screened = self.ratios(lone, SCREENING_ROUNDS, to=None) if lone else {}
        best: Kept | None = None
        for kept in sorted(lone, key=lambda kept: screened[kept].value):
            if screened[kept].value >= 1 or time.monotonic() > end:
                break
            candidate = kept if best is None else best & kept
            if self.beats(candidate, best) and not judge.exceeds(self.file(candidate), max_drop):
                best = candidate
                advance()
        return best

    def _descend(self, best: Kept, end: float, advance: Callable[[], object], *, back: bool = True) -> Kept:
        """Change layer after layer, as long as it is faster beyond doubt and the time suffices.

        Args:
            best: where to begin.
            end: when to stop, by the monotonic clock.
            advance: told of every step.
            back: float layers may become integers again.
        """
        while True:
            neighbours = self._neighbours(best, self._affordable(end))
            neighbours = [kept for kept in neighbours if back or kept > best]
            if not neighbours:
                return best
            screened = self.ratios(neighbours, SCREENING_ROUNDS, to=best)
            promising = min(neighbours, key=lambda kept: screened[kept].value)
            self._forget(one for one in neighbours if one != promising)
            if screened[promising].value >= 1 or not self.beats(promising, best):
                return best
            best = promising
            advance()

    def _forget(self, candidates: Iterable[Kept]) -> None:
        """Remove files that lost, where all of them take much room: of a deep network they are many and large."""
        if sum(path.stat().st_size for path in self.files.values()) > ROOM:
            for kept in candidates:
                self.files.pop(kept).unlink(missing_ok=True)

    def _affordable(self, end: float) -> int:
        """How many files can be screened until then, beside the one that they are compared with."""
        return max(0, int((end - time.monotonic()) / (self._timing * SCREENING_ROUNDS + self._writing)) - 1)

    def beats(self, kept: Kept, other: Kept | None) -> bool:
        """Whether it is faster beyond doubt than another assignment, or (None) than the float twin."""
        return self.ratios([kept], DECIDING_ROUNDS, to=other)[kept].high < 1

    def _neighbours(self, kept: Kept, count: int) -> list[Kept]:
        """With one layer more in float, or one of those fewer; at most `count`, first those next to the ends."""
        inwards = sorted(range(len(self.layers)), key=lambda at: min(at, len(self.layers) - 1 - at))
        changed = [kept ^ {self.layers[at]} for at in inwards[:count]]
        return [one for one in changed if len(one) < len(self.layers)]

    def accurate(
        self, kept: Kept, order: Sequence[str], judge: Judge, max_drop: float, advance: Callable[[], object]
    ) -> tuple[Kept, tuple[str, ...]]:
        """With as many more layers float as accuracy needs, the first of an order; at least one stays integer.

        Args:
            kept: the layers that are float anyway.
            order: of all layers, about, those that are to become float first.
            judge: of accuracy.
            max_drop: as `find_assignment` takes it.
            advance: told of every graph that is judged.

        Returns:
            The layers that are float, and those that were added, in that order.
        """
        left = [name for name in order if name not in kept]
        further: list[str] = []  # in a better order, as far as it is needed

        def exceeds(count: int) -> bool:
            self._rank(kept, left, further, count, judge)
            advance()
            return judge.exceeds(self.file(kept | set(further[:count])), max_drop)

        count = fewest(exceeds, len(left) - 1)
        self._rank(kept, left, further, count, judge)
        return kept | set(further[:count]), tuple(further[:count])

    def needed(
        self, kept: Kept, added: tuple[str, ...], order: Sequence[str], judge: Judge, max_drop: float
    ) -> tuple[str, ...]:
        """Which of the layers that are float accuracy asks for, with those that are faster so as well.

        Files for other runtimes, where other layers are faster, leave these float and no more.
        """
        speed = [name for name in order if name in kept and name not in added]

        def exceeds(count: int) -> bool:
            return judge.exceeds(self.file(frozenset((*added, *speed[:count]))), max_drop)

        return (*added, *speed[: fewest(exceeds, len(speed))])

    def _rank(self, kept: Kept, left: Sequence[str], further: list[str], count: int, judge: Judge) -> None:
        """Add to `further`, up to that many: of the next few of an order always the one that leaves the least error."""
        while len(further) < count:
            near = [name for name in left if name not in further][:SHORTLIST]
            if len(further) < RANKED:
                noise = {name: judge.noise(self._trial(kept | {*further, name})) for name in near}
                near.sort(key=lambda name: noise[name])
            further.append(near[0])

    def _trial(self, kept: Kept) -> Path:
        """A graph that is looked at once."""
        path = self._folder / "trial.onnx"
        self._quantizer.write(path, keep_float=kept)
        return path
