"""What to try next: Optuna's tree-structured Parzen estimator (Ozaki et al. 2022), repeatable trial by trial."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study._constrained_optimization import _CONSTRAINTS_KEY
from optuna.trial import FrozenTrial, TrialState

from toolkit.artifacts import derive_seed

Excess = Callable[[FrozenTrial], Mapping[str, float]]

STARTUP_TRIALS = 8
"""Drawn at random, before earlier trials say where to look."""


class SeededSampler(BaseSampler):
    """Draws every trial with a seed of its own, from the search's seed and the trial's number.

    A search that is continued would otherwise draw the same numbers again, and so would a second process.

    Args:
        seed: of the search.
        excess: by how much a completed trial oversteps each limit, at most 0 where it keeps it. It is asked anew for
            every proposal, since a search may go on under other limits; Optuna's constraints can be set only once.
    """

    def __init__(self, seed: int, excess: Excess) -> None:
        self._seed, self._excess = seed, excess
        self._inner = _inner(seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._inner = _inner(derive_seed(self._seed, trial.number))
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._inner.sample_relative(_judged(study, self._excess), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._inner.sample_independent(_judged(study, self._excess), trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._inner.after_trial(study, trial, state, values)


class _Judged:
    """A study whose completed trials have the constraints of the limits as they are now."""

    def __init__(self, study: optuna.Study, excess: Excess) -> None:
        self._study, self._excess = study, excess

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def get_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:
        return [self._with_constraints(trial) for trial in self._study.get_trials(*args, **kwargs)]

    def _get_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:
        return [self._with_constraints(trial) for trial in self._study._get_trials(*args, **kwargs)]

    def _with_constraints(self, trial: FrozenTrial) -> FrozenTrial:
        if trial.state != TrialState.COMPLETE:
            return trial
        found = copy.copy(trial)
        found.system_attrs = trial.system_attrs | {
            f"{_CONSTRAINTS_KEY}:{name}": amount for name, amount in self._excess(trial).items()
        }
        return found


def _judged(study: optuna.Study, excess: Excess) -> optuna.Study:
    return cast("optuna.Study", _Judged(study, excess))


def _inner(seed: int) -> TPESampler:
    return TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
