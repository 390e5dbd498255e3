"""Paths in the files that we write: relative to the file, so that they name nothing of the machine.

A setting may hold a path inside: `folder:DIR`, `npz:FILE`, `pickle:FILE`, `path/to/file.py:callable`. Other words
(`sample`, `cnn8`, `torchvision:NAME`, `shipped:NAME`) hold none.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

KINDS = ("folder", "npz", "pickle")


def relative(setting: str, folder: Path) -> str:
    """`setting` with its path relative to `folder`; on another Windows drive it stays absolute."""

    def from_folder(path: str) -> str:
        try:
            return Path(os.path.relpath(path, folder)).as_posix()
        except ValueError:
            return path

    return _with_path(setting, from_folder)


def resolved(setting: str, folder: Path) -> str:
    """The inverse of `relative`: the path relative to the working folder if it lies below it, else absolute."""

    def from_here(path: str) -> str:
        absolute = Path(os.path.normpath(folder.absolute() / path))
        here = Path.cwd()
        return str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute)

    return _with_path(setting, from_here)


def public_name(setting: str) -> str:
    """`setting` with the last part of its path alone, for reports."""
    return _with_path(setting, lambda path: path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1])


def place(setting: str) -> Path | None:
    """The path in `folder:DIR` and its like; None if there is none."""
    kind, _, found = setting.partition(":")
    return Path(found) if kind in KINDS and found else None


def _with_path(setting: str, change: Callable[[str], str]) -> str:
    kind, _, place = setting.partition(":")
    if kind in KINDS and place:
        return f"{kind}:{change(place)}"
    if ".py:" in setting:
        path, _, name = setting.rpartition(":")
        return f"{change(path)}:{name}"
    return setting


def cache_folder() -> Path:
    """The toolkit's folder in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "toolkit"
