from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from toolkit.artifacts import HashArray, Int64Array, Normalization, Splits, UInt8Array
from toolkit.config import DataConfig
from toolkit.data import sources
from toolkit.data.images import ArrayImages, FolderImages
from toolkit.data.sources import SAMPLE, DataSource, load_source
from toolkit.data.splits import check_trained_on, make_splits, stratified, without_seen
from toolkit.data.standard import find_fashion_mnist
from toolkit.errors import ToolkitError

from .conftest import random_pixels

PARTS = ("train", "calibration", "validation", "evaluation")


def numbered(numbers: Int64Array) -> UInt8Array:
    """One distinct image per number."""
    return numbers.astype("<u8").view(np.uint8).reshape(-1, 1, 2, 4)


def a_source(train: Int64Array, test: Int64Array, *, holdout: int = 20, classes: int = 2) -> DataSource:
    names = tuple(map(str, range(classes)))
    train_images = ArrayImages("toy", names, numbered(train), train % classes)
    test_images = ArrayImages("toy test", names, numbered(test), test % classes)
    return DataSource("toy", train_images, test_images, Normalization((0.5,), (0.5,)), holdout, None)


def parts_of(splits: Splits) -> dict[str, HashArray]:
    return {name: getattr(splits, name).hashes for name in PARTS}


def held_out(splits: Splits) -> set[int]:
    return {*splits.calibration.hashes.tolist(), *splits.validation.hashes.tolist()}


NUMBERS = st.lists(st.integers(0, 150), min_size=60, max_size=200)


@settings(max_examples=60, deadline=None)
@given(NUMBERS, st.lists(st.integers(0, 150), min_size=4, max_size=30), st.integers(0, 99), st.integers(1, 30))
def test_parts_are_disjoint_and_every_training_image_is_accounted_for(
    train: list[int], test: list[int], seed: int, calibration: int
) -> None:
    source = a_source(np.array([*train, 151, 152, *range(160, 190)]), np.array([*test, 153, 154]))
    splits = make_splits(source, DataConfig(calibration=calibration), seed)
    hashes = parts_of(splits)
    for name in PARTS:
        for other in PARTS:
            assert name == other or not set(hashes[name].tolist()) & set(hashes[other].tolist())
    assert len(held_out(splits)) == len(splits.calibration) + len(splits.validation) == 20
    assert len(splits.calibration) == min(calibration, 10)
    kept = sum(len(getattr(splits, name)) for name in PARTS[:3])
    assert kept + splits.dropped == len(source.train.labels)


def test_held_out_images_do_not_depend_on_seed_order_calibration_or_evaluation() -> None:
    numbers, test = np.arange(200), np.arange(300, 340)
    reference = held_out(make_splits(a_source(numbers, test), DataConfig(), 0))
    shuffled = np.random.default_rng(1).permutation(numbers)
    for source in (a_source(numbers, test), a_source(shuffled, test)):
        for config in (DataConfig(calibration=3), DataConfig(evaluation=7)):
            assert held_out(make_splits(source, config, seed=5)) == reference


@pytest.mark.parametrize("calibration", [7, 512])
@pytest.mark.parametrize("seed", [0, 5])
def test_other_parts_are_the_same_for_every_number_of_evaluation_images(calibration: int, seed: int) -> None:
    source = a_source(np.arange(400), np.arange(500, 600), holdout=60)
    reference = make_splits(source, DataConfig(calibration=calibration), seed)
    for count in (2, 31, 99, 100):
        splits = make_splits(source, DataConfig(calibration=calibration, evaluation=count), seed)
        assert len(splits.evaluation) == count
        for name in PARTS[:3]:
            np.testing.assert_array_equal(getattr(splits, name).indices, getattr(reference, name).indices)


def test_evaluation_is_the_same_for_every_number_of_calibration_images() -> None:
    source = a_source(np.arange(400), np.arange(500, 600), holdout=60)
    one, two = (make_splits(source, DataConfig(calibration=count, evaluation=30), 0) for count in (5, 30))
    np.testing.assert_array_equal(one.evaluation.indices, two.evaluation.indices)


def test_calibration_cut_to_half_the_hold_out_is_said_with_both_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    source = a_source(np.arange(200), np.arange(300, 340))
    assert len(make_splits(source, DataConfig(calibration=10), 0).calibration) == 10
    assert not capsys.readouterr().err
    assert len(make_splits(source, DataConfig(calibration=11), 0).calibration) == 10
    said = capsys.readouterr().err
    assert said.startswith("calibration takes 10 images, not 11: half of the 20 held out") and said.count("\n") == 1


