"""Who judges the points that minimum-norm attacks find, and in which form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.attacks.problems import Hyperplane, Judge, a_hyperplane
from toolkit.attacks.minimum_norm import MinimumNorm, Search, require_norm
from toolkit.attacks.pgd import largest_violation
from toolkit.attacks.projections import NORM
from toolkit.attacks.survivors import Settle
from toolkit.attacks.threat import ThreatModel
from toolkit.errors import ToolkitError

THREAT = ThreatModel("l2", 0.5, "pixels", clip=False)


def a_search(settle: Settle | None, threat: ThreatModel = THREAT) -> tuple[Hyperplane, Search]:
    plane = a_hyperplane(4)
    return plane, Search(plane.surrogate(), plane.images, plane.labels, threat, settle)


def moved(plane: Hyperplane, lengths: list[float]) -> Tensor:
    """The images, moved across the boundary by l2 lengths."""
    along = plane.weight / NORM["l2"](plane.weight).view(-1, 1, 1, 1)
    return plane.images + torch.tensor(lengths).view(-1, 1, 1, 1) * along


def lengths_of(plane: Hyperplane, seen: list[Tensor], position: int) -> list[float]:
    return [float((image - plane.images[position]).norm()) for image in seen]


ALL = torch.ones(4, dtype=torch.bool)


def test_the_closest_points_that_fool_are_kept() -> None:
    plane, search = a_search(None)
    search.record(moved(plane, [0.4, 0.4, 0.4, 0.4]), torch.tensor([True, True, True, False]))
    search.record(moved(plane, [0.3, 0.5, 0.1, 0.1]), torch.tensor([True, True, False, False]))
    result = search.finish()
    assert torch.allclose(result.norms[:3], torch.tensor([0.3, 0.4, 0.4]))
    assert result.found.tolist() == [True, True, True, False] and float(result.norms[3]) == torch.inf
    assert torch.allclose(result.closest, moved(plane, [0.3, 0.4, 0.4, 0.0]), atol=1e-6)


def test_the_direction_is_judged_at_the_full_radius_before_the_point_itself() -> None:
    judge = Judge(set())
    plane, search = a_search(judge)
    search.record(moved(plane, [0.1, 0.2, 0.3, 0.8]), ALL)
    assert search.settle(everything=False) is None
    for position, exact in enumerate([0.1, 0.2, 0.3]):
        assert lengths_of(plane, judge.seen[position], position) == pytest.approx([0.5, exact], abs=1e-5)
    assert 3 not in judge.seen, "what lies beyond the radius waits until the end"


def test_first_points_are_judged_at_once_and_closer_ones_when_everything_is() -> None:
    judge = Judge(set())
    plane, search = a_search(judge)
    search.record(moved(plane, [0.4] * 4), ALL)
    search.settle(everything=False)
    search.record(moved(plane, [0.3, 0.45, 0.3, 0.3]), ALL)
    search.settle(everything=False)
    assert all(len(seen) == 2 for seen in judge.seen.values())
    search.settle(everything=True)
    assert [len(judge.seen[position]) for position in range(4)] == [4, 2, 4, 4]
    search.settle(everything=True)
    assert [len(judge.seen[position]) for position in range(4)] == [4, 2, 4, 4], "nothing is judged twice"


def test_settled_images_leave_with_what_was_judged_whichever_of_the_two_it_was() -> None:
    class Picky:
        """Takes image 0 at the full radius, image 2 only at the point itself."""

        def __call__(self, attacked: Tensor, positions: Tensor) -> Tensor:
            sizes = NORM["l2"](attacked - plane.images[positions])
            return ((positions == 0) & (sizes > 0.45)) | ((positions == 2) & (sizes < 0.45))

    plane, search = a_search(None)
    search = Search(plane.surrogate(), plane.images, plane.labels, THREAT, Picky())
    search.record(moved(plane, [0.2] * 4), ALL)
    keep = search.settle(everything=False)
    assert keep is not None and keep.tolist() == [False, True, False, True]
    assert search.positions.tolist() == [1, 3] and len(search) == 2
    search.record(moved(plane, [0.1] * 4)[[1, 3]], ALL[:2])
    result = search.finish()
    sizes = NORM["l2"](result.attacked - plane.images)
    assert sizes[[0, 2]].tolist() == pytest.approx([0.5, 0.2], abs=1e-5)
    assert torch.allclose(result.norms, torch.tensor([0.2, 0.1, 0.2, 0.1]), atol=1e-6)


def test_points_beyond_the_radius_are_judged_at_the_end_brought_onto_it() -> None:
    judge = Judge({1})
    plane, search = a_search(judge)
    search.record(moved(plane, [0.9] * 4), torch.tensor([True, True, True, False]))
    result = search.finish()
    assert set(judge.seen) == {0, 1, 2}
    assert lengths_of(plane, judge.seen[0], 0) == pytest.approx([0.5, 0.5], abs=1e-5)
    assert torch.equal(result.attacked[1], judge.seen[1][0])
    assert largest_violation(result.attacked, plane.images, THREAT, plane.model.spec.normalization) < 1e-5
    assert torch.equal(result.attacked[3], plane.images[3]), "where nothing was found the image stays"


def test_what_is_scored_fools_the_surrogate_where_stretching_would_not() -> None:
    """With clipping, a longer perturbation may point elsewhere: the point itself is given then."""
    plane, _ = a_search(None)
    threat = ThreatModel("l2", 5.0, "pixels", clip=True)
    search = Search(plane.surrogate(), plane.images, plane.labels, threat, None)
    distance = plane.distance("l2", torch.ones(1))
    exact = moved(plane, (distance * 1.01).tolist())
    search.record(exact, ALL)
    result = search.finish()
    fooled = plane.model.predict(result.attacked).argmax(dim=1) != plane.labels
    assert bool(fooled.all())


def test_an_image_that_is_wrong_from_the_start_has_no_direction() -> None:
    plane = a_hyperplane(4)
    result = Search(plane.surrogate(), plane.images, 1 - plane.labels, THREAT, None).finish()
    assert torch.equal(result.norms, torch.zeros(4)) and torch.equal(result.attacked, plane.images)


def test_where_a_graph_judges_an_image_that_the_surrogate_is_wrong_about_is_searched_for_too() -> None:
    """The graph may be right about it."""
    plane, judge = a_hyperplane(4), Judge(set())
    search = Search(plane.surrogate(), plane.images, 1 - plane.labels, THREAT, judge)
    assert bool(search.norms.isinf().all())
    points = moved(plane, [0.5 * float(THREAT.eps)] * 4)
    search.record(points, ALL)
    search.settle(everything=True)
    assert set(judge.seen) == set(range(4))
    assert not any(torch.equal(seen[0], plane.images[position]) for position, seen in judge.seen.items())


def test_points_that_are_no_numbers_are_not_kept() -> None:
    plane, search = a_search(None)
    search.record(torch.full_like(plane.images, torch.nan), ALL)
    search.record(torch.full_like(plane.images, torch.inf), ALL)
    assert not bool(search.finish().found.any())


def test_norms_for_which_an_attack_is_not_defined_are_refused() -> None:
    require_norm("an attack", THREAT, ("linf", "l2"))
    with pytest.raises(ToolkitError, match="an attack is not defined for l2") as caught:
        require_norm("an attack", THREAT, ("linf", "l1"))
    assert caught.value.found == "--norm l2" and "--norm linf or l1" in caught.value.fix


def test_found_is_what_has_a_finite_norm() -> None:
    result = MinimumNorm(torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1), torch.tensor([0.0, torch.inf]))
    assert result.found.tolist() == [True, False]
