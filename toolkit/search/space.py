"""What a search may vary: every point of the space is a configuration of `harden`."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from toolkit.config import (
    HardenConfig,
    Options,
    PruneConfig,
    QuantizeConfig,
    RangeConfig,
    SearchRunConfig,
    TrainConfig,
    build,
    merge,
)
from toolkit.errors import ToolkitError, unknown_name
from toolkit.progress import notice
from toolkit.training.losses import unused

Parameter = str | float
"""A number of a range, or the label of an option."""
Parameters = Mapping[str, Parameter]

VARIED = ("prune", "finetune", "quantize", "export")
"""Parts of the configuration that make another network or graph; the others decide how it is measured."""
SETTINGS = tuple(
    f"{part}.{name}" for part in VARIED for name in type(HardenConfig.model_fields[part].default).model_fields
)
"""Of `harden`, by dotted name, as in a bundle's config.yaml."""
PRECISION = "precision"
RATIO = "prune.ratio"
GROUP_RATIO = "prune.ratios."
"""Before the name of a group's first layer."""
ASSIGNMENTS = ("int8", "first-float", "ends-float", "auto", "float")
"""What `precision` may be: all layers integer, all but the first, all but both ends, those found by measuring, none."""


@dataclass(frozen=True)
class Anatomy:
    """What the space has to know of the network."""

    layers: tuple[str, ...]
    """Of its float twin, in the order of the graph."""
    groups: tuple[tuple[str, ...], ...]
    """Layers that are pruned together; needed where every group has a ratio of its own."""


@dataclass(frozen=True)
class Dimension:
    """One thing that varies, with the settings that each of its values stands for."""

    name: str
    settings: Mapping[Parameter, Mapping[str, Any]]
    """By number or label: settings of `harden`, nested."""
    step: float | None
    """Between numbers; None: the values are labels."""

    @property
    def values(self) -> tuple[Parameter, ...]:
        return tuple(self.settings)


class Space:
    """All configurations that a search may try.

    Args:
        config: the run's; what is not varied stays as it says.
        anatomy: of the network.
        refuse: raises for a configuration that cannot be made; values that lead to one from the point that the user
            gave are left out, as long as others are there.

    Raises:
        ToolkitError: something varies that may not, or takes a value that `harden` would refuse.
    """

    def __init__(
        self, config: SearchRunConfig, anatomy: Anatomy, refuse: Callable[[HardenConfig], None] | None = None
    ) -> None:
        self._base: dict[str, Any] = config.model_dump(mode="json", exclude={"search"})
        self.dimensions = tuple(
            dimension
            for name, options in config.search.space.items()
            for dimension in _make(name, options, config, anatomy)
        )
        for dimension in self.dimensions:
            for settings in dimension.settings.values():
                build(HardenConfig, merge(self._base, dict(settings)))
        if refuse is not None:
            self.dimensions = tuple(self._possible(dimension, refuse) for dimension in self.dimensions)

    def choices(self, name: str) -> tuple[Any, ...]:
        """What the setting of this dotted name may be; one value where it does not vary."""
        varied = [dimension for dimension in self.dimensions if dimension.name == name]
        settings = [dict(option) for dimension in varied for option in dimension.settings.values()] or [self._base]
        return tuple(_lookup(one, name) for one in settings)

    @property
    def size(self) -> int:
        """How many points there are; several may stand for the same configuration."""
        return math.prod(len(dimension.settings) for dimension in self.dimensions)

    def points(self) -> Iterator[dict[str, Parameter]]:
        """All of them."""
        names = [dimension.name for dimension in self.dimensions]
        for values in itertools.product(*(dimension.values for dimension in self.dimensions)):
            yield dict(zip(names, values, strict=True))

    def config(self, parameters: Parameters, seed: int | None = None) -> HardenConfig:
        """The configuration at a point, free of settings that mean nothing there.

        Args:
            parameters: one value for every dimension.
            seed: in place of the run's.
        """
        values = self._base
        for dimension in self.dimensions:
            values = merge(values, dict(dimension.settings[_key(parameters[dimension.name])]))
        found = build(HardenConfig, values)
        return _canonical(found if seed is None else found.model_copy(update={"seed": seed}))

    def start(self) -> dict[str, Parameter]:
        """The point nearest to the configuration that the user gave."""
        return {dimension.name: self._nearest(dimension) for dimension in self.dimensions}

    def _possible(self, dimension: Dimension, refuse: Callable[[HardenConfig], None]) -> Dimension:
        """Without the labels that are refused beside the user's own settings; ranges stay whole."""
        start = self.start()
        found: dict[Parameter, Mapping[str, Any]] = {}
        reasons = []
        for value, settings in dimension.settings.items():
            try:
                refuse(self.config({**start, dimension.name: value}))
            except ToolkitError as error:
                reasons.append(f"{value} ({error.problem})")
            else:
                found[value] = settings
        if dimension.step is not None or not found or not reasons:
            return dimension
        notice(f"not tried for {dimension.name}: {', '.join(reasons)}")
        return replace(dimension, settings=found)

    def _nearest(self, dimension: Dimension) -> Parameter:
        given = dimension.name if not dimension.name.startswith(GROUP_RATIO) else RATIO
        if dimension.step is not None:
            wanted = _lookup(self._base, given)
            if wanted is None:  # resolved later
                return dimension.values[0]
            return min(dimension.values, key=lambda value: abs(float(value) - float(wanted)))
        same = (
            label for label, settings in dimension.settings.items() if merge(self._base, dict(settings)) == self._base
        )
        return next(same, dimension.values[0])


