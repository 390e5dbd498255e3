"""Reading what a file of ours tells of itself, which may be damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from toolkit.errors import ToolkitError
from toolkit.paths import KINDS, place
from toolkit.progress import notice

Read = TypeVar("Read")


def metadata_value(metadata: Mapping[str, str], key: str, read: Callable[[Any], Read]) -> Read:
    """What `read` makes of the JSON in an entry.

    Args:
        metadata: of an ONNX file of ours.
        key: that it has.
        read: takes what JSON holds; may raise ValueError, TypeError, KeyError or AttributeError.

    Raises:
        ToolkitError: the entry is damaged.
    """
    try:
        return read(json.loads(metadata[key]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ToolkitError(
            "what the ONNX file says of itself is damaged",
            found=f"metadata {key}: {metadata[key][:80]!r} ({type(error).__name__})",
            fix="use another copy of the file, or write it again with toolkit harden, export or quantize",
        ) from error


def data_set_of(metadata: Mapping[str, str]) -> str | None:
    """The data set that a file is for; None: it does not say, or names a folder or file that is not here."""
    known = metadata.get("dataset")
    if known is None or known in KINDS:
        return None
    there = place(known)
    if there is None:
        return known
    if not there.exists():
        return None
    notice(f"images: {known} in the working folder, which is what the file calls them; --data names others")
    return known
