"""Structured pruning: whole filters leave the network. The only module that imports torch-pruning."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from toolkit.artifacts import TorchModel
from toolkit.config import PruneConfig
from toolkit.errors import ToolkitError
from toolkit.progress import notice

History = Sequence[Sequence[Any]]
"""torch-pruning's record: (module name, whether output channels, indices removed) per step, plain data."""
Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


@dataclass(frozen=True, slots=True)
class LayerWidth:
    """Output channels of one layer before and after pruning."""

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class PruningResult:
    """The pruned network, and the width of every convolution and linear layer."""

    model: TorchModel
    layers: tuple[LayerWidth, ...]
    parameters_before: int
    parameters_after: int


def prune(model: TorchModel, config: PruneConfig) -> PruningResult:
    """Remove the filters of least l1 norm (Li et al. 2017) with torch-pruning's dependency graph.

    Every convolution and linear layer but the classifier loses the share `config.ratio` (scope `layer`), or the
    weakest filters of the whole network go (scope `global`). Widths are rounded to multiples of `config.round_to`.

    Raises:
        ToolkitError: torch-pruning cannot follow the network, or nothing could be removed.
    """
    copied = model.copy()
    network = copied.network
    before = _widths(network)
    parameters_before = _parameters(network)
    if config.ratio == 0:
        same = tuple(LayerWidth(name, width, width) for name, width in before.items())
        return PruningResult(copied, same, parameters_before, parameters_before)
    network.eval()
    for parameter in network.parameters():
        parameter.requires_grad_(True)  # frozen parameters are silently not pruned
    example = torch.zeros(1, *model.spec.input_shape)
    classifier = find_classifier(copied)
    try:
        history = _run_pruner(network, example, classifier, config)
        network.zero_grad(set_to_none=True)
        logits = copied.predict(example.expand(2, -1, -1, -1))
    except ToolkitError:
        raise
    except Exception as error:  # torch-pruning fails in many ways on networks that it cannot trace
        raise _cannot_follow(network, error) from error
    after = _widths(network)
    layers = tuple(LayerWidth(name, width, after[name]) for name, width in before.items())
    if logits.shape[-1] != len(model.spec.class_names):
        raise _cannot_follow(network, RuntimeError(f"{logits.shape[-1]} outputs after pruning"))
    if all(layer.before == layer.after for layer in layers):
        raise ToolkitError(
            "pruning removed nothing",
            found=f"--prune {config.ratio:g} with --round-to {config.round_to} on {sorted(set(before.values()))}",
            fix="raise --prune or lower --round-to",
        )
    entry = {"ratio": config.ratio, "scope": config.scope, "round_to": config.round_to, "history": history}
    spec = replace(model.spec, pruning=(*model.spec.pruning, entry))
    return PruningResult(replace(copied, spec=spec), layers, parameters_before, _parameters(network))


def replay(network: nn.Module, history: History, input_shape: tuple[int, int, int]) -> nn.Module:
    """Give a freshly built network the shape that `history` led to; the weights are to be loaded afterwards.

    Changes and returns `network`.
    """
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = torch_pruning.DependencyGraph().build_dependency(network.eval(), torch.zeros(1, *input_shape))
            graph.load_pruning_history([(name, bool(out), list(indices)) for name, out, indices in history])
    except Exception as error:  # see prune
        raise ToolkitError(
            "the checkpoint's pruning history does not fit its network",
            found=f"{type(error).__name__}: {error}",
            fix="use the code of the network that was pruned (--arch path/to/file.py:callable)",
        ) from error
    return network


def rounded_width(width: int, ratio: float, round_to: int) -> int:
    """The multiple of `round_to` nearest to `width * (1 - ratio)`, at least 1 and at most `width`.

    Where less than one multiple would be left, the multiple is halved until it fits.
    """
    wanted = width * (1 - ratio)
    while round_to > 1 and round_to > wanted:
        round_to //= 2
    nearest = int(wanted / round_to + 0.5) * round_to
    return min(width, max(1, nearest))


def find_classifier(model: TorchModel) -> nn.Module:
    """The layer that gives the logits: the last one executed that has one output per class."""
    classes = len(model.spec.class_names)
    executed: list[nn.Module] = []

    def record(module: nn.Module, _inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        executed.append(module)

    hooks = [m.register_forward_hook(record) for m in model.network.modules() if isinstance(m, Layer)]
    try:
        model.predict(torch.zeros(2, *model.spec.input_shape))
    finally:
        for hook in hooks:
            hook.remove()
    for module in reversed(executed):
        if _out_channels(module) == classes:
            return module
    raise ToolkitError(
        "the network's classifier was not found",
        found=f"no convolution or linear layer with {classes} outputs",
        fix="end the network in a linear layer or 1x1 convolution with one output per class",
    )


def _run_pruner(network: nn.Module, example: Tensor, classifier: nn.Module, config: PruneConfig) -> list[list[Any]]:
    ratios: dict[nn.Module, float] = {}
    if config.scope == "layer":
        for module in network.modules():
            if isinstance(module, Layer) and module is not classifier:
                width = _out_channels(module)
                kept = rounded_width(width, config.ratio, config.round_to)
                # torch-pruning keeps int(width * (1 - ratio)); half a filter more keeps that off the edge
                ratios[module] = 1 - (kept + 0.5) / width
    with torch.enable_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pruner = torch_pruning.pruner.BasePruner(
            network,
            example,
            torch_pruning.importance.MagnitudeImportance(p=1, group_reduction="first", normalizer=None),
            pruning_ratio=config.ratio,
            pruning_ratio_dict=ratios,
            ignored_layers=[classifier],
            global_pruning=config.scope == "global",
            max_pruning_ratio=1.0 if config.scope == "layer" else 0.95,
            round_to=config.round_to if config.scope == "global" and config.round_to > 1 else None,
            num_heads=_attention_heads(network),
        )
        pruner.step()
    for message in sorted({str(item.message).splitlines()[0] for item in caught}):
        notice(f"pruning: {message}")
    return [[name, bool(out), [int(i) for i in indices]] for name, out, indices in pruner.pruning_history()]


def _attention_heads(network: nn.Module) -> dict[nn.Module, int]:
    return {module: module.num_heads for module in network.modules() if isinstance(module, nn.MultiheadAttention)}


def _out_channels(module: nn.Module) -> int:
    width = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    assert isinstance(width, int)
    return width


def _widths(network: nn.Module) -> dict[str, int]:
    return {name: _out_channels(module) for name, module in network.named_modules() if isinstance(module, Layer)}


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _cannot_follow(network: nn.Module, error: Exception) -> ToolkitError:
    own = [
        f"{name or 'the network'} ({type(module).__name__})"
        for name, module in network.named_modules()
        if not type(module).__module__.startswith("torch.nn") and list(module.parameters(recurse=False))
    ]
    suspects = f"; modules with parameters of their own: {', '.join(own[:5])}" if own else ""
    reason = str(error).splitlines()[0] if str(error) else "no message"
    return ToolkitError(
        "torch-pruning cannot follow this network",
        found=f"{type(network).__name__}: {type(error).__name__}: {reason}{suspects}",
        fix="build those modules from torch.nn layers, or harden without pruning: --prune 0",
    )
