"""Who is at work in the folder of a search: several searches share one, and who begins it anew has to be alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from toolkit.errors import ToolkitError
from toolkit.locks import give_back, take


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
    if anew is not None:
        try:
            descriptor = take(folder)
        except BlockingIOError as error:
            raise ToolkitError(
                "--force would remove the files of a search that is under way",
                found=f"another process searches in {folder}",
                fix="wait for it, or end it first; without --force both share the trials",
            ) from error
        try:
            anew()
        finally:
            give_back(descriptor)
    descriptor = take(folder, wait=True, shared=True)  # once nobody is alone in it
    try:
        yield
    finally:
        give_back(descriptor)
