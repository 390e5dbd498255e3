"""The errors that users meet: each names the problem, what was found, and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ToolkitError(Exception):
    """Bad input or usage; the command line prints the three parts in one panel and exits with 2.

    Args:
        problem: what is wrong, in one line.
        found: what was found where something else was needed (the value, the file, the sizes).
        fix: what the user can do about it; quotes the flag where there is one.
    """

    def __init__(self, problem: str, *, found: str, fix: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.found = found
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.problem}\n  found: {self.found}\n  fix:   {self.fix}"


class DivergedError(ToolkitError):
    """A training that diverged: it would again, so what it saved is of no use."""


class OutputTakenError(ToolkitError):
    """Something appeared at the output during a run, whose result is kept beside it."""


def unknown_name(kind: str, name: str, choices: Iterable[str]) -> ToolkitError:
    """The error for a name outside a registry: lists the choices and the nearest one."""
    known = sorted(choices)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return ToolkitError(f"unknown {kind}", found=f"'{name}'", fix=f"{hint}choose one of: {', '.join(known)}")
