"""The identity of images: 64 bits of BLAKE2b, equal for equal images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from toolkit.artifacts import HashArray


def hash_bytes(data: bytes | memoryview) -> int:
    """BLAKE2b of `data` with a digest of 8 bytes, read as an unsigned little-endian integer."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def hash_all(items: Iterable[bytes | memoryview], count: int) -> HashArray:
    """The hashes of `count` items, uint64 [count]."""
    return np.fromiter((hash_bytes(item) for item in items), dtype=np.uint64, count=count)
