from __future__ import annotations

import contextlib
import gzip
import hashlib
import pickle
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets

from toolkit.artifacts import ModelSpec, Normalization
from toolkit.config import DataConfig
from toolkit.data import standard
from toolkit.data.sources import SAMPLE, SOURCES, WITH_ARGUMENT, check_fits, load_source
from toolkit.data.standard import CIFAR10_CLASSES, FASHION_MNIST_CLASSES
from toolkit.errors import ToolkitError

from .conftest import MakeFolder, random_pixels


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without data sets; returns its (empty) cache."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(standard, "DEBIAN_FASHION_MNIST", tmp_path / "no-package")
    monkeypatch.setattr(standard, "cache_dir", lambda: cache)
    return cache


def refused(match: str, **config: Any) -> ToolkitError:
    with pytest.raises(ToolkitError, match=match) as error:
        load_source(DataConfig(**config))
    return error.value


# Names


def test_no_name_is_refused() -> None:
    assert "add --data" in refused("no data set is given").fix


def test_unknown_name_lists_the_choices_and_the_nearest() -> None:
    error = refused("unknown data set", source="fashionmnist")
    assert "did you mean 'fashion-mnist'?" in error.fix
    for name in SOURCES:
        assert name in error.fix


def test_bare_paths_get_their_prefix_as_the_fix(tmp_path: Path) -> None:
    assert refused("unknown", source=str(tmp_path)).fix == f"write --data folder:{tmp_path}"
    assert refused("unknown", source="a/b.npz").fix == "write --data npz:a/b.npz"


@pytest.mark.parametrize("kind", WITH_ARGUMENT)
def test_missing_argument_is_refused(kind: str) -> None:
    for source in (kind, f"{kind}:"):
        assert "folder:DIR" in refused("--data is incomplete", source=source).fix


def test_superfluous_argument_is_refused() -> None:
    assert refused("takes no argument", source="sample:small").found == "--data sample:small"


def test_size_on_arrays_is_refused_unless_it_is_theirs() -> None:
    error = refused("resizes image folders only", source="sample", size=32)
    assert error.found == "--size 32 for sample, whose images are 28x28"
    assert load_source(DataConfig(source="sample", size=28)).train.shape == (1, 28, 28)


# The sample


def test_sample() -> None:
    source = load_source(DataConfig(source="sample"))
    assert source.name == "sample"
    assert source.threat_key == "fashion-mnist"
    assert source.normalization_hint == Normalization((0.5,), (0.5,))
    assert source.holdout == 1_000
    assert source.train.class_names == FASHION_MNIST_CLASSES
    assert np.bincount(source.train.labels).tolist() == [1_000] * 10
    assert np.bincount(source.evaluation.labels).tolist() == [200] * 10
    every = np.concatenate([source.train.hashes, source.evaluation.hashes])
    assert len(np.unique(every)) == 12_000


def test_sample_is_small_and_its_licence_and_origin_stand_beside_it() -> None:
    assert SAMPLE.stat().st_size < 8e6
    licence = (SAMPLE.parent / "LICENSE").read_text(encoding="utf-8")
    assert "MIT" in licence and "Copyright (c) 2017 Zalando SE" in licence
    assert "benchmarks/make_sample.py" in (SAMPLE.parent / "README.md").read_text(encoding="utf-8")


# Fashion-MNIST


def write_fashion_mnist(folder: Path, monkeypatch: pytest.MonkeyPatch, *, packed: bool = True) -> None:
    """A tiny data set in the form of the original; its digests are made the expected ones."""
    folder.mkdir(parents=True, exist_ok=True)
    digests = {}
    for part, count in (("train", 40), ("t10k", 20)):
        images = bytes(16) + random_pixels(count, count, 28, 28).tobytes()
        labels = bytes(8) + (np.arange(count) % 10).astype(np.uint8).tobytes()
        for name, data in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            digests[name] = hashlib.sha256(data).hexdigest()
            path = folder / (f"{name}.gz" if packed else name)
            path.write_bytes(gzip.compress(data) if packed else data)
    monkeypatch.setattr(standard, "FASHION_MNIST_SHA256", digests)


