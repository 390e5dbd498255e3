from __future__ import annotations

import errno
import json
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.reproduce import small
from toolkit import cli
from toolkit.attacks.deepfool import deepfool
from toolkit.attacks.threat import PgdPlan
from toolkit.errors import ToolkitError
from toolkit.reproduce import command, paper, runner, targets, workers, world
from toolkit.reproduce import measure as measuring
from toolkit.reproduce.document import documents
from toolkit.reproduce.recipes import Measure, Recipe
from toolkit.reproduce.render import render
from toolkit.reproduce.runner import Runner
from toolkit.reproduce.steps import MODEL, Step
from toolkit.reproduce.work import Bench
from toolkit.training import loop

TUNED = Recipe("standard", 0.8, "adversarial")


def fill(runner: Runner, recipe: Recipe, measure: Measure = "pgd-paper") -> dict[str, Any]:
    """Do one cell's steps, whatever others there are."""
    panel = runner.panels[0]
    assert panel.world is not None
    planner = panel.planners[0]
    step = planner.measure(recipe, measure)
    for needed in runner.store.missing(step):
        assert runner._do(needed, planner, panel.world), runner.failed
    found = runner.store.result(step)
    assert found is not None
    return found


# Bad input


def test_an_unknown_table_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match="unknown table or figure") as error:
        Runner(small.settings(tmp_path, "tabel3"))
    assert "did you mean 'table3'?" in error.value.fix and not list(tmp_path.iterdir())


def test_a_repeated_seed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match="the seed 1 is named twice") as error:
        Runner(small.settings(tmp_path, seeds=(1, 0, 1)))
    assert error.value.found == "--seeds 1,0,1"


def test_a_data_set_that_is_named_must_be_there(tmp_path: Path) -> None:
    data = {"source": "cifar10", "data_dir": tmp_path / "nowhere"}
    with pytest.raises(ToolkitError, match="CIFAR-10 is not on this machine"):
        Runner(small.settings(tmp_path, data=data))


def test_data_without_the_papers_radius_are_refused(tmp_path: Path) -> None:
    tiny.write_archive(tmp_path / "data.npz")
    with pytest.raises(ToolkitError, match="have no radius for this data set") as error:
        Runner(small.settings(tmp_path / "work", data={"source": f"npz:{tmp_path / 'data.npz'}"}))
    assert "fashion-mnist" in error.value.fix


def test_a_data_set_that_only_the_table_names_leaves_empty_cells(tmp_path: Path) -> None:
    data = {"data_dir": tmp_path / "nowhere"}
    found = Runner(small.settings(tmp_path / "work", "table5", data=data))
    assert found.run() == "everything that can be run is done"
    cells = documents(found)[0]["panels"][0]["cells"]
    assert cells and all(cell["missing"] == {"all": "CIFAR-10 is not on this machine"} for cell in cells)
    assert all(cell["paper"] for cell in cells)


def test_the_command_line_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.run("reproduce", "figure5", "--work", tmp_path) == cli.BAD_INPUT
    assert "did you mean 'figure" in capsys.readouterr().err
    assert tiny.run("reproduce", "table2", "--seeds", "0,x", "--work", tmp_path) == cli.BAD_INPUT
    assert "--seeds has no usable value" in capsys.readouterr().err


@pytest.mark.usefixtures("small_world")
def test_the_command_line_shows_what_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("reproduce", "table2", "--data", "fashion-mnist", "--seeds", "0,4", "--work", tmp_path / "work", "-q")
    assert tiny.run(*command, "--max-runs", "0", "--output", tmp_path / "out") == cli.DONE
    shown = capsys.readouterr().out
    assert "| standard | none | not run: not yet: run the same command again | 90.49 ± 0.22 |" in shown
    assert "stopped: --max-runs 0: nothing was run" in shown and "seeds 0, 4" in shown
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"table2.md", "table2.json"}
    assert (tmp_path / "out" / "table2.md").read_text() in shown
    assert tiny.run(*command, "--max-runs", "0", "--json") == cli.DONE
    (found,) = json.loads(capsys.readouterr().out)
    assert found["panels"][0]["cells"][0]["paper"]["test"] == {"mean": 90.49, "error": 0.22}
    assert tiny.run(*command, "--dry-run") == cli.DONE
    assert "fashion-mnist, cnn8, seed 4: robust network   about" in capsys.readouterr().out


