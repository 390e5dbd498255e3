"""Whole searches, by the command line, on the tiny world."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import tiny
from tests.search import fakes
from tests.search.commands import arguments, front_of
from toolkit import bundle, cli
from toolkit.config import (
    DataConfig,
    HardenConfig,
    ModelConfig,
    SearchRunConfig,
    ThreatConfig,
    TrainConfig,
    build,
)
from toolkit.errors import ToolkitError
from toolkit.search import cluster, finals, planned
from toolkit.search import search as search_module
from toolkit.search.cluster import work_on
from toolkit.search.objective import Job, Laboratory, Measurement, Outcome, Workbench
from toolkit.search.problems import Problem
from toolkit.search.report import own_name
from toolkit.search.search import Search
from toolkit.search.storage import Study
from toolkit.training.losses import cost_per_image
from toolkit.training.run import Run


def test_the_folder_of_a_search(searched: Path) -> None:
    output = searched / "search-out"
    assert {path.name for path in output.iterdir() if not path.name.startswith(".")} == {
        "bundles", "front.json", "front.md", "front.png", "search.yaml", "study.sqlite", "tuned",
    }  # fmt: skip
    assert (output / "front.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((output / "tuned").glob("*.pt"))) == 2, "one fine-tuning for each ratio, whatever the precision"


def test_the_front_is_made_of_bundles_and_says_what_they_say(searched: Path) -> None:
    found = front_of(searched / "search-out")
    assert 1 <= len(found["bundles"]) <= 2
    for entry in found["bundles"]:
        folder = searched / "search-out" / entry["bundle"]
        assert all(finding.passed for finding in bundle.verify_files(folder))
        report = bundle.read_report(folder)
        assert entry["clean"] == report.accuracy.deployed.model_dump()
        assert entry["robust"] == report.robust_accuracy.deployed.model_dump()
        assert entry["clean"]["total"] == tiny.TEST, "all evaluation images, and none of those that led the search"
        assert entry["bytes"] == (folder / "model.onnx").stat().st_size
        assert report.model.prune_ratio == entry["settings"]["prune.ratio"]
        assert (report.quantization.engine == "none") == (entry["settings"]["precision"] == "float")
    numbers = [entry["trial"] for entry in found["bundles"]]
    assert found["recommended"]["trial"] in numbers and set(found["front"]) <= set(numbers)


def test_every_trial_is_told_with_its_cheap_evidence(searched: Path) -> None:
    found = front_of(searched / "search-out")
    points = [tuple(trial["settings"].values()) for trial in found["trials"]]
    assert len(points) == len(set(points)) == 3
    for trial in found["trials"]:
        (measured,) = trial["result"]
        assert measured["clean"]["total"] == 20
        assert Measurement.of(measured).record() == measured
    text = (searched / "search-out" / "front.md").read_text()
    assert all(f"\n| {trial['trial']} | " in text for trial in found["trials"]) and "![front](front.png)" in text


@pytest.mark.usefixtures("again")
def test_the_same_command_makes_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    before = front_of()
    times = {path: path.stat().st_mtime_ns for path in Path("search-out/bundles").rglob("*")}
    monkeypatch.setattr(Run, "advance", lambda _: pytest.fail("a fine-tuning was made again"))
    assert tiny.run(*arguments(bundles=2), "-q") == cli.DONE
    assert front_of()["trials"] == before["trials"]
    assert {path: path.stat().st_mtime_ns for path in Path("search-out/bundles").rglob("*")} == times


@pytest.mark.usefixtures("again")
def test_more_trials_go_on_from_those_that_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    before = front_of()
    assert tiny.run(*arguments("--json", trials=9), "-q") == cli.DONE
    printed = json.loads(capsys.readouterr().out)
    assert printed == front_of()
    assert printed["trials"][:3] == before["trials"] and len(printed["trials"]) == 4, "the space has four points"


@pytest.mark.usefixtures("again")
def test_limits_that_nothing_meets(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.run(*arguments("--max-size", "1k", "--max-latency", "0.000001"), "-q") == cli.GATE_UNMET
    printed = capsys.readouterr().out
    assert "NO POINT KEEPS ALL LIMITS; nearest" in printed and "misses --max-latency by" in printed
    assert "--max-size by" in printed
    found = front_of()
    assert not found["recommended"]["keeps_limits"] and found["limits"]["max_size"] == 1000
    assert "no point keeps all limits" in Path("search-out/front.md").read_text()


@pytest.mark.usefixtures("again")
def test_other_limits_choose_anew_among_the_bundles_that_are_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {path.name for path in Path("search-out/bundles").iterdir()}
    made = []
    monkeypatch.setattr(finals, "_write", lambda *parts: made.append(parts[-1].name))
    assert tiny.run(*arguments("--min-accuracy", "0.1", "--max-size", "1M"), "-q") == cli.DONE
    assert "why:     keeps all limits" in capsys.readouterr().out and made == []
    assert {Path(one["bundle"]).name for one in front_of()["bundles"]} <= there
    assert front_of()["limits"]["min_accuracy"] == 0.1


@pytest.mark.usefixtures("again")
def test_a_bundle_of_another_search_is_not_taken_for_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for origin in Path("search-out", finals.ORIGINS).iterdir():
        origin.write_text("that of another network")
    made = []
    write = finals._write

    def noted(how: HardenConfig, laboratory: Laboratory, folder: Path) -> None:
        made.append(folder.name)
        write(how, laboratory, folder)

    monkeypatch.setattr(finals, "_write", noted)
    assert tiny.run(*arguments(), "-q") == cli.DONE
    assert made == [Path(one["bundle"]).name for one in front_of()["bundles"]]


@pytest.mark.usefixtures("again")
def test_force_removes_what_a_search_wrote_and_nothing_else() -> None:
    Path("search-out/thesis.tex").write_text("mine")
    Path("search-out/pictures").mkdir()
    Path("search-out/pictures/one.png").write_bytes(b"mine")
    assert tiny.run(*arguments("--force", trials=1, epochs=0), "-q") == cli.DONE
    assert Path("search-out/thesis.tex").read_text() == "mine" and Path("search-out/pictures/one.png").is_file()
    assert len(front_of()["trials"]) == 1


@pytest.mark.usefixtures("here")
def test_a_search_that_was_killed_before_its_first_trial_goes_on() -> None:
    Path("search-out").mkdir()
    Path("search-out/study.sqlite").touch()
    assert tiny.run(*arguments(trials=1, epochs=0), "-q") == cli.DONE


@pytest.mark.usefixtures("here")
def test_no_password_is_written_down(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    url, opened = "postgresql://me:secret@there/studies", list[str]()

    def elsewhere(url: str, *parts: Any) -> Study:
        opened.append(url)
        return Study("sqlite:///local.sqlite", *parts)

    monkeypatch.setattr(search_module, "Study", elsewhere)
    monkeypatch.setattr(search_module, "check_url", opened.append)  # the driver may not be installed
    assert tiny.run(*arguments("--storage", url, trials=1, epochs=0)) == cli.DONE
    assert opened == [url, url]
    written = Path("search-out/search.yaml").read_text()
    assert "me:***@there" in written and "secret" not in written + capsys.readouterr().err


def prepared(monkeypatch: pytest.MonkeyPatch, *, cpus: int = 8, **search: Any) -> Search:
    """As on a machine with so many CPUs."""
    monkeypatch.setattr(search_module, "usable_threads", lambda wanted: wanted or cpus)
    values: dict[str, Any] = {"model": {"path": "model.pt"}, "data": {"source": "npz:data.npz"}}
    values |= {"threat": {"eps": 0.1}, "search": {"address": "local", **search}}
    return search_module.prepare_search(build(SearchRunConfig, values), Path("out"))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("more", "threads"), [((), 8), (("--workers", "4"), 2), (("--workers", "9"), 1)])
def test_workers_share_the_threads_of_this_machine(
    more: tuple[str, ...], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = {"workers": int(more[1])} if more else {}
    assert prepared(monkeypatch, **search).config.threads == threads


@pytest.mark.usefixtures("here")
def test_machines_with_other_numbers_of_cpus_share_a_study(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = prepared(monkeypatch, cpus=16), prepared(monkeypatch, cpus=2)
    assert (large.config.threads, small.config.threads) == (16, 2)
    assert search_module._identity(large) == search_module._identity(small)
    Path("out").mkdir()
    search_module._write_settings(large, "sqlite:///out/study.sqlite")
    assert yaml.safe_load(Path("out/search.yaml").read_text())["threads"] is None, "it repeats the search"


@pytest.mark.parametrize("study", ["s" * 300, "ü/" * 200])
def test_files_of_a_study_of_a_long_name_can_be_written(study: str, tmp_path: Path) -> None:
    (tmp_path / own_name(study, "search.yaml")).touch()
    assert own_name(study, "search.yaml") != own_name(study + "x", "search.yaml")


@pytest.mark.usefixtures("here")
def test_machines_with_other_packages_do_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def lacking(config: HardenConfig) -> None:
        if config.quantize.engine == "inc":
            raise ToolkitError("Neural Compressor is not installed", found="", fix="")

    found = list[Search]()
    for refuse in (lambda _: None, lacking):
        monkeypatch.setattr(search_module, "check_settings", refuse)
        found.append(prepared(monkeypatch, space="quantize.engine=ort,inc; precision=int8"))
    assert [one.space.size for one in found] == [2, 1]
    url = f"sqlite:///{tmp_path / 'shared.sqlite'}"
    both, ort = ((url, "search", one.space, search_module._identity(one), 0) for one in found)
    Study(*both).close()
    with pytest.raises(ToolkitError, match="the storage holds another study") as caught:
        Study(*ort)
    assert "differs in: values that can be made" in caught.value.found


@pytest.mark.usefixtures("again")
def test_the_written_settings_repeat_the_search() -> None:
    saved = yaml.safe_load(Path("search-out/search.yaml").read_text())
    assert saved["model"]["path"] == "../model.pt" and saved["search"]["trials"] == 3
    shutil.copy("search-out/search.yaml", "mine.yaml")
    values = Path("mine.yaml").read_text().replace("../", "")
    Path("mine.yaml").write_text(values)
    before = front_of()["trials"]
    assert tiny.run("search", "--config", "mine.yaml", "-q") == cli.DONE
    assert tiny.run("search", "mine.yaml", "-q") == cli.DONE, "in the model's place it is the same"
    assert front_of()["trials"] == before


@pytest.mark.usefixtures("here")
def test_a_search_that_was_interrupted_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    advance, steps = Run.advance, []

    def interrupted(run: Run) -> None:
        steps.append(run.fingerprint)
        advance(run)
        if len(steps) == run.steps + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "advance", interrupted)
    space = "prune.ratio=0.25:0.5:0.25; precision=int8"
    assert tiny.run(*arguments(trials=2, space=space), "-q") == cli.INTERRUPTED
    monkeypatch.setattr(Run, "advance", advance)
    assert tiny.run(*arguments(trials=2, space=space), "-q") == cli.DONE
    found = front_of()
    assert [trial["reason"] for trial in found["trials"]] == [None, None]
    assert len({trial["settings"]["prune.ratio"] for trial in found["trials"]}) == 2


@pytest.mark.usefixtures("again")
def test_begun_anew_with_force() -> None:
    command = arguments("--force", trials=1, epochs=0)
    assert tiny.run(*arguments(trials=1, epochs=0), "-q") == cli.BAD_INPUT
    assert tiny.run(*command, "-q") == cli.DONE
    assert len(front_of()["trials"]) == 1


@pytest.mark.usefixtures("here")
def test_every_group_and_every_seed() -> None:
    space = "prune.ratio=0.25:0.5:0.25; precision=int8"
    more = ["--per-group", "--seeds", "3,5"]
    assert tiny.run(*arguments(*more, trials=2, space=space, epochs=0), "-q") == cli.DONE
    found = front_of()
    assert set(found["trials"][0]["settings"]) == {"prune.ratios.0", "prune.ratios.2", "precision"}
    assert [len(trial["result"]) for trial in found["trials"]] == [2, 2]
    report = bundle.read_report(Path("search-out") / found["bundles"][0]["bundle"])
    assert report.seed == 3 and set(report.model.prune_ratios) == {"0", "2"}


def test_a_dry_run_writes_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one second per gradient and image: two fine-tunings of two epochs, PGD on the images that judge."""
    monkeypatch.setattr(planned, "seconds_per_image", lambda *_: 1.0)
    before = tiny.entries(here)

    def plan(*more: str) -> dict[str, Any]:
        assert tiny.run(*arguments("--dry-run", "--json", "-q", *more, epochs=2)) == cli.DONE
        return {row["step"].split()[0]: row for row in json.loads(capsys.readouterr().out)}

    found = plan("--min-robust", "0.3")
    assert [name for name in tiny.entries(here) if name != "__pycache__"] == before
    assert "4 points: prune.ratio 0.25 to 0.5 by 0.25; precision int8, float" in found["space"]["step"]
    assert "min_robust 0.3" in found["front"]["step"] and "20 validation images" in found["trials"]["step"]
    shorter = plan("--seeds", "1,2")
    assert shorter["trials"]["seconds"] == pytest.approx(2 * found["trials"]["seconds"])
    assert shorter["front"]["seconds"] == found["front"]["seconds"]
    longer = plan("--epochs", "3")
    tuned = 3 * 540 * cost_per_image(TrainConfig())  # three trials, an epoch more
    assert longer["trials"]["seconds"] - found["trials"]["seconds"] == pytest.approx(tuned)
    assert plan("--budget", "5")["trials"]["seconds"] == 5
    assert tiny.run(*arguments("--dry-run", "-q")) == cli.DONE
    assert "the front would be written to search-out" in capsys.readouterr().out


