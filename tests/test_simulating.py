from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.tiny import entries
from toolkit import cli

PGD = ("--eps", "0.12", "--zero-start", "--steps", "3", "--threads", "1", "--n", "60")


def test_the_table_says_that_it_is_simulated_and_of_how_many_images(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = entries(here)
    assert tiny.run("simulate", "model.pt", "--bits", "8,1,4/32", *PGD, "-q") == cli.DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("SIMULATED") and "60 images" in lines[1] and "eps 0.12" in lines[2]
    assert [line.split()[0] for line in lines[6:]] == ["float", "8/8", "1/1", "4/32"]
    assert entries(here) == before


@pytest.mark.usefixtures("here")
def test_the_json_holds_every_share_with_its_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.run("simulate", "model.pt", "--bits", "16", "--per-tensor", *PGD, "-q", "--json") == cli.DONE
    found = json.loads(capsys.readouterr().out)
    assert found["simulated"] is True and "no integer kernel ran" in found["what"]
    assert found["images"] == 60 and found["weights"] == "symmetric per tensor" and found["data"] == "npz:data.npz"
    plain, rounded = found["rows"]
    assert not plain["simulated"] and rounded["simulated"] and rounded["bits"] == "16/16"
    assert rounded["clean"]["total"] == 60
    assert abs(rounded["clean"]["correct"] - plain["clean"]["correct"]) <= 1
    assert rounded["robust"]["correct"] <= min(rounded[name]["correct"] for name in ("robust_own", "robust_transfer"))


@pytest.mark.parametrize(("bits", "words"), [("17", "cannot be simulated"), (",", "names no precision")])
def test_bad_bits_are_refused_before_anything_is_loaded(
    bits: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.run("simulate", "missing.pt", "--bits", bits, "-q") == cli.BAD_INPUT
    assert words in capsys.readouterr().err