@pytest.mark.usefixtures("bare_machine")
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("place", ["own", "own/FashionMNIST/raw", "no-package", "cache/FashionMNIST/raw"])
def test_fashion_mnist_is_found(place: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fashion_mnist(tmp_path / place, monkeypatch, packed=packed)
    source = load_source(DataConfig(source="fashion-mnist", data_dir=tmp_path / "own"))
    assert source.train.shape == (1, 28, 28)
    assert (len(source.train.labels), len(source.evaluation.labels)) == (40, 20)
    assert source.train.labels[:12].tolist() == [*range(10), 0, 1]
    np.testing.assert_array_equal(source.train.pixels(np.array([3]))[0, 0], random_pixels(40, 40, 28, 28)[3])
    assert (source.holdout, source.threat_key) == (5_000, "fashion-mnist")
    assert source.train.class_names == FASHION_MNIST_CLASSES


def test_fashion_mnist_of_this_machine() -> None:
    if standard.find_fashion_mnist(None) is None:
        pytest.skip("needs the full data set: apt-get install dataset-fashion-mnist")
    source = load_source(DataConfig(source="fashion-mnist"))
    assert np.bincount(source.train.labels).tolist() == [6_000] * 10
    assert np.bincount(source.evaluation.labels).tolist() == [1_000] * 10


def test_missing_fashion_mnist_names_the_fixes_and_downloads_nothing(bare_machine: Path) -> None:
    error = refused("Fashion-MNIST is not on this machine", source="fashion-mnist")
    for fix in ("apt-get install dataset-fashion-mnist", "--data-dir", "--download", "--data sample"):
        assert fix in error.fix
    assert not bare_machine.exists()


def test_download_only_when_asked(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(folder: Path, download: bool) -> None:
        assert download
        write_fashion_mnist(folder / "FashionMNIST" / "raw", monkeypatch)

    monkeypatch.setattr(datasets, "FashionMNIST", download)
    source = load_source(DataConfig(source="fashion-mnist", download=True))
    assert len(source.train.labels) == 40
    assert (bare_machine / "FashionMNIST").is_dir()


@pytest.mark.usefixtures("bare_machine")
def test_processes_that_start_together_download_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those that torchrun starts; a folder that is half there is not taken for the data set."""
    begun: list[Path] = []

    def download(folder: Path, download: bool) -> None:
        assert download
        begun.append(folder)
        write_fashion_mnist(folder / "FashionMNIST" / "raw", monkeypatch)
        (half,) = (folder / "FashionMNIST" / "raw").glob("t10k-images*")
        content = half.read_bytes()
        half.write_bytes(content[:100])
        time.sleep(0.3)  # so that the others look while the file is cut
        half.write_bytes(content)

    monkeypatch.setattr(datasets, "FashionMNIST", download)
    with ThreadPoolExecutor(3) as pool:
        config = DataConfig(source="fashion-mnist", download=True)
        found = list(pool.map(load_source, [config] * 3))
    assert len(begun) == 1 and [len(source.train.labels) for source in found] == [40] * 3


@pytest.mark.usefixtures("bare_machine")
@pytest.mark.parametrize(("source", "kind"), [("fashion-mnist", "FashionMNIST"), ("cifar10", "CIFAR10")])
def test_failed_download_is_explained(source: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, kind, download)
    error = refused("cannot be downloaded", source=source, download=True)
    assert error.found == "no route to host"
    assert "--data-dir" in error.fix


@pytest.mark.usefixtures("bare_machine")
@pytest.mark.parametrize("damage", [b"", b"\x1f\x8b\x08\x00broken", gzip.compress(b"other contents", mtime=0)])
def test_damaged_or_foreign_files_are_named(damage: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fashion_mnist(tmp_path, monkeypatch)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(damage)
    error = refused("damaged or another data set's", source="fashion-mnist", data_dir=tmp_path)
    assert "t10k-labels-idx1-ubyte.gz" in error.found
    assert "--data-dir" in error.fix


# CIFAR-10


def write_cifar10(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny data set in the form of the original; its digests are made the expected ones."""
    base = folder / "cifar-10-batches-py"
    base.mkdir(parents=True)

    def write(name: str, content: dict[str, Any]) -> str:
        data = pickle.dumps(content, protocol=2)
        (base / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    batches = [f"data_batch_{number}" for number in range(1, 6)]
    listed = {}
    for seed, name in enumerate([*batches, "test_batch"]):
        content = {"data": random_pixels(seed, 10, 3072), "labels": list(range(10))}
        listed[name] = write(name, content)
    meta = write("batches.meta", {"label_names": list(CIFAR10_CLASSES)})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[name, listed[name]] for name in batches])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", listed["test_batch"]]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": meta})