def test_held_out_images_are_those_of_smallest_hash() -> None:
    source = a_source(np.arange(200), np.arange(300, 340))
    splits = make_splits(source, DataConfig(), 0)
    assert held_out(splits) == set(np.sort(source.train.hashes)[:20].tolist())
    assert splits.train.hashes.min() > max(held_out(splits))


def test_copies_of_one_image_never_reach_two_parts() -> None:
    """Every image stands twice in train, and 10 of them in test."""
    source = a_source(np.repeat(np.arange(200), 2), np.concatenate([np.arange(10), np.arange(300, 340)]))
    splits = make_splits(source, DataConfig(), 0)
    assert len(splits.train) == 2 * (200 - 10 - 20)
    assert splits.dropped == 2 * 10 + 20


def test_images_of_test_leave_train_even_where_evaluation_does_not_take_them() -> None:
    source = a_source(np.arange(200), np.arange(100, 200))
    splits = make_splits(source, DataConfig(evaluation=2), 0)
    assert splits.dropped == 100
    assert not np.isin(splits.train.hashes, source.evaluation.hashes).any()


def test_same_seed_gives_the_same_splits_and_another_seed_another_calibration() -> None:
    source, config = a_source(np.arange(200), np.arange(300, 400)), DataConfig(evaluation=30)
    one, two, three = (make_splits(source, config, seed) for seed in (0, 0, 1))
    assert one.record() == two.record()
    for name in PARTS:
        np.testing.assert_array_equal(getattr(one, name).indices, getattr(two, name).indices)
    assert one.calibration.digest != three.calibration.digest
    assert one.evaluation.digest != three.evaluation.digest
    assert one.train.digest == three.train.digest


def test_evaluation_is_the_whole_test_part() -> None:
    splits = make_splits(a_source(np.arange(200), np.arange(300, 340)), DataConfig(), 0)
    assert sorted(splits.evaluation.indices.tolist()) == list(range(40))


def test_first_evaluation_images_are_mixed_even_where_the_data_set_is_sorted_by_class() -> None:
    test = np.concatenate([np.arange(400, 600, 2), np.arange(401, 601, 2)])
    splits = make_splits(a_source(np.arange(200), test), DataConfig(), 0)
    assert 15 <= splits.evaluation.first(50).labels.sum() <= 35


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.integers(0, 9), st.data())
def test_stratified_choice_keeps_class_shares_to_within_one(labels: list[int], seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(labels)))
    array = np.array(labels)
    chosen = stratified(array, count, np.random.default_rng(seed))
    assert len(np.unique(chosen)) == len(chosen) == count
    wanted = np.bincount(array, minlength=5) * count / len(array)
    assert np.abs(np.bincount(array[chosen], minlength=5) - wanted).max() < 1


def test_more_evaluation_images_than_there_are_quotes_the_flag() -> None:
    with pytest.raises(ToolkitError, match="more evaluation images") as error:
        make_splits(a_source(np.arange(200), np.arange(300, 340)), DataConfig(evaluation=41), 0)
    assert error.value.found == "--n 41, and 40 images in the test part"
    assert "--n at most 40" in error.value.fix


@pytest.mark.parametrize(
    ("train", "holdout", "empty"),
    [
        (np.arange(20), 20, "train"),
        (np.arange(20), 1, "calibration"),
        (np.arange(300, 340), 20, "train and calibration and validation"),
    ],
)
def test_empty_parts_are_named(train: Int64Array, holdout: int, empty: str) -> None:
    with pytest.raises(ToolkitError) as error:
        make_splits(a_source(train, np.arange(300, 340), holdout=holdout), DataConfig(), 0)
    assert error.value.problem == f"no images are left for {empty}"
    assert f"{len(train)} training images" in error.value.found
    assert "more images" in error.value.fix


@pytest.mark.parametrize(("train", "test", "part"), [(1, 2, "test"), (2, 1, "training")])
def test_one_class_is_refused(train: int, test: int, part: str) -> None:
    source = a_source(np.arange(0, 200, train), np.arange(300, 340, test))
    with pytest.raises(ToolkitError, match="fewer than two classes") as error:
        make_splits(source, DataConfig(), 0)
    assert part in error.value.problem or part == "training"
    assert "class 0" in error.value.found
    assert "at least two classes" in error.value.fix


