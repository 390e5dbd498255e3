"""The order of layers, and each fragile dependency in its own module."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

import toolkit

ROOT = Path(__file__).parents[1]
PACKAGE = Path(toolkit.__file__).parent
OWNERS = {
    "torch_pruning": {"pruning.py"},
    "onnxruntime_extensions": {"exporters/end_to_end.py"},
    "yaml": {"config/files.py", "config/space.py"},
    "optuna": {"search/database.py", "search/sampler.py", "search/storage.py"},
    "sqlalchemy": {"search/database.py"},
    "ray": {"search/cluster.py"},
    "matplotlib": {"reproduce/plots.py", "search/plot.py"},
    "sklearn": {"reproduce/embedding.py"},
}


def test_imports_point_down_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), cache_dir=None)
    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("dependency", OWNERS)
def test_a_fragile_dependency_has_one_owner(dependency: str) -> None:
    users = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if dependency in imported(path)}
    assert users == OWNERS[dependency]


def test_only_the_command_line_knows_typer() -> None:
    users = {path for path in PACKAGE.rglob("*.py") if "typer" in imported(path)}
    assert users and {path.parent for path in users} == {PACKAGE / "cli"}


def test_sessions_are_made_in_one_place() -> None:
    users = {path.name for path in PACKAGE.rglob("*.py") if "InferenceSession(" in path.read_text()}
    assert users == {"session.py"}


def test_the_package_never_imports_its_tests() -> None:
    assert not [path for path in PACKAGE.rglob("*.py") if {"tests", "pytest"} & imported(path)]
