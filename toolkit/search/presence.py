"""Who is at work in the folder of a search: several searches share one, and who begins it anew has to be alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from toolkit.errors import ToolkitError


@contextlib.contextmanager
def at_work(folder: Path, anew: Callable[[], None] | None = None) -> Iterator[None]:
    """Be seen in a folder by whoever would begin it anew; the system ends that with the process.

    The folder is made if it is not there, and goes again where an error leaves it empty.

    Args:
        folder: of the search.
        anew: empties it, while nobody else is there; None: it stays as it is.

    Raises:
        ToolkitError: another search is at work there, and `anew` would take its files away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _shared(folder, anew):
            yield
    except BaseException:
        with contextlib.suppress(OSError):  # it stays where anything is in it
            folder.rmdir()
        raise


@contextlib.contextmanager
def _shared(folder: Path, anew: Callable[[], None] | None) -> Iterator[None]:
    descriptor = _open(folder)
    try:
        if anew is not None:
            try:
                _lock(descriptor, alone=True)
            except BlockingIOError as error:
                raise ToolkitError(
                    "--force would remove the files of a search that is under way",
                    found=f"another process searches in {folder}",
                    fix="wait for it, or end it first; without --force both share the trials",
                ) from error
            anew()
        _lock(descriptor, alone=False)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _open(folder: Path) -> int | None:
    """None: the system has no locks of folders."""
    try:
        import fcntl  # noqa: F401
    except ImportError:  # Windows
        return None
    return os.open(folder, os.O_RDONLY)


def _lock(descriptor: int | None, *, alone: bool) -> None:
    """Hold the folder together with others, once nobody is alone in it; or alone, at once.

    Raises:
        BlockingIOError: others are there.
    """
    if descriptor is None:
        return
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
    except BlockingIOError:
        raise
    except OSError:  # some shared disks know no locks of folders
        return
