"""The forward pass of a network in training, in the fastest form that it bears."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import functional

from toolkit.artifacts import Normalized
from toolkit.attacks.forms import TRAINING_FORMS, Form, Precision, first_working
from toolkit.attacks.surrogate import probe_images
from toolkit.errors import ToolkitError


def find_form(
    module: Normalized, input_shape: tuple[int, int, int], precision: Precision, device: torch.device
) -> Form:
    """The fastest form in which `module`, on `device`, can be trained; tried on a copy with two images of noise.

    Raises:
        ToolkitError: it can be trained in none.
    """
    images = probe_images(input_shape).to(device)
    labels = torch.zeros(len(images), dtype=torch.int64, device=device)

    def attempt(form: Form) -> None:
        trial = copy.deepcopy(module).train()
        form.cast(trial.network)
        torch.autograd.backward(functional.cross_entropy(forward(trial, form, images), labels))

    return first_working(TRAINING_FORMS[precision], attempt, "training")[0]


def check_single_images(
    module: Normalized, form: Form, input_shape: tuple[int, int, int], device: torch.device
) -> None:
    """Refuse a network that learns from several images alone, as batch norm does where one image gives one value.

    Raises:
        ToolkitError: it is one.
    """
    trial = copy.deepcopy(module).train()
    try:
        forward(trial, form, probe_images(input_shape)[:1].to(device))
    except ValueError as error:
        raise ToolkitError(
            "the network does not learn from one image at a time",
            found=str(error),
            fix="raise --batch-size, or lower --accumulate, so that every part of a batch has two images",
        ) from error


def finite_entries(module: Normalized) -> frozenset[str]:
    """Names of the weights and buffers without NaN or infinity; a mask of an attention may hold the latter."""
    return frozenset(name for name, value in module.state_dict().items() if bool(value.isfinite().all()))


def forward(module: Normalized, form: Form, images: Tensor) -> Tensor:
    """Logits float32 [n, classes] of images float32 [n, C, H, W] in [0, 1]; the caller has cast `module` to `form`."""
    with form.context(images.device):
        logits: Tensor = module(form.lay_out(images))
    return logits.float()
