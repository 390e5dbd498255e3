"""The twin of a deployed graph: a torch module, rebuilt from the ONNX file, on which gradient attacks can be made.

Its forward pass computes what the file computes, integers included; its backward pass goes straight through the
rounding (Bengio et al. 2013). How faithful it is to the session that runs the file is measured, never assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from onnx import ModelProto
from torch import Tensor, nn

from toolkit.artifacts import ModelSpec, Normalization, Normalized, Predictor, TorchModel
from toolkit.errors import ToolkitError
from toolkit.evaluators.fidelity import FIDELITY_LIMIT, Fidelity, compare, count_saturated
from toolkit.evaluators.twin.graph import UnconvertibleOperators, needed_nodes, read_network
from toolkit.evaluators.twin.network import Entry, TwinNetwork
from toolkit.exporters.interface import GraphInterface, interface_of
from toolkit.exporters.onnx import load_onnx
from toolkit.exporters.optimised import layers_in_float
from toolkit.exporters.qoperator import to_qdq

__all__ = [
    "FIDELITY_LIMIT",
    "Fidelity",
    "Twin",
    "UnconvertibleGraph",
    "build_twin",
    "measure_fidelity",
    "saturation",
    "twin_model",
]

PROBE = 2
"""Images on which a graph with a fixed batch shows whether it bears another one."""


class UnconvertibleGraph(ToolkitError):
    """The graph holds operators that the twin does not have; attacks that ask only for logits still work."""

    def __init__(self, path: Path, operators: tuple[str, ...]) -> None:
        super().__init__(
            "the ONNX graph cannot be made differentiable",
            found=f"{path}: no conversion of {', '.join(operators)}",
            fix="attack it with queries alone (--attacks square), or attack the network that it was exported from and "
            "score on this file (--target)",
        )
        self.operators = operators


@dataclass(frozen=True)
class Twin:
    """A differentiable network with the function of an ONNX classifier."""

    module: Normalized
    """Pixels float32 [n, C, H, W] in [0, 1] to logits [n, classes]; probabilities in the file are logits here."""
    normalization: Normalization
    """In `module`: the identity, unless the file leaves the normalisation to its caller."""
    input_shape: tuple[int, int, int]
    """(channels, height, width)"""
    classes: int
    quantised: bool
    """The graph holds quantisers."""
    interface: GraphInterface

    def predict(self, images: Tensor) -> Tensor:
        """Logits float32 [n, classes] of images float32 [n, C, H, W] in [0, 1]."""
        return twin_model(self).predict(images)


def build_twin(
    path: Path, interface: GraphInterface | None = None, *, input_shape: tuple[int, int, int] | None = None
) -> Twin:
    """Rebuild the classifier in an ONNX file as a torch module with straight-through rounding.

    Args:
        path: a float, QDQ or QOperator graph, of this toolkit or not.
        interface: how it is fed; None: as the file says.
        input_shape: (channels, height, width) of the images, for files that take any.

    Raises:
        UnconvertibleGraph: with the operators that cannot be converted.
        ToolkitError: no ONNX image classifier in the file, or images of unknown size.
    """
    model = to_qdq(load_onnx(path))
    interface = interface or interface_of(model, str(path))
    shape = _input_shape(path, interface, input_shape)
    entry = Entry(
        interface.input_name, interface.layout, interface.pixel_scale, interface.dtype == "uint8", interface.batch
    )
    try:
        network = read_network(model, entry, interface.logits_name, layers_in_float(path, model))
        return _finish(_with_free_batch(network, shape), model, interface, shape)
    except UnconvertibleOperators as error:
        raise UnconvertibleGraph(path, error.operators) from error
    except ToolkitError:
        raise
    except Exception as error:  # whatever a stranger's graph breaks here costs its twin alone
        reason = str(error).strip().splitlines()
        raise UnconvertibleGraph(path, (f"{type(error).__name__}: {reason[0][:200] if reason else ''}",)) from error


def _finish(network: TwinNetwork, model: ModelProto, interface: GraphInterface, shape: tuple[int, int, int]) -> Twin:
    identity = Normalization((0.0,) * shape[0], (1.0,) * shape[0])
    normalization = interface.normalization or identity
    module = Normalized(network, normalization).eval().requires_grad_(False)
    with torch.inference_mode():
        classes = module(torch.zeros(1, *shape)).shape[-1]
    nodes = needed_nodes(model, interface.logits_name)
    quantised = any(node.op_type == "QuantizeLinear" for node in nodes)
    return Twin(module, normalization, shape, classes, quantised, replace(interface, classes=classes))


def _input_shape(path: Path, interface: GraphInterface, given: tuple[int, int, int] | None) -> tuple[int, int, int]:
    sizes = [wanted or size for wanted, size in zip(interface.input_shape, given or (None,) * 3, strict=True)]
    channels, height, width = sizes
    if channels is None or height is None or width is None:
        raise ToolkitError(
            "the size of the images is not known",
            found=f"{path} takes images [{', '.join('any' if size is None else str(size) for size in sizes)}]",
            fix="name the data that it is for (--data, --size)",
        )
    if given is not None and given != (channels, height, width):
        raise ToolkitError(
            "the images do not fit the ONNX file",
            found=f"images {list(given)}, {path} takes {sizes}",
            fix="give images of the size and channels that the network was trained on (--data, --size)",
        )
    return channels, height, width


def _with_free_batch(network: TwinNetwork, shape: tuple[int, int, int]) -> TwinNetwork:
    """`network` without its fixed batch, where it is only written in the file and nothing depends on it."""
    batch = network.entry.batch
    if batch is None:
        return network
    images = torch.rand((batch + PROBE, *shape), generator=torch.Generator().manual_seed(0))
    free = network.with_entry(replace(network.entry, batch=None))
    with torch.inference_mode():
        wanted = network(images)
        try:
            found = free(images)
        except (RuntimeError, ValueError, IndexError):  # shapes that do not fit
            return network
    same = found.shape == wanted.shape and bool(torch.allclose(found, wanted, rtol=1e-3, atol=1e-4))
    return free if same else network


def twin_model(twin: Twin, class_names: tuple[str, ...] | None = None, dataset: str | None = None) -> TorchModel:
    """The twin as a model that every evaluator takes.

    Args:
        twin: not copied.
        class_names: of the data; None: numbers.
        dataset: the data source's own words.
    """
    names = class_names or tuple(map(str, range(twin.classes)))
    return TorchModel(twin.module, ModelSpec("twin", names, twin.input_shape, twin.normalization, dataset))


def measure_fidelity(
    twin: TorchModel | Twin, predictor: Predictor, clean: Iterable[Tensor], attacked: Iterable[Tensor] = ()
) -> Fidelity:
    """Compare a twin with the session that runs the file, on clean and on attacked images.

    Where the file gives probabilities, both are compared as logarithms of probabilities.

    Args:
        twin: computes in float32.
        predictor: the session.
        clean: batches float32 [n, C, H, W] in [0, 1].
        attacked: the same; may be empty.

    Raises:
        ToolkitError: no images.
    """
    interface = getattr(predictor, "interface", None) or getattr(twin, "interface", None)
    normalise: Callable[[Tensor], Tensor] = nn.Identity()
    if isinstance(interface, GraphInterface) and interface.output == "probabilities":
        normalise = nn.LogSoftmax(dim=1)
    if isinstance(interface, GraphInterface) and interface.output == "sigmoids":
        normalise = nn.LogSigmoid()
    model = twin_model(twin) if isinstance(twin, Twin) else twin
    return compare(model, predictor, clean, attacked, normalise)


def saturation(twin: Twin, batches: Iterable[Tensor]) -> dict[str, float]:
    """Share of values that every quantiser of activations clips.

    A quantiser whose lower end is 0 does the work of a ReLU there: only what it clips above counts.

    Args:
        twin: of a quantised graph.
        batches: float32 [n, C, H, W] in [0, 1].

    Returns:
        name of the quantised tensor in the file to share in [0, 1]; empty for a float graph.
    """
    return count_saturated(twin.module, batches)
