"""Paths in the files that we write: relative to the file, so that they name nothing of the machine.

A setting may hold a path inside: `folder:DIR`, `npz:FILE`, `pickle:FILE`, `path/to/file.py:callable`. Other words
(`sample`, `cnn8`, `torchvision:NAME`, `shipped:NAME`) hold none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from toolkit.errors import ToolkitError

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
    if kind in KINDS and found:
        return Path(found)
    return Path(setting.rpartition(":")[0]) if ".py:" in setting else None


def is_text(name: str) -> bool:
    """Whether a file's name can be written into documents; bytes of another encoding than UTF-8 cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def refuse_inputs(output: Path, inputs: Iterable[str | Path | None]) -> None:
    """Refuse an output in whose place, or below which, lies what is to be read.

    Args:
        output: file or folder that will be written anew.
        inputs: paths, or settings that may hold one.

    Raises:
        ToolkitError: one of them would be gone.
    """
    for given in inputs:
        path = place(given) if isinstance(given, str) else given
        if path is not None and path.resolve().is_relative_to(output.resolve()):
            raise ToolkitError(
                "--force would remove what is to be read",
                found=str(path) if path == output else f"{path} in {output}",
                fix="name another place with --output, or copy that to another place first",
            )


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