# The plan


@pytest.mark.usefixtures("small_world")
def test_the_paper_comes_before_what_it_lacks_and_cheap_before_dear(tmp_path: Path) -> None:
    plan = [step.text for step in Runner(small.settings(tmp_path)).plan()]
    assert len(plan) == len(set(plan)), "what tables share is run once"
    last_of_paper = max(i for i, text in enumerate(plan) if text.endswith("eps behind the normalisation, no clipping")
                        and "AutoAttack" not in text and "integer" not in text and "distill" not in text
                        and "robust" in text and "PTQ" in text)  # fmt: skip
    assert last_of_paper < min(i for i, text in enumerate(plan) if "AutoAttack" in text or "DeepFool" in text)
    assert plan[0].endswith("standard network") and sum("quantisation-aware" in text for text in plan) == 1
    assert plan.index(f"{plan[0].rsplit(':')[0]}: robust network") > plan.index(
        next(text for text in plan if "PTQ" in text)
    ), "what needs a second training from scratch comes after what does not"


@pytest.mark.usefixtures("small_world")
def test_seeds_come_one_after_the_other_within_a_tier(tmp_path: Path) -> None:
    plan = [step.text for step in Runner(small.settings(tmp_path, "table2", seeds=(5, 3))).plan()]
    assert [text.split("seed ")[1][0] for text in plan] == ["5"] * (len(plan) // 2) + ["3"] * (len(plan) // 2)


@pytest.mark.usefixtures("small_world")
def test_cells_can_be_chosen(tmp_path: Path) -> None:
    def planned(target: str, only: str) -> list[str]:
        found = Runner(small.settings(tmp_path, target, only=only))
        return [step.text.removeprefix("fashion-mnist, cnn8, seed 0: ") for step in found.plan()]

    assert planned("table3", "Pruned, from robust; S") == [
        "robust network",
        "prune 0.8 of the robust network",
        "standard fine-tuning of prune 0.8 of the robust network",
        "robust, pruned 0.8, standard fine-tuning: PGD-20, eps behind the normalisation, no clipping",
    ]
    assert planned("figure3", "from robust; 0.5")[1] == "prune 0.5 of the robust network"
    assert planned("figure2", "t-sne")[-1] == "t-SNE of the class Bag"


@pytest.mark.usefixtures("small_world")
def test_cells_that_were_not_chosen_say_so(tmp_path: Path) -> None:
    found = Runner(small.settings(tmp_path, "table2", only="standard; none"))
    assert found.run() == "everything that can be run is done"
    cells = documents(found)[0]["panels"][0]["cells"]
    assert [cell["missing"] for cell in cells] == [{}, *[{"0": "not yet: --only leaves it out"}] * 2]


@pytest.mark.usefixtures("small_world")
def test_cells_that_no_table_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match="no cell is called so") as error:
        Runner(small.settings(tmp_path, "table2", only="from robots"))
    assert error.value.found == "--only 'from robots'" and "robust; none" in error.value.fix
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small_world")
def test_everything_at_once_runs_nothing_twice(tmp_path: Path) -> None:
    found = Runner(small.settings(tmp_path, "all", seeds=(0, 1)))
    plan = [step.text for step in found.plan()]
    assert len(plan) == len(set(plan)) and len(found.targets) == 9
    alone = {step.text for step in Runner(small.settings(tmp_path, "table3", seeds=(0, 1))).plan()}
    assert alone < set(plan)
    assert sum("t-SNE" in text for text in plan) == 1, "of the first seed alone"


