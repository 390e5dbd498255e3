"""The protocol `paper` against what is written of the paper's runs."""

from __future__ import annotations

import pytest

from toolkit.artifacts import Normalization
from toolkit.reproduce import paper, targets
from toolkit.reproduce.protocol import CIFAR10, FASHION_MNIST, PROTOCOLS, Experiment
from toolkit.reproduce.recipes import plan_of
from toolkit.training.schedules import SCHEDULES

PAPER = PROTOCOLS["paper"]


@pytest.mark.parametrize("objective", ["standard", "adversarial"])
def test_training_from_scratch(objective: str) -> None:
    config = PAPER.training("base", objective)
    assert (config.epochs, config.batch_size, config.learning_rate) == (20, 64, 0.1)
    assert (config.momentum, config.weight_decay, config.ema, config.augment) == (0, 0, 0, False)
    assert config.keep == "last" and not PAPER.holds_out
    rates = [config.learning_rate * SCHEDULES[config.schedule](epoch * 937, 20 * 937, 937) for epoch in range(20)]
    assert rates == [0.1] * 4 + [pytest.approx(0.01)] * 16
    if objective == "adversarial":
        assert (config.attack_steps, config.attack_schedule) == (20, "threat")


def test_fine_tuning() -> None:
    pruned, quantised = PAPER.training("after_pruning", "adversarial"), PAPER.training("with_quantisation", "standard")
    assert (pruned.epochs, pruned.learning_rate, pruned.momentum) == (3, 0.1, 0)
    assert (quantised.epochs, quantised.learning_rate, quantised.momentum) == (3, 0.01, 0.9)
    for config in (pruned, quantised):  # the rate never falls within three epochs
        assert SCHEDULES[config.schedule](3 * 937 - 1, 3 * 937, 937) == 1


def test_quantisation_aware_training_keeps_its_rate() -> None:
    config = PAPER.training("with_rounding", "adversarial")
    assert (config.epochs, config.learning_rate, config.momentum, config.qat_from) == (20, 0.01, 0.9, 0)
    assert all(SCHEDULES[config.schedule](epoch * 937, 20 * 937, 937) == 1 for epoch in range(20))
    assert PAPER.qat_extremes, "as its library, whose ranges follow the least and largest values"


@pytest.mark.parametrize(("experiment", "eps"), [(FASHION_MNIST, 0.1), (CIFAR10, 8 / 255)])
def test_the_attack(experiment: Experiment, eps: float) -> None:
    theirs, sound = plan_of("pgd-paper", experiment), plan_of("pgd-pixel", experiment)
    assert (theirs.steps, theirs.step_size, theirs.random_start) == (20, 0.01, False)
    assert (theirs.threat.eps, theirs.threat.space, theirs.threat.clip) == (eps, "normalised", False)
    assert theirs.threat.margin(Normalization((0.5,), (0.5,))) == pytest.approx(eps / 2)
    assert (sound.threat.eps, sound.threat.space, sound.threat.clip) == (eps, "pixels", True)
    assert plan_of("pgd-l2", experiment).threat.norm == "l2"


def test_the_fast_protocol_takes_as_many_epochs() -> None:
    for stage in ("base", "after_pruning", "with_quantisation"):
        ours, theirs = (PROTOCOLS[name].training(stage, "adversarial") for name in ("fast", "paper"))
        assert ours.epochs == theirs.epochs and ours.momentum == 0.9 and ours.schedule == "one-cycle"


@pytest.mark.parametrize(
    ("experiment", "numbers"),
    [
        (FASHION_MNIST, paper.FASHION_MNIST_COMPRESSED),
        (FASHION_MNIST, paper.FASHION_MNIST_APPENDIX),
        (CIFAR10, paper.CIFAR10_COMPRESSED),
        (CIFAR10, paper.CIFAR10_APPENDIX),
    ],
)
def test_every_number_of_the_paper_finds_its_cell(
    experiment: Experiment, numbers: dict[paper.CellKey, paper.PaperCell]
) -> None:
    cells = targets.renumbered([*targets.baselines(experiment), *targets.compressed(experiment, numbers)], numbers)
    assert {(cell.row, cell.column): cell.paper for cell in cells} == dict(numbers)
    main = [cell for cell in targets.compressed(experiment, numbers) if cell.recipe.pruned]
    assert {cell.recipe.pruned for cell in main} == {0.8 if experiment is FASHION_MNIST else 0.5}


def test_the_appendix_differs_where_it_does() -> None:
    key = (paper.PRUNED_STANDARD, "adversarial")
    main, appendix = paper.FASHION_MNIST_COMPRESSED[key], paper.FASHION_MNIST_APPENDIX[key]
    assert (main.robust.error, appendix.robust.error) == (2.33, 2.23) and main.test == appendix.test
    assert paper.CIFAR10_APPENDIX[key].test == paper.Figure(82.62, 0.17)
