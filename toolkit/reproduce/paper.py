"""The paper's numbers, in per cent: Thorsteinsson, Henriksen, Chen, Selvan 2024, arXiv 2403.09441."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PAPER_SEEDS = 3

CellKey = tuple[str, str]
"""Row and fine-tuning: `none`, `standard` or `adversarial`."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean and its standard error over three seeds, in per cent."""

    mean: float
    error: float | None = None
    """None where the paper gives none."""


@dataclass(frozen=True, slots=True)
class PaperCell:
    """Accuracy on test images, and on the same under PGD-20."""

    test: Figure
    robust: Figure


def _cell(test: float, robust: float, test_error: float | None = None, robust_error: float | None = None) -> PaperCell:
    return PaperCell(Figure(test, test_error), Figure(robust, robust_error))


STANDARD, ROBUST = "standard", "robust"
PRUNED_STANDARD, PTQ_STANDARD = "pruned, from standard", "PTQ int8, from standard"
PRUNED_ROBUST, PTQ_ROBUST = "pruned, from robust", "PTQ int8, from robust"
QAT_ROBUST = "QAT int8, robust"
COMPRESSED = (PRUNED_STANDARD, PTQ_STANDARD, PRUNED_ROBUST, PTQ_ROBUST)

FASHION_MNIST_BASELINES: Mapping[CellKey, PaperCell] = {
    (STANDARD, "none"): _cell(90.49, 4.26, 0.22, 2.36),
    (ROBUST, "none"): _cell(87.87, 82.51, 0.33, 0.16),
    (STANDARD, "adversarial"): _cell(85.37, 77.53, 0.44, 1.17),
}
CIFAR10_BASELINES: Mapping[CellKey, PaperCell] = {
    (STANDARD, "none"): _cell(88.74, 0.05),
    (ROBUST, "none"): _cell(85.72, 57.22, 0.27, 0.91),
}
FASHION_MNIST_COMPRESSED: Mapping[CellKey, PaperCell] = {
    (PRUNED_STANDARD, "none"): _cell(33.21, 0.33),
    (PRUNED_STANDARD, "standard"): _cell(88.94, 0.28),
    (PRUNED_STANDARD, "adversarial"): _cell(83.91, 76.74, 1.53, 2.33),
    (PTQ_STANDARD, "none"): _cell(90.40, 11.72),
    (PTQ_STANDARD, "standard"): _cell(90.07, 7.00),
    (PTQ_STANDARD, "adversarial"): _cell(84.93, 79.43, 0.71, 0.59),
    (PRUNED_ROBUST, "none"): _cell(16.68, 14.40),
    (PRUNED_ROBUST, "standard"): _cell(87.71, 16.26),
    (PRUNED_ROBUST, "adversarial"): _cell(84.53, 78.84, 1.21, 2.04),
    (PTQ_ROBUST, "none"): _cell(87.90, 82.80),
    (PTQ_ROBUST, "standard"): _cell(89.54, 25.66),
    (PTQ_ROBUST, "adversarial"): _cell(87.51, 82.65, 0.04, 0.11),
    (QAT_ROBUST, "adversarial"): _cell(88.27, 81.18, 0.42, 1.08),
}
"""The appendix repeats this table with one other value: the robust accuracy of the pruned network from standard
training, adversarially fine-tuned, has the error 2.23."""
FASHION_MNIST_APPENDIX: Mapping[CellKey, PaperCell] = {
    **FASHION_MNIST_COMPRESSED,
    (PRUNED_STANDARD, "adversarial"): _cell(83.91, 76.74, 1.53, 2.23),
}
CIFAR10_COMPRESSED: Mapping[CellKey, PaperCell] = {
    (PRUNED_STANDARD, "none"): _cell(86.68, 0.00),
    (PRUNED_STANDARD, "standard"): _cell(89.74, 0.00),
    (PRUNED_STANDARD, "adversarial"): _cell(81.98, 56.99, 0.71, 0.11),
    (PTQ_STANDARD, "none"): _cell(88.23, 0.09),
    (PTQ_STANDARD, "standard"): _cell(90.75, 0.01),
    (PTQ_STANDARD, "adversarial"): _cell(84.21, 60.03, 0.93, 0.67),
    (PRUNED_ROBUST, "none"): _cell(74.95, 35.31),
    (PRUNED_ROBUST, "standard"): _cell(89.31, 3.26),
    (PRUNED_ROBUST, "adversarial"): _cell(83.18, 57.13, 0.88, 0.42),
    (PTQ_ROBUST, "none"): _cell(85.64, 58.08),
    (PTQ_ROBUST, "standard"): _cell(90.75, 3.98),
    (PTQ_ROBUST, "adversarial"): _cell(84.31, 57.23, 0.22, 0.63),
    (QAT_ROBUST, "adversarial"): _cell(83.19, 55.38, 0.69, 0.52),
}
CIFAR10_APPENDIX: Mapping[CellKey, PaperCell] = {
    (STANDARD, "none"): _cell(88.74, 0.00),
    (ROBUST, "none"): _cell(85.77, 57.93, 0.95, 0.27),
    (PRUNED_STANDARD, "adversarial"): _cell(82.62, 56.56, 0.17, 0.77),
    (PTQ_STANDARD, "adversarial"): _cell(84.21, 60.03, 0.93, 0.67),
    (PRUNED_ROBUST, "adversarial"): _cell(83.55, 57.27, 0.86, 0.47),
    (PTQ_ROBUST, "adversarial"): _cell(84.31, 57.23, 0.22, 0.63),
}