@pytest.mark.usefixtures("small_world")
def test_a_plan_runs_nothing(tmp_path: Path) -> None:
    found = Runner(small.settings(tmp_path, "figure4"))
    text = command.plan(found, as_json=False)
    assert "not to be run: quantisation-aware training rounds to at least 2 bits" in text
    assert "quantisation-aware training, int8   about" in text
    assert [path.name for path in tmp_path.iterdir()] == ["reproduce.json"]
    steps = json.loads(command.plan(Runner(small.settings(tmp_path, "table2")), as_json=True))
    assert all(step["seconds"] > 0 for step in steps)


@pytest.mark.usefixtures("small_world")
def test_the_papers_resnet_alone_is_pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "load_source", lambda config: replace(small.source(config), threat_key="cifar10"))

    def epochs(protocol: str = "paper", **changes: Any) -> list[int]:
        changes |= {"data": {"source": "cifar10"}, "protocol": protocol}
        found = Runner(small.settings(tmp_path / protocol, "table2", **changes))
        steps = found.panels[0].planners[0].network_of(Recipe("robust")).walk()
        return [step.settings["config"]["epochs"] for step in steps]

    assert epochs() == [300, 3], "the robust network starts from the standard one"
    assert epochs(network="cnn8") == [3]
    assert epochs("fast") == [3, 3]


# Running


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
    whole = fill(Runner(small.settings(tmp_path / "whole")), recipe)
    cut = Runner(small.settings(tmp_path / "cut"))

    @contextmanager
    def task(_label: str, _total: int) -> Iterator[Cut]:
        yield Cut(50)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "task", task)
        patched.setattr(loop, "SAVE_EVERY_S", -1.0)
        with pytest.raises(KeyboardInterrupt):
            fill(cut, recipe)
    assert list((tmp_path / "cut").glob("*/training.partial")) and not list((tmp_path / "cut").glob("*/result.json"))
    again = fill(Runner(small.settings(tmp_path / "cut")), recipe)
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
    first = fill(Runner(small.settings(tmp_path)), tuned)
    kept = {path.parent.name: path.read_text() for path in tmp_path.glob("*/result.json")}
    for path in tmp_path.glob(f"*/{MODEL}"):
        path.unlink()
    runner = Runner(small.settings(tmp_path))
    planner = next(iter(runner.panels[0].planners.values()))
    assert runner.store.missing(planner.measure(tuned, "pgd-paper")) == []
    needed = runner.store.missing(planner.measure(tuned, "pgd-pixel"))
    assert [step.kind for step in needed] == ["train", "prune", "train", "measure"]
    fill(runner, tuned, "pgd-pixel")
    assert runner.store.missing(planner.measure(tuned, "pgd-pixel")) == []
    assert fill(runner, tuned) == first  # not measured again
    spent = [json.loads(path.read_text())["spent"]["count"] for path in tmp_path.glob("*/result.json")]
    assert spent == [1] * 5
    now = {path.parent.name: path.read_text() for path in tmp_path.glob("*/result.json")}
    changed = {name for name, text in now.items() if kept.get(name) != text}
    assert changed == {step.digest[:20] for step in needed}


@pytest.mark.usefixtures("small_world")
def test_torchrun_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ToolkitError, match="not shared by torchrun"):
        Runner(small.settings(tmp_path, "table2", data={"source": "fashion-mnist"})).run()


@pytest.mark.usefixtures("small_world")
def test_a_network_of_ones_own_is_known_by_its_file(tmp_path: Path) -> None:
    """Another text under the same name is another network, whose runs are its own; the first one's stay known."""
    file = tmp_path / "own.py"

    def digest(text: str) -> str:
        file.write_text(text)
        found = Runner(small.settings(tmp_path, "table2", data={"source": "fashion-mnist"}, network=f"{file}:net"))
        (planner, *_) = next(iter(found.panels)).planners.values()
        return planner.network_of(Recipe("standard")).digest

    first = digest("net = 1")
    assert digest("net = 2") != first == digest("net = 1")


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
        with pytest.raises(KeyboardInterrupt), runner._alarm(0.2 / 60) as expired:
            doze(30)
        assert expired() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


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
    two, eight = (Recipe("standard", tuned="adversarial", form="qat", bits=bits) for bits in (2, 8))
    coarse, fine = fill(found, two), fill(found, eight)
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


