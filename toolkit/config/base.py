"""What every configuration is built on, and the types of settings that users write as text."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError


class StageConfig(BaseModel):
    """Base of all stage configurations: immutable, and unknown keys are errors.

    A part that is given in part keeps the rest of what this configuration sets for it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _keep_defaults_of_parts(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        completed = dict(values)
        for name, field in cls.model_fields.items():
            if isinstance(field.default, StageConfig) and isinstance(values.get(name), dict):
                completed[name] = {**field.default.model_dump(exclude_unset=True), **values[name]}
        return completed


def parse_fraction(value: object) -> object:
    """Turn `8/255` into a float; anything that is no such text is returned for pydantic to judge."""
    if isinstance(value, str) and value.count("/") == 1:
        top, bottom = value.split("/")
        try:
            return float(top) / float(bottom)
        except (ValueError, ZeroDivisionError):
            return value
    return value


def parse_multiple(value: object) -> int | Literal["auto"]:
    """Turn text or a number into a multiple of at least 1, or `auto`."""
    if value == "auto":
        return "auto"
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            if int(value) >= 1:
                return int(value)
    raise PydanticCustomError("multiple", "a whole number of at least 1, or auto, is wanted")


Fraction = Annotated[float, BeforeValidator(parse_fraction)]
Multiple = Annotated[int | Literal["auto"], PlainValidator(parse_multiple)]
PrecisionChoice = Literal["auto", "float32", "bfloat16"]
CalibrationName = Literal["minmax", "moving-average", "percentile", "entropy", "mse"]
CalibrationSetting = Literal["minmax", "moving-average", "percentile", "entropy", "mse", "auto"]
Epsilon = Annotated[Fraction, Field(gt=0, le=1e6, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
