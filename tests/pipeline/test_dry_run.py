from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests import tiny
from toolkit import cli, pipeline, planning


def test_a_dry_run_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tiny.entries(here)
    assert tiny.run(*tiny.harden_arguments(), "--dry-run") == cli.DONE
    assert [name for name in tiny.entries(here) if name != "__pycache__"] == before
    plan = capsys.readouterr().out
    assert "6,339 -> 2,019 parameters" in plan and "2 epoch(s) of 540 images" in plan
    assert re.search(r"in all about \d+\.\d minutes", plan) and plan.count(" s\n") >= 6


@pytest.mark.usefixtures("here")
def test_settings_without_effect_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    plain = [*tiny.harden_arguments(), "--dry-run", "-q"]
    idle = ["--finetune", "standard", "--radius", "1.5", "--attack-steps", "3", "--beta", "1", "--qat-from", "0.2"]
    assert tiny.run(*plain) == cli.DONE
    assert "warning" not in capsys.readouterr().err
    assert tiny.run(*plain, *idle) == cli.DONE
    said = capsys.readouterr().err
    assert "the objective standard makes no use of --attack-steps, --radius, --beta" in said
    assert "without --qat nothing rounds in training, so --qat-from is ignored" in said


@pytest.mark.parametrize("more", [["--dry-run"], []])
def test_a_layer_that_is_not_there_is_told_before_anything_is_trained(
    more: list[str], here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tiny.entries(here)
    monkeypatch.setattr(pipeline, "train", lambda *_arguments, **_options: pytest.fail("trained"))
    assert tiny.run(*tiny.harden_arguments(), "--keep-float", "node_liner", *more, "-q") == cli.BAD_INPUT
    assert "did you mean 'node_linear" in capsys.readouterr().err
    assert tiny.entries(here) == before


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("objective", "passes"), [("fgsm", 2.6), ("trades", 10.2), ("standard", 1.6), ("none", 0)])
def test_a_dry_run_counts_the_passes_of_the_objective(
    objective: str, passes: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "seconds_per_image", lambda *_: 1.0)
    more = ["--finetune", objective, "--dry-run", "--json", "-q"]
    assert tiny.run(*tiny.harden_arguments(), *more) == cli.DONE
    plan = {row["step"].split()[0]: row["seconds"] for row in json.loads(capsys.readouterr().out)}
    assert plan["fine-tune"] == pytest.approx(2 * 540 * passes)


@pytest.mark.usefixtures("here")
def test_a_dry_run_counts_surrogates_and_attacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "seconds_per_image", lambda *_: 1.0)
    found = {}
    for attacks in ("pgd", "fast", "ensemble", "square"):
        assert tiny.run(*tiny.harden_arguments(attacks=attacks), "--dry-run", "--json", "-q") == cli.DONE
        (row,) = [row for row in json.loads(capsys.readouterr().out) if row["step"].startswith("evaluate")]
        assert f"PGD-5 on all surrogates, {attacks}; 150 images" in row["step"]
        found[attacks] = row["seconds"]
    assert found["pgd"] < found["fast"] < found["ensemble"]
    searched = 2  # the float twin and the deployed graph
    assert found["square"] - found["pgd"] == pytest.approx(150 * 5000 * planning.QUERY_COST * searched)
