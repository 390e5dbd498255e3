from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.artifacts import Proportion
from toolkit.reproduce.paper import Figure
from toolkit.reproduce.statistics import Mean, compare, first_repeated, holm

THREE = Mean((Proportion(80, 100), Proportion(84, 100), Proportion(88, 100)))
ONE = Mean((Proportion(8000, 10_000),))


def test_mean_and_standard_error_in_closed_form() -> None:
    # deviations of -4, 0 and 4 points: variance 32 / 2, so the error of the mean is 4 / sqrt(3)
    assert THREE.value == pytest.approx(84) and THREE.error == pytest.approx(4 / math.sqrt(3))
    assert str(THREE) == "84.00 ± 2.31"


def test_one_seed_has_no_error_but_an_interval() -> None:
    assert ONE.error is None and str(ONE) == "80.00 [79.20, 80.77]"
    assert ONE.sampling_error == pytest.approx(100 * math.sqrt(0.8 * 0.2 / 10_000), rel=0.02)


def test_errors_add_as_squares() -> None:
    found = compare(THREE, Figure(80, 1.5))
    assert found.difference == pytest.approx(4)
    assert found.error == pytest.approx(math.sqrt(16 / 3 + 2.25))
    assert found.parts == "our 3 seeds and the paper's"


@pytest.mark.parametrize("off", [0.0, 3.0, -8.0])
def test_welch_in_closed_form_where_both_sides_vary_alike(off: float) -> None:
    """Then it is Student's test with four degrees of freedom, whose tails are known."""
    t = abs(off) / (4 / math.sqrt(3) * math.sqrt(2))
    wanted = 1 - t * (t * t + 6) / (t * t + 4) ** 1.5
    assert compare(THREE, Figure(84 + off, 4 / math.sqrt(3))).p_value == pytest.approx(wanted)


def test_welch_in_closed_form_where_ours_hardly_varies() -> None:
    """Then the paper's three seeds leave two degrees of freedom, and three standard errors are not rare."""
    still = Mean(tuple(Proportion(8_000_000 + n, 10_000_000) for n in range(3)))
    found = compare(still, Figure(83, 1))
    assert found.p_value == pytest.approx(1 - 3 / math.sqrt(11), rel=1e-3) and not found.within


@pytest.mark.parametrize("ours", [ONE, Mean(THREE.shares, one_network=True), Mean((Proportion(80, 100),) * 3)])
def test_no_test_where_ours_tells_nothing_of_how_seeds_vary(ours: Mean) -> None:
    assert compare(ours, Figure(80, 1.5)).p_value is None and compare(THREE, Figure(80)).p_value is None


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx((0.06, 0.03, 0.06, 0.02))
    assert holm([0.9, 0.8]) == (1.0, 1.0) and holm([]) == ()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_one_comparison_and_all_of_them(p_values: list[float]) -> None:
    found = holm(p_values)
    for before, after in zip(p_values, found, strict=True):
        assert before <= after <= min(1.0, len(p_values) * before)
    assert holm(p_values[::-1]) == found[::-1]


@pytest.mark.parametrize(("theirs", "within"), [(84 + 2 * 5 - 0.01, True), (84 + 2 * 5 + 0.01, False)])
def test_within_two_standard_errors(theirs: float, within: bool) -> None:
    wanted = math.sqrt(25 - 16 / 3)  # with ours, a combined error of 5
    found = compare(THREE, Figure(theirs, wanted))
    assert found.error == pytest.approx(5) and found.within is within
    assert ("within" in str(found)) is within and ("OUTSIDE" in str(found)) is not within


def test_what_the_error_leaves_out_is_said() -> None:
    found = compare(Mean(ONE.shares, one_network=True), Figure(80.5))
    assert found.error == pytest.approx(0.4, rel=0.02) and found.parts == "test images alone"
    assert str(found) == "-0.50, within 2 x 0.41 (test images alone)"


@pytest.mark.parametrize(("theirs", "within"), [(80 + 2 * 0.4 - 0.01, True), (80 + 2 * 0.4 + 0.01, False)])
def test_one_seed_varies_as_the_papers(theirs: float, within: bool) -> None:
    """Both are of the same images, so the error that those cause is no excuse: of 0.4 points here, as it happens."""
    found = compare(ONE, Figure(theirs, 0.2))  # a deviation of 0.2 sqrt(3), and so 0.2 sqrt(3 + 1) with their error
    assert found.error == pytest.approx(0.4) and found.within is within
    assert found.parts == "the paper's, and the spread of its seeds for our one"


def test_one_seed_is_not_judged_where_nothing_tells_how_seeds_vary() -> None:
    found = compare(ONE, Figure(90))
    assert found.within is None and found.error is None
    assert str(found) == "-10.00, not judged (one seed, and the paper gives no error)"


def test_seeds_of_one_network_have_the_interval_of_the_images() -> None:
    shares = (Proportion(8810, 10_000), Proportion(8830, 10_000), Proportion(8820, 10_000))
    found = Mean(shares, one_network=True)
    assert found.error is None and str(found) == str(Mean((Proportion(8820, 10_000),)))
    assert compare(found, Figure(88.74)) == compare(Mean((Proportion(8820, 10_000),), True), Figure(88.74))
    assert compare(found, Figure(88.74)).within and not compare(Mean(shares), Figure(88.74)).within


def test_agreement_to_the_last_image_is_no_certainty() -> None:
    found = compare(Mean((Proportion(0, 10_000),) * 3), Figure(0.01))
    assert found.within and found.error == pytest.approx(0.0196, rel=0.01), "the same images three times"
    assert found.parts == "test images alone"


@pytest.mark.parametrize(("seeds", "repeated"), [((0, 1, 2), None), ((0, 1, 0), 0), ((3, 5, 5), 5), ((7,), None)])
def test_a_repeated_seed_is_found(seeds: tuple[int, ...], repeated: int | None) -> None:
    assert first_repeated(seeds) == repeated
