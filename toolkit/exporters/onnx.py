"""torch to ONNX: one file, dynamic batch, nothing in it of the machine that made it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from onnx import ModelProto, TensorProto

import toolkit
from toolkit.artifacts import OnnxModel, TorchModel
from toolkit.config import ExportConfig
from toolkit.errors import ToolkitError
from toolkit.exporters.rewrites import rewrite, strip_metadata

INPUT, OUTPUT, BATCH = "image", "logits", "N"
PROTOBUF_LIMIT = 2**31 - 1
KEPT_BYTES = 2**27
"""Of the last graphs, which are not converted again when the same network comes back: a trial's in its bundle."""
CONSTANTS_APART = 4
"""IR version from which on constants need not be inputs."""
EXAMPLE_BATCH = 2
"""Images of the example that is traced; 1 would be taken for a constant."""


_converted: dict[str, bytes] = {}


def export_onnx(
    model: TorchModel, path: Path, config: ExportConfig, *, metadata: Mapping[str, str] | None = None
) -> OnnxModel:
    """Write the float twin of `model` to `path`.

    The file takes `image` float32 [N, C, H, W] in [0, 1] and gives `logits` float32 [N, classes]. Spatial means stand
    as GlobalAveragePool, which has an integer kernel; the exporter's stack traces are stripped.

    Args:
        model: left as it is; a copy on the CPU, in evaluation mode, is exported.
        path: the file to write.
        config: the operator set.
        metadata: what to write into the file's metadata_props.

    Raises:
        ToolkitError: the exporter cannot handle the network, or its batch size would be fixed.
    """
    copy = model.copy().module.cpu().float().eval()
    finished = convert_module(copy, model.spec.input_shape, config.opset)
    finished.producer_name, finished.producer_version = "onnx-hardening-toolkit", toolkit.__version__
    onnx.helper.set_model_props(finished, dict(metadata or {}))
    save_onnx(finished, path)
    return OnnxModel(path, "fp32")


def example_images(shape: tuple[int, int, int]) -> torch.Tensor:
    """The pixels that a network is traced on, float32 [2, C, H, W]."""
    return torch.linspace(0, 1, EXAMPLE_BATCH * _numel(shape)).view(EXAMPLE_BATCH, *shape)


def convert_module(module: torch.nn.Module, shape: tuple[int, int, int], opset: int) -> ModelProto:
    """The graph of a module on the CPU that takes pixels of `shape` (C, H, W), with what exporters leave behind gone.

    Raises:
        ToolkitError: the exporter cannot handle the module, or its batch size would be fixed.
    """
    exported = _convert(_trace(module, example_images(shape)), opset)
    _check_batch(exported)
    finished = rewrite(exported)
    strip_metadata(finished)
    return finished


def save_onnx(model: ModelProto, path: Path) -> None:
    """Check a model and write it as one file.

    Raises:
        ToolkitError: it is too large for one file.
    """
    if model.ByteSize() > PROTOBUF_LIMIT:
        raise ToolkitError(
            "the network is too large for one ONNX file",
            found=f"{model.ByteSize() / 1e9:.1f} GB; the format ends at 2.1 GB",
            fix="prune it further (--prune) or take a smaller network",
        )
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def load_onnx(path: Path) -> ModelProto:
    """Read an ONNX file.

    Raises:
        ToolkitError: no such file, or no ONNX in it.
    """
    fix = "name an ONNX file, for instance the model.onnx of a bundle"
    try:
        model = onnx.load(path)
    except (OSError, DecodeError) as error:
        raise ToolkitError("the ONNX file cannot be read", found=f"{path}: {type(error).__name__}", fix=fix) from error
    if not model.graph.node:
        raise ToolkitError("the ONNX file holds no network", found=f"{path}: no nodes", fix=fix)
    _set_constants_apart(model)
    return model


def _set_constants_apart(model: ModelProto) -> None:
    """Take constants out of the inputs, where files of before IR 4 list them as what a caller may replace."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) < len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(inputs)
        model.ir_version = max(model.ir_version, CONSTANTS_APART)


def write_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Set entries of the metadata_props of an ONNX file; other entries stay."""
    model = load_onnx(path)
    merged = {entry.key: entry.value for entry in model.metadata_props} | dict(metadata)
    onnx.helper.set_model_props(model, merged)
    path.write_bytes(model.SerializeToString(deterministic=True))


