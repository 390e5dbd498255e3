from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.reproduce import small
from toolkit import cli
from toolkit.attacks.threat import PgdPlan
from toolkit.config import DataConfig
from toolkit.data.sources import DataSource
from toolkit.errors import ToolkitError
from toolkit.reproduce import command, runner, workers, world
from toolkit.reproduce.document import documents
from toolkit.reproduce.recipes import Recipe
from toolkit.reproduce.runner import Runner
from toolkit.reproduce.steps import Step
from toolkit.reproduce.work import Bench

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


def test_a_table_none_of_whose_data_sets_is_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match="CIFAR-10 is not on this machine") as error:
        Runner(small.settings(tmp_path / "work", "table5", data={"data_dir": tmp_path / "nowhere"}))
    assert "--data-dir" in error.value.fix and not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small_world")
def test_a_data_set_that_only_the_table_names_leaves_empty_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(config: DataConfig) -> DataSource:
        if config.source == "cifar10":
            raise ToolkitError("CIFAR-10 is not on this machine", found="nothing", fix="get it")
        return small.source(config)

    monkeypatch.setattr(world, "load_source", load)
    found = Runner(small.settings(tmp_path / "work", "table2", max_runs=0))
    cells = next(panel["cells"] for panel in documents(found)[0]["panels"] if "CIFAR" in panel["title"])
    assert cells and all(cell["missing"] == {"all": "CIFAR-10 is not on this machine"} for cell in cells)
    assert any(cell["paper"] for cell in cells), "the paper's numbers are shown all the same"
    assert "not to be run: CIFAR-10: CIFAR-10 is not on this machine" in command.plan(found, as_json=False)


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


@pytest.mark.usefixtures("small_world")
def test_torchrun_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ToolkitError, match="not shared by torchrun"):
        Runner(small.settings(tmp_path, "table2", data={"source": "fashion-mnist"})).run()


@pytest.mark.usefixtures("small_world")
def test_the_command_line_tells_of_steps_that_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(_step: Step, _bench: Bench) -> dict[str, Any]:
        raise ToolkitError("the training diverged", found="loss nan", fix="none")

    monkeypatch.setattr(runner, "WORKERS", {**workers.WORKERS, "train": diverge})
    command = ("reproduce", "table2", "--data", "fashion-mnist", "--only", "robust", "--work", tmp_path / "work", "-q")
    assert tiny.run(*command) == cli.BAD_INPUT
    shown = capsys.readouterr().out
    assert "failed:  fashion-mnist, cnn8, seed 0: robust network: the training diverged: loss nan" in shown
    assert (tmp_path / "work" / "tables" / "table2.md").is_file()


@pytest.mark.usefixtures("small_world")
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    found = Runner(small.settings(tmp_path / "work", "table2", data={"source": "fashion-mnist"}))
    with pytest.raises(ToolkitError, match="the output cannot be written"):
        command.fill(found, tmp_path / "file" / "tables", as_json=False)
    assert not list((tmp_path / "work").glob("*/result.json"))


# The plan


@pytest.mark.usefixtures("small_world")
def test_the_paper_comes_before_what_it_lacks_and_cheap_before_dear(tmp_path: Path) -> None:
    plan = [step.text for step in Runner(small.settings(tmp_path)).plan()]
    assert len(plan) == len(set(plan)), "what tables share is run once"
    last_of_paper = max(i for i, text in enumerate(plan) if text.endswith("eps behind the normalisation, no clipping")
                        and "AutoAttack" not in text and "integer" not in text and "distill" not in text
                        and "robust" in text and "PTQ" in text)  # fmt: skip
    assert last_of_paper < min(i for i, text in enumerate(plan) if "AutoAttack" in text or "DeepFool" in text)
    assert plan[0].endswith("standard network") and sum(": quantisation-aware" in text for text in plan) == 1
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
    assert not list(tmp_path.iterdir())
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


def test_plans_survive_being_written(tmp_path: Path, small_world: None) -> None:
    del small_world
    from toolkit.reproduce.work import read_plan

    step = Runner(small.settings(tmp_path)).panels[0].planners[0].measure(small.TUNED, "pgd-paper")
    plan = read_plan(json.loads(json.dumps(step.settings["plan"])))
    assert isinstance(plan, PgdPlan) and (plan.steps, plan.step_size, plan.random_start) == (20, 0.01, False)
    assert read_plan(None) is None