@pytest.mark.usefixtures("bare_machine")
@pytest.mark.parametrize("place", ["own", "cache"])
def test_cifar10_is_found(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path / place, monkeypatch)
    source = load_source(DataConfig(source="cifar10", data_dir=tmp_path / "own"))
    assert source.train.shape == (3, 32, 32)
    assert (len(source.train.labels), len(source.evaluation.labels)) == (50, 10)
    assert (source.holdout, source.threat_key) == (5, "cifar10")
    assert source.normalization_hint == Normalization((0.5,) * 3, (0.5,) * 3)
    expected = random_pixels(1, 10, 3072)[2].reshape(3, 32, 32)
    np.testing.assert_array_equal(source.train.pixels(np.array([12]))[0], expected)


def test_missing_cifar10_names_the_fixes(bare_machine: Path) -> None:
    error = refused("CIFAR-10 is not on this machine", source="cifar10")
    for fix in ("--data-dir", "--download", "--data folder:DIR", "--data sample"):
        assert fix in error.fix
    assert not bare_machine.exists()


def test_damaged_cifar10_is_refused(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(bare_machine, monkeypatch)
    (bare_machine / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"not the original, never unpickled")
    assert "MD5" in refused("incomplete or damaged", source="cifar10").found


# Folders


@pytest.mark.parametrize("part", ["test", "val"])
def test_folder(part: str, make_folder: MakeFolder) -> None:
    root = make_folder("set/train", per_class=30).parent
    make_folder(f"set/{part}")
    source = load_source(DataConfig(source=f"folder:{root}"))
    assert source.name == f"folder:{root}"
    assert (len(source.train.labels), len(source.evaluation.labels)) == (60, 8)
    assert (source.holdout, source.threat_key) == (6, None)
    assert source.normalization_hint == Normalization((0.5,) * 3, (0.5,) * 3)


def test_test_is_preferred_to_val(make_folder: MakeFolder) -> None:
    root = make_folder("set/train").parent
    make_folder("set/val", per_class=2)
    make_folder("set/test", per_class=3)
    assert len(load_source(DataConfig(source=f"folder:{root}")).evaluation.labels) == 6


def test_test_images_take_the_channels_of_train(make_folder: MakeFolder) -> None:
    root = make_folder("set/train").parent
    make_folder("set/test", mode="L")
    assert load_source(DataConfig(source=f"folder:{root}")).evaluation.shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("classes", "side", "mode", "key"),
    [
        (CIFAR10_CLASSES, 32, "RGB", "cifar10"),
        (CIFAR10_CLASSES, 28, "RGB", None),
        (CIFAR10_CLASSES, 32, "L", None),
        (CIFAR10_CLASSES[:9], 32, "RGB", None),
    ],
)
def test_only_what_looks_like_cifar10_gets_its_presets(
    classes: tuple[str, ...], side: int, mode: str, key: str | None, make_folder: MakeFolder
) -> None:
    for part in ("train", "test"):
        root = make_folder(f"set/{part}", classes=classes, per_class=1, size=(side, side), mode=mode).parent
    assert load_source(DataConfig(source=f"folder:{root}")).threat_key == key


