"""`toolkit verify`: claims that hold, claims that do not, and claims that cannot be measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from tests import tiny
from tests.tiny import report_of
from toolkit import bundle, cli, verification
from toolkit.config import ModelConfig
from toolkit.evaluators.latency import LatencyRow
from toolkit.verification import _loads

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def timed(out: Path, monkeypatch: pytest.MonkeyPatch) -> list[LatencyRow]:
    """What a benchmark of the bundle finds: what its report says, until a test says otherwise."""
    known = {field.name for field in fields(LatencyRow)}
    told = [{key: value for key, value in row.items() if key in known} for row in report_of(out)["latency"]]
    rows = [LatencyRow(**{**row, "foreign_load": 0.0}) for row in told]
    monkeypatch.setattr(verification, "benchmark_files", lambda *_: tuple(rows))
    return rows


def rewrite(folder: Path, edit: Edit) -> None:
    """Change what a bundle claims, as if it had been written so."""
    report = report_of(folder)
    edit(report)
    (folder / "report.json").write_text(json.dumps(report))
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        entry["sha256"] = bundle.sha256(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def claims(capsys: pytest.CaptureFixture[str], *more: str, code: int = cli.DONE) -> dict[tuple[str, str], Any]:
    """Verdict and words of every claim, by file and claim."""
    assert tiny.run("verify", "out", "--threads", "1", "--json", "-q", *more) == code
    found = json.loads(capsys.readouterr().out)
    return {(one["file"], one["claim"]): (one["passed"], one["detail"]) for one in found}


@pytest.mark.usefixtures("timed")
def test_what_is_claimed_of_a_bundle_holds_where_it_was_made(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = claims(capsys)
    assert all(passed for passed, _ in found.values())
    measured = {claim for _, claim in found} - {"unchanged", "schema"}
    assert measured == {"integer layers", "accuracy", "robust accuracy", "time, batch 1"}
    report = report_of(out)
    clean = report["accuracy"]["deployed"]
    assert f"n={clean['total']}; claimed {clean['value']:.2%}, the same images" in found["model.onnx", "accuracy"][1]
    assert ("model.fp32.onnx", "accuracy") in found
    robust = report["robust_accuracy"]["deployed"]
    words = found["model.onnx", "robust accuracy"][1]
    assert f"of {tiny.TEST} images under fast; claimed {robust['value']:.2%}" in words
    assert words.startswith(f"{robust['value']:.2%}"), "the same attacks on the same images find the same"


def robust_everywhere(folder: Path) -> None:
    report = report_of(folder)
    report["robust_accuracy"]["deployed"]["value"] = 1.0
    rewrite(folder, lambda old: old.update(report))


def float_in_its_place(folder: Path) -> None:
    shutil.copy(folder / "model.fp32.onnx", folder / "model.onnx")


def wrong(name: str) -> Callable[[Path], None]:
    """The graph prefers what it preferred least."""

    def spoil(folder: Path) -> None:
        graph = onnx.load(folder / name)
        last = next(node for node in graph.graph.node if "logits" in node.output)
        last.output[list(last.output).index("logits")] = "before"
        graph.graph.node.append(helper.make_node("Neg", ["before"], ["logits"]))
        onnx.save(graph, folder / name)

    return spoil


SPOILT: dict[str, tuple[Callable[[Path], None], set[tuple[str, str]]]] = {
    "a robust accuracy that no attack leaves": (robust_everywhere, {("model.onnx", "robust accuracy")}),
    "a float graph": (float_in_its_place, {("model.onnx", "integer layers")}),
    "a wrong graph": (wrong("model.onnx"), {("model.onnx", "accuracy")}),  # which is not attacked
    "a wrong twin": (wrong("model.fp32.onnx"), {("model.fp32.onnx", "accuracy")}),
}


@pytest.mark.usefixtures("timed")
@pytest.mark.parametrize("name", SPOILT)
def test_what_does_not_hold_fails_and_nothing_else(name: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With hashes that fit, as of a bundle that was written so."""
    spoil, expected = SPOILT[name]
    spoil(out)
    rewrite(out, lambda _: None)
    found = claims(capsys, "--attacks", "pgd", code=cli.BAD_INPUT)
    assert {key for key, (passed, _) in found.items() if passed is False} == expected


