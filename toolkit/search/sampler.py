"""What to try next: Optuna's tree-structured Parzen estimator (Ozaki et al. 2022), repeatable trial by trial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from toolkit.artifacts import derive_seed

STARTUP_TRIALS = 8
"""Drawn at random, before earlier trials say where to look."""


class SeededSampler(BaseSampler):
    """Draws every trial with a seed of its own, from the search's seed and the trial's number.

    A search that is continued would otherwise draw the same numbers again, and so would a second process.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._inner = _inner(seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._inner = _inner(derive_seed(self._seed, trial.number))
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._inner.after_trial(study, trial, state, values)


def _inner(seed: int) -> TPESampler:
    return TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
