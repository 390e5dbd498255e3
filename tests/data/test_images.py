from __future__ import annotations

import contextlib
import hashlib
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as tv

from toolkit.artifacts import ImageSet, Int64Array, UInt8Array
from toolkit.data import decoding
from toolkit.data.decoding import to_pixels
from toolkit.data.images import ArrayImages, FolderImages
from toolkit.errors import ToolkitError

from .conftest import MakeFolder, random_pixels


def every(images: ImageSet) -> Int64Array:
    return np.arange(len(images.labels), dtype=np.int64)


# Arrays


def test_array_gives_back_its_pixels_labels_and_shape() -> None:
    array = random_pixels(0, 5, 3, 6, 7)
    images = ArrayImages("mine", ("a", "b"), array, np.array([0, 1, 1, 0, 1], dtype=np.uint8))
    assert images.shape == (3, 6, 7)
    assert images.labels.dtype == np.int64
    np.testing.assert_array_equal(images.pixels(np.array([4, 0])), array[[4, 0]])


def test_pixels_of_an_array_are_a_copy() -> None:
    images = ArrayImages("mine", ("a", "b"), random_pixels(0, 2, 1, 4, 4), np.array([0, 1]))
    before = images.pixels(every(images))
    images.pixels(every(images))[:] = 0
    np.testing.assert_array_equal(images.pixels(every(images)), before)


def test_hash_is_blake2b_of_the_bytes_whatever_the_memory_layout() -> None:
    array = random_pixels(0, 3, 6, 5, 3)
    images = ArrayImages("mine", ("a", "b"), array.transpose(0, 3, 1, 2), np.array([0, 1, 1]))
    plain = np.ascontiguousarray(array.transpose(0, 3, 1, 2))
    expected = [int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8).digest(), "little") for image in plain]
    assert images.hashes.dtype == np.uint64
    assert images.hashes.tolist() == expected


def test_equal_images_and_only_they_have_equal_hashes() -> None:
    array = random_pixels(0, 4, 1, 4, 4)
    array[2] = array[0]
    hashes = ArrayImages("mine", ("a", "b"), array, np.array([0, 1, 1, 0])).hashes
    assert hashes[0] == hashes[2]
    assert len(np.unique(hashes)) == 3


@pytest.mark.parametrize(
    ("array", "labels", "problem", "found"),
    [
        (np.zeros((2, 1, 4, 4), np.float32), [0, 1], "not bytes", "float32"),
        (np.zeros((2, 4, 4), np.uint8), [0, 1], "no usable shape", "(2, 4, 4)"),
        (np.zeros((2, 4, 4, 4), np.uint8), [0, 1], "no usable shape", "(2, 4, 4, 4)"),
        (np.zeros((0, 1, 4, 4), np.uint8), [], "no usable shape", "(0, 1, 4, 4)"),
        (np.zeros((2, 1, 4, 4), np.uint8), [0], "do not fit its images", "shape (1,) for 2 images"),
        (np.zeros((2, 1, 4, 4), np.uint8), [0.0, 1.0], "do not fit its images", "float64"),
        (np.zeros((2, 1, 4, 4), np.uint8), [0, 2], "do not fit its classes", "from 0 to 2 for 2 classes"),
        (np.zeros((2, 1, 4, 4), np.uint8), [-1, 1], "do not fit its classes", "from -1 to 1"),
    ],
)
def test_unusable_arrays_are_refused(array: Any, labels: list[float], problem: str, found: str) -> None:
    with pytest.raises(ToolkitError, match="mine") as error:
        ArrayImages("mine", ("a", "b"), array, np.array(labels))
    assert problem in error.value.problem
    assert found in error.value.found
    assert "store" in error.value.fix


# Folders: pixels


def test_rgb_folder_gives_the_pixels_of_its_files(make_folder: MakeFolder) -> None:
    root = make_folder("train", size=(6, 4))
    images = FolderImages(root)
    assert images.class_names == ("cat", "dog")
    assert images.shape == (3, 4, 6)
    assert images.labels.tolist() == [0] * 4 + [1] * 4
    with Image.open(root / "dog" / "001.png") as image:
        np.testing.assert_array_equal(images.pixels(np.array([5]))[0], np.asarray(image).transpose(2, 0, 1))


