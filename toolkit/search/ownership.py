"""Which process does a piece of work, so that another can tell that it is gone."""

from __future__ import annotations

import os
import platform
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

CLOCK_S = 5.0
"""By so much may a clock that was set move the time at which a process is said to have begun; no number of a process
comes again so soon."""


def this_process() -> dict[str, Any]:
    """Plain data that no other process has, not even one with the same number later."""
    return {"machine": _machine(), "pid": os.getpid(), "since": psutil.Process().create_time()}


def vanished(owner: Mapping[str, Any]) -> bool:
    """Whether a process that gave `this_process` is gone; False where that cannot be told from here."""
    if owner["machine"] != _machine():
        return False
    try:
        return bool(abs(psutil.Process(owner["pid"]).create_time() - owner["since"]) > CLOCK_S)
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def _machine() -> str:
    """The same for processes that see each other's numbers: of one boot of one machine, in one container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{platform.node()} {uuid.getnode()}"