def with_names(model: ModelProto) -> ModelProto:
    """A copy whose nodes all have names, no two the same: profiles and quantisation know nodes by name only."""
    copied = ModelProto()
    copied.CopyFrom(model)
    seen: set[str] = set()
    for index, node in enumerate(copied.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_unnamed_{index}"
        seen.add(node.name)
    return copied


def digest_with_weights(path: Path) -> str:
    """SHA-256 over an ONNX file and the files beside it that hold its weights, if any do."""
    digest = hashlib.sha256(path.read_bytes())
    model = onnx.load(path, load_external_data=False)
    named = {entry.value for tensor in _tensors(model) for entry in tensor.external_data if entry.key == "location"}
    for name in sorted(named):
        digest.update(name.encode() + (path.parent / name).read_bytes())
    return digest.hexdigest()


def _tensors(message: Message) -> Iterator[TensorProto]:
    """All tensors within a message, also of constants and of branches."""
    if isinstance(message, TensorProto):
        yield message
        return
    for _field, value in message.ListFields():
        if isinstance(value, Message):
            yield from _tensors(value)
        elif not isinstance(value, str | bytes | int | float):
            yield from (tensor for one in value if isinstance(one, Message) for tensor in _tensors(one))


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata_props of an ONNX file, whoever wrote it."""
    return {entry.key: entry.value for entry in load_onnx(path).metadata_props}


def own_metadata(metadata: Mapping[str, str]) -> Mapping[str, str]:
    """What this toolkit wrote of a file; of a stranger's nothing, whose keys of the same names mean something else."""
    return metadata if "toolkit_version" in metadata else {}


def _numel(shape: tuple[int, int, int]) -> int:
    channels, height, width = shape
    return channels * height * width


def _trace(module: torch.nn.Module, example: torch.Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim(BATCH)
    try:
        with silence(), torch.no_grad():
            return torch.export.export(module, (example,), dynamic_shapes=({0: batch},), strict=False)
    except Exception as error:
        # torch.export lets through whatever the network's own code raises.
        raise _cannot_export(error, None) from error


def _convert(program: torch.export.ExportedProgram, opset: int) -> ModelProto:
    """The graph of a program; equal programs are converted once, as long as the last ones fit into `KEPT_BYTES`."""
    key = _digest(program, opset)
    file = _converted.pop(key, None)
    if file is None:
        proto = _convert_anew(program, opset)
        if proto.ByteSize() > KEPT_BYTES:
            return proto
        file = proto.SerializeToString()
    _converted[key] = file  # the last one used is the last one to go
    while sum(map(len, _converted.values())) > KEPT_BYTES:
        del _converted[next(iter(_converted))]
    graph: ModelProto = ModelProto.FromString(file)
    return graph


def _digest(program: torch.export.ExportedProgram, opset: int) -> str:
    """Of everything that a graph is made of: code, signature and ranges of the program, and all its tensors."""
    found = hashlib.sha256(f"{opset}\n{program}".encode())
    for name, value in sorted({**program.state_dict, **program.constants}.items()):
        found.update(f"{name} {getattr(value, 'dtype', type(value))} {getattr(value, 'shape', value)}".encode())
        if isinstance(value, torch.Tensor):
            found.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _convert_anew(program: torch.export.ExportedProgram, opset: int) -> ModelProto:
    try:
        with silence(), _one_registry(), torch.no_grad():
            converted: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=({0: torch.export.Dim(BATCH)},),
                input_names=[INPUT],
                output_names=[OUTPUT],
                external_data=False,
                verbose=False,
            )
            proto: ModelProto = converted.model_proto
            return proto
    except torch.onnx.OnnxExporterError as error:
        raise _cannot_export(error, program) from error


@contextlib.contextmanager
def _one_registry() -> Iterator[None]:
    """Let exports share torch's table of operators, which it builds anew for each.

    That is half a second, and of a small network 40 % of the export (torch 2.14). The table depends on the operator
    set, and on the operators that torch knows at the time (importing torchao adds some), and is only read. Where a
    torch has no such method, nothing is done.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        table: Any = ONNXRegistry
        built = vars(table).get("from_torchlib")
    except ImportError:
        built = None
    if not isinstance(built, classmethod):
        yield
        return
    known = len(torch._C._dispatch_get_all_op_names())
    table.from_torchlib = classmethod(
        lambda _class, *given, **how: _registry(built.__func__, table, known, *given, **how)
    )
    try:
        yield
    finally:
        table.from_torchlib = built


@functools.cache
def _registry(build: Callable[..., object], kind: Any, _known: int, *given: int, **how: int) -> object:
    """The table of one operator set, while torch knows so many operators."""
    return build(kind, *given, **how)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """The exporter prints, logs and warns; what matters of it is in our errors."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _cannot_export(error: Exception, program: torch.export.ExportedProgram | None) -> ToolkitError:
    chain = [error]
    while chain[-1].__cause__ is not None and isinstance(chain[-1].__cause__, Exception):
        chain.append(chain[-1].__cause__)
    reason = str(chain[-1]).strip().splitlines()[0][:200] if str(chain[-1]).strip() else type(chain[-1]).__name__
    text = "\n".join(str(link) for link in chain)
    if "Constraints violated" in text:
        return _fixed_batch(f"the tracer finds {BATCH} tied to a constant")
    found = [reason, *_module_of(text, program)]
    code = re.search(r'File ".*", line \d+, in forward\n\s*(.+)', text)
    if code:
        found.append(f"in the line `{code.group(1).strip()}`")
    return ToolkitError(
        "the ONNX exporter cannot handle the network",
        found="; ".join(found),
        fix="rewrite that part of forward() with operators that ONNX has, without branches on tensor values",
    )


def _module_of(text: str, program: torch.export.ExportedProgram | None) -> list[str]:
    """The module whose operator failed, if the error names a node of the traced program."""
    name = re.search(r"translating node %(\w+)", text)
    if name is None or program is None:
        return []
    # Decomposition renames nodes (`linalg_svdvals` to `_linalg_svd`) but keeps the stem.
    wanted = name.group(1).strip("_")
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack and (wanted in node.name or node.name in wanted):
            where, kind = list(stack.values())[-1]
            return [f"in module '{where}' ({str(kind).rsplit('.', 1)[-1]})"]
    return []


def _check_batch(model: ModelProto) -> None:
    """The exporter turns `x.view(2, -1)` into a graph that is right for two images only: refuse it."""
    for value in (model.graph.input[0], model.graph.output[0]):
        first = value.type.tensor_type.shape.dim[0]
        if first.dim_param != BATCH:
            raise _fixed_batch(f"the first axis of '{value.name}' is {first.dim_param or first.dim_value}")


def _fixed_batch(found: str) -> ToolkitError:
    return ToolkitError(
        "the network's output depends on a fixed batch size",
        found=found,
        fix="use x.flatten(1) or x.view(x.size(0), -1) in forward(), and give logits [N, classes]",
    )
