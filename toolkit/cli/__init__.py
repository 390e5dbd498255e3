"""The command line: one thin command a file. Heavy imports live inside the commands, so that --help is quick."""

from __future__ import annotations

import io
import sys
from importlib import import_module

from toolkit.cli.app import BAD_INPUT, DEFECT, DONE, GATE_UNMET, INTERRUPTED, run

__all__ = ["BAD_INPUT", "DEFECT", "DONE", "GATE_UNMET", "INTERRUPTED", "main", "run"]

for _name in (
    *("harden", "search", "train", "prune", "export", "quantize", "simulate", "attack", "benchmark"),
    *("bundles", "verify", "reproduce", "doctor"),
):
    import_module(f"toolkit.cli.{_name}")  # registers its commands, in the order in which --help lists them


def main() -> None:
    """Entry point: runs a command and turns every outcome into its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show ends no command
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))