# The training images of a checkpoint


def test_checkpoint_trained_on_train_passes_and_so_does_one_without_record() -> None:
    splits = make_splits(a_source(np.arange(200), np.arange(300, 340)), DataConfig(), 0)
    check_trained_on(splits, splits.train.hashes)
    check_trained_on(splits, np.empty(0, dtype=np.uint64))


@pytest.mark.parametrize("part", PARTS[1:])
def test_checkpoint_trained_on_judging_images_is_refused(part: str) -> None:
    splits = make_splits(a_source(np.arange(200), np.arange(300, 340)), DataConfig(), 0)
    hashes = getattr(splits, part).hashes
    with pytest.raises(ToolkitError, match="trained on images that are to judge it") as error:
        check_trained_on(splits, np.concatenate([splits.train.hashes, hashes[:3]]))
    assert error.value.found == f"3 of {len(hashes)} {part} images are among its training images"
    assert "--data" in error.value.fix


def test_checkpoint_trained_on_none_of_the_images_is_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    splits = make_splits(a_source(np.arange(200), np.arange(300, 340)), DataConfig(calibration=10), 0)
    for known in (np.empty(0, dtype=np.uint64), splits.train.hashes[:1]):
        check_trained_on(splits, known)
    assert not capsys.readouterr().err
    check_trained_on(splits, np.array([1, 2, 3], dtype=np.uint64))
    assert "none of the 3 images that trained the checkpoint is in toy:" in capsys.readouterr().err