def test_folder_that_is_missing_or_in_another_layout_is_refused(make_folder: MakeFolder, tmp_path: Path) -> None:
    assert refused("no such folder", source="folder:nowhere").found == "nowhere"
    root = make_folder("set")
    error = refused("no train and test part", source=f"folder:{root}")
    assert error.found == f"{root} holds: cat, dog"
    assert "DIR/train/CLASS/IMAGE" in error.fix
    (tmp_path / "empty").mkdir()
    assert refused("no train and test part", source=f"folder:{tmp_path / 'empty'}").found.endswith("holds: nothing")


def test_parts_of_different_size_need_size(make_folder: MakeFolder) -> None:
    root = make_folder("set/train").parent
    make_folder("set/test", size=(8, 9))
    error = refused("differ in size", source=f"folder:{root}")
    assert error.found == "8x8 and 9x8"
    assert load_source(DataConfig(source=f"folder:{root}", size=16)).evaluation.shape == (3, 16, 16)


# Archives


def write_npz(path: Path, **changed: Any) -> str:
    arrays = {
        "x_train": random_pixels(0, 30, 6, 5),
        "y_train": np.arange(30) % 3,
        "x_test": random_pixels(1, 9, 6, 5),
        "y_test": np.arange(9) % 3,
    }
    arrays.update(changed)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})  # type: ignore[arg-type]
    return f"npz:{path}"


def test_npz(tmp_path: Path) -> None:
    source = load_source(DataConfig(source=write_npz(tmp_path / "x.npz")))
    assert source.train.shape == (1, 6, 5)
    assert source.train.class_names == ("0", "1", "2")
    assert (source.holdout, source.threat_key, source.name) == (3, None, f"npz:{tmp_path / 'x.npz'}")


@pytest.mark.parametrize("channels", [1, 3])
def test_every_order_of_axes_gives_the_same_images(channels: int, tmp_path: Path) -> None:
    train, test = random_pixels(0, 30, channels, 6, 5), random_pixels(1, 9, channels, 6, 5)
    forms = {"nchw": (train, test), "nhwc": (train.transpose(0, 2, 3, 1), test.transpose(0, 2, 3, 1))}
    if channels == 1:
        forms["nhw"] = (train[:, 0], test[:, 0])
    for name, (x_train, x_test) in forms.items():
        source = load_source(DataConfig(source=write_npz(tmp_path / f"{name}.npz", x_train=x_train, x_test=x_test)))
        np.testing.assert_array_equal(source.train.pixels(np.arange(30)), train)
        np.testing.assert_array_equal(source.evaluation.pixels(np.arange(9)), test)


def test_names_and_labels_of_medmnist_are_understood(tmp_path: Path) -> None:
    labels = (np.arange(30) % 3)[:, None].astype(np.uint8)
    path = tmp_path / "med.npz"
    np.savez(
        path,
        train_images=random_pixels(0, 30, 6, 5),
        train_labels=labels,
        val_images=random_pixels(2, 3, 6, 5),
        val_labels=labels[:3],
        test_images=random_pixels(1, 9, 6, 5),
        test_labels=labels[:9],
        class_names=np.array(["a", "b", "c"]),
    )
    source = load_source(DataConfig(source=f"npz:{path}"))
    assert source.train.class_names == ("a", "b", "c")
    assert source.train.labels[:4].tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"y_test": None}, "lacks arrays"),
        ({"x_train": random_pixels(0, 30, 6, 5) / 255}, "not bytes"),
        ({"x_train": random_pixels(0, 30, 6)}, "no usable shape"),
        ({"x_train": random_pixels(0, 30, 6, 5, 4)}, "no usable shape"),
        ({"x_train": random_pixels(0, 30, 3, 5, 3)}, "cannot be told apart"),
        ({"x_test": random_pixels(0, 9, 5, 5)}, "differ in shape"),
        ({"y_train": np.arange(29)}, "do not fit its images"),
        ({"y_train": np.eye(30)}, "do not fit its images"),
        ({"y_train": 1 + np.arange(30) % 3, "y_test": 1 + np.arange(9) % 3}, "do not number the classes from 0"),
        ({"y_train": np.arange(30) * 10**9}, "do not number the classes from 0"),
        ({"y_train": -1 - np.arange(30) % 3}, "do not number the classes from 0"),
        ({"y_test": np.arange(9)}, "do not fit its classes"),
        ({"class_names": np.array(["a", "b", "b"])}, "class names"),
        ({"class_names": np.arange(3)}, "class names"),
        ({"class_names": np.array(["a", "b"])}, "do not fit its classes"),
        ({"x_train": np.array([{"a": "pickle"}] * 30)}, "cannot be read"),
    ],
)
def test_unusable_archives_are_refused(changed: dict[str, Any], match: str, tmp_path: Path) -> None:
    error = refused(match, source=write_npz(tmp_path / "x.npz", **changed))
    assert error.found and error.fix


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 truncated"])
def test_files_that_are_no_archives_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    assert str(path) in refused("cannot be read", source=f"npz:{path}").found


