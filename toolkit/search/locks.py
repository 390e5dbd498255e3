"""Locks between processes of one machine, or of one shared folder; the system lifts those of a process that died."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from toolkit.progress import notice


@contextlib.contextmanager
def locked(path: Path, waiting_for: str = "") -> Iterator[None]:
    """Keep all others out of the block that name the same file.

    Args:
        path: made if it is not there; its folder exists.
        waiting_for: what a notice says if another holds the lock; none where it is empty.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting_for:
                notice(f"waiting for another process: {waiting_for}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def stopwatch_lock() -> Path:
    """Whoever times graphs on this machine holds it, so that no two searches of a user time at once."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    return Path(tempfile.gettempdir()) / f"onnx-hardening-toolkit-stopwatch-{user}.lock"
