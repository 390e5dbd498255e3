"""What the parts of a report are made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from toolkit.artifacts import Proportion


class Part(BaseModel):
    """Base of all parts: unknown fields are errors, so that the schema says everything."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Share(Part):
    """A share of images with its 95 % Wilson interval."""

    correct: int = Field(ge=0)
    total: int = Field(ge=1)
    value: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)

    @classmethod
    def of(cls, proportion: Proportion) -> Share:
        """The same share as a part of a report."""
        return cls.model_validate(proportion.as_dict())


class Change(Part):
    """A quantity of the network that came in, and of what ships."""

    before: int
    after: int
