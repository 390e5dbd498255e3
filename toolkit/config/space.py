"""What `toolkit search` varies, and how far it looks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, field_validator, model_validator

from toolkit.config.base import StageConfig

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMgG]?)[bB]?")
UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000}
MOST_VALUES = 1000
"""Of one range: each is checked before a search begins."""


class RangeConfig(StageConfig):
    """Numbers that a search may try: from `low` to `high`, both included, `step` apart."""

    low: Annotated[float, Field(allow_inf_nan=False)]
    high: Annotated[float, Field(allow_inf_nan=False)]
    step: Annotated[float, Field(gt=0, allow_inf_nan=False)]

    @model_validator(mode="after")
    def _check_order(self) -> RangeConfig:
        if not self.low < self.high:
            raise ValueError(f"{self.low:g} is not below {self.high:g}")
        count = (self.high - self.low) / self.step + 1
        if count > MOST_VALUES:
            raise ValueError(f"that is {count:.3g} values, and at most {MOST_VALUES:,} are tried; take a larger step")
        return self

    @property
    def values(self) -> tuple[float, ...]:
        """Every number, free of the rounding that repeated addition brings."""
        count = int((self.high - self.low) / self.step + 1e-9) + 1
        return tuple(round(self.low + index * self.step, 10) for index in range(count))


Options = RangeConfig | Annotated[tuple[Any, ...], Field(min_length=1)]


def parse_space(value: object) -> object:
    """Turn `prune.ratio=0.2:0.8:0.1; quantize.calibrate=minmax,mse` into a mapping; leave what is no text."""
    if not isinstance(value, str):
        return value
    found: dict[str, Any] = {}
    for part in filter(None, map(str.strip, value.split(";"))):
        name, sign, options = map(str.strip, part.partition("="))
        numbers = options.split(":")
        if not (name and sign and options) or name in found or len(numbers) not in (1, 3):  # YAML reads 1:7 as 67
            raise ValueError(f"'{part}' is no NAME=LOW:HIGH:STEP or NAME=ONE,OTHER,... (each name once)")
        if len(numbers) == 3:
            found[name] = dict(zip(("low", "high", "step"), numbers, strict=True))
        else:
            found[name] = [_option(option) for option in options.split(",")]
    return found


def _option(text: str) -> Any:
    """What YAML takes an option for."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"'{text}' is neither a number nor a name") from error


def parse_bytes(value: object) -> object:
    """Turn `500k`, `1.5 MB` or `300000` into a number of bytes; leave what is no text.

    Raises:
        ValueError: a text that is no such size.
    """
    if not isinstance(value, str):
        return value
    found = SIZE.fullmatch(value.strip())
    if found is None:
        raise ValueError(f"'{value}' is no number of bytes, such as 300000, 500k or 1.5M")
    size = float(found[1]) * UNITS[found[2].lower()]
    if not math.isfinite(size):
        raise ValueError("that is more bytes than there are")
    return round(size)


class SearchConfig(StageConfig):
    """What `toolkit search` varies, how far it looks, and what limits hold beside those of `gates`."""

    space: Annotated[Mapping[str, Options], BeforeValidator(parse_space), Field(min_length=1)] = {
        "prune.ratio": RangeConfig(low=0.2, high=0.9, step=0.1),
        "prune.importance": ("l1", "l2", "geometric-median"),
        "precision": ("int8", "first-float", "ends-float", "float"),
        "quantize.calibrate": ("minmax", "percentile", "mse"),
        "finetune.radius": (1.0, 1.25, 1.5),
    }
    """Settings of `harden` by dotted name, with what each may be; `precision` is which layers stay float."""
    per_group: bool = False
    """Whether every group of layers that are pruned together has a ratio of its own, from those of `prune.ratio`."""
    trials: Annotated[int, Field(ge=1)] = 24
    budget: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Seconds after which no trial begins; None: all `trials` are made."""
    images: Annotated[int, Field(ge=1)] = 512
    """Validation images of the cheap evidence."""
    attacks: str = "fast"
    """Of the cheap evidence; the front gets those of `attack.attacks`."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] | None = None
    """Every trial is trained with each of them, and their mean counts; None: the run's own seed."""
    bundles: Annotated[int, Field(ge=1)] = 4
    """So many points of the front get full evidence, up to twice as many where none keeps the limits."""
    storage: str | None = None
    """URL of the data base that keeps the trials; None: an SQLite file in the output's folder."""
    study: Annotated[str, Field(min_length=1)] = "search"
    """Name of the search in its storage."""
    address: str | None = None
    """Ray cluster that runs the trials: `auto`, `local` or HOST:PORT; None: this process runs them."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Trainings at a time, on Ray; None: as many as the cluster's CPUs and GPUs allow."""
    gpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """GPUs that each of them needs, on Ray."""
    max_latency: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Most milliseconds per call of model.onnx, at the first of the benchmark's batch sizes."""
    max_size: Annotated[int, Field(gt=0), BeforeValidator(parse_bytes)] | None = None
    """Most bytes of model.onnx."""

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: tuple[int, ...] | None) -> tuple[int, ...] | None:
        twice = sorted({seed for seed in seeds or () if (seeds or ()).count(seed) > 1})
        if twice:
            raise ValueError(f"seed {twice[0]} stands there more than once; each may count once")
        if seeds == ():
            raise ValueError("there is no seed")
        return seeds