# Bad input.


def job(**changes: Any) -> Job:
    config = HardenConfig(
        model=ModelConfig(path=Path("model.pt")),
        data=DataConfig(source="npz:data.npz"),
        threat=ThreatConfig(eps=0.12, steps=2),
        allow_float=True,
        threads=1,
    )
    return Job(0, config.model_copy(update=changes))


def test_a_worker_without_the_data(here: Path) -> None:
    Path("data.npz").unlink()
    outcome = work_on(Workbench(str(here), str(here / "out"), 10, "pgd"), job())
    assert outcome.problem is not None and outcome.problem.fatal and outcome.measurement is None
    error = outcome.problem.error()
    assert "on the worker" in error.found and "every worker needs the model's file and the data set" in error.fix


def test_a_worker_without_the_folder(here: Path) -> None:
    outcome = work_on(Workbench(str(here / "gone"), str(here / "out"), 10, "pgd"), job())
    assert outcome.problem is not None and outcome.problem.fatal
    assert "a folder of the search is not there" in outcome.problem.problem


def test_jobs_and_outcomes_travel_between_processes() -> None:
    one = job(seed=4)
    outcomes = (
        Outcome(one, fakes.measured(one)),
        Outcome(one, problem=Problem("a", "b", "c", fatal=True)),
    )
    for thing in (one, *outcomes, Workbench("home", "folder", 10, "pgd")):
        assert pickle.loads(pickle.dumps(thing)) == thing


