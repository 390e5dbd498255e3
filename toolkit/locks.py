"""Locks between processes of one machine, or of one shared folder; the system lifts those of a process that died."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from toolkit.errors import ToolkitError
from toolkit.progress import notice, warn

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF}
"""What flock gives where the file system knows no locks, or none of folders, as some shared disks."""
_told: set[int] = set()
"""Devices whose want of locks was told."""


def take(path: Path, *, wait: bool = False, shared: bool = False) -> int | None:
    """Lock a folder, or a file, which is made if it is not there; `shared`: together with others who share it.

    Returns:
        The open descriptor that holds the lock until it is closed; None on systems, and disks, without such locks.

    Raises:
        BlockingIOError: another process holds it, unless `wait`.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BaseException as error:
        device = os.fstat(descriptor).st_dev
        os.close(descriptor)
        if not isinstance(error, OSError) or error.errno not in NO_LOCKS:
            raise
        if device not in _told:
            _told.add(device)
            warn(f"the disk of {path} knows no locks: let one process at a time work there")
        return None
    return descriptor


def _open(path: Path) -> int:
    if path.is_dir():
        return os.open(path, os.O_RDONLY)
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # less the umask: users may share a folder
    except PermissionError:
        return os.open(path, os.O_RDONLY)  # another user's, in a folder that both may write


def give_back(descriptor: int | None) -> None:
    """End what `take` gave."""
    if descriptor is not None:
        os.close(descriptor)


@contextlib.contextmanager
def alone(path: Path, otherwise: ToolkitError) -> Iterator[None]:
    """Keep all others out of the block that name the same file or folder; where one is in it, `otherwise` is raised."""
    try:
        descriptor = take(path)
    except BlockingIOError as error:
        raise otherwise from error
    try:
        yield
    finally:
        give_back(descriptor)


@contextlib.contextmanager
def locked(path: Path, waiting_for: str = "") -> Iterator[None]:
    """Keep all others out of the block that name the same file.

    Args:
        path: made if it is not there; its folder exists.
        waiting_for: what a notice says if another holds the lock; none where it is empty.
    """
    try:
        descriptor = take(path)
    except BlockingIOError:
        if waiting_for:
            notice(f"waiting for another process: {waiting_for}")
        descriptor = take(path, wait=True)
    try:
        yield
    finally:
        give_back(descriptor)


def stopwatch_lock() -> Path:
    """Whoever times graphs on this machine holds it, so that no two searches of a user time at once."""
    return users_lock("stopwatch")


def users_lock(name: str) -> Path:
    """A lock between all processes of a user on this machine."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    return Path(tempfile.gettempdir()) / f"onnx-hardening-toolkit-{name}-{user}.lock"
