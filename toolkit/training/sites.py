"""Where a network rounds: at the tensors that the integer graph will quantise, seen in one forward pass.

Layers read rounded tensors, and so do sums, products and concatenations between layers. A ReLU's result is rounded
where it is made, whatever reads it, because the ReLU fuses into the layer before it; other results of modules only
where a sum reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from toolkit.artifacts import TorchModel
from toolkit.attacks.surrogate import probe_images
from toolkit.errors import ToolkitError
from toolkit.evaluators.fake_quantised import LAYERS

SUMS = ("add", "add_", "mul", "mul_", "cat", "concat", "concatenate")
"""Functions between layers that have integer kernels and read what modules made."""
RECTIFIERS = (nn.ReLU, nn.ReLU6)
SAME_RANGE = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
"""Modules whose result lies on the grid of what they read."""
IMAGE = ("<image>", 0)
"""The network's input, as a maker of tensors."""

Call = tuple[str, int]
"""A module's name, and which of its calls in one forward pass."""


@dataclass(frozen=True)
class Sites:
    """By the name of a module: for every call in one pass, whether it is rounded there."""

    inputs: Mapping[str, tuple[bool, ...]]
    """Of layers."""
    outputs: Mapping[str, tuple[bool, ...]]
    pixels: tuple[str, ...]
    """Layers that read the normalised image."""
    layers: tuple[str, ...]
    """All layers that were called, in the order of their first call."""


def find_sites(model: TorchModel) -> Sites:
    """See where `model` is to round.

    Raises:
        ToolkitError: it calls no layer, or one whose weights are computed by other code.
    """
    network = model.module.eval().network
    tracer = _Tracer()
    handles = [
        module.register_forward_pre_hook(lambda _, arguments, name=name: tracer.reads(name, arguments[0]))
        for name, module in network.named_modules()
        if isinstance(module, LAYERS)
    ]
    handles += [
        module.register_forward_hook(_watch(tracer, name), prepend=True)
        for name, module in network.named_modules()
        if not any(True for _ in module.children())
    ]
    images = probe_images(model.spec.input_shape).to(model.module.mean.device)
    normalised = (images - model.module.mean) / model.module.std
    tracer.made(IMAGE, normalised)
    try:
        with torch.no_grad(), tracer:
            network(normalised)
    finally:
        for handle in handles:
            handle.remove()
    if any(isinstance(module, nn.LayerNorm) for module in network.modules()):
        tracer.summed.clear()  # the integer graph leaves sums float that a LayerNorm reads
    found = tracer.sites({name for name, module in network.named_modules() if isinstance(module, RECTIFIERS)})
    _check_layers(network, found.layers)
    return found


def _watch(tracer: _Tracer, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def seen(module: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
        if isinstance(result, Tensor):
            tracer.returns(name, arguments[0] if isinstance(module, SAME_RANGE) else None, result)

    return seen


def _check_layers(network: nn.Module, layers: tuple[str, ...]) -> None:
    if not layers:
        raise ToolkitError(
            "the network has nothing to round in training",
            found=f"forward() calls no convolution and no linear layer among {len(list(network.modules()))} modules",
            fix="give a network whose layers are modules (nn.Conv2d, nn.Linear), or leave --qat away",
        )
    for name in layers:
        if network.get_submodule(name)._parameters.get("weight") is None:
            raise ToolkitError(
                "a layer's weights cannot be rounded in training",
                found=f"the weights of '{name}' are no parameter: other code (weight or spectral norm) computes them",
                fix="remove that first (torch.nn.utils.parametrize.remove_parametrizations), or leave --qat away",
            )


@dataclass
class _Tracer(TorchFunctionMode):
    """Sees in one forward pass who makes the tensors that layers and sums read.

    Tensors are recognised by their memory, so that views (flattening) count, and by their version, so that what was
    changed in place does not.
    """

    makers: dict[int, tuple[Call, Tensor, int]] = field(default_factory=dict)
    order: list[Call] = field(default_factory=list)
    """All calls in the order in which they returned."""
    read: dict[Call, Call | None] = field(default_factory=dict)
    """By a layer's call: who made what it read; None: no module, or it was changed since."""
    summed: set[Call] = field(default_factory=set)
    """Whose results a sum reads."""
    called: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "").strip("_") in {name.strip("_") for name in SUMS}:
            operands = args[0] if args and isinstance(args[0], (list, tuple)) else args
            makers = [self._maker(operand) for operand in operands if isinstance(operand, Tensor)]
            self.summed.update(maker for maker in makers if maker is not None)
        return func(*args, **(kwargs or {}))

    def made(self, call: Call, tensor: Tensor) -> None:
        self.makers[_memory(tensor)] = (call, tensor, tensor._version)  # kept: its memory must not be given out again

    def reads(self, name: str, tensor: Tensor) -> None:
        self.read[name, self.called.get(name, 0)] = self._maker(tensor)

    def returns(self, name: str, passed: Tensor | None, result: Tensor) -> None:
        """Note a module's result; `passed`: it is as good as the tensor that the module read."""
        call = (name, self.called.get(name, 0))
        self.called[name] = call[1] + 1
        self.order.append(call)
        earlier = self._maker(passed) if passed is not None else None
        if earlier is None and self._maker(result) is not None:
            return  # the module gave back what it was given: identity, dropout, flattening
        self.made(earlier or call, result)

    def _maker(self, tensor: Tensor) -> Call | None:
        found = self.makers.get(_memory(tensor))
        return found[0] if found is not None and found[2] == tensor._version else None

    def sites(self, rectifiers: set[str]) -> Sites:
        layers = tuple(dict.fromkeys(name for name, _ in self.read))
        last = max((self.order.index(call) for call in self.read if call in self.order), default=-1)
        outputs = {
            call for at, call in enumerate(self.order) if at < last and (call[0] in rectifiers or call in self.summed)
        }
        pixels = {name for (name, _), maker in self.read.items() if maker == IMAGE}
        inputs = {call for call, maker in self.read.items() if maker not in outputs and call[0] not in pixels}
        return Sites(
            {name: self._calls(name, inputs) for name, _ in sorted(inputs)},
            {name: self._calls(name, outputs) for name, _ in sorted(outputs)},
            tuple(name for name in layers if name in pixels),
            layers,
        )

    def _calls(self, name: str, sites: set[Call]) -> tuple[bool, ...]:
        return tuple((name, number) in sites for number in range(self.called[name]))


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())
