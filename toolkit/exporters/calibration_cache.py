"""What calibration found, kept in the user's cache: the same graph on the same images is not run through again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from toolkit import __version__
from toolkit.exporters.observer import BINS, Observed
from toolkit.paths import cache_folder

KEPT = 64
"""Files; the oldest go first."""


def default_folder() -> Path:
    """In the user's cache folder."""
    return cache_folder() / "calibration"


def key(model: ModelProto, **facts: Any) -> str:
    """Names a calibration: the graph as it is observed, and everything else that what is found rests on."""
    digest = hashlib.sha256(model.SerializeToString(deterministic=True))
    digest.update(json.dumps({**facts, "bins": BINS, "version": __version__}, sort_keys=True).encode())
    return digest.hexdigest()


def kept_or_observed(
    name: str, observe: Callable[[], Mapping[str, Observed]], folder: Path | None = None
) -> Mapping[str, Observed]:
    """What is kept under `name` (from `key`); otherwise what `observe` finds, which is kept from then on.

    A cache that cannot be read or written is as if there were none.
    """
    path = (folder or default_folder()) / f"{name}.npz"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        found = _read(path)
        os.utime(path)
        return found
    found = observe()
    with contextlib.suppress(OSError):
        _write(path, found)
    return found


def _read(path: Path) -> Mapping[str, Observed]:
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        rows = json.loads(str(file["rows"]))
        counts = {int(number[len("counts") :]): file[number] for number in file.files if number != "rows"}
    return {
        name: replace(Observed(**row), counts=counts.get(number)) for number, (name, row) in enumerate(rows.items())
    }


def _write(path: Path, found: Mapping[str, Observed]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {name: asdict(replace(one, counts=None)) for name, one in found.items()}
    counts = {f"counts{number}": one.counts for number, one in enumerate(found.values()) if one.counts is not None}
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    with partial.open("wb") as file:
        np.savez(file, allow_pickle=False, rows=np.array(json.dumps(rows)), **counts)
    partial.replace(path)
    files = sorted(path.parent.glob("*.npz"), key=lambda other: other.stat().st_mtime)
    for other in files[:-KEPT]:
        other.unlink(missing_ok=True)
