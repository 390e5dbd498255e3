from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reproduce import small
from toolkit.artifacts import state_digest
from toolkit.attacks.deepfool import deepfool
from toolkit.errors import ToolkitError
from toolkit.reproduce import limits, paper, runner, store, workers
from toolkit.reproduce import measure as measuring
from toolkit.reproduce.document import documents
from toolkit.reproduce.recipes import Recipe
from toolkit.reproduce.render import render
from toolkit.reproduce.runner import Runner
from toolkit.reproduce.steps import INTEGER_GRAPH, MODEL, Step
from toolkit.reproduce.work import Bench
from toolkit.training import loop


@pytest.mark.usefixtures("small_world")
def test_a_table_is_filled_over_several_sittings_and_shared_with_others(tmp_path: Path) -> None:
    first = Runner(small.settings(tmp_path, "table2", data={"source": "fashion-mnist"}, max_runs=1))
    assert first.run() == "--max-runs 1 is reached"
    assert len(list(tmp_path.glob("*/result.json"))) == 1
    second = Runner(small.settings(tmp_path, "table2", data={"source": "fashion-mnist"}))
    assert second.run() == "everything that can be run is done"
    cells = documents(second)[0]["panels"][0]["cells"]
    assert [cell["row"] for cell in cells] == [paper.STANDARD, paper.ROBUST, paper.STANDARD]
    for cell in cells:
        (run,) = cell["runs"]
        assert run["test"]["total"] == small.TEST and not cell["missing"] and cell["agreement"]["test"]["parts"]
        assert run["training"][-1]["spent"]["count"] == 1
    assert cells[0]["means"]["test"]["value"] > 60, "the small images can be learnt"
    done = {json.loads(path.read_text())["label"] for path in tmp_path.glob("*/step.json")}
    left = {step.text for step in Runner(small.settings(tmp_path, "table6", data={"source": "fashion-mnist"})).plan()}
    assert left and not left & done, "what tables share is not run again"
    assert not any("PGD" in text for text in left), "times need no attacks"


@pytest.mark.usefixtures("small_world")
def test_what_another_run_does_is_waited_for_last_and_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def filled() -> set[str]:
        return {json.loads(path.read_text())["label"] for path in tmp_path.glob("*/step.json")}

    settings = small.settings(tmp_path, "table2", data={"source": "fashion-mnist"})
    mine, theirs = Runner(settings), Runner(settings)
    everything = {step.text for step in mine.plan()}
    robust = mine.panels[0].planners[0].network_of(Recipe("robust"))
    waited = []
    with ExitStack() as other:
        assert other.enter_context(theirs.store.claim(robust))

        def pause(_seconds: float) -> None:
            waited.append(filled())
            other.close()
            small.fill(theirs, Recipe("robust"))

        monkeypatch.setattr("time.sleep", pause)  # while this run waits, the other one does its step
        assert mine.run() == "everything that can be run is done"
    (before,) = waited
    assert filled() == everything and everything - before == {text for text in everything if "robust" in text}
    spent = [json.loads(path.read_text())["spent"] for path in tmp_path.glob("*/result.json")]
    assert all((one["count"], one["lost"]) == (1, 0) for one in spent)


SHARE = """
import sys, time
from pathlib import Path
from tests.reproduce import small
from toolkit.reproduce import runner, workers
from toolkit.reproduce.output import write

small.shrink()
if "hang" in sys.argv:
    runner.WORKERS = {**workers.WORKERS, "train": lambda *_: time.sleep(600)}  # until it is killed
found = runner.Runner(small.settings(Path("work"), "table2", data={"source": "fashion-mnist"}))
found.run(lambda: write(found, Path("out")))
"""


def test_a_run_takes_over_from_one_that_was_killed(tmp_path: Path) -> None:
    """Two processes on one work folder: the first hangs in the first training, the second does the rest and waits."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    how: dict[str, Any] = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": path}, "stderr": subprocess.PIPE}
    with (tmp_path / "said").open("w+") as said:
        first = subprocess.Popen([sys.executable, "-c", SHARE, "hang"], **how)
        wait_for(lambda: any(tmp_path.glob("work/*/sittings.json")), first)
        second = subprocess.Popen([sys.executable, "-c", SHARE], **{**how, "stderr": said})
        try:
            wait_for(lambda: "waiting for another run" in (tmp_path / "said").read_text(), second)
            assert len(list(tmp_path.glob("work/*/result.json"))) >= 2, "what does not need the first training"
            first.kill()
            assert second.wait(120) == 0, (tmp_path / "said").read_text()
        finally:
            for process in (first, second):
                process.kill()
                process.communicate()
    spent = [json.loads(path.read_text())["spent"] for path in tmp_path.glob("work/*/result.json")]
    assert sorted((one["count"], one["lost"]) for one in spent) == [(1, 0)] * (len(spent) - 1) + [(1, 1)]
    assert "not run" not in (tmp_path / "out" / "table2.md").read_text()


def wait_for(reached: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Until it is so, for two minutes, while the process lives."""
    end = time.monotonic() + 120
    while not reached():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)


