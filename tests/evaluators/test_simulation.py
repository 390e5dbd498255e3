from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.toys import halves, linear_model, small_network, wrap
from toolkit.attacks.pgd import pgd
from toolkit.attacks.surrogate import Surrogate
from toolkit.attacks.threat import PgdPlan, ThreatModel
from toolkit.errors import ToolkitError
from toolkit.evaluators.fake_quantised import fake_quantise
from toolkit.evaluators.rounding import quantise_weights
from toolkit.evaluators.simulation import Bits, parse_bits, simulate

SHAPE = (1, 8, 8)
PLAN = PgdPlan("pixel", ThreatModel("linf", 0.1, "pixels", clip=True), 4, 0.05, random_start=False)


def test_bits_are_of_both_or_of_each_apart() -> None:
    assert parse_bits("8") == Bits(8, 8) and parse_bits(" 4/8 ") == Bits(4, 8) and parse_bits("1/32") == Bits(1, 32)
    assert Bits(4, 8).label == "4/8" and Bits(32, 32).floating and not Bits(8, 32).floating


@pytest.mark.parametrize("text", ["0", "17", "31", "8/0", "8/8/8", "int8", "", "-1", "4.5"])
def test_bits_that_cannot_be_simulated_are_refused(text: str) -> None:
    with pytest.raises(ToolkitError) as caught:
        parse_bits(text)
    assert caught.value.found == f"'{text}'" and "--bits 4/8,8/32" in caught.value.fix


@pytest.mark.parametrize(("weights", "activations"), [(4, None), (None, 4), (1, None)])
def test_either_side_stays_float(weights: int | None, activations: int | None) -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    model, split = linear_model(weight, SHAPE), halves(20)
    images = split.take(np.arange(20, dtype=np.int64)).images
    found = fake_quantise(model, split, weight_bits=weights, activation_bits=activations).predict(images)
    values = (images.reshape(20, 64) - 0.5) / 0.5
    if activations is not None:  # pixels -1 to 1 in 16 values, 0 among them
        distances = (found - values @ weight.T).abs().max()
        assert 1e-3 < distances < 64 * weight.abs().max() * (2 / 14) / 2
    else:
        assert weights is not None
        assert torch.allclose(found, values @ quantise_weights(weight, weights).T, atol=1e-5)


def test_binary_weights_are_signs_with_the_scale_that_fits_best() -> None:
    weight = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    found = quantise_weights(weight, 1)
    for row, rounded in zip(weight, found, strict=True):
        assert torch.equal(rounded.sign(), row.sign()) and rounded.abs().unique().numel() == 1
        scale = float(rounded.abs().max())
        errors = [float((row - row.sign() * s).square().sum()) for s in (0.99 * scale, scale, 1.01 * scale)]
        assert errors[1] < min(errors[0], errors[2])


def test_every_precision_is_scored_under_its_own_attack_and_under_that_on_the_float_network() -> None:
    torch.manual_seed(0)
    model, split = wrap(small_network(), classes=2, shape=SHAPE), halves(40)
    rows = simulate(model, split, split, [Bits(8, 8), Bits(2, 8), Bits(8, 8)], PLAN, precision="float32")
    assert [row.bits.label for row in rows] == ["32/32", "8/8", "2/8"]
    batch = split.take(np.arange(40, dtype=np.int64))
    form = fake_quantise(model, split, weight_bits=2)
    clean = form.predict(batch.images).argmax(1) == batch.labels
    left = {}
    for name, victim in (("own", form), ("transfer", model)):
        surrogate = Surrogate(victim.module, model.spec.normalization, "float32", input_shape=SHAPE)
        attacked = pgd(surrogate, batch.images, batch.labels, PLAN, torch.Generator())
        left[name] = clean & (form.predict(attacked).argmax(1) == batch.labels)
    last = rows[-1]
    assert last.clean.correct == int(clean.sum())
    assert last.robust_own.correct == int(left["own"].sum())
    assert last.robust_transfer.correct == int(left["transfer"].sum())
    assert last.robust.correct == int((left["own"] & left["transfer"]).sum())
    reference = rows[0]
    assert reference.robust == reference.robust_own == reference.robust_transfer and reference.clean_test.p_value == 1
    gained = last.clean_test.only_second - last.clean_test.only_first
    assert gained == last.clean.correct - reference.clean.correct
    assert [row.as_dict()["simulated"] for row in rows] == [False, True, True]
