"""Alarms: what makes a robustness figure suspect. They stand beside the figure, never in a footnote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from toolkit.artifacts import Proportion
from toolkit.evaluators.fidelity import Fidelity
from toolkit.evaluators.probes import GradientProbes, InputProbes, Point
from toolkit.evaluators.scoring import SurrogateName, TargetName
from toolkit.evaluators.transfer import ColumnTest
from toolkit.evaluators.worst_case import MASKED_FEWEST, MASKED_SHARE, PassRecord, found_by_queries
from toolkit.exporters.end_to_end import EndToEndComparison
from toolkit.statistics import Mcnemar

GRAPH_WORDS: Mapping[TargetName, str] = {"torch": "network", "fp32": "float twin", "deployed": "deployed graph"}

END_TO_END_PROBABILITY = 0.1
"""By so much at most may a probability of the end-to-end graph differ where no image decoder is involved."""

LIMITS: Mapping[str, float] = {
    "integer_above_float": 0.003,
    "more_steps_weaker": 0.01,
    "larger_radius_weaker": 0.02,  # of the same number of steps each is longer: PGD-20 is coarser at twice the radius
    "large_radius_survived": 0.05,
    "query_beats_gradient": MASKED_SHARE,
    "zero_gradients": 0.02,
    "loss_not_rising": 0.05,
    "random_outputs": 0.0,
    "disagreement_under_attack": 0.03,
    "wrong_input": 0.05,
    "surrogate_unfaithful": 0.01,
    "end_to_end_differs": END_TO_END_PROBABILITY,
}
"""Each check's value must not be above its limit; shares of images, but for the last (a probability)."""

FEWEST, FEW = MASKED_FEWEST, 0.1
"""So few images prove nothing, even where they are a larger share of a small sample than a check allows; but more than
the second, a share, is too much of any sample. See `Check.images`."""
ROUNDING = 1e-9
"""Differences of shares that lie at their limit are above it by this in floating point, at most."""


@dataclass(frozen=True, slots=True)
class Check:
    """One way in which a figure could be wrong, measured."""

    name: str
    value: float
    message: str
    """What it would mean, as it is shown when the limit is passed."""
    images: int | None = None
    """Of how many images `value` is a share; None: the limit is as it stands, however few they are."""

    @property
    def limit(self) -> float:
        return max(LIMITS[self.name], min(FEW, FEWEST / self.images) if self.images else 0.0)

    @property
    def alarming(self) -> bool:
        return self.value > self.limit + ROUNDING


def alarms(checks: Iterable[Check]) -> tuple[Check, ...]:
    """Those that do not hold."""
    return tuple(check for check in checks if check.alarming)


def integer_above_float(robust: Mapping[str, Proportion]) -> tuple[Check, ...]:
    """Rounding and clipping hide gradients but do not make a network robust: a gain over the float twin is an alarm.

    Args:
        robust: worst-case robust accuracy; nothing is checked without the keys `fp32` and `deployed`.
    """
    if not {"fp32", "deployed"} <= set(robust):
        return ()
    gain = robust["deployed"].value - robust["fp32"].value
    message = (
        f"the integer graph looks {100 * gain:.2f} points more robust than its float twin under the same attacks: "
        "they transfer badly to it or its input quantiser clips them; do not rely on the gain"
    )
    return (Check("integer_above_float", gain, message),)


def end_to_end_differs(found: EndToEndComparison | None) -> tuple[Check, ...]:
    """The preprocessing inside model.e2e.onnx must be that of torchvision, on which all figures rest."""
    if found is None:
        return ()
    message = (
        f"model.e2e.onnx gives probabilities up to {found.lossless_difference:.3f} away from torchvision's "
        f"preprocessing before the same network (same label {found.lossless_agreement}); "
        "the figures hold for model.onnx alone"
    )
    return (Check("end_to_end_differs", found.lossless_difference, message),)


def input_checks(found: InputProbes) -> tuple[Check, ...]:
    """The graph must be deterministic, and want its images in the form in which it gets them."""
    form, best = max(found.others.items(), key=lambda item: item[1].value)
    gain = best.value - found.accuracy.value
    return (
        Check(
            "wrong_input",
            gain,
            f"the graph classifies {form} better ({best}) than pixels in [0, 1] ({found.accuracy}): the normalisation "
            "or the pixel range is not the one it was trained with (--mean, --std); the figures mean nothing",
        ),
        Check(
            "random_outputs",
            found.changed.value,
            f"predicted again, or in other company, images get another label ({found.changed}): the graph is random or "
            "still in training mode, and attacks on it need averaged gradients",
        ),
    )


