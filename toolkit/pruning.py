"""Structured pruning: whole filters leave the network. The only module that imports torch-pruning."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch_pruning.dependency import index_mapping

from toolkit.artifacts import Normalized, TorchModel
from toolkit.config import PruneConfig
from toolkit.errors import ToolkitError, unknown_name
from toolkit.progress import notice

History = Sequence[Sequence[Any]]
"""torch-pruning's record: (module name, whether output channels, indices removed) per step, plain data."""
FIXED_WIDTH = ("cannot be multiplied", "invalid for input of size")
"""What torch says where a network counts on the widths that it was written with."""
Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear

MAX_GLOBAL_RATIO = 0.95
"""Global ranking takes at most this share of any one layer."""


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
    """Remove the filters that matter least with torch-pruning's dependency graph.

    Those are the filters of least l1 or l2 norm (Li et al. 2017), or those nearest to the geometric median of their
    layer (He et al. 2019). Every convolution and linear layer but the classifier loses the share `config.ratio` (scope
    `layer`), or the weakest filters of the whole network go (scope `global`; importance relative to the layer's mean);
    layers in `config.ratios`, and those that can only be pruned with them, lose the share given there. Widths are
    rounded to multiples of `config.round_to` (`auto` is resolved before). Layers that torch-pruning cannot follow stay
    whole, and a notice names them, as long as others can be pruned.

    Raises:
        ToolkitError: torch-pruning cannot follow the network, nothing could be removed, or a ratio is for no layer.
    """
    copied = model.copy()
    before = _widths(copied.network)
    parameters_before = _parameters(copied.network)
    for name in config.ratios:
        if name not in before:
            raise unknown_name("layer in prune.ratios", name, before)
    if config.ratio == 0 and not any(config.ratios.values()):
        same = tuple(LayerWidth(name, width, width) for name, width in before.items())
        return PruningResult(copied, same, parameters_before, parameters_before)
    copied.network.eval()
    for parameter in copied.network.parameters():
        parameter.requires_grad_(True)  # frozen parameters are silently not pruned
    pruned, history = _prune_what_can_be_followed(copied, config)
    after = _widths(pruned.network)
    layers = tuple(LayerWidth(name, width, after[name]) for name, width in before.items())
    if all(layer.before == layer.after for layer in layers):
        classifier = find_classifier(copied)
        prunable = [w for name, w in before.items() if copied.network.get_submodule(name) is not classifier]
        if any(rounded_width(width, config.ratio, config.multiple) < width for width in prunable):
            raise _cannot_follow(copied.network, RuntimeError("every layer would stay whole"))
        raise ToolkitError(
            "pruning removed nothing",
            found=f"--prune {config.ratio:g} with --round-to {config.multiple} on {sorted(set(before.values()))}",
            fix="raise --prune or lower --round-to",
        )
    entry = {**config.model_dump(mode="json"), "round_to": config.multiple, "history": history}
    spec = replace(model.spec, pruning=(*model.spec.pruning, entry))
    return PruningResult(replace(pruned, spec=spec), layers, parameters_before, _parameters(pruned.network))


def replay(network: nn.Module, history: History, input_shape: tuple[int, int, int]) -> nn.Module:
    """Give a freshly built network the shape that `history` led to; the weights are to be loaded afterwards.

    Changes and returns `network`.
    """
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    try:
        with _tracing(network):
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


def _prune_what_can_be_followed(model: TorchModel, config: PruneConfig) -> tuple[TorchModel, list[list[Any]]]:
    """All layers but the classifier; if that fails, without those that torch-pruning cannot follow."""
    try:
        return _attempt(model, [], config)
    except ToolkitError:
        raise
    except Exception as error:  # torch-pruning fails in many ways on networks that it cannot trace
        try:
            left_whole = _find_untraceable(model)
            pruned = _attempt(model, left_whole, config) if left_whole else None
        except ToolkitError:
            raise
        except Exception:
            pruned = None
        if pruned is None:
            raise _cannot_follow(model.network, error) from error
        names = [name for name, module in model.network.named_modules() if module in set(left_whole)]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        notice(f"pruning: layers that torch-pruning cannot follow stay whole: {', '.join(names[:5])}{more}")
        return pruned


