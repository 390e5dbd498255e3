from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.attacks.problems import Judge
from toolkit.attacks.survivors import Survivors, both, narrowed

IMAGES = torch.zeros(5, 1, 2, 2)


def attacked(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def test_only_suspects_are_judged_and_only_settled_ones_leave() -> None:
    judge = Judge({1, 3})
    survivors = Survivors(IMAGES, judge)
    suspected = torch.tensor([True, True, False, False, True])
    keep = survivors.submit(attacked([1, 2, 3, 4, 5]), suspected)
    assert keep is not None and keep.tolist() == [True, False, True, True, True]
    assert set(judge.seen) == {0, 1, 4} and survivors.positions.tolist() == [0, 2, 3, 4]
    keep = survivors.submit(attacked([6, 7, 8, 9]), torch.ones(4, dtype=torch.bool))
    assert keep is not None and keep.tolist() == [True, True, False, True] and len(survivors) == 3
    result = survivors.finish(attacked([10, 11, 12]))
    assert result[:, 0, 0, 0].tolist() == [10, 2, 11, 8, 12]


def test_without_suspects_or_a_judge_nobody_is_asked_and_all_remain() -> None:
    judge = Judge({0})
    assert Survivors(IMAGES, judge).submit(attacked([1] * 5), torch.zeros(5, dtype=torch.bool)) is None
    assert judge.seen == {}
    assert Survivors(IMAGES, None).submit(attacked([1] * 5), torch.ones(5, dtype=torch.bool)) is None
    assert Survivors(IMAGES, Judge(set())).submit(attacked([1] * 5), torch.ones(5, dtype=torch.bool)) is None


def test_who_leaves_is_not_judged_and_keeps_what_it_had() -> None:
    judge = Judge(set())
    survivors = Survivors(IMAGES, judge)
    assert survivors.leave(attacked([1] * 5), torch.zeros(5, dtype=torch.bool)) is None
    keep = survivors.leave(attacked([1, 2, 3, 4, 5]), torch.tensor([False, True, False, False, True]))
    assert keep is not None and keep.tolist() == [True, False, True, True, False] and judge.seen == {}
    assert survivors.positions.tolist() == [0, 2, 3]
    assert survivors.finish(attacked([6, 7, 8]))[:, 0, 0, 0].tolist() == [6, 2, 7, 8, 5]


def test_two_submissions_in_one() -> None:
    first, second = torch.tensor([True, False, True, True]), torch.tensor([False, True, True])
    joined = both(first, second)
    assert joined is not None and joined.tolist() == [False, False, True, True]
    assert both(None, second) is second and both(first, None) is first and both(None, None) is None


def test_the_images_themselves_are_never_written_to() -> None:
    survivors = Survivors(IMAGES, Judge({0}))
    survivors.submit(attacked([1] * 5), torch.ones(5, dtype=torch.bool))
    survivors.finish(attacked([2] * 4))
    assert float(IMAGES.abs().max()) == 0


def test_all_rows_of_a_state_are_narrowed_alike() -> None:
    @dataclass
    class State:
        images: Tensor
        step: Tensor

    state = narrowed(State(IMAGES, torch.arange(5)), torch.tensor([True, False, False, True, False]))
    assert state.images.shape == (2, 1, 2, 2) and state.step.tolist() == [0, 3]