def gradient_checks(found: GradientProbes, guessing: float) -> tuple[Check, ...]:
    """An attack that has gradients to follow gets stronger with steps and radius, and wins in the end.

    Args:
        found: the probes.
        guessing: accuracy that guessing reaches.
    """
    last = found.curve[-1]
    return (
        _rise("more_steps_weaker", found.ladder),
        _rise("larger_radius_weaker", found.curve),
        Check(
            "large_radius_survived",
            last.robust.value - guessing,
            f"at a radius of {last.eps:g} the attack may do nearly anything, and {last.robust} stay right: "
            "its gradients are masked",
            last.robust.total,
        ),
        Check(
            "zero_gradients",
            found.zero_gradients.value,
            f"the loss has no gradient at {found.zero_gradients} of the images: the attack cannot move them",
            found.zero_gradients.total,
        ),
        Check(
            "loss_not_rising",
            found.loss_fell.value,
            f"the attack lowers the loss of {found.loss_fell} of the images that it should raise: gradients mislead it",
            found.loss_fell.total,
        ),
    )


def _rise(name: str, points: Sequence[Point]) -> Check:
    first, second = max(pairwise(points), key=lambda pair: pair[1].robust.value - pair[0].robust.value)
    weak, strong = (f"{point.steps} steps at a radius of {point.eps:g}" for point in (first, second))
    message = (
        f"{strong} leave more images right than {weak} ({second.robust} against {first.robust}): "
        "the stronger attack is the weaker one, so neither finds the worst case"
    )
    return Check(name, second.robust.value - first.robust.value, message, second.robust.total)


def query_beats_gradient(passes: Sequence[PassRecord], images: int) -> tuple[Check, ...]:
    """What a random search still finds after all gradient attacks, these should have found.

    Args:
        passes: of the worst case, in their order; nothing is checked if none of them searched by queries.
        images: number of evaluation images.
    """
    fooled = found_by_queries(passes)
    if not fooled:
        return ()
    graph, most = max(fooled.items(), key=lambda row: row[1])
    share = most / images
    message = (
        f"a random search by queries to the {GRAPH_WORDS[graph]} fools {share:.2%} of the images that no gradient "
        "attack could: the surrogates' gradients do not show the way on it; do not rely on the gradient attacks"
    )
    return (Check("query_beats_gradient", share, message, images),)


def disagreement_under_attack(columns: Sequence[ColumnTest], clean: Mcnemar | None, images: int) -> tuple[Check, ...]:
    """Float and integer graph must not part under attack more than on clean images.

    Args:
        columns: tests between targets under attack, of every surrogate.
        clean: the test between the float twin and the deployed graph on clean images; None where one is missing.
        images: number of evaluation images.
    """
    wanted: tuple[TargetName, TargetName] = ("fp32", "deployed")
    parted = [column for column in columns if (column.first, column.second) == wanted]
    if not parted or clean is None:
        return ()
    worst = max(parted, key=lambda column: _discordant(column.test))
    attacked, before = _discordant(worst.test) / images, _discordant(clean) / images
    message = (
        f"under {worst.attack} on {worst.surrogate} exactly one of float twin and integer graph is right on "
        f"{attacked:.2%} of the images, clean on {before:.2%}: the attack meets a difference between them"
    )
    return (Check("disagreement_under_attack", attacked - before, message, images),)


def _discordant(test: Mcnemar) -> int:
    return test.only_first + test.only_second


def unfaithful_surrogate(name: SurrogateName, found: Fidelity) -> tuple[Check, ...]:
    """Attacks made on a twin say little of a graph that answers otherwise."""
    agreements = [share for share in (found.agreement_clean, found.agreement_attacked) if share is not None]
    worst = min(agreements, key=lambda share: share.value)
    message = (
        f"the {name} of the deployed graph gives the same label on {worst} of the images only: figures of attacks made "
        "on it are invalid as they stand, and the worst case rests on the other surrogates and on queries"
    )
    return (Check("surrogate_unfaithful", 1 - worst.value, message),)
