"""The forms in which a network can compute, fastest first, and the search for the first that a network bears.

Most networks bear bfloat16 weights and channels-last images. Those that flatten with `view`, or that mix dtypes within
(`.float()`, `torch.arange`, tensors that are no parameters), do not; they compute in the next form that they do bear.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.progress import notice

Precision = Literal["float32", "autocast", "bfloat16"]
"""What is asked for; `Form.precision` is what is done. Networks that round must keep float32 weights: `autocast`."""
Result = TypeVar("Result")

FORMATS: Mapping[str, torch.memory_format] = {
    "channels-last": torch.channels_last,
    "contiguous": torch.contiguous_format,
}


@dataclass(frozen=True, slots=True)
class Form:
    """How a network computes."""

    precision: Literal["bfloat16", "autocast", "float32"]
    """`bfloat16`: with weights cast to it; `autocast`: with float32 weights, and bfloat16 where torch holds it safe."""
    memory_format: Literal["channels-last", "contiguous"]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and of what the network is given."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    def cast(self, network: nn.Module) -> nn.Module:
        """Bring the weights of `network` into this form, in place; complex ones stay complex."""
        if self.precision == "bfloat16":
            if any(value.is_complex() for value in network.state_dict().values()):
                raise TypeError("complex weights cannot be cast to bfloat16")
            network.bfloat16()
        else:
            network.float()
        cast: nn.Module = network.to(memory_format=FORMATS[self.memory_format])
        return cast

    def lay_out(self, images: Tensor) -> Tensor:
        """`images` in this form's dtype and memory format."""
        return images.to(dtype=self.dtype, memory_format=FORMATS[self.memory_format])

    def context(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """In which the network's forward pass runs."""
        if self.precision != "autocast":
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def __str__(self) -> str:
        return f"{'bfloat16 autocast' if self.precision == 'autocast' else self.precision}, {self.memory_format}"


FLOAT_FORMS = (Form("float32", "channels-last"), Form("float32", "contiguous"))
AUTOCAST_FORMS = (Form("autocast", "channels-last"), Form("autocast", "contiguous"), *FLOAT_FORMS)
ATTACK_FORMS: Mapping[Precision, Sequence[Form]] = {
    "bfloat16": (Form("bfloat16", "channels-last"), Form("bfloat16", "contiguous"), *AUTOCAST_FORMS),
    "autocast": AUTOCAST_FORMS,
    "float32": FLOAT_FORMS,
}
TRAINING_FORMS: Mapping[Precision, Sequence[Form]] = {**ATTACK_FORMS, "bfloat16": AUTOCAST_FORMS}
"""Training keeps its weights in float32, so that small steps add up."""


def first_working(forms: Sequence[Form], attempt: Callable[[Form], Result], work: str) -> tuple[Form, Result]:
    """The first of `forms` in which `attempt` succeeds, and what it gave; a line says so if it is not the fastest.

    Args:
        forms: fastest first.
        attempt: the work on a few images; raises whatever the network raises.
        work: what is attempted, as it reads in messages.

    Raises:
        ToolkitError: the network bears none of the forms.
    """
    failures: list[Exception] = []
    for form in forms:
        try:
            result = attempt(form)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the network's own code may raise anything
            failures.append(error)
            continue
        if failures:
            notice(f"{work} in {form}: the network does not bear {forms[0]} ({_reason(failures[0])})")
        return form, result
    raise ToolkitError(
        f"{work} is not possible with this network",
        found=_reason(failures[-1]),
        fix="let forward() return the logits alone, as a tensor that is differentiable with respect to the images, "
        "in training mode too",
    ) from failures[-1]


def _reason(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:160]