class Cut:
    """Kills a training after some steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, amount: int = 1, note: str = "") -> None:
        del amount, note
        self.left -= 1
        if self.left <= 0:
            raise KeyboardInterrupt


@pytest.mark.usefixtures("small_world")
def test_a_killed_training_resumes_to_the_same_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe("robust")
    whole = small.fill(Runner(small.settings(tmp_path / "whole")), recipe)
    cut = Runner(small.settings(tmp_path / "cut"))

    @contextmanager
    def task(_label: str, _total: int) -> Iterator[Cut]:
        yield Cut(50)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "task", task)
        patched.setattr(loop, "SAVE_EVERY_S", -1.0)
        with pytest.raises(KeyboardInterrupt):
            small.fill(cut, recipe)
    assert list((tmp_path / "cut").glob("*/training.partial")) and not list((tmp_path / "cut").glob("*/result.json"))
    again = small.fill(Runner(small.settings(tmp_path / "cut")), recipe)
    assert {name: again[name] for name in ("clean", "robust")} == {name: whole[name] for name in ("clean", "robust")}
    paths = [next((tmp_path / name).glob(f"*/{MODEL}")) for name in ("whole", "cut")]
    first, second = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
    assert all(torch.equal(first[name], second[name]) for name in first)
    spent = json.loads(next((tmp_path / "cut").glob(f"*/{MODEL}")).with_name("result.json").read_text())["spent"]
    assert (spent["count"], spent["lost"]) == (2, 0)
    assert not list((tmp_path / "cut").glob("*/training.partial"))


@pytest.mark.usefixtures("small_world")
def test_results_without_networks_stand_and_networks_are_made_again_for_new_cells(tmp_path: Path) -> None:
    tuned = Recipe("standard", 0.5, "standard")
    first = small.fill(Runner(small.settings(tmp_path)), tuned)
    kept = {path.parent.name: path.read_text() for path in tmp_path.glob("*/result.json")}
    for path in tmp_path.glob(f"*/{MODEL}"):
        path.unlink()
    runner = Runner(small.settings(tmp_path))
    planner = next(iter(runner.panels[0].planners.values()))
    assert runner.store.missing(planner.measure(tuned, "pgd-paper")) == []
    needed = runner.store.missing(planner.measure(tuned, "pgd-pixel"))
    assert [step.kind for step in needed] == ["train", "prune", "train", "measure"]
    small.fill(runner, tuned, "pgd-pixel")
    assert runner.store.missing(planner.measure(tuned, "pgd-pixel")) == []
    assert small.fill(runner, tuned) == first  # not measured again
    spent = [json.loads(path.read_text())["spent"]["count"] for path in tmp_path.glob("*/result.json")]
    assert spent == [1] * 5
    now = {path.parent.name: path.read_text() for path in tmp_path.glob("*/result.json")}
    changed = {name for name, text in now.items() if kept.get(name) != text}
    assert changed == {step.digest[:20] for step in needed}


def doze(seconds: float) -> None:
    """In naps, between which Python notices an interrupt from a thread; it wakes nobody who sleeps."""
    for _ in range(round(100 * seconds)):
        time.sleep(0.01)


@pytest.mark.usefixtures("small_world")
def test_no_path_of_data_or_code_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from tests.reproduce import small\n\nnet = lambda num_classes: small.network(num_classes, (1, 8, 8))\n"
    )
    changes: dict[str, Any] = {"data": {"source": f"folder:{tmp_path / 'images'}"}, "network": f"{file}:net"}
    found = Runner(small.settings(tmp_path / "work", "table2", **changes, max_runs=2))
    assert all(step.text.startswith("folder:images, own.py:net, seed 0: ") for step in found.plan())
    found.run()
    (document,) = documents(found)
    assert any(cell["runs"] for cell in document["panels"][0]["cells"])
    assert str(tmp_path) not in json.dumps(document) + render(document)


def test_the_time_is_over_even_where_a_shell_lets_interrupts_be_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), limits.alarm(0.2 / 60) as expired:
            doze(30)
        assert expired() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_budget_without_end_is_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    with limits.alarm(1e12) as expired:
        doze(0.2)
    assert failed == [] and not expired()


@pytest.mark.usefixtures("small_world")
def test_the_budget_interrupts_a_training_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = small.protocols()["paper"]
    endless = replace(short, base={**short.base, "epochs": 10_000})
    monkeypatch.setattr(runner, "PROTOCOLS", {"paper": endless})
    found = Runner(small.settings(tmp_path, "table2", data={"source": "fashion-mnist"}, budget=0.05))
    assert found.run() == "--budget 0.05 (minutes) is spent"
    assert list(tmp_path.glob("*/training.partial"))


@pytest.mark.usefixtures("small_world")
def test_a_step_that_fails_leaves_its_cells_empty_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(_step: Step, _bench: Bench) -> dict[str, Any]:
        raise ToolkitError("the training diverged", found="loss nan", fix="none")

    monkeypatch.setattr(runner, "WORKERS", {**workers.WORKERS, "train": diverge})
    found = Runner(small.settings(tmp_path, "table2", data={"source": "fashion-mnist"}))
    assert found.run() == "everything that can be run is done"
    cells = documents(found)[0]["panels"][0]["cells"]
    assert all(cell["missing"]["0"] == "the training diverged: loss nan" for cell in cells)
    monkeypatch.undo()


@pytest.mark.usefixtures("small_world")
def test_quantisation_aware_training_is_judged_as_it_rounds(tmp_path: Path) -> None:
    """The network of few bits is not the float network that its weights make, and its ranges are those it learnt."""
    found = Runner(small.settings(tmp_path, "figure4"))
    two, eight = (replace(small.ROUNDED, bits=bits) for bits in (2, 8))
    coarse, fine = small.fill(found, two), small.fill(found, eight)
    assert set(fine["by_surrogate"]) == {"fake_quantised", "float"} and fine["clean"][0] > 50
    assert coarse["robust"] == coarse["by_surrogate"]["fake_quantised"], "the paper's attack"
    assert coarse["worst_case"][0] <= min(share[0] for share in coarse["by_surrogate"].values())
    panel = found.panels[0]
    assert panel.world is not None
    step = panel.planners[0].network_of(two)
    bench = Bench(found.store, panel.world, panel.planners[0].splits)
    rounded = bench.simulated(step, {"bits": 2, "recorded": True, "calibration": None})
    batch = next(bench.splits.evaluation.batches(100))
    assert not torch.allclose(rounded.predict(batch.images), bench.model(step).predict(batch.images), atol=0.1)
    assert coarse["clean"] == [int((rounded.predict(batch.images).argmax(1) == batch.labels).sum()), 100]
    (document,) = documents(found)
    trained = [run["training"] for point in document["panels"][0]["curves"][0]["points"] for run in point["runs"]]
    worst = 100 * coarse["worst_case"][0] / coarse["worst_case"][1]
    assert f"| {worst:.2f} | 1 |" in render(document) and "Few bits mask gradients" in render(document)
    assert len(trained) == 2 and all(len(one) == 1 and one[0]["parameters"] for one in trained)


@pytest.mark.usefixtures("small_world")
def test_binary_weights_are_said_not_to_be_trained(tmp_path: Path) -> None:
    found = Runner(small.settings(tmp_path, "figure4", max_runs=0))
    found.run()
    points = documents(found)[0]["panels"][0]["curves"][0]["points"]
    missing = {point["x"]: point["missing"]["0"] for point in points}
    assert missing.pop(1.0) == "quantisation-aware training rounds to at least 2 bits"
    assert set(missing) == {16.0, 8.0, 4.0, 2.0} and set(missing.values()) == {"not yet: run the same command again"}


@pytest.mark.usefixtures("small_world")
def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Runner(small.settings(tmp_path, "table2", data={"source": "fashion-mnist"}))

    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("toolkit.reproduce.work.save_checkpoint", full)
    found.run()
    assert all(reason.startswith("the disk is full") for reason in found.failed.values()) and found.failed
    assert list(tmp_path.glob("*/training.partial")), "what was trained is kept"


@pytest.mark.usefixtures("small_world")
def test_times_are_known_without_networks(tmp_path: Path) -> None:
    settings = small.settings(tmp_path, "table6", data={"source": "fashion-mnist"})
    Runner(settings).run()
    before = {path: path.read_text() for path in tmp_path.glob("*/result.json")}
    for path in tmp_path.glob(f"*/{MODEL}"):
        path.unlink()
    again = Runner(settings)
    assert again.plan() == [] and again.run() == "everything that can be run is done"
    assert before and all(path.read_text() == text for path, text in before.items())
    assert all(row["runs"] for row in documents(again)[0]["panels"][0]["times"])


def made_otherwise(work: Path) -> None:
    """Change every network of a work folder as another machine might that makes it again."""
    for path in work.glob(f"*/{MODEL}"):
        content = torch.load(path, weights_only=True)
        for value in content["state_dict"].values():
            value.mul_(1.5)
        torch.save(content, path)


def told(work: Path) -> None:
    """Let results tell of the networks that are there."""
    for path in work.glob(f"*/{MODEL}"):
        state = torch.load(path, weights_only=True)["state_dict"]
        result = json.loads(path.with_name("result.json").read_text())
        digest = state_digest(state)
        path.with_name("result.json").write_text(json.dumps({**result, store.WEIGHTS: digest}))


@pytest.mark.usefixtures("small_world")
def test_a_network_that_is_not_the_one_of_its_result_is_refused(tmp_path: Path) -> None:
    """As where folders that were filled apart are joined, one of them without its networks."""
    tuned = Recipe("standard", 0.5, "standard")
    small.fill(Runner(small.settings(tmp_path)), tuned)
    made_otherwise(tmp_path)
    found = Runner(small.settings(tmp_path, "table3"))
    planner = found.panels[0].planners[0]
    (step,) = found.store.missing(planner.measure(tuned, "pgd-pixel"))
    assert found.panels[0].world is not None
    assert not found._do(step, planner, found.panels[0].world)
    assert "is not the one that its step's result tells of" in found.failed[step] and MODEL in found.failed[step]


@pytest.mark.usefixtures("small_world")
def test_a_graph_that_is_not_the_one_of_its_result_is_refused(tmp_path: Path) -> None:
    real = replace(small.TUNED, form="integer")
    small.fill(Runner(small.settings(tmp_path)), real)
    (graph,) = tmp_path.glob(f"*/{INTEGER_GRAPH}")
    assert not list(graph.parent.glob("unfinished*"))
    graph.write_bytes(graph.read_bytes()[:1000])
    found = Runner(small.settings(tmp_path))
    planner = found.panels[0].planners[0]
    (step,) = found.store.missing(planner.measure(real, "pgd-pixel"))
    assert found.panels[0].world is not None
    assert not found._do(step, planner, found.panels[0].world)
    assert INTEGER_GRAPH in found.failed[step]


@pytest.mark.parametrize("otherwise", [False, True])
@pytest.mark.usefixtures("small_world")
def test_deepfool_that_was_cut_goes_on_with_the_same_network_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, otherwise: bool
) -> None:
    whole = small.fill(Runner(small.settings(tmp_path / "whole", attack_images=8)), small.TUNED, "deepfool-paper")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for path in (tmp_path / "cut").glob("*/step.json"):
        if json.loads(path.read_text())["settings"].get("measure") == "deepfool-paper":
            path.with_name("result.json").unlink()
    monkeypatch.setattr("toolkit.artifacts.evaluation_batch", lambda _shape: 3)
    seen: list[int] = []

    def cut(*arguments: Any, **options: Any) -> Any:
        seen.append(len(arguments[1]))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return deepfool(*arguments, **options)

    monkeypatch.setattr(measuring, "deepfool", cut)
    with pytest.raises(KeyboardInterrupt):
        small.fill(Runner(small.settings(tmp_path / "cut", attack_images=8)), small.TUNED, "deepfool-paper")
    if otherwise:
        made_otherwise(tmp_path / "cut")
        told(tmp_path / "cut")
    again = small.fill(Runner(small.settings(tmp_path / "cut", attack_images=8)), small.TUNED, "deepfool-paper")
    if otherwise:
        assert seen == [3, 3, 2, 3, 3, 2]
    else:
        assert seen == [3, 3, 2, 2], "the last batch alone is made again"
        assert again["robust"] == whole["robust"]
