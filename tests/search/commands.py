"""The search by its command line, on the tiny world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from toolkit import cli

SPACE = "prune.ratio=0.25:0.5:0.25; precision=int8,float"
"""Two fine-tunings, two graphs of each."""


def arguments(*more: str, trials: int = 3, space: str = SPACE, epochs: int = 1, bundles: int = 1) -> list[str]:
    command = ["search", "model.pt", "--space", space, "--trials", str(trials), "--epochs", str(epochs)]
    command += ["--images", "20", "--quick-attacks", "pgd", "--attacks", "pgd", "--bundles", str(bundles)]
    return [*command, "--threads", "1", "--no-end-to-end", *tiny.QUICK, *more]


def front_of(folder: Path = Path("search-out")) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "front.json").read_text())
    return found


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert tiny.run(*command) == cli.BAD_INPUT
    return " ".join(capsys.readouterr().err.replace("│", " ").split())
