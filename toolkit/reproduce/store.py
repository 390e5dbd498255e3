"""The work folder: what came of every step, in a folder of its own under the step's digest.

Several runs may fill it at a time, on all machines that see it: each holds the step that it does.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from toolkit import __version__
from toolkit.errors import ToolkitError
from toolkit.evaluators.environment import cpu_model, gpu_names
from toolkit.locks import give_back, locked, take
from toolkit.paths import cache_folder
from toolkit.reproduce.energy import Meter
from toolkit.reproduce.protocol import Protocol
from toolkit.reproduce.steps import FILES, Step

FORMAT = 1
WEIGHTS = "weights_sha256"
"""In the result of what makes a network, or an integer graph: the digest of its weights, or of the file."""
MARKER, LOCK = "reproduce.json", "lock"
RESULT, STEP, SITTINGS = "result.json", "step.json", "sittings.json"
TRAINING = "training.partial"
"""Checkpoint of a training under way."""


def default_folder(protocol: str) -> Path:
    """Where work is kept unless `--work` says otherwise: the user's cache folder."""
    return cache_folder() / "reproduce" / protocol


@dataclass
class Sittings:
    """The time that a step took, over as many sittings as it needed."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    joules: float | None = 0.0
    """Of all processor packages meanwhile; None: not measured."""
    count: int = 0
    lost: int = 0
    """Sittings that were killed, whose time nobody knows: the sums are then too small."""


class Store:
    """Keeps what comes of steps.

    Args:
        root: the work folder; nothing is written before `begin`.
        protocol: whose work it keeps.

    Raises:
        ToolkitError: the folder is another protocol's, or cannot be read.
    """

    def __init__(self, root: Path, protocol: Protocol) -> None:
        self.root, self._protocol = root, protocol
        self._check()

    def begin(self) -> None:
        """Make the folder one of this protocol.

        Raises:
            ToolkitError: it cannot be written, or has become another protocol's.
        """
        with self._usable():
            self.root.mkdir(parents=True, exist_ok=True)
            if not (self.root / MARKER).exists():
                _write(self.root / MARKER, self._marker)
        self._check()

    @property
    def _marker(self) -> dict[str, object]:
        return {"format": FORMAT, "protocol": self._protocol.name}

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise ToolkitError(
                "the work folder cannot be used",
                found=f"{self.root}: {type(error).__name__}: {error}",
                fix="name a folder that you may write with --work DIR",
            ) from error

    def _check(self) -> None:
        root, path, marker, protocol = self.root, self.root / MARKER, self._marker, self._protocol
        with self._usable():
            if root.exists() and not root.is_dir():
                raise NotADirectoryError("a file")
            known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        theirs = {name: known.get(name) for name in marker} if isinstance(known, dict) else known
        if known is not None and theirs != marker:
            other = "another version of the toolkit"
            if isinstance(theirs, dict) and theirs["format"] == FORMAT:
                other = f"the protocol {theirs['protocol']}"
            raise ToolkitError(
                "the work folder is of another protocol",
                found=f"{root} was filled under {other}, and this run is under {protocol.name}",
                fix="name another folder with --work DIR, or leave --work away",
            )

    @contextmanager
    def claim(self, step: Step) -> Iterator[bool]:
        """Hold a step for the block, so that no other run does it meanwhile; False where another run holds it.

        The system lifts the claim of a run that died. Where it knows no such locks, every claim is granted.

        Raises:
            ToolkitError: the folder cannot be written.
        """
        folder, descriptor, ours = self.folder(step), None, True
        with self._usable():
            folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = take(folder / LOCK)
            except BlockingIOError:
                ours = False
        try:
            yield ours
        finally:
            give_back(descriptor)

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Keep other runs from writing the documents at the same time, of older results."""
        if not os.access(self.root, os.W_OK):  # then nobody fills it
            yield
            return
        with locked(self.root / LOCK):
            yield

    def folder(self, step: Step) -> Path:
        """Where the step's files lie."""
        return self.root / step.digest[:20]

    def unfinished(self, step: Step, name: str) -> Path:
        """Where a file of the step is written, which takes its place when the step is finished."""
        return self.folder(step) / f"unfinished-{name}"

    def result(self, step: Step) -> dict[str, Any] | None:
        """What came of the step; None if it has not been done.

        Raises:
            ToolkitError: the file is damaged.
        """
        path = self.folder(step) / RESULT
        if not path.is_file():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ToolkitError(
                "a result in the work folder is damaged",
                found=f"{path}: {error}",
                fix="remove this file's folder; the step is then done again",
            ) from error
        return found

    def missing(self, step: Step) -> list[Step]:
        """What is to be done, in this order, for the step to be done and its files to be there.

        Results may be kept without networks and graphs, which are large: what was made of those stands, and they are
        made again only where something new is to be made of them.
        """
        found: dict[Step, None] = {}

        def visit(needed: Step) -> None:
            if needed in found or self.has(needed):
                return
            for parent in needed.parents:
                visit(parent)
            found[needed] = None

        visit(step)
        return list(found)

    def has(self, step: Step) -> bool:
        """Whether the step is done and its files are there."""
        folder = self.folder(step)
        return (folder / RESULT).is_file() and all((folder / name).is_file() for name in FILES[step.kind])

    def is_mixed(self, step: Step) -> bool:
        """Whether something that the step's result comes from was made again since, and came out otherwise."""
        for needed in step.walk():
            seen = (self.result(needed) or {}).get("made_from")
            pairs = zip(seen or (), map(self.weights, needed.parents), strict=bool(seen))
            if any(None not in (then, now) and then != now for then, now in pairs):  # a folder may have been removed
                return True
        return False

    def weights(self, step: Step) -> str | None:
        """Digest of the step's network, or graph; None where it makes none, or an older result does not tell."""
        found: str | None = (self.result(step) or {}).get(WEIGHTS)
        return found

    def finish(self, step: Step, result: dict[str, Any], sittings: Sittings) -> None:
        """Keep what came of the step; from now on it is done."""
        folder = self.folder(step)
        for name in FILES[step.kind]:
            if self.unfinished(step, name).exists():
                self.unfinished(step, name).replace(folder / name)
        facts = {"kind": step.kind, "label": step.label, "settings": step.settings}
        _write(folder / STEP, {**facts, "parents": [parent.digest for parent in step.parents]})
        machine = {"cpu": cpu_model(), "gpus": list(gpu_names()), "torch": version("torch")}
        origins = {"made_from": [self.weights(parent) for parent in step.parents], "toolkit_version": __version__}
        _write(folder / RESULT, {**result, **origins, "spent": vars(sittings), "machine": machine})
        for name in (TRAINING, SITTINGS):  # if it is ever done again, that time counts from nothing
            (folder / name).unlink(missing_ok=True)

    @contextmanager
    def sitting(self, step: Step) -> Iterator[Sittings]:
        """Count the time of a block as the step's, whether it ends well or not."""
        path = self.folder(step) / SITTINGS
        path.parent.mkdir(parents=True, exist_ok=True)
        found = Sittings(**_read(path))
        under_way = Sittings(found.seconds, found.cpu_seconds, found.joules, found.count, found.lost + 1)
        _write(path, vars(under_way))  # what stands if nobody comes back from this sitting
        start, cpu, meter = time.perf_counter(), time.process_time(), Meter()
        try:
            yield found
        finally:
            found.seconds += time.perf_counter() - start
            found.cpu_seconds += time.process_time() - cpu
            energy = meter.stop()
            found.joules = None if energy is None or found.joules is None else found.joules + energy
            found.count += 1
            _write(path, vars(found))


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _write(path: Path, content: object) -> None:
    """Whole, or as it was, whoever writes the same file at this moment."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
