"""Image files to pixels: modes, resizing, and one error for all files that cannot be used."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from toolkit import progress
from toolkit.artifacts import UInt8Array
from toolkit.errors import ToolkitError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")

GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"})

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow's decoders raise on files that are no images, or broken ones."""

NAMED = 5
"""Number of unusable files that an error names; it counts them all."""

LONG_WORK = 5_000
"""Number of files from which reading them shows progress."""

THREADED_PIXELS = 96 * 96
"""Height times width from which decoding in threads pays: below, Python's own work per file dominates, and threads that
wait for each other's are many times slower than one (32x32 JPEG on two busy cores: 18 s for 1)."""

BLOCK = 8
"""Files that a thread decodes at a time."""


@dataclass
class Rejects:
    """Files that cannot be used, gathered over a whole pass so that one error names them together."""

    folder: Path
    unreadable: list[str] = field(default_factory=list)
    unequal: list[str] = field(default_factory=list)

    @contextmanager
    def catch(self, file: str) -> Iterator[None]:
        """Note `file` as unreadable if the block raises what decoders raise."""
        try:
            yield
        except UnidentifiedImageError:
            self.unreadable.append(f"{file} (no image)")
        except UNREADABLE as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self.unreadable.append(f"{file} ({reason[:60] or type(error).__name__})")

    def check_size(self, file: str, size: tuple[int, int], expected: tuple[int, int]) -> bool:
        """Whether `size` (width, height) is the expected one; `file` is noted if not."""
        if size != expected:
            self.unequal.append(f"{file} ({size[0]}x{size[1]})")
        return size == expected

    def raise_any(self, total: int, expected: tuple[int, int]) -> None:
        """Raise one error if any of `total` files was rejected."""
        if self.unreadable:
            raise ToolkitError(
                f"{len(self.unreadable)} of {total} images in {self.folder} cannot be read",
                found=_name_some(self.unreadable),
                fix="replace or delete these files, then run the command again",
            )
        if self.unequal:
            raise ToolkitError(
                f"the images in {self.folder} differ in size",
                found=f"{len(self.unequal)} of {total} are not {expected[0]}x{expected[1]}: {_name_some(self.unequal)}",
                fix="give all images one size with --size N",
            )


def _name_some(files: Sequence[str]) -> str:
    named = ", ".join(sorted(files)[:NAMED])
    return named if len(files) <= NAMED else f"{named}, and {len(files) - NAMED} more"


def to_pixels(image: Image.Image, channels: int, size: int | None) -> UInt8Array:
    """Decode one opened image to uint8 [C, H, W].

    Args:
        image: of any mode; transparency is dropped, palettes are looked up, 16-bit grey is scaled to 8 bits.
        channels: 1 (grey) or 3 (RGB).
        size: the shorter side is resized to it (bilinear, antialiased) and the centre cropped to a square, as
            torchvision's `Resize` and `CenterCrop` do; None: left as it is.
    """
    plain = _convert(image, channels)
    if size is not None:
        plain = _resize_and_crop(plain, size)
    array = np.asarray(plain)
    return array[np.newaxis] if channels == 1 else array.transpose(2, 0, 1)


def _convert(image: Image.Image, channels: int) -> Image.Image:
    image.load()  # until then, some formats do not know their mode
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.clip(np.rint(deep / 257), 0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    wanted = "L" if channels == 1 else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def _resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    shorter, longer = min(width, height), max(width, height)
    long_side = int(size * longer / shorter)
    width, height = (size, long_side) if width <= height else (long_side, size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


def decode_files(
    folder: Path,
    files: Sequence[str],
    shape: tuple[int, int, int],
    size: int | None,
    use: Callable[[int, UInt8Array], None],
    *,
    task: str = "reading",
    tell: bool = False,
) -> None:
    """Decode each of `files` of `folder` once, and call `use(index, pixels)` with its pixels, uint8 [C, H, W].

    Calls come in no fixed order and, where decoding in threads pays, from several threads; pixels are not kept.

    Args:
        folder: what `files` are relative to.
        files: the image files.
        shape: (channels, height, width) of every decoded image.
        size: as in `to_pixels`; None: every file must have the size that `shape` gives.
        use: stores or digests one image.
        task: what the progress says is done to the folder.
        tell: whether to say which images in colour are read as grey.

    Raises:
        ToolkitError: files that cannot be read or, without `size`, are of another size than `shape`.
    """
    channels, height, width = shape
    rejects = Rejects(folder)
    coloured: list[str] = []

    def decode(index: int) -> None:
        file = files[index]
        with rejects.catch(file):
            data = (folder / file).read_bytes()
            with Image.open(io.BytesIO(data)) as image:
                if size is None and not rejects.check_size(file, image.size, (width, height)):
                    return
                if channels == 1 and image.mode not in GREY_MODES:
                    coloured.append(file)
                pixels = to_pixels(image, channels, size)
            use(index, pixels)

    def decode_block(start: int) -> int:
        block = range(start, min(start + BLOCK, len(files)))
        for index in block:
            decode(index)
        return len(block)

    starts = range(0, len(files), BLOCK)
    with show_progress(f"{task} {folder.name}", len(files)) as shown:
        if height * width < THREADED_PIXELS:
            for start in starts:
                shown.advance(decode_block(start))
        else:
            with ThreadPoolExecutor(min(16, usable_cpus())) as pool:
                for done in pool.map(decode_block, starts):
                    shown.advance(done)
    rejects.raise_any(len(files), (width, height))
    if tell and coloured:
        some = ", ".join(sorted(coloured)[:3])
        progress.warn(
            f"{folder}: {len(coloured):,} of {len(files):,} images are in colour and are read as grey: {some}"
        )


class _Hidden:
    def advance(self, amount: int = 1, note: str = "") -> None:
        pass


@contextmanager
def show_progress(label: str, files: int) -> Iterator[progress.Task]:
    """Progress over `files`, shown only where they take noticeable time."""
    with progress.task(label, files) if files >= LONG_WORK else nullcontext(_Hidden()) as shown:
        yield shown


def usable_cpus() -> int:
    """Number of CPUs that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
