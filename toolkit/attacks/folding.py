"""Batch norm folded into the convolution before it: a network that only evaluates then computes in fewer passes.

In evaluation mode batch norm multiplies every channel by a number and adds another, which the convolution's weights and
bias can take over (Jacob et al. 2018, section 3.2; torch's own `fuse_conv_bn_eval` does the same to one pair).
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
TOLERANCE = 1e-3
"""Of the folded network's outputs, relative to the largest: rounding in float32 stays far below it."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Names of a convolution, and of the batch norm that alone reads it."""

    convolution: str
    norm: str

    def names(self, of: nn.Module) -> Iterator[str]:
        """Of all parameters and buffers of the two."""
        for name in (self.convolution, self.norm):
            yield from (f"{name}.{inner}" for inner in of.get_submodule(name).state_dict())


def fold(network: nn.Module, images: Tensor) -> tuple[nn.Module, tuple[Pair, ...]]:
    """The network with every batch norm in its convolution that can be, and which those are.

    Args:
        network: in evaluation mode; it is not changed.
        images: [n, C, H, W] in its dtype, on which both must agree.

    Returns:
        A copy, and its pairs; the network itself, and none, if nothing can be folded.
    """
    pairs = find_pairs(network)
    if not pairs:
        return network, ()
    folded = _without_norms(network, pairs)
    write_folded(folded, network, pairs)
    try:
        with torch.no_grad():
            wanted, found = network(images), folded(images)
        agree = bool((wanted - found).abs().max() <= TOLERANCE * wanted.abs().max())
    except Exception:  # the network's own code may raise anything; whether it works at all is asked elsewhere
        return network, ()
    return (folded, pairs) if agree else (network, ())


class _Tracer(fx.Tracer):
    """Leaves batch norms whole that are not torch's own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def find_pairs(network: nn.Module) -> tuple[Pair, ...]:
    """Convolutions whose result a batch norm, and nothing else, reads, where both are torch's own and used once.

    A batch norm of another class is one of these if that says so: `plain_in_evaluation = True`.
    """
    if not any(isinstance(module, _BatchNorm) for module in network.modules()):
        return ()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = _Tracer().trace(copy.deepcopy(network))  # what a network keeps of its passes stays as it is
    except Exception:  # what branches on its input has no graph, and the network's own code may raise anything
        return ()
    modules = dict(network.named_modules())
    owners = Counter(id(p) for _, p in network.named_parameters(remove_duplicate=False))
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")

    def usable(name: object, kinds: Sequence[type]) -> bool:
        module = modules[str(name)]
        known = type(module) in kinds or (kinds is NORMS and "plain_in_evaluation" in vars(type(module)))
        plain = known and not module._forward_hooks and not module._forward_pre_hooks
        return plain and calls[str(name)] == 1 and all(owners[id(p)] == 1 for p in module.parameters())

    found = []
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 and not node.kwargs else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        if not usable(node.target, NORMS) or not usable(before.target, CONVOLUTIONS):
            continue
        if getattr(modules[str(node.target)], "running_mean", None) is not None:
            found.append(Pair(str(before.target), str(node.target)))
    return tuple(found)


def write_folded(folded: nn.Module, source: nn.Module, pairs: Sequence[Pair]) -> None:
    """Bring the folded convolutions up to what the source's weights and statistics are now.

    Args:
        folded: as `fold` gave it, in whatever dtype.
        source: the network with its batch norms.
        pairs: as `fold` gave them.
    """
    with torch.no_grad():
        for pair in pairs:
            convolution, norm = _convolution(source, pair), cast("nn.BatchNorm2d", source.get_submodule(pair.norm))
            assert norm.running_mean is not None and norm.running_var is not None  # else they are no pair
            weight, bias = fuse_conv_bn_weights(
                convolution.weight,
                convolution.bias,
                norm.running_mean,
                norm.running_var,
                norm.eps,
                norm.weight,
                norm.bias,
            )
            mine = _convolution(folded, pair)
            assert mine.bias is not None  # it was given one
            mine.weight.copy_(weight)
            mine.bias.copy_(bias)


def _convolution(network: nn.Module, pair: Pair) -> nn.Conv2d:
    return cast("nn.Conv2d", network.get_submodule(pair.convolution))


def _without_norms(network: nn.Module, pairs: Sequence[Pair]) -> nn.Module:
    folded = copy.deepcopy(network)
    for pair in pairs:
        convolution = _convolution(folded, pair)
        if convolution.bias is None:
            zeros = convolution.weight.new_zeros(convolution.out_channels)
            convolution.bias = nn.Parameter(zeros, requires_grad=False)
        parent, _, name = pair.norm.rpartition(".")
        setattr(folded.get_submodule(parent), name, nn.Identity())
    return folded
