from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import tiny
from tests.tiny import report_of
from toolkit import cli, graphs, pipeline, prepare
from toolkit.config import QuantizeConfig
from toolkit.evaluators import widths
from toolkit.evaluators.assignment import Assignment, find_assignment
from toolkit.evaluators.judge import Drop
from toolkit.evaluators.timing import Interval
from toolkit.evaluators.widths import RoundingChoice, choose_rounding
from toolkit.exporters.engine import Writer
from toolkit.exporters.onnx import load_onnx
from toolkit.exporters.precision import layer_precision


def test_a_search_for_the_integer_layers_is_told_and_not_repeated(here: Path) -> None:
    command = [*tiny.harden_arguments(epochs=0, precision="auto"), "--calibrate", "auto"]
    assert tiny.run(*command, "--threads", "1", "-q") == cli.DONE
    first = report_of(here / "out")["quantization"]
    found = first["assignment"]
    settings = yaml.safe_load(Path("out/config.yaml").read_text())["quantize"]
    assert settings["precision"] == "int8" and set(settings["keep_float"]) == set(found["for_accuracy"])
    assert {*settings["keep_float"], *settings["keep_float_here"]} == set(found["keep_float"])
    assert settings["calibrate"] == first["calibration"] != "auto"
    assert len(first["calibration_methods"]) == 5 and "## Calibration methods" in Path("out/report.md").read_text()
    integer = {row["layer"] for row in first["layers"] if row["integer"]}
    assert integer and not integer & set(found["keep_float"]), "what was chosen is what ships"
    assert found["images"] == 30 and found["tried"] >= 1
    assert "## Which layers are integer" in Path("out/report.md").read_text()
    assert tiny.run("harden", "--config", "out/config.yaml", "--output", "again", "-q") == cli.DONE
    assert report_of(here / "again")["quantization"]["assignment"] is None
    assert Path("again/model.onnx").read_bytes() == Path("out/model.onnx").read_bytes()


