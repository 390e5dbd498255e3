"""The wheel: what is in it, and that it works where only it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SAMPLE_LIMIT = 8_000_000


def call(command: Sequence[str | Path], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, check=False, env=environment | variables
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the source, so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "toolkit", source / "toolkit", ignore=shutil.ignore_patterns("__pycache__"))
    build: list[str | Path] = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        source / "dist",
        source,
    ]
    call(build, source)
    (found,) = (source / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel alone; the dependencies are those of this one, behind it on the path."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--quiet"]
    call([sys.executable, "-m", "pip", "--python", python, "install", *options, wheel], place)
    lookup = "import sysconfig; print(sysconfig.get_path('purelib'))"
    target = Path(call([python, "-c", lookup], place).stdout.strip())
    # a path in a .pth file is added without reading the .pth files in it, so the editable install stays out
    (target / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place


def test_the_wheel_holds_code_data_weights_and_licences(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sizes = {item.filename: item.file_size for item in archive.infolist()}
        (metadata,) = (name for name in sizes if name.endswith(".dist-info/METADATA"))
        said = archive.read(metadata).decode()
        licences = {name: archive.read(name).decode() for name in sizes if "/licenses/" in name}
    wanted = (
        "py.typed",
        "cli/app.py",
        "data/sample/fashion-mnist-sample.npz",
        "data/sample/LICENSE",
        "models/weights/cnn8.pt",
    )
    assert {f"toolkit/{name}" for name in wanted} <= set(sizes)
    assert sizes["toolkit/data/sample/fashion-mnist-sample.npz"] < SAMPLE_LIMIT
    assert sum("Apache License" in text for text in licences.values()) == 1
    assert sum("MIT" in text for text in licences.values()) == 1
    assert "Name: onnx-hardening-toolkit" in said and "Requires-Python: >=3.11" in said
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "toolkit").rglob("*.py")}
    assert modules == {name for name in sizes if name.endswith(".py")}, "nothing is missing, and nothing else is in it"


def test_it_works_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    toolkit, python = installed / "bin" / "toolkit", installed / "bin" / "python"
    where = call([python, "-c", "import toolkit; print(toolkit.__file__)"], tmp_path).stdout
    assert Path(where.strip()).is_relative_to(installed), "the installed copy, not the checkout"
    assert "harden" in call([toolkit, "--help"], tmp_path).stdout
    assert "data set sample: embedded" in call([toolkit, "doctor"], tmp_path).stdout
    command = "harden shipped:cnn8 --data sample --int8 --precision int8 --epochs 0 --n 40 --attacks pgd --steps 2"
    command += " --rounds 3 --batch 1 --threads 1 --json"
    report = json.loads(call([toolkit, *command.split()], tmp_path).stdout)
    assert report["accuracy"]["deployed"]["total"] == 40
    assert report["quantization"]["integer_coverage"] >= 0.99
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    call([toolkit, "verify", "out", "--files-only"], tmp_path)


def test_the_tools_that_build_it_are_there() -> None:
    for name in ("build", "setuptools", "pip"):
        assert importlib.util.find_spec(name), f"{name} is missing: install the extra dev"