def test_grey_folder_has_one_channel(make_folder: MakeFolder) -> None:
    root = make_folder("train", mode="L")
    images = FolderImages(root)
    assert images.shape == (1, 8, 8)
    with Image.open(root / "cat" / "000.png") as image:
        np.testing.assert_array_equal(images.pixels(np.array([0]))[0, 0], np.asarray(image))


def test_one_coloured_file_makes_the_folder_rgb(make_folder: MakeFolder) -> None:
    root = make_folder("train", mode="L")
    Image.fromarray(random_pixels(1, 8, 8, 3)).save(root / "dog" / "003.png")
    images = FolderImages(root)
    assert images.shape == (3, 8, 8)
    grey = images.pixels(np.array([0]))[0]
    assert (grey == grey[:1]).all()


@pytest.mark.parametrize(("channels", "shape"), [(1, (1, 8, 8)), (3, (3, 8, 8))])
def test_channels_can_be_prescribed_and_colours_that_are_lost_are_told(
    make_folder: MakeFolder, channels: int, shape: tuple[int, int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert FolderImages(make_folder("train"), channels=channels).shape == shape
    assert ("are in colour and are read as grey" in capsys.readouterr().err) == (channels == 1)


def test_sixteen_bit_grey_is_scaled_to_eight() -> None:
    deep = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    assert to_pixels(Image.fromarray(deep), 1, None).tolist() == [[[0, 1, 128, 255]]]


def test_bilevel_becomes_black_and_white() -> None:
    image = Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("1")
    assert to_pixels(image, 1, None).tolist() == [[[0, 255]]]


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "CMYK"])
def test_palettes_transparency_and_cmyk_are_converted(mode: str, tmp_path: Path) -> None:
    plain = Image.new("RGB", (4, 4), (204, 204, 204))
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    converted = plain.convert(mode)
    if mode == "P":
        converted.info["transparency"] = b"\x00\x80"
    converted.save(path)
    with Image.open(path) as image:
        assert image.mode == mode
        pixels = to_pixels(image, 3, None)
    assert pixels.shape == (3, 4, 4)
    assert np.abs(pixels.astype(int) - 204).max() <= 2


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 40), st.integers(4, 40), st.integers(4, 24), st.sampled_from([1, 3]))
def test_resizing_equals_torchvision(width: int, height: int, size: int, channels: int) -> None:
    shape = (height, width, 3) if channels == 3 else (height, width)
    image = Image.fromarray(random_pixels(width * 41 + height, *shape))
    reference = tv.center_crop(tv.resize(image, size, tv.InterpolationMode.BILINEAR), [size, size])
    expected = np.asarray(reference).reshape(size, size, channels).transpose(2, 0, 1)
    np.testing.assert_array_equal(to_pixels(image, channels, size), expected)


def test_size_brings_mixed_images_to_one_shape(make_folder: MakeFolder) -> None:
    root = make_folder("train", size=(20, 12))
    Image.fromarray(random_pixels(1, 30, 9, 3)).save(root / "cat" / "tall.png")
    assert FolderImages(root, size=10).shape == (3, 10, 10)


def test_files_below_the_class_folder_count_and_others_do_not(make_folder: MakeFolder) -> None:
    root = make_folder("train", per_class=2)
    (root / "cat" / "deep" / "er").mkdir(parents=True)
    (root / "cat" / ".cache").mkdir()
    for name in ("deep/er/x.PNG", ".cache/y.png"):
        Image.fromarray(random_pixels(9, 8, 8, 3)).save(root / "cat" / name, format="PNG")
    (root / "cat" / "._000.png").write_bytes(b"resource fork")
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "README").write_text("no class")
    assert FolderImages(root).labels.tolist() == [0, 0, 0, 1, 1]


def test_test_part_takes_the_labels_of_the_training_part(make_folder: MakeFolder) -> None:
    root = make_folder("test", classes=("dog",), per_class=3)
    images = FolderImages(root, class_names=("cat", "dog"))
    assert images.class_names == ("cat", "dog")
    assert images.labels.tolist() == [1, 1, 1]


# Folders: streaming


@pytest.mark.parametrize("size", [None, 12, 100])
def test_streamed_equals_in_memory(make_folder: MakeFolder, size: int | None) -> None:
    root = make_folder("train", per_class=5)
    memory, streamed = FolderImages(root, size=size), FolderImages(root, size=size, memory_limit=0)
    assert streamed.streamed and not memory.streamed
    assert streamed.shape == memory.shape
    np.testing.assert_array_equal(streamed.labels, memory.labels)
    np.testing.assert_array_equal(streamed.hashes, memory.hashes)
    order = np.random.default_rng(0).permutation(10)
    np.testing.assert_array_equal(streamed.pixels(order), memory.pixels(order))