@pytest.mark.parametrize("streamed", [False, True])
def test_checkpoint_trained_on_a_folder_is_held_to_it_in_an_archive_and_the_other_way_round(
    streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each one's test part is the other's training part: whoever trained on one must not be judged on the other."""
    if streamed:
        defaults = {**(FolderImages.__init__.__kwdefaults__ or {}), "memory_limit": 0}
        monkeypatch.setattr(FolderImages.__init__, "__kwdefaults__", defaults)
    folder, archive = a_folder_and_an_archive(tmp_path)
    images = folder.train
    assert isinstance(images, FolderImages) and images.streamed == streamed
    np.testing.assert_array_equal(np.sort(images.hashes), np.sort(archive.evaluation.hashes))
    on_folder, on_archive = (make_splits(source, DataConfig(), 0) for source in (folder, archive))
    with pytest.raises(ToolkitError, match="trained on images that are to judge it"):
        check_trained_on(on_archive, on_folder.train.hashes)
    with pytest.raises(ToolkitError, match="trained on images that are to judge it"):
        check_trained_on(on_folder, on_archive.train.hashes)


def a_folder_and_an_archive(place: Path) -> tuple[DataSource, DataSource]:
    pixels, labels = random_pixels(0, 40, 8, 8, 3), np.arange(40) % 2
    others = random_pixels(1, 40, 8, 8, 3)
    for part, array in (("train", pixels), ("test", others)):
        for number, image in enumerate(array):
            path = place / "set" / part / str(labels[number]) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path, compress_level=number % 10)
    np.savez(place / "x.npz", x_train=others, y_train=labels, x_test=pixels, y_test=labels)
    folder, archive = (
        load_source(DataConfig(source=name)) for name in (f"folder:{place / 'set'}", f"npz:{place / 'x.npz'}")
    )
    return folder, archive


def test_folder_and_archive_of_the_same_images_are_divided_alike(tmp_path: Path) -> None:
    folder, _ = a_folder_and_an_archive(tmp_path)
    arrays = [part.pixels(np.arange(40)) for part in (folder.train, folder.evaluation)]
    path = tmp_path / "same.npz"
    np.savez(path, x_train=arrays[0], y_train=folder.train.labels, x_test=arrays[1], y_test=folder.evaluation.labels)
    same = load_source(DataConfig(source=f"npz:{path}"))
    assert make_splits(same, DataConfig(), 0).record() == make_splits(folder, DataConfig(), 0).record()


def test_shipped_checkpoint_trained_on_the_training_images_of_the_sample_alone() -> None:
    splits = make_splits(load_source(DataConfig(source="sample")), DataConfig(), 0)
    shipped = Path(sources.__file__).parents[1] / "models" / "weights" / "cnn8.pt"
    hashes = torch.load(shipped, weights_only=True)["hashes"].numpy().view(np.uint64)
    assert np.isin(splits.train.hashes, hashes).all()
    check_trained_on(splits, hashes)


# Fashion-MNIST and its sample


def test_sample_holds_out_exactly_the_flagged_images() -> None:
    source = load_source(DataConfig(source="sample"))
    splits = make_splits(source, DataConfig(), 3)
    with np.load(SAMPLE) as archive:
        flagged = archive["held_out"]
    assert held_out(splits) == set(source.train.hashes[flagged].tolist())
    assert np.bincount(source.train.labels[flagged]).tolist() == [100] * 10
    assert [len(getattr(splits, name)) for name in PARTS] == [9_000, 500, 500, 2_000]
    assert splits.dropped == 0


def test_sample_is_a_part_of_fashion_mnist_and_so_is_its_hold_out() -> None:
    if find_fashion_mnist(None) is None:
        pytest.skip("needs the full data set: apt-get install dataset-fashion-mnist")
    full, sample = (load_source(DataConfig(source=name)) for name in ("fashion-mnist", "sample"))
    splits, small = make_splits(full, DataConfig(), 0), make_splits(sample, DataConfig(), 0)
    assert [len(getattr(splits, name)) for name in PARTS] == [55_000, 500, 4_500, 10_000]
    assert held_out(small) < held_out(splits)
    assert np.isin(small.train.hashes, splits.train.hashes).all()
    assert np.isin(small.evaluation.hashes, splits.evaluation.hashes).all()
    check_trained_on(small, splits.train.hashes)
    check_trained_on(splits, small.train.hashes)


def test_labels_of_the_sample_are_those_of_the_full_data_set() -> None:
    if find_fashion_mnist(None) is None:
        pytest.skip("needs the full data set: apt-get install dataset-fashion-mnist")
    full, sample = (load_source(DataConfig(source=name)) for name in ("fashion-mnist", "sample"))
    for ours, theirs in ((sample.train, full.train), (sample.evaluation, full.evaluation)):
        known = dict(zip(theirs.hashes.tolist(), theirs.labels.tolist(), strict=True))
        assert [known[number] for number in ours.hashes.tolist()] == ours.labels.tolist()


def test_splits_do_not_change_the_source() -> None:
    source = a_source(np.arange(200), np.arange(300, 340))
    before = replace(source)
    make_splits(source, DataConfig(), 0)
    assert source == before


@pytest.mark.parametrize("more", [20, 300])
def test_a_data_set_that_grew_leaves_out_the_few_held_out_images_that_were_trained_on(
    more: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last ones held out change with the number of images."""
    before = make_splits(a_source(np.arange(400), np.arange(900, 930), holdout=40), DataConfig(calibration=20), 0)
    grown = make_splits(
        a_source(np.arange(400 + more), np.arange(900, 930), holdout=40 + more // 10), DataConfig(calibration=20), 0
    )
    trained = before.train.hashes
    left = without_seen(grown, trained)
    told = capsys.readouterr().err
    seen = {name: int(np.isin(getattr(grown, name).hashes, trained).sum()) for name in ("calibration", "validation")}
    for name, count in seen.items():
        part, kept = getattr(grown, name), getattr(left, name)
        if 0 < count <= 0.1 * len(part):
            assert len(kept) == len(part) - count and not np.isin(kept.hashes, trained).any()
            assert f"{count} of {len(part)} {name} images trained the checkpoint" in told
        else:
            assert kept is part
    assert left.train is grown.train and left.evaluation is grown.evaluation
    assert without_seen(grown, trained[:0]).calibration is grown.calibration


def test_few_seen_images_are_left_out_and_many_are_not() -> None:
    splits = make_splits(a_source(np.arange(400), np.arange(900, 930), holdout=80), DataConfig(calibration=40), 0)
    few, many = splits.calibration.hashes[:4], splits.calibration.hashes[:5]
    assert len(without_seen(splits, few).calibration) == 36 and len(without_seen(splits, many).calibration) == 40
    with pytest.raises(ToolkitError, match="judge"):
        check_trained_on(without_seen(splits, many), many)
    check_trained_on(without_seen(splits, few), few)


def test_a_class_without_a_test_image_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    make_splits(a_source(np.arange(90), np.arange(900, 930), classes=3), DataConfig(calibration=5), 0)
    assert "no test image" not in capsys.readouterr().err
    even = np.arange(900, 960)[np.arange(60) % 3 != 1]
    make_splits(a_source(np.arange(90), even, classes=3), DataConfig(calibration=5), 0)
    assert "no test image is of class 1: no figure" in capsys.readouterr().err
