from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.paths import public_name, relative, resolved


@pytest.mark.parametrize("setting", ["sample", "cnn8", "torchvision:resnet18", "shipped:cnn8"])
def test_words_without_a_path_stay(setting: str) -> None:
    assert relative(setting, Path("/a")) == resolved(setting, Path("/a")) == public_name(setting) == setting


@pytest.mark.parametrize("form", ["folder:{}", "npz:{}", "pickle:{}", "{}.py:build"])
def test_a_path_is_kept_relative_to_the_file_and_found_again(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "deep" / "out"
    written = relative(form.format("data/x"), home)
    assert written == form.format("../../data/x") and relative(form.format(tmp_path / "data/x"), home) == written
    assert resolved(written, home) == form.format("data/x")
    assert resolved(written, Path("deep/out")) == form.format("data/x")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert resolved(written, home) == form.format(tmp_path / "data/x")


def test_reports_name_the_last_part() -> None:
    assert public_name("folder:/home/me/birds/") == "folder:birds"
    assert public_name("/home/me/net.py:build") == "net.py:build"
