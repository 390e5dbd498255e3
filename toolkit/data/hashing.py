"""The identity of images: 64 bits of BLAKE2b over decoded pixels, equal for equal images wherever they are stored."""

from __future__ import annotations

import hashlib

import numpy as np

from toolkit.artifacts import HashArray, UInt8Array


def hash_image(image: UInt8Array) -> int:
    """BLAKE2b over the pixels of `image`, uint8 in the order C, H, W: 8 bytes, read as a little-endian number.

    A lossless copy of an image (another format, another compression) has its hash; a copy resized or compressed with
    loss is another image.
    """
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=8).digest(), "little")


def hash_images(images: UInt8Array) -> HashArray:
    """The hashes of images uint8 [n, C, H, W], uint64 [n]."""
    return np.fromiter(map(hash_image, images), dtype=np.uint64, count=len(images))
