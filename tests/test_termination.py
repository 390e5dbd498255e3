"""SIGTERM, as a container or a batch system sends it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from toolkit import cli

TERMINATED = """
import os, signal, sys, time
from toolkit.cli import app

def command(**_):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)  # at work when the signal comes, which ends it; else the test would fail late, not hang

app.app = command
sys.exit(app.run(["train"]))
"""


@pytest.mark.parametrize("ignored", [False, True])
def test_termination_ends_a_command_as_an_interrupt_does(ignored: bool) -> None:
    """Also where a shell lets what it starts in the background ignore Ctrl-C."""
    before = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{TERMINATED}" if ignored else TERMINATED
    found = subprocess.run([sys.executable, "-c", before], capture_output=True, text=True, timeout=120)
    assert found.returncode == cli.INTERRUPTED and "interrupted: nothing was written" in found.stderr


def test_the_handler_of_whoever_runs_a_command_is_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    cli.run(["--version"])
    assert signal.getsignal(signal.SIGTERM) == before
    mine = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        cli.run(["--version"])
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, mine)
