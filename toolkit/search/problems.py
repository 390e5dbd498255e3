"""Why a trial, or the bundle of one, is not made."""

from __future__ import annotations

import errno
import traceback
from dataclasses import dataclass
from pathlib import Path

from toolkit import bundle
from toolkit.errors import ToolkitError

GO_ON = "the same command then goes on with the trials that are there"
MOST_LETTERS = 300
"""Of what a library says of its failure."""


@dataclass(frozen=True)
class Problem:
    """Why there is no measurement, as an error that travels between processes."""

    problem: str
    found: str
    fix: str
    fatal: bool
    """Whether other trials would meet the same."""
    trace: str | None = None
    """Traceback of a defect; None: bad input, or a stage that says itself that it cannot do this."""
    died: bool = False
    """Whether the process that met it is gone, and could not say why."""

    @property
    def reason(self) -> str:
        """In one line."""
        return f"{self.problem}: {self.found}"

    def error(self) -> ToolkitError:
        return ToolkitError(self.problem, found=self.found, fix=self.fix)


def problem_of(error: Exception, folder: Path) -> Problem:
    """What ended one trial, or the making of one bundle, in `folder`; fatal where others would meet it too."""
    trace = "".join(traceback.format_exception(error))
    cause = error.__cause__ if isinstance(error, ToolkitError) else error
    disk = bundle.disk_error(cause, folder) if isinstance(cause, Exception) else None
    if disk is not None:
        return Problem(disk.problem, disk.found, disk.fix, True)
    if isinstance(error, ToolkitError):
        return Problem(error.problem, error.found, error.fix, False)
    if isinstance(error, OSError) and error.errno != errno.ENOMEM:
        return Problem("the system refuses what a trial needs", _words(error), f"see to it; {GO_ON}", True)
    return Problem("a defect", _words(error), "report what the toolkit says of it", False, trace)


def _words(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:MOST_LETTERS]}"
