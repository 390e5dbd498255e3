"""What the parts of an evaluation came to, on disk: a run that is cut short goes on where it stopped."""

from __future__ import annotations

import contextlib
import io
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from toolkit.errors import ToolkitError
from toolkit.locks import give_back, take
from toolkit.paths import cache_folder
from toolkit.progress import notice, warn

Arrays = Mapping[str, npt.NDArray[Any]]
FINGERPRINT = "fingerprint"
PREFIX = "array."
"""Before every name, so that none is an argument of numpy.savez."""


def default_folder() -> Path:
    """Where journals of `toolkit attack` lie: the user's cache folder."""
    return cache_folder() / "attacks"


class Journal:
    """Arrays by key in one SQLite file; every entry is written whole or not at all.

    A journal that cannot be written is no reason to lose a run: it warns once and keeps nothing from then on.

    Args:
        path: the file; None: nothing is kept.
        fingerprint: names the run; entries of another run are never read.
        resume: go on from what the file holds; otherwise it starts empty. What is of another run, or damaged, is
            refused, or with "or anew" given up.

    Raises:
        ToolkitError: another process has it open; with `resume`, the file is of another run or is no journal.
    """

    def __init__(
        self, path: Path | None = None, fingerprint: str = "", *, resume: bool | Literal["or anew"] = False
    ) -> None:
        self.path = path
        self._database: sqlite3.Connection | None = None
        self._lock: int | None = None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._take_alone(path)
            if not resume:
                path.unlink(missing_ok=True)
            try:
                self._begin(path, fingerprint, resume=bool(resume))
            except ToolkitError as error:
                if resume is True:
                    raise
                notice(f"{error.problem}, and begins anew: {error.found}")
                self._leave()
                path.unlink()
                self._begin(path, fingerprint, resume=False)
        except ToolkitError:
            self.close()
            raise
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)

    def _begin(self, path: Path, fingerprint: str, *, resume: bool) -> None:
        try:
            self._database = _open(path)
            self._check(fingerprint)
        except sqlite3.DatabaseError as error:
            if resume:
                raise self._unreadable(f"{path}: {error}") from error
            raise

    def _take_alone(self, path: Path) -> None:
        try:
            self._lock = take(path.with_suffix(".lock"))
        except BlockingIOError as error:
            raise ToolkitError(
                "the same evaluation is under way in another process",
                found=str(path),
                fix="wait for it, and give the same command with --resume if it was cut short",
            ) from error

    def get(self, key: str) -> dict[str, npt.NDArray[Any]] | None:
        """The arrays kept under `key`; None if there are none."""
        try:
            return self._read(key)
        except sqlite3.Error as error:
            self._give_up(error)
            return None

    def put(self, key: str, arrays: Arrays) -> None:
        """Keep `arrays` under `key`, at once on disk."""
        if self._database is None:
            return
        buffer = io.BytesIO()
        np.savez(buffer, **{PREFIX + name: array for name, array in arrays.items()})  # type: ignore[arg-type]
        try:
            with self._database:
                self._database.execute("INSERT OR REPLACE INTO entry VALUES (?, ?)", (key, buffer.getvalue()))
        except sqlite3.Error as error:
            self._give_up(error)

    def close(self, *, discard: bool = False) -> None:
        """Close the file; with `discard` it is removed, because the run is finished."""
        self._leave()
        if self.path is not None and self._lock is not None:
            with contextlib.suppress(OSError):
                if discard:
                    self.path.unlink(missing_ok=True)
                self.path.with_suffix(".lock").unlink(missing_ok=True)
        give_back(self._lock)
        self._lock = None

    def _leave(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def _read(self, key: str) -> dict[str, npt.NDArray[Any]] | None:
        if self._database is None:
            return None
        row = self._database.execute("SELECT arrays FROM entry WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        with np.load(io.BytesIO(row[0]), allow_pickle=False) as found:
            return {name.removeprefix(PREFIX): array for name, array in found.items()}

    def _check(self, fingerprint: str) -> None:
        known = self._read(FINGERPRINT)
        if known is None:
            self.put(FINGERPRINT, {"value": np.array(fingerprint)})
        elif str(known["value"]) != fingerprint:
            raise self._unreadable(f"{self.path} was kept by a run with other settings, files or images")

    def _give_up(self, error: Exception) -> None:
        warn(f"the evaluation cannot be resumed if it is cut short: {self.path}: {error}")
        self.close()

    @staticmethod
    def _unreadable(found: str) -> ToolkitError:
        return ToolkitError(
            "the interrupted evaluation cannot be continued",
            found=found,
            fix="start anew without --resume",
        )


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path)
    try:
        database.execute("CREATE TABLE IF NOT EXISTS entry (key TEXT PRIMARY KEY, arrays BLOB NOT NULL)")
    except sqlite3.Error:
        database.close()
        raise
    return database