def test_layers_that_are_float_for_this_machine_s_speed_are_integers_for_other_runtimes(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = Interval(0.5, 0.4, 0.6)
    speed, accuracy = "node_conv2d", "node_linear"

    def find(*_: object, **__: object) -> Assignment:
        return Assignment((speed, accuracy), fast, fast, Drop(0, 0), Drop(0, 0), 60, 1, (accuracy,))

    monkeypatch.setattr(graphs, "find_assignment", find)
    command = tiny.harden_arguments(epochs=0, precision="auto")
    assert tiny.run(*command, "--target", "tensorrt", "--threads", "1", "-q") == cli.DONE
    assert tiny.run("harden", "--config", "out/config.yaml", "--output", "again", "-q") == cli.DONE
    for folder in (here / "out", here / "again"):
        left = {
            name: {row.name for row in layer_precision(load_onnx(folder / name)) if row.precision == "float32"}
            for name in ("model.onnx", "model.trt.onnx")
        }
        assert left == {"model.onnx": {speed, accuracy}, "model.trt.onnx": {accuracy}}
        settings = yaml.safe_load((folder / "config.yaml").read_text())["quantize"]
        assert (settings["keep_float"], settings["keep_float_here"]) == ([accuracy], [speed])


def test_a_new_search_forgets_what_was_faster_on_another_machine(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.run(*tiny.harden_arguments(epochs=0), "--threads", "1", "-q") == cli.DONE
    path = here / "out" / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["quantize"]["keep_float_here"] = ["node_linear"]
    path.write_text(yaml.safe_dump(settings))
    assert tiny.run("harden", "--config", str(path), "--output", "same", "-q") == cli.DONE
    assert yaml.safe_load(Path("same/config.yaml").read_text())["quantize"]["keep_float_here"] == ["node_linear"]
    searched: list[tuple[str, ...]] = []

    def find(quantizer: Writer, *_: object, **__: object) -> Assignment:
        searched.append(quantizer.kept)
        return Assignment((), *(Interval(0.5, 0.4, 0.6),) * 2, Drop(0, 0), Drop(0, 0), 60, 1)

    monkeypatch.setattr(graphs, "find_assignment", find)
    again = ("harden", "--config", str(path), "--precision", "auto", "--output", "again", "-q")
    assert tiny.run(*again) == cli.DONE and searched == [()]
    assert yaml.safe_load(Path("again/config.yaml").read_text())["quantize"]["keep_float_here"] == []
    settings["quantize"]["keep_float_here"] = ["node_of_another"]
    path.write_text(yaml.safe_dump(settings))
    monkeypatch.setattr("toolkit.pipeline._finetune", lambda *_, **__: pytest.fail("it trained first"))
    for how in ((), ("--dry-run",)):
        assert tiny.run("harden", "--config", str(path), "--output", "other", *how, "-q") == cli.BAD_INPUT
        words = " ".join(capsys.readouterr().err.split())
        assert "keep_float_here, which config.yaml has from another network" in words


def test_where_integers_do_not_pay_the_float_graph_ships_if_that_is_allowed(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Interval(1.2, 1.1, 1.3)
    searched = []

    def find(*_: object, **__: object) -> Assignment:
        searched.append(1)
        return Assignment((), slow, slow, Drop(0, 0), Drop(0, 0), 60, 1)

    monkeypatch.setattr(graphs, "find_assignment", find)
    command = tiny.harden_arguments(epochs=0, precision="auto")
    assert tiny.run(*command, "--allow-float", "--threads", "1", "-q") == cli.DONE
    found = report_of(here / "out")["quantization"]
    assert found["engine"] == "none" and "int8 does not pay on this machine" in found["verdict"]
    assert found["assignment"]["pays"] is False and found["assignment"]["shipped"]["ratio"] == 1.2
    assert yaml.safe_load(Path("out/config.yaml").read_text())["quantize"]["int8"] is False
    assert tiny.run("verify", "out", "-q") == cli.DONE
    assert tiny.run(*command, "--force", "--threads", "1", "-q") == cli.DONE
    assert report_of(here / "out")["quantization"]["engine"] == "onnxruntime" and len(searched) == 2


def test_where_integers_lose_too_much_the_float_graph_ships_if_that_is_allowed(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = Interval(0.5, 0.4, 0.6)
    lossy = Assignment((), fast, fast, Drop(0, 0.02), Drop(0, 0.03), 60, 1, max_drop=0.01)
    monkeypatch.setattr(graphs, "find_assignment", lambda *_, **__: lossy)
    command = tiny.harden_arguments(epochs=0, precision="auto")
    assert tiny.run(*command, "--allow-float", "--threads", "1", "-q") == cli.DONE
    found = report_of(here / "out")["quantization"]
    assert found["engine"] == "none" and "int8 loses more accuracy than --max-drop allows" in found["verdict"]


def test_a_resumed_run_searches_no_second_time(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[int] = []

    def find(*arguments: Any, **how: Any) -> Assignment:
        searched.append(1)
        return find_assignment(*arguments, **how)

    monkeypatch.setattr(graphs, "find_assignment", find)
    command = [*tiny.harden_arguments(epochs=1, precision="auto"), "--threads", "1", "-q"]
    with monkeypatch.context() as broken:
        broken.setattr(pipeline, "build_report", lambda *_: 1 / 0)
        assert tiny.run(*command) != cli.DONE
    assert (here / ".out.partial" / "assignment.json").exists()
    assert tiny.run(*command, "--resume") == cli.DONE
    assert len(searched) == 1 and report_of(here / "out")["quantization"]["assignment"]["tried"] >= 1


@pytest.mark.usefixtures("here")
def test_a_resumed_run_that_asks_for_something_else_searches_again(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[float] = []

    def find(*arguments: Any, max_drop: float, **how: Any) -> Assignment:
        searched.append(max_drop)
        return find_assignment(*arguments, max_drop=max_drop, **how)

    monkeypatch.setattr(graphs, "find_assignment", find)
    command = [*tiny.harden_arguments(epochs=1, precision="auto"), "--threads", "1", "-q"]
    with monkeypatch.context() as broken:
        broken.setattr(pipeline, "build_report", lambda *_: 1 / 0)
        assert tiny.run(*command, "--max-drop", "0.2") != cli.DONE
    assert tiny.run(*command, "--max-drop", "0.1", "--resume") == cli.DONE
    assert searched == [0.2, 0.1]


def test_a_search_for_the_widths_is_told_and_not_repeated(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widths, "MULTIPLES", (1, 8))
    searched: list[int] = []

    def choose(*arguments: Any, **how: Any) -> RoundingChoice:
        searched.append(1)
        return choose_rounding(*arguments, **how)

    monkeypatch.setattr(graphs, "choose_rounding", choose)
    command = [*tiny.harden_arguments(epochs=1), "--prune", "0.4", "--round-to", "auto", "--threads", "1", "-q"]
    with monkeypatch.context() as broken:
        broken.setattr(pipeline, "build_report", lambda *_: 1 / 0)
        assert tiny.run(*command) != cli.DONE
    assert tiny.run(*command, "--resume") == cli.DONE and len(searched) == 1
    model = report_of(here / "out")["model"]
    (taken,) = [row for row in model["roundings"] if row["chosen"]]
    assert [row["round_to"] for row in model["roundings"]] == [1, 8]
    assert yaml.safe_load(Path("out/config.yaml").read_text())["prune"]["round_to"] == taken["round_to"]
    assert model["round_to"] == taken["round_to"] and model["macs"]["after"] == taken["macs"]
    assert "## Widths" in Path("out/report.md").read_text()
    assert tiny.run("harden", "--config", "out/config.yaml", "--output", "again", "-q") == cli.DONE
    assert report_of(here / "again")["model"]["roundings"] == [] and len(searched) == 1
    assert Path("again/model.onnx").read_bytes() == Path("out/model.onnx").read_bytes()


@pytest.mark.usefixtures("here")
def test_widths_are_not_searched_by_several_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = [*tiny.harden_arguments(epochs=0), "--round-to", "auto", "-q"]
    assert tiny.run(*command) == cli.BAD_INPUT
    assert "name the multiple" in capsys.readouterr().err


def test_where_nothing_is_pruned_no_widths_are_searched(here: Path) -> None:
    command = [*tiny.harden_arguments(epochs=0), "--prune", "0", "--round-to", "auto", "--threads", "1", "-q"]
    assert tiny.run(*command) == cli.DONE
    assert yaml.safe_load(Path("out/config.yaml").read_text())["prune"]["round_to"] == 8
    assert report_of(here / "out")["model"]["roundings"] == []


@pytest.mark.parametrize(
    ("saturates", "how", "provider", "wanted"),
    [
        (True, {}, "cpu", True),
        (False, {}, "cpu", False),
        (True, {"reduce_range": False}, "cpu", False),
        (False, {"reduce_range": True}, "cpu", True),
        (True, {"activation_bits": 16}, "cpu", False),
        (True, {}, "cuda", False),
    ],
)
def test_weights_have_seven_bits_where_sums_saturate_unless_told_otherwise(
    saturates: bool, how: dict[str, Any], provider: Any, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "saturates_here", lambda: saturates)
    assert prepare.resolved_quantize(QuantizeConfig(**how), provider).reduce_range is wanted
