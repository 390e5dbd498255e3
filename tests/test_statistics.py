from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from toolkit.statistics import Mcnemar, mcnemar


def flags(both: int, only_first: int, only_second: int, neither: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [(1, 1)] * both + [(1, 0)] * only_first + [(0, 1)] * only_second + [(0, 0)] * neither
    columns = torch.tensor(pairs, dtype=torch.bool).reshape(-1, 2)
    return columns[:, 0], columns[:, 1]


def test_closed_forms() -> None:
    assert mcnemar(*flags(5, 0, 0, 2)) == Mcnemar(0, 0, 1.0)
    assert mcnemar(*flags(5, 3, 3)) == Mcnemar(3, 3, 1.0)
    assert mcnemar(*flags(0, 0, 6, 1)) == Mcnemar(0, 6, 2 / 2**6)
    assert mcnemar(*flags(9, 8, 1)).p_value == 2 * (1 + 9) / 2**9
    assert mcnemar(*flags(1, 1, 8)).as_dict() == {"only_first": 1, "only_second": 8, "p_value": 20 / 512}


@given(both=st.integers(0, 5), only_first=st.integers(0, 200), only_second=st.integers(0, 200))
def test_it_is_the_binomial_test_of_the_discordant_images(both: int, only_first: int, only_second: int) -> None:
    found = mcnemar(*flags(both, only_first, only_second))
    assert (found.only_first, found.only_second) == (only_first, only_second)
    if only_first + only_second:
        assert found.p_value == pytest.approx(binomtest(only_first, only_first + only_second).pvalue, rel=1e-9)


def test_many_images_are_no_overflow() -> None:
    found = mcnemar(*flags(0, 6000, 4000))
    assert 0 < found.p_value < 1e-80
    assert found.p_value == pytest.approx(binomtest(6000, 10_000).pvalue, rel=1e-9)


def test_flags_of_other_images_are_refused() -> None:
    first, second = flags(2, 1, 1)
    with pytest.raises(ValueError, match="no flags of the same images"):
        mcnemar(first, second[:-1])
    with pytest.raises(ValueError, match="no flags of the same images"):
        mcnemar(first.float(), second)
