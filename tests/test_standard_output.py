"""What is printed into a full disk, to nobody, or to a reader that leaves early."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit import cli
from toolkit.cli.app import UNREAD

FULL = Path("/dev/full")
COMMANDS = (["--version"], ["harden", "--help"])


def run(command: list[str], stdout: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "toolkit", *command], stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120
    )


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_told_once_and_is_no_defect(command: list[str]) -> None:
    with FULL.open("w") as full:
        found = run(command, full.fileno())
    assert found.returncode == cli.BAD_INPUT
    assert "standard output takes nothing more" in found.stderr and "No space left" in found.stderr
    assert "defect" not in found.stderr and "Exception ignored" not in found.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_reader_that_has_seen_enough_is_not_told_anything(command: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        found = run(command, write)
    finally:
        os.close(write)
    assert found.returncode == UNREAD and found.stderr == ""


def test_no_standard_output_at_all() -> None:
    script = (
        "import sys; sys.stdout.close(); sys.stdout = None; from toolkit import cli; sys.exit(cli.run(['--version']))"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=120, check=False).returncode == cli.DONE


def test_another_error_of_the_system_stays_a_defect(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(**_named: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("toolkit.cli.app.app", failing)
    assert cli.run(["doctor"]) == cli.DEFECT
    assert "a defect of the toolkit" in capsys.readouterr().err