def _attempt(model: TorchModel, left_whole: list[nn.Module], config: PruneConfig) -> tuple[TorchModel, list[list[Any]]]:
    """Prune a copy of `model` and check that it still gives one logit per class."""
    # copied together, so that the layers to ignore are those of the copy
    pruned, ignored = copy.deepcopy((model, [find_classifier(model), *left_whole]))
    example = torch.zeros(1, *model.spec.input_shape)
    with _tracing(pruned.network) as caught:
        history = _run_pruner(pruned.network, example, ignored, config)
    pruned.network.zero_grad(set_to_none=True)
    logits = pruned.predict(example.expand(2, -1, -1, -1))
    if logits.shape[-1] != len(model.spec.class_names):
        raise RuntimeError(f"{logits.shape[-1]} outputs after pruning")
    for message in sorted({str(item.message).splitlines()[0] for item in caught}):
        notice(f"pruning: {message}")
    return pruned, history


def _run_pruner(network: nn.Module, example: Tensor, ignored: list[nn.Module], config: PruneConfig) -> list[list[Any]]:
    widths: dict[nn.Module, int] = {
        module: _out_channels(module) for module in network.modules() if isinstance(module, Layer)
    }
    wanted: dict[nn.Module, float] = {module: width * (1 - config.ratio) for module, width in widths.items()}
    if config.scope == "global":
        wanted.update(_global_widths(network, example, ignored, config))
    if config.ratios:
        wanted.update(_wanted_by_name(network, example, ignored, config, widths))
    ratios: dict[nn.Module, float] = {}
    for module, width in widths.items():
        whole = wanted[module] == width  # rounding takes nothing from a layer that is to stay as it is
        kept = width if whole else rounded_width(width, 1 - wanted[module] / width, config.multiple)
        # torch-pruning keeps int(width * (1 - ratio)); half a filter more keeps that off the edge
        ratios[module] = 1 - (kept + 0.5) / width
    pruner = torch_pruning.pruner.BasePruner(
        network,
        example,
        _importance(config),
        pruning_ratio=config.ratio,
        pruning_ratio_dict=ratios,
        ignored_layers=ignored,
        max_pruning_ratio=1.0,
        num_heads=_attention_heads(network),
    )
    pruner.step()
    return [[name, bool(out), [int(i) for i in indices]] for name, out, indices in pruner.pruning_history()]


def _wanted_by_name(
    network: nn.Module,
    example: Tensor,
    ignored: list[nn.Module],
    config: PruneConfig,
    widths: Mapping[nn.Module, int],
) -> dict[nn.Module, float]:
    """The filters that layers with a share of their own, and those that are pruned with them, are to keep.

    Raises:
        ToolkitError: a share for a layer that stays whole, or different ones for layers that lose filters together.
    """
    names = {module: name for name, module in network.named_modules()}
    wanted: dict[nn.Module, float] = {}
    left = dict(config.ratios)
    for together in _coupled(network, example, ignored):
        given = {names[module]: config.ratios[names[module]] for module in together if names[module] in config.ratios}
        if len(set(given.values())) > 1:
            raise ToolkitError(
                "layers that lose filters together have different shares in prune.ratios",
                found=", ".join(f"{name}: {share:g}" for name, share in given.items()),
                fix="give a share for one of them; the others follow it",
            )
        for name, share in given.items():
            wanted.update({module: widths[module] * (1 - share) for module in together})
            del left[name]
    for name, share in left.items():
        if share:
            raise ToolkitError(
                "a layer in prune.ratios cannot lose filters",
                found=f"{name}: {share:g}, the classifier or a layer that torch-pruning cannot follow",
                fix=f"leave {name} away; it stays whole",
            )
    return wanted


def _importance(config: PruneConfig, normalizer: str | None = None) -> Any:
    kinds = torch_pruning.importance
    kind = kinds.FPGMImportance if config.importance == "geometric-median" else kinds.MagnitudeImportance
    return kind(p=1 if config.importance == "l1" else 2, group_reduction="first", normalizer=normalizer)


def find_groups(model: TorchModel) -> tuple[tuple[str, ...], ...]:
    """The layers that are pruned together, by name, group by group in the order of the network.

    Raises:
        ToolkitError: torch-pruning cannot follow the network.
    """
    network = model.copy().network.eval()
    for parameter in network.parameters():
        parameter.requires_grad_(True)  # as in `prune`
    copied = replace(model, module=Normalized(network, model.spec.normalization).eval())
    names = {module: name for name, module in network.named_modules()}
    example = torch.zeros(1, *model.spec.input_shape)
    try:
        ignored = [find_classifier(copied), *_find_untraceable(copied)]
        with _tracing(network):
            groups = _coupled(network, example, ignored)
    except ToolkitError:
        raise
    except Exception as error:  # see prune
        raise _cannot_follow(network, error) from error
    place = {name: number for number, name in enumerate(names.values())}
    named = [tuple(sorted((names[module] for module in together), key=place.__getitem__)) for together in groups]
    return tuple(sorted(named, key=lambda group: place[group[0]]))