# Networks and measures


@pytest.mark.usefixtures("small_world")
def test_real_integers_and_simulated_ones_under_every_attack(tmp_path: Path) -> None:
    """The recorded ranges are those of the fine-tuning; stronger attacks leave less."""
    found = Runner(small.settings(tmp_path, attack_images=8))
    simulated = fill(found, Recipe("standard", 0.8, "adversarial", "simulated"))
    real = fill(found, Recipe("standard", 0.8, "adversarial", "integer"))
    assert set(real["by_surrogate"]) == {"twin", "fake_quantised", "float"}
    assert real["worst_case"][0] <= min(share[0] for share in real["by_surrogate"].values())
    assert abs(real["clean"][0] - simulated["clean"][0]) <= 10
    strong = fill(found, TUNED, "autoattack-paper")
    weak = fill(found, TUNED, "deepfool-paper")
    assert strong["robust"][1] == weak["robust"][1] == 8
    assert strong["robust"][0] <= weak["clean"][0] and weak["robust"][0] <= weak["clean"][0] and strong["passes"]


@pytest.mark.usefixtures("small_world")
def test_deepfool_that_was_cut_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fill(Runner(small.settings(tmp_path / "whole", attack_images=8)), TUNED, "deepfool-paper")
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
        fill(Runner(small.settings(tmp_path / "cut", attack_images=8)), TUNED, "deepfool-paper")
    again = fill(Runner(small.settings(tmp_path / "cut", attack_images=8)), TUNED, "deepfool-paper")
    assert seen == [3, 3, 2, 2], "the last batch alone is made again"
    assert again["robust"] == whole["robust"]


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
def test_the_two_readings_of_eps_are_two_figures(tmp_path: Path) -> None:
    found = Runner(small.settings(tmp_path))
    theirs, sound = (fill(found, TUNED, measure) for measure in ("pgd-paper", "pgd-pixel"))
    assert sound["robust"][0] <= theirs["robust"][0] and sound["clean"] == theirs["clean"]
    planner = found.panels[0].planners[0]
    assert planner.measure(TUNED, "pgd-paper") != planner.measure(TUNED, "pgd-pixel")


@pytest.mark.usefixtures("small_world")
def test_pruning_keeps_the_exact_share(tmp_path: Path) -> None:
    found = Runner(small.settings(tmp_path))
    fill(found, Recipe("standard", 0.8))
    (pruned,) = [json.loads(p.read_text()) for p in tmp_path.glob("*/result.json") if "widths" in p.read_text()]
    assert list(pruned["widths"].values()) == [[10, 2], [20, 4], [20, 4], [32, 32], [10, 10]]


@pytest.mark.usefixtures("small_world")
def test_the_paper_prunes_convolutions_alone_and_the_fast_protocol_hidden_layers_too(tmp_path: Path) -> None:
    found = Runner(small.settings(tmp_path, protocol="fast"))
    fill(found, Recipe("standard", 0.5))
    (pruned,) = [json.loads(p.read_text()) for p in tmp_path.glob("*/result.json") if "widths" in p.read_text()]
    assert list(pruned["widths"].values()) == [[10, 5], [20, 10], [20, 10], [32, 16], [10, 10]]
    (document,) = documents(found)
    assert any("hidden linear layers" in item for item in document["deviations"])


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


@pytest.mark.usefixtures("small_world")
def test_a_table_is_named_after_the_data_that_fill_it(tmp_path: Path) -> None:
    def titles(target: str) -> dict[str, str]:
        found = Runner(small.settings(tmp_path, target, data={"source": "fashion-mnist"}, max_runs=0))
        return {document["target"]: document["title"] for document in documents(found)}

    assert titles("table4") == {"table4": "Fashion-MNIST, compressed"}
    everything = titles("all")
    assert "table4" not in everything, "it would be table3 once more"
    assert everything["table3"] == "Fashion-MNIST, compressed"
    assert everything["table5"] == "Fashion-MNIST, compressed, as in the appendix"


