"""A search that several modules look at."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests import tiny
from tests.search.commands import arguments
from tests.tiny import World
from toolkit import cli, progress


@pytest.fixture(scope="session")
def searched(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a search of three trials; read only."""
    folder = tmp_path_factory.mktemp("searched")
    for path in world.folder.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    with tiny.working_folder(folder):
        assert tiny.run(*arguments(bundles=2), "-q") == cli.DONE
    progress.set_quiet(False)
    return folder


@pytest.fixture
def again(searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working folder."""
    shutil.copytree(searched, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.sqlite'}"
