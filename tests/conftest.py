from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.tiny import World
from toolkit import cli, progress


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test writes to the user's own cache folder; subprocesses do not either."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def audible() -> Iterator[None]:
    """What one test silences is heard in the next."""
    yield
    progress.set_quiet(False)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A folder with data, a user's network and its checkpoint; read only."""
    return tiny.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def hardened(world: World) -> World:
    """The same folder with a bundle `out`, made by `toolkit harden` with all its evidence; read only."""
    with tiny.working_folder(world.folder):
        assert tiny.run(*tiny.harden_arguments(attacks="fast"), "--threads", "1", "-q") == cli.DONE
    progress.set_quiet(False)
    return world


@pytest.fixture
def here(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working folder with copies of the world's files, without its bundle."""
    for path in world.folder.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.with_name(f"{tmp_path.name}-cache")))
    return tmp_path


@pytest.fixture
def out(hardened: World, here: Path) -> Path:
    """A copy of the bundle, in a fresh working folder."""
    shutil.copytree(hardened.bundle, here / "out")
    return Path("out")
