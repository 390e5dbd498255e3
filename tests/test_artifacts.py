from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from tests.toys import GREY, RGB, halves, small_network, wrap
from toolkit.artifacts import Normalized, Proportion, Splits
from toolkit.data.images import ArrayImages


@given(st.integers(1, 100_000), st.floats(0, 1))
def test_the_interval_is_wilsons(total: int, share: float) -> None:
    proportion = Proportion(round(share * total), total)
    theirs = stats.binomtest(proportion.correct, total).proportion_ci(method="wilson")
    assert math.isclose(proportion.low, theirs.low, abs_tol=1e-9)
    assert math.isclose(proportion.high, theirs.high, abs_tol=1e-9)
    assert 0 <= proportion.low <= proportion.value + 1e-12 and proportion.value - 1e-12 <= proportion.high <= 1


@pytest.mark.parametrize(("correct", "total"), [(-1, 2), (3, 2), (0, 0)])
def test_no_proportion(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        Proportion(correct, total)


def test_a_proportion_of_flags_and_its_words() -> None:
    proportion = Proportion.of(torch.tensor([True, False, True, True]))
    assert (proportion.correct, proportion.total) == (3, 4)
    assert str(proportion).startswith("75.00% [") and str(proportion).endswith("] n=4")
    assert set(proportion.as_dict()) == {"correct", "total", "value", "low", "high"}


def test_batches_give_every_image_once_in_order() -> None:
    split = halves(10)
    batches = list(split.batches(4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    images = torch.cat([batch.images for batch in batches])
    assert torch.equal(images * 255, torch.from_numpy(split.images.pixels(split.indices)).float())
    assert torch.cat([batch.labels for batch in batches]).tolist() == split.labels.tolist()
    assert images.dtype == torch.float32 and float(images.min()) >= 0 and float(images.max()) <= 1


def test_a_digest_names_the_set_whatever_its_order() -> None:
    split = halves(10)
    turned = type(split)(split.images, split.indices[::-1].copy())
    assert split.digest == turned.digest != split.first(9).digest
    assert len(split.first(99)) == 10
    assert split.labelled_digest == turned.labelled_digest != split.first(9).labelled_digest
    images = ArrayImages("b", ("left", "right"), split.images.pixels(split.indices), 1 - split.labels)
    other = replace(split, images=images)
    assert split.digest == other.digest and split.labelled_digest != other.labelled_digest


def test_the_record_counts_every_part() -> None:
    split = halves(10)
    record = Splits(split, split.first(1), split.first(2), split.first(3), dropped=7).record()
    counts = [record[part]["images"] for part in ("train", "calibration", "validation", "evaluation")]
    assert counts == [10, 1, 2, 3] and record["dropped_duplicates"] == 7


def test_normalisation_is_part_of_the_network() -> None:
    images = torch.rand(2, 3, 4, 4)
    normalised = Normalized(nn.Identity(), RGB)(images)
    for channel in range(3):
        assert torch.allclose(normalised[:, channel], (images[:, channel] - RGB.mean[channel]) / RGB.std[channel])


def test_normalisation_adds_no_key_to_the_weights() -> None:
    network = small_network()
    assert set(Normalized(network, GREY).state_dict()) == {f"network.{key}" for key in network.state_dict()}


def test_prediction_is_in_evaluation_mode_and_leaves_the_mode() -> None:
    model = wrap(nn.Sequential(small_network(batch_norm=True), nn.Dropout(0.9)), classes=2, shape=(1, 8, 8))
    images = torch.rand(4, 1, 8, 8)
    expected = model.predict(images)
    model.module.train()
    before = {key: value.clone() for key, value in model.network.state_dict().items()}
    assert torch.equal(model.predict(images), expected)
    assert model.module.training
    assert all(torch.equal(value, before[key]) for key, value in model.network.state_dict().items())


def test_a_copy_shares_no_weights() -> None:
    model = wrap(small_network(), classes=2, shape=(1, 8, 8))
    copied = model.copy()
    with torch.no_grad():
        next(copied.network.parameters()).fill_(np.pi)
    assert not torch.equal(next(model.network.parameters()), next(copied.network.parameters()))