def test_limit_decides_between_memory_and_streaming(make_folder: MakeFolder) -> None:
    root = make_folder("train")
    total = 8 * 3 * 8 * 8
    assert not FolderImages(root, memory_limit=total).streamed
    assert FolderImages(root, memory_limit=total - 1).streamed


@pytest.mark.parametrize("limit", [2**30, 0])
@pytest.mark.parametrize(("mode", "size"), [("RGB", None), ("L", None), ("RGB", 12), ("L", 12)])
def test_hashes_of_a_folder_are_those_of_an_array_of_the_same_pixels(
    make_folder: MakeFolder, limit: int, mode: str, size: int | None
) -> None:
    images = FolderImages(make_folder("train", mode=mode, size=(8, 6)), size=size, memory_limit=limit)
    array = ArrayImages("array", images.class_names, images.pixels(every(images)), images.labels)
    np.testing.assert_array_equal(images.hashes, array.hashes)


@pytest.mark.parametrize("limit", [2**30, 0])
def test_hashes_do_not_change_with_the_compression_or_format_of_files(make_folder: MakeFolder, limit: int) -> None:
    root = make_folder("train")
    before = FolderImages(root, memory_limit=limit).hashes
    for number, path in enumerate(sorted(root.glob("*/*.png"))):
        old = path.read_bytes()
        with Image.open(path) as image:
            image.load()
        if number % 2:
            image.save(path, compress_level=0)
        else:
            image.save(path.with_suffix(".bmp"))
            path.unlink()
        assert not path.exists() or path.read_bytes() != old
    np.testing.assert_array_equal(FolderImages(root, memory_limit=limit).hashes, before)


