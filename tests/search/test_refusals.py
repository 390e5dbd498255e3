"""What a search refuses, and that nothing is lost by it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.search import fakes
from tests.search.commands import arguments, refused
from toolkit import cli
from toolkit.config import (
    GateConfig,
)
from toolkit.errors import ToolkitError
from toolkit.search import search as search_module
from toolkit.search.presence import at_work


@pytest.mark.usefixtures("again")
def test_force_does_not_remove_what_it_is_to_read(capsys: pytest.CaptureFixture[str]) -> None:
    inner = next(Path("search-out/bundles").glob("*/model.pt"))
    command = arguments("--force")
    command[command.index("model.pt")] = str(inner)
    assert tiny.run(*command, "-q") == cli.BAD_INPUT
    assert "--force would remove what is to be read" in capsys.readouterr().err and inner.is_file()


@pytest.mark.usefixtures("here")
def test_flags_that_would_do_nothing_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.run(*arguments("--per-group", space="precision=int8,float")) == cli.BAD_INPUT
    assert "no ratio varies" in capsys.readouterr().err and not Path("search-out").exists()
    assert tiny.run(*arguments("--workers", "2", "--dry-run")) == cli.DONE
    assert "without --address they are ignored" in capsys.readouterr().err


@pytest.mark.usefixtures("again")
def test_force_removes_nothing_for_want_of_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    before = tiny.entries(Path("search-out"))
    assert "cannot be reached" in refused(capsys, *arguments("--force", "--address", "127.0.0.1:1"), "-q")
    assert tiny.entries(Path("search-out")) == before


@pytest.mark.parametrize("varied", [False, True])
@pytest.mark.usefixtures("again")
def test_another_teacher_is_another_study(capsys: pytest.CaptureFixture[str], varied: bool) -> None:
    """Though a trial of the space alone learns from it, or the space names it."""
    space = "finetune.objective=standard,distill; prune.ratio=0.25:0.5:0.25"
    shutil.copy("model.pt", "one.pt")
    first = arguments("--output", "two", "--teacher", "one.pt", space=space, trials=1, epochs=1)
    if varied:
        space += "; finetune.teacher=model.pt,one.pt"
        first = arguments("--output", "two", space=space, trials=1, epochs=1)
    assert tiny.run(*first, "-q") == cli.DONE
    teacher = torch.load("model.pt", weights_only=True)
    name = next(iter(teacher["state_dict"]))
    teacher["state_dict"][name] = teacher["state_dict"][name] + 0.25
    torch.save(teacher, "one.pt")
    assert "the storage holds another study" in refused(capsys, *first, "-q")


@pytest.mark.usefixtures("here")
def test_settings_that_no_trial_uses_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    space = "finetune.objective=standard,trades; prune.ratio=0.25:0.5:0.25"
    idle = ["--beta", "3", "--clean-share", "0.5", "--qat-from", "0.3", "--dry-run"]
    assert tiny.run(*arguments(*idle, space=space)) == cli.DONE
    said = capsys.readouterr().err
    assert "the objective standard or trades makes no use of --clean-share" in said
    assert "so --qat-from is ignored" in said and "--beta" not in said


@pytest.mark.usefixtures("again")
def test_force_spares_the_images_that_the_search_is_to_read(capsys: pytest.CaptureFixture[str]) -> None:
    images = Path("search-out/data.npz")
    shutil.copy("data.npz", images)
    assert tiny.run(*arguments("--force", "--data", f"npz:{images}"), "-q") == cli.BAD_INPUT
    assert "--force would remove what is to be read" in capsys.readouterr().err and images.is_file()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("flags", [(), ("--force",)])
def test_a_settings_file_of_the_users_is_no_search(flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    Path("search-out").mkdir()
    Path("search-out/search.yaml").write_text("prune:\n  ratio: 0.5\n")
    assert tiny.run(*arguments(*flags, trials=1, epochs=0), "-q") == cli.BAD_INPUT
    assert "no search wrote" in capsys.readouterr().err
    assert Path("search-out/search.yaml").read_text() == "prune:\n  ratio: 0.5\n"


def test_a_limit_that_a_search_has_not_is_refused() -> None:
    config = fakes.config().model_copy(update={"gates": GateConfig(min_integer_coverage=0.9)})
    with pytest.raises(ToolkitError, match="no limit on integer coverage") as caught:
        search_module._check_flags(config)
    assert "gates.min_integer_coverage 0.9" in caught.value.found


@pytest.mark.usefixtures("here")
def test_force_spares_a_search_that_is_under_way(capsys: pytest.CaptureFixture[str]) -> None:
    kept = Path("search-out/study.sqlite")
    with at_work(kept.parent):
        kept.touch()
        assert tiny.run(*arguments("--force", trials=1, epochs=0), "-q") == cli.BAD_INPUT
    assert "a search that is under way" in capsys.readouterr().err and kept.is_file()


@pytest.mark.usefixtures("here")
def test_torchrun_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert tiny.run(*arguments(), "-q") == cli.BAD_INPUT
    assert "start it without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--seeds", "1,2,1"], "--seeds has no usable value"),
        (["--seeds", ","], "there is no seed"),
        (["--space", "prune.ratio"], "is no NAME=LOW:HIGH:STEP"),
        (["--space", "prune.ratio=0.5:0.1:0.1"], "0.5 is not below 0.1"),
        (["--space", "prune.ratio=0.5,0.6;prune.ratio=0.7,0.8"], "each name once"),
        (["--space", ";"], "--space has no usable value"),
        (["--max-size", "little"], "--max-size has no usable value"),
        (["--trials", "0"], "--trials has no usable value"),
        (["--quick-attacks", "magic"], "unknown attack"),
        (["--attacks", "magic"], "unknown attack"),
        (["--space", "seed=1,2"], "the search cannot vary seed"),
        (["--storage", "nonsense"], "the storage cannot be used"),
        (["--space", "prune.ratio=0.01,0.02; precision=int8"], "no trial could be made"),
        (["--round-to", "auto"], "would measure inside a measurement"),
        (["--space", "prune.round_to=8,auto; prune.ratio=0.4,0.6"], "would measure inside a measurement"),
        (["--address", "127.0.0.1:1"], "the Ray cluster cannot be reached"),
        (["--space", "prune.ratoi=0.4,0.6"], "did you mean 'prune.ratio'?"),
        (["--space", "finetune.objective=distill,none"], "distillation needs a teacher"),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_is_refused(capsys: pytest.CaptureFixture[str], more: list[str], problem: str) -> None:
    assert problem in refused(capsys, *arguments(epochs=0), *more)


@pytest.mark.usefixtures("again")
def test_a_storage_of_another_study(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, *arguments(epochs=2))
    assert "the storage holds another study" in message and "finetune" in message and "--study" in message


@pytest.mark.usefixtures("here")
def test_a_folder_of_something_else(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    for more in ([], ["--force"]):
        assert "the output is no folder of a search" in refused(capsys, *arguments("--output", "mine", *more))
    assert Path("mine/thesis.txt").exists()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("storage", ["foo", "nosql:///x", "postgresql+nodriver://host/x"])
def test_a_storage_that_cannot_be_is_told_by_the_plan(storage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the storage cannot be used" in refused(capsys, *arguments("--storage", storage, "--dry-run"))


@pytest.mark.usefixtures("here")
def test_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no model is named" in refused(capsys, "search")


@pytest.mark.usefixtures("again")
def test_a_refused_search_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    settings = Path("search-out/search.yaml").read_bytes()
    assert tiny.run(*arguments(epochs=2), "-q") == cli.BAD_INPUT
    assert "the storage holds another study" in capsys.readouterr().err
    assert Path("search-out/search.yaml").read_bytes() == settings
    assert tiny.run(*arguments("--storage", "sqlite:////proc/none/a", "--output", "new"), "-q") == cli.BAD_INPUT
    assert not Path("new").exists()