@pytest.mark.usefixtures("again")
def test_without_ray_the_same_command_runs_in_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "is_installed", lambda: False)
    assert tiny.run(*arguments("--address", "local")) == cli.DONE
    assert "Ray is not installed (the extra `scale`)" in capsys.readouterr().err


@pytest.mark.usefixtures("again")
def test_two_studies_in_one_folder_are_kept_apart(capsys: pytest.CaptureFixture[str]) -> None:
    """Each has its own bundles, front and settings; beginning one anew would take the other's with it."""
    output, front = Path("search-out"), front_of()
    first = {path.name for path in (output / "bundles").iterdir()}
    radius = bundle.read_report(output / "bundles" / min(first)).threat.eps
    command = arguments("--eps", "0.01", "--study", "../smaller", trials=1)
    assert tiny.run(*command, "-q") == cli.DONE
    prefix = own_name("../smaller", "").rstrip("-")
    assert prefix.startswith(".._smaller-") and prefix != own_name(".._smaller", "").rstrip("-")
    (entry,) = json.loads((output / f"{prefix}-front.json").read_text())["bundles"]
    assert Path(entry["bundle"]).name == f"{prefix}-trial-000"
    assert bundle.read_report(output / entry["bundle"]).threat.eps == 0.01 != radius
    assert f"![front]({prefix}-front.png)" in (output / f"{prefix}-front.md").read_text()
    assert front_of() == front and (output / "search.yaml").is_file() and (output / f"{prefix}-search.yaml").is_file()
    capsys.readouterr()
    assert tiny.run(*command, "--force", "-q") == cli.BAD_INPUT
    assert "--force would remove other studies" in capsys.readouterr().err
    assert first < {path.name for path in (output / "bundles").iterdir()}


@pytest.mark.usefixtures("here")
def test_trials_round_in_training_as_what_ships_of_them() -> None:
    assert tiny.run(*arguments("--int8", "--qat", trials=2, space="prune.ratio=0.25:0.5:0.25"), "-q") == cli.DONE
    (entry,) = front_of()["bundles"]
    assert bundle.read_report(Path("search-out") / entry["bundle"]).quantization.learnt_ranges > 0