def test_every_file_is_decoded_once_to_load_or_hash_it(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    original = decoding.to_pixels

    def count(*arguments: Any) -> UInt8Array:
        decoded.append(1)
        return original(*arguments)

    monkeypatch.setattr(decoding, "to_pixels", count)
    root = make_folder("train")
    for limit in (2**30, 0):
        decoded.clear()
        images = FolderImages(root, memory_limit=limit)
        assert images.hashes is images.hashes
        assert len(decoded) == 8


def test_decoding_in_threads_gives_the_same(make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder("train", per_class=15)
    alone = FolderImages(root)
    monkeypatch.setattr(decoding, "THREADED_PIXELS", 0)
    for limit in (2**30, 0):
        threaded = FolderImages(root, memory_limit=limit)
        np.testing.assert_array_equal(threaded.hashes, alone.hashes)
        np.testing.assert_array_equal(threaded.pixels(every(threaded)), alone.pixels(every(alone)))


def test_memory_of_hashing_a_streamed_folder_does_not_grow_with_its_pixels(make_folder: MakeFolder) -> None:
    def peak(root: Path) -> int:
        tracemalloc.start()
        try:
            FolderImages(root, memory_limit=0)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = (make_folder(name, per_class=count, size=(64, 64)) for name, count in (("few", 10), ("many", 80)))
    peak(few)
    one_image = 3 * 64 * 64
    assert peak(many) - peak(few) < 10 * one_image


def test_memory_of_streaming_does_not_grow_with_the_number_of_images(make_folder: MakeFolder) -> None:
    def peak(images: FolderImages) -> int:
        tracemalloc.start()
        try:
            for start in range(0, len(images.labels), 8):
                images.pixels(every(images)[start : start + 8])
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few = FolderImages(make_folder("few", per_class=10, size=(64, 64)), memory_limit=0)
    many = FolderImages(make_folder("many", per_class=80, size=(64, 64)), memory_limit=0)
    peak(few)
    one_image = 3 * 64 * 64
    assert peak(many) - peak(few) < 4 * one_image


def test_long_reading_shows_progress(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decoding, "LONG_WORK", 8)
    FolderImages(make_folder("train"))
    assert FolderImages(make_folder("large"), memory_limit=0).hashes.size == 8
    shown = capsys.readouterr().err
    assert "reading train: done" in shown
    assert "hashing large: done" in shown


# Folders: bad input


def corrupt(root: Path, count: int) -> None:
    for number in range(count):
        path = root / "cat" / f"{number:03}.png"
        path.write_bytes(b"" if number == 0 else path.read_bytes()[:60])


def test_corrupt_files_are_named_up_to_five_and_counted(make_folder: MakeFolder) -> None:
    root = make_folder("train", per_class=9)
    corrupt(root, 7)
    with pytest.raises(ToolkitError) as error:
        FolderImages(root)
    assert error.value.problem == f"7 of 18 images in {root} cannot be read"
    assert "cat/000.png (no image), cat/001.png" in error.value.found
    assert "cat/004.png" in error.value.found and "cat/005.png" not in error.value.found
    assert error.value.found.endswith("and 2 more")
    assert "replace or delete" in error.value.fix


def test_streamed_folder_finds_broken_headers_and_pixels_at_load(make_folder: MakeFolder) -> None:
    root = make_folder("train")
    corrupt(root, 3)
    with pytest.raises(ToolkitError, match="3 of 8 images") as error:
        FolderImages(root, memory_limit=0)
    assert error.value.found.startswith("cat/000.png (no image), cat/001.png (")
    assert "cat/002.png" in error.value.found


def test_streamed_folder_names_files_broken_since(make_folder: MakeFolder) -> None:
    root = make_folder("train")
    images = FolderImages(root, memory_limit=0)
    corrupt(root, 2)
    with pytest.raises(ToolkitError, match="2 of 8 images") as error:
        images.pixels(every(images))
    assert "cat/000.png" in error.value.found and "cat/001.png" in error.value.found


def test_folder_of_nothing_but_broken_files_is_refused(make_folder: MakeFolder) -> None:
    root = make_folder("train", per_class=1)
    for label in ("cat", "dog"):
        (root / label / "000.png").write_bytes(b"x")
    with pytest.raises(ToolkitError, match="2 of 2 images"):
        FolderImages(root)


def test_float_pixels_are_refused(make_folder: MakeFolder) -> None:
    root = make_folder("train")
    Image.fromarray(np.zeros((8, 8), dtype=np.float32)).save(root / "cat" / "float.tif")
    with pytest.raises(ToolkitError, match="1 of 9 images") as error:
        FolderImages(root)
    assert "floating-point" in error.value.found


@pytest.mark.parametrize("limit", [2**30, 0])
def test_several_sizes_need_size(make_folder: MakeFolder, limit: int) -> None:
    root = make_folder("train")
    Image.fromarray(random_pixels(1, 9, 7, 3)).save(root / "cat" / "000.png")
    with pytest.raises(ToolkitError, match="differ in size") as error:
        FolderImages(root, memory_limit=limit)
    assert error.value.found == "1 of 8 are not 8x8: cat/000.png (7x9)"
    assert "--size N" in error.value.fix


def test_file_that_vanished_is_named(make_folder: MakeFolder) -> None:
    root = make_folder("train")
    images = FolderImages(root, memory_limit=0)
    (root / "dog" / "002.png").unlink()
    with pytest.raises(ToolkitError, match="cannot be read") as error:
        images.pixels(every(images))
    assert error.value.found == "dog/002.png (No such file or directory)"


def test_missing_and_empty_folders_are_refused(make_folder: MakeFolder, tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match="no such image folder"):
        FolderImages(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ToolkitError, match="holds no images") as error:
        FolderImages(tmp_path / "empty")
    assert "0 class folders" in error.value.found and "empty/CLASS/IMAGE" in error.value.fix
    root = make_folder("train")
    (root / "bird").mkdir()
    with pytest.raises(ToolkitError, match=r"class folders of .* hold no images") as lacking:
        FolderImages(root)
    assert lacking.value.found == "bird"


def test_classes_that_training_lacks_are_refused(make_folder: MakeFolder) -> None:
    with pytest.raises(ToolkitError, match="training images lack") as error:
        FolderImages(make_folder("test"), class_names=("cat", "horse"))
    assert error.value.found == "dog"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_bytes_never_escape_as_another_error(tmp_path: Path, data: st.DataObject) -> None:
    root = tmp_path / "fuzzed"
    for label in ("a", "b"):
        (root / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_pixels(3, 8, 8)).save(root / label / "0.png")
    path = root / "a" / "0.png"
    raw = bytearray(path.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw[: data.draw(st.integers(1, len(raw)))])
    with contextlib.suppress(ToolkitError):
        FolderImages(root)


def test_folder_that_cannot_be_opened_is_refused(make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder("train")

    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ToolkitError, match="cannot be opened") as error:
        FolderImages(root)
    assert error.value.found == f"{root}: Permission denied"