def promise(ratio: float, low: float, high: float) -> Edit:
    """The deployed graph's time over its float twin's."""

    def edit(report: dict[str, Any]) -> None:
        row = next(row for row in report["latency"] if row["file"] == "deployed")
        row.update(ratio=ratio, ratio_low=low, ratio_high=high)

    return edit


def test_time_fails_where_the_graph_is_slower_and_faster_was_claimed(
    out: Path, timed: list[LatencyRow], capsys: pytest.CaptureFixture[str]
) -> None:
    quick, slow = ((0.5, 0.4, 0.6), (1.5, 1.4, 1.6))
    index = next(number for number, row in enumerate(timed) if row.file == "deployed")
    for claimed, here, load, passed in (
        (quick, slow, 0.0, False),
        (quick, slow, 0.9, None),  # on a busy machine nobody knows
        (slow, slow, 0.0, True),  # nothing was promised
        (slow, quick, 0.0, True),
    ):
        rewrite(out, promise(*claimed))
        ratio, low, high = here
        timed[index] = replace(timed[index], ratio=ratio, ratio_low=low, ratio_high=high, foreign_load=load)
        found = claims(capsys, "--attacks", "pgd", code=cli.BAD_INPUT if passed is False else cli.DONE)
        assert found["model.onnx", "time, batch 1"][0] is passed


@pytest.mark.parametrize("name", ["model.onnx", "model.fp32.onnx", "model.pt"])
def test_a_file_that_does_not_run_here_fails(name: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As under an older runtime: nothing that was claimed of it holds."""
    (out / name).write_bytes(b"of another version")
    rewrite(out, lambda _: None)
    found = claims(capsys, code=cli.BAD_INPUT)
    assert {key for key, (passed, _) in found.items() if not passed} == {(name, "runs here")}


def test_a_network_of_the_users_code_is_not_known_to_fail(tmp_path: Path) -> None:
    """Whoever verifies need not trust, or have, the pickle that a bundle's network comes from."""
    path = tmp_path / "model.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    unknown = _loads(path, ModelConfig(path=path))
    assert unknown is not None and unknown.passed is None and "--trust-pickle" in unknown.detail
    assert _loads(path, ModelConfig(path=path, trust_pickle=True)) is None


@pytest.mark.usefixtures("timed", "out")
def test_another_seed_chooses_no_other_images_for_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    assert all(passed is not False for passed, _ in claims(capsys, "--seed", "3", "--attacks", "pgd").values())


@pytest.mark.usefixtures("out", "timed")
def test_other_images_are_told_from_those_of_the_report(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = dict(np.load("data.npz"))
    archive["x_test"] = 255 - archive["x_test"]
    np.savez(here / "other.npz", **archive)
    found = claims(capsys, "--data", "npz:other.npz", "--attacks", "pgd", code=cli.BAD_INPUT)
    passed, detail = found["model.onnx", "accuracy"]
    assert passed is False and detail.startswith("other images")


@pytest.mark.usefixtures("out", "timed")
def test_without_the_images_the_rest_is_measured(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "data.npz").unlink()
    found = claims(capsys)
    missing = {claim for (_, claim), (passed, _) in found.items() if passed is None}
    assert missing == {"accuracy", "robust accuracy"} and found["model.onnx", "integer layers"][0]
    assert "data.npz" in found["model.onnx", "accuracy"][1]
    assert tiny.run("verify", "out", "--threads", "1") == cli.DONE
    captured = capsys.readouterr()
    assert "NOT MEASURED" in captured.out and "2 claim(s) could not be measured" in captured.err


@pytest.mark.usefixtures("out", "timed")
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--attacks", "nonsense"), "unknown attack"),
        (("--data", "npz:nowhere.npz"), "nowhere.npz"),
        (("--n", "0"), "--n"),
    ],
)
def test_what_the_user_names_wrongly_is_an_error_and_no_gap(
    more: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.run("verify", "out", "--threads", "1", "-q", *more) == cli.BAD_INPUT
    assert words in capsys.readouterr().err


def test_files_alone_are_checked_without_a_measurement(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verification, "_measured", lambda *_: pytest.fail("something was measured"))
    found = claims(capsys, "--files-only")
    assert {claim for _, claim in found} == {"unchanged", "schema"}
    (out / "model.onnx").write_bytes(b"")
    found = claims(capsys, code=cli.BAD_INPUT)  # nor is anything of files that are not what was written
    assert {claim for _, claim in found} == {"unchanged"}