def digest(config: HardenConfig) -> str:
    """Names what a configuration makes, whatever it is measured by."""
    facts = config.model_dump(mode="json", include=set(VARIED))
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _make(name: str, options: Options, config: SearchRunConfig, anatomy: Anatomy) -> Sequence[Dimension]:
    if name == PRECISION:
        if isinstance(options, RangeConfig):
            raise _unusable(name, "a range of numbers", f"list some of: {', '.join(ASSIGNMENTS)}")
        return (Dimension(name, {str(label): _assignment(str(label), config, anatomy) for label in options}, None),)
    if name == RATIO and config.search.per_group:
        return tuple(_dimension(GROUP_RATIO + group[0], options) for group in anatomy.groups)
    if name.partition(".")[0] not in VARIED or "." not in name:
        raise _unusable(name, f"'{name}'", f"vary {PRECISION} or settings of {', '.join(VARIED)}, e.g. {RATIO}")
    if not name.startswith(GROUP_RATIO) and name not in SETTINGS:
        raise unknown_name("setting to vary (--space)", name, SETTINGS)
    return (_dimension(name, options),)


def _dimension(name: str, options: Options) -> Dimension:
    if isinstance(options, RangeConfig):
        return Dimension(name, {value: _nested(name, value) for value in options.values}, options.step)
    return Dimension(name, {_label(option): _nested(name, option) for option in options}, None)


def _label(option: Any) -> str:
    return option if isinstance(option, str) else json.dumps(option)


def _nested(name: str, value: Any) -> dict[str, Any]:
    """Settings with one value; a layer's name may hold dots."""
    if name.startswith(GROUP_RATIO):
        return {"prune": {"ratios": {name.removeprefix(GROUP_RATIO): value}}}
    for part in reversed(name.split(".")):
        value = {part: value}
    found: dict[str, Any] = value
    return found


def _lookup(values: Mapping[str, Any], name: str) -> Any:
    found: Any = values
    for part in name.split("."):
        found = found[part]
    return found


def _assignment(label: str, config: SearchRunConfig, anatomy: Anatomy) -> dict[str, Any]:
    """Settings for one choice of the layers that are integer."""
    if label not in ASSIGNMENTS:
        raise unknown_name("precision assignment", label, ASSIGNMENTS)
    if label == "float":
        return {"quantize": {"int8": False}, "allow_float": True}
    ends = {"first-float": anatomy.layers[:1], "ends-float": (anatomy.layers[0], anatomy.layers[-1])}
    kept = tuple(dict.fromkeys((*config.quantize.keep_float, *ends.get(label, ()))))
    precision = "auto" if label == "auto" else "int8"
    return {"quantize": {"int8": True, "precision": precision, "keep_float": list(kept)}}


def _key(value: Parameter) -> Parameter:
    """Numbers come back from a storage with the rounding of repeated additions."""
    return value if isinstance(value, str) else round(float(value), 10)


def _canonical(config: HardenConfig) -> HardenConfig:
    """Equal for all points that make the same graph."""
    update: dict[str, Any] = {}
    tuning = config.finetune
    if not config.quantize.int8:
        update |= {"quantize": QuantizeConfig(int8=False, targets=config.quantize.targets), "allow_float": True}
    else:
        update["quantize"] = _without_idle(config.quantize)
    if config.prune.ratio == 0 and not any(config.prune.ratios.values()):
        update["prune"] = PruneConfig(ratio=0)
    if not config.quantize.int8 and tuning.qat:
        tuning = tuning.model_copy(update={"qat": False})
    if not tuning.qat:
        tuning = update["finetune"] = tuning.model_copy(update={"qat_from": TrainConfig().qat_from})
    if tuning.objective == "none" or tuning.epochs == 0:
        update["finetune"] = type(tuning)(objective="none", epochs=0, precision=tuning.precision)
    elif idle := unused(tuning):
        defaults = {name: TrainConfig.model_fields[name].default for name in idle}
        update["finetune"] = tuning.model_copy(update=defaults)
    return config.model_copy(update=update)


def _without_idle(quantize: QuantizeConfig) -> QuantizeConfig:
    """Free of what the chosen calibration, and layers that are not searched for, make no use of."""
    plain, idle = QuantizeConfig(), dict[str, Any]()
    if quantize.calibrate not in ("percentile", "auto"):
        idle["percentile"] = plain.percentile
    if not quantize.searches:
        idle["max_drop"] = plain.max_drop
    return quantize.model_copy(update=idle)


def _unusable(name: str, found: str, fix: str) -> ToolkitError:
    return ToolkitError(f"the search cannot vary {name} so", found=found, fix=f"{fix} (--space)")