@pytest.mark.usefixtures("small_world")
def test_how_the_standard_network_of_cifar_10_differs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "load_source", lambda config: replace(small.source(config), threat_key="cifar10"))

    def said(protocol: str, **changes: Any) -> list[str]:
        changes |= {"data": {"source": "cifar10"}, "protocol": protocol, "max_runs": 0}
        (document,) = documents(Runner(small.settings(tmp_path / protocol, "table2", **changes)))
        return [item for item in document["deviations"] if "public checkpoint" in item]

    assert "for 300 epochs" in said("paper")[0] and "for 20 epochs" in said("fast")[0]
    assert said("paper", network="cnn8") == []


@pytest.mark.usefixtures("small_world")
def test_all_training_images_train_under_the_papers_protocol_alone(tmp_path: Path) -> None:
    for protocol, count in (("paper", small.TRAIN), ("fast", small.TRAIN - 100)):
        found = Runner(small.settings(tmp_path / protocol, protocol=protocol))
        assert len(found.panels[0].planners[0].splits.train) == count


@pytest.mark.usefixtures("small_world")
def test_another_network_or_fewer_images_are_not_compared_with_the_paper(tmp_path: Path) -> None:
    for changes in ({"network": "resnet18"}, {"data": {"source": "fashion-mnist", "evaluation": 50}}):
        found = Runner(small.settings(tmp_path, max_runs=0, **changes))
        assert all(cell["paper"] is None for cell in documents(found)[0]["panels"][0]["cells"])
    assert all(cell["paper"] for cell in documents(Runner(small.settings(tmp_path, "table2")))[0]["panels"][0]["cells"])


@pytest.mark.usefixtures("small_world")
def test_layouts_are_of_the_class_and_of_clean_and_attacked_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"a": Recipe("standard"), "b": Recipe("standard", form="simulated")}
    monkeypatch.setattr(targets, "embedded", lambda _experiment: few)
    found = Runner(small.settings(tmp_path, "figure2"))
    text = command.fill(found, tmp_path / "out", as_json=False)
    assert "10 test images of the class Bag" in text and "| a | standard | " in text
    assert (tmp_path / "out" / "figure2.png").is_file()
    written = (tmp_path / "out" / "figure2.json").read_text()
    assert str(tmp_path) not in written and '"layer 5"' in written


def test_the_class_must_exist(tmp_path: Path, small_world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    del small_world
    monkeypatch.setattr(targets, "EMBEDDED_CLASS", "Rucksack")
    found = Runner(small.settings(tmp_path, "figure2"))
    assert found.plan() == [], "nothing is trained for it"
    assert found.impossible() == ["the data set has no class Rucksack"]
    assert documents(found)[0]["panels"][0]["embedding"]["missing"] == "the data set has no class Rucksack"


@pytest.mark.usefixtures("small_world")
def test_too_few_images_of_the_class_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "embedded", lambda _experiment: {"a": Recipe("standard")})
    found = Runner(small.settings(tmp_path, "figure2", data={"source": "fashion-mnist", "evaluation": 20}))
    found.run()
    assert list(found.failed.values()) == ["too few images of the class Bag to lay out: 2 among 20 evaluation images"]


def test_plans_survive_being_written(tmp_path: Path, small_world: None) -> None:
    del small_world
    from toolkit.reproduce.work import read_plan

    step = Runner(small.settings(tmp_path)).panels[0].planners[0].measure(TUNED, "pgd-paper")
    plan = read_plan(json.loads(json.dumps(step.settings["plan"])))
    assert isinstance(plan, PgdPlan) and (plan.steps, plan.step_size, plan.random_start) == (20, 0.01, False)
    assert read_plan(None) is None