def _coupled(network: nn.Module, example: Tensor, ignored: list[nn.Module]) -> list[tuple[Layer, ...]]:
    """Groups of layers whose filters go together."""
    graph = torch_pruning.DependencyGraph().build_dependency(network, example)
    groups = graph.get_all_groups(ignored_layers=ignored, root_module_types=list(Layer.__args__))
    found = []
    for group in groups:
        layers = [item.dep.target.module for item in group if graph.is_out_channel_pruning_fn(item.dep.handler)]
        found.append(tuple(dict.fromkeys(layer for layer in layers if isinstance(layer, Layer))))
    return found


def _global_widths(
    network: nn.Module, example: Tensor, ignored: list[nn.Module], config: PruneConfig
) -> dict[nn.Module, float]:
    """How many filters of each layer are among those that stay, when the filters of all layers are ranked together.

    Norms count relative to their layer's mean, because they grow with a filter's inputs. torch-pruning's own global
    ranking leaves a layer whole if none of its filters is above the threshold; here it keeps its smallest share.
    """
    graph = torch_pruning.DependencyGraph().build_dependency(network, example)
    importance = _importance(config, "mean")
    groups = graph.get_all_groups(ignored_layers=ignored, root_module_types=list(Layer.__args__))
    scores = {group[0].dep.target.module: importance(group) for group in groups}
    if not scores:
        return {}
    together = torch.cat(list(scores.values()))
    threshold = together.sort().values[min(len(together) - 1, round(config.ratio * len(together)))]
    return {
        module: max(float((score >= threshold).sum()), (1 - MAX_GLOBAL_RATIO) * len(score))
        for module, score in scores.items()
    }


@contextlib.contextmanager
def _tracing(network: nn.Module) -> Iterator[list[warnings.WarningMessage]]:
    """What torch-pruning's tracing needs: gradients, its warnings caught, and an end to lists of indices that explode.

    It takes every reshape for a flatten. Where windows of attention are cut out (Swin), each of them multiplies the
    indices, for minutes and gigabytes; but an index must lie within some layer, so the widest layer bounds them.
    """
    widest = max((side for parameter in network.parameters() for side in parameter.shape), default=1)
    flatten = index_mapping._FlattenIndexMapping
    unbounded = flatten.__call__

    def bounded(mapping: Any, indices: Sequence[Any]) -> Any:
        if not mapping.reverse and len(indices) * mapping._stride > widest:
            raise RuntimeError(f"a reshape that is no flatten: {len(indices) * mapping._stride} indices")
        return unbounded(mapping, indices)

    flatten.__call__ = bounded
    try:
        with torch.enable_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield caught
    finally:
        flatten.__call__ = unbounded


def _find_untraceable(model: TorchModel) -> list[nn.Module]:
    """The layers whose filters torch-pruning cannot follow through the network, or only into bare parameters."""
    found: list[nn.Module] = []
    with _tracing(model.network):
        example = torch.zeros(1, *model.spec.input_shape)
        graph = torch_pruning.DependencyGraph().build_dependency(model.network, example)
        for module in graph.module2node:
            if isinstance(module, Layer):
                try:
                    pruner = graph.get_pruner_of_module(module)
                    everything = list(range(_out_channels(module)))
                    group = graph.get_pruning_group(module, pruner.prune_out_channels, everything)
                    followed = not any(isinstance(dependency.target.module, nn.Parameter) for dependency, _ in group)
                except Exception:
                    followed = False
                if not followed:
                    found.append(module)
    return found


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
    fix = "build those modules from torch.nn layers"
    if any(words in reason for words in FIXED_WIDTH):
        fix = "forward() may name a width: write x.flatten(1) in place of x.view(-1, NUMBER)"
    return ToolkitError(
        "torch-pruning cannot follow this network",
        found=f"{type(network).__name__}: {type(error).__name__}: {reason}{suspects}",
        fix=f"{fix}, or harden without pruning: --prune 0",
    )