def test_truncated_archive_single_array_and_missing_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    write_npz(path)
    path.write_bytes(path.read_bytes()[:500])
    refused("cannot be read", source=f"npz:{path}")
    np.save(tmp_path / "one.npy", np.zeros(3))
    refused("one array, not an archive", source=f"npz:{tmp_path / 'one.npy'}")
    refused("no such file", source="npz:nowhere.npz")


# Does the model fit?


def a_spec(names: tuple[str, ...] = FASHION_MNIST_CLASSES, shape: tuple[int, int, int] = (1, 28, 28)) -> ModelSpec:
    return ModelSpec("cnn8", names, shape, Normalization((0.5,) * shape[0], (0.5,) * shape[0]))


def test_fitting_model_passes_and_other_words_for_its_classes_do_with_a_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = load_source(DataConfig(source="sample"))
    check_fits(source, a_spec())
    assert not capsys.readouterr().err
    check_fits(source, a_spec(tuple(f"kind {number}" for number in range(10))))
    warned = capsys.readouterr().err
    assert warned.startswith("warning: ") and len(warned.splitlines()) == 1
    assert "kind 0, kind 1," in warned and "sample T-shirt/top, Trouser," in warned and "by their numbers" in warned


@pytest.mark.parametrize(
    ("spec", "match", "found"),
    [
        (a_spec(("a", "b")), "number of classes", "the model has 2 classes, sample has 10"),
        (a_spec(tuple(sorted(FASHION_MNIST_CLASSES))), "number the same classes differently", "Ankle boot"),
        (a_spec(shape=(3, 28, 28)), "number of channels", "takes RGB (3 channels) images, sample has grey (1 channel)"),
        (a_spec(shape=(1, 32, 32)), "size of images", "the model takes 32x32, sample has 28x28"),
    ],
)
def test_disagreeing_model_is_refused_with_both_values(spec: ModelSpec, match: str, found: str) -> None:
    source = load_source(DataConfig(source="sample"))
    with pytest.raises(ToolkitError, match=match) as error:
        check_fits(source, spec)
    assert found in error.value.found
    assert error.value.fix


def test_folder_of_another_size_gets_the_flag_as_the_fix(make_folder: MakeFolder) -> None:
    root = make_folder("set/train").parent
    make_folder("set/test")
    source = load_source(DataConfig(source=f"folder:{root}"))
    with pytest.raises(ToolkitError, match="size of images") as error:
        check_fits(source, a_spec(("a", "b"), (3, 32, 32)))
    assert re.match("add --size 32, or name", error.value.fix)


def test_damaged_image_in_a_part_names_the_file(make_folder: MakeFolder) -> None:
    root = make_folder("set/train").parent
    broken = make_folder("set/test") / "dog" / "001.png"
    Image.fromarray(random_pixels(0, 8, 8, 3)).save(broken)
    broken.write_bytes(broken.read_bytes()[:-30])
    assert "dog/001.png" in refused("1 of 8 images", source=f"folder:{root}").found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_archives_never_escape_as_another_error(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.npz"
    source = write_npz(path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    with contextlib.suppress(ToolkitError):
        load_source(DataConfig(source=source))
