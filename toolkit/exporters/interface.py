"""What an ONNX image classifier takes and gives, read from its file: layout, data type, pixel range, kind of output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from torch import Tensor

from toolkit.artifacts import Normalization
from toolkit.errors import ToolkitError
from toolkit.exporters.onnx import load_onnx
from toolkit.exporters.qoperator import to_qdq

Layout = Literal["NCHW", "NHWC"]
InputType = Literal["float32", "float16", "uint8"]
OutputKind = Literal["logits", "probabilities", "sigmoids"]

INPUT_TYPES: dict[int, InputType] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.UINT8: "uint8",
}
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
CHANNELS = (1, 3, 4)
"""Of grey, colour, and colour images with transparency."""
TRANSPARENT = ("Identity", "Cast", "QuantizeLinear", "DequantizeLinear", "Flatten", "Squeeze", "Reshape")
"""Operators behind a Softmax that leave its output probabilities, in the order of the classes."""
FIX = "give a file with one image input, [N, C, H, W] or [N, H, W, C], and one output [N, classes]"


@dataclass(frozen=True, slots=True)
class GraphInterface:
    """How images in [0, 1] become the input of an ONNX classifier, and what its output is."""

    input_name: str
    output_name: str
    layout: Layout
    dtype: InputType
    pixel_scale: float
    """What the graph is given for a white pixel: 1, or 255 where it takes whole numbers."""
    output: OutputKind
    logits_name: str
    """The value inside the graph that holds logits: what the last Softmax or Sigmoid reads, else the output."""
    classes: int | None
    """None: the file does not say; running one image does."""
    input_shape: tuple[int | None, int | None, int | None]
    """(channels, height, width); None where the graph takes any."""
    batch: int | None
    """The batch size that the graph insists on."""
    normalization: Normalization | None = None
    """What is to be done to the pixels before the graph gets them; None: the graph does it, or needs none."""

    def normalized(self, images: Tensor) -> Tensor:
        """Images [n, C, H, W] in [0, 1], normalised if that is left to the caller, in the graph's pixel range."""
        if self.normalization is not None:
            shape = (1, -1, 1, 1)
            images = (images - images.new_tensor(self.normalization.mean).view(shape)) / images.new_tensor(
                self.normalization.std
            ).view(shape)
        return images * self.pixel_scale

    def feed(self, images: Tensor) -> Tensor:
        """The graph's input for images float32 [n, C, H, W] in [0, 1]; whole numbers are rounded, halves to even."""
        fed = self.normalized(images)
        fed = fed.round().clamp(0, 255).to(torch.uint8) if self.dtype == "uint8" else fed
        fed = fed.half() if self.dtype == "float16" else fed
        return (fed.permute(0, 2, 3, 1) if self.layout == "NHWC" else fed).contiguous()

    def logits(self, output: Tensor) -> Tensor:
        """Logits float32 [n, classes] of the graph's output; of probabilities logarithms, of sigmoids log-odds."""
        output = output.float()
        if self.output == "sigmoids":
            return torch.logit(output, eps=torch.finfo(torch.float32).eps / 2)
        return output.clamp_min(torch.finfo(torch.float32).tiny).log() if self.output == "probabilities" else output


def read_interface(path: Path, *, normalization: Normalization | None = None) -> GraphInterface:
    """Find out what the ONNX classifier at `path` takes and gives.

    Raises:
        ToolkitError: no ONNX in the file, several inputs, an input that is no image, or an output that is not
            [N, classes].
    """
    return interface_of(to_qdq(load_onnx(path)), str(path), normalization=normalization)


def interface_of(model: ModelProto, name: str, *, normalization: Normalization | None = None) -> GraphInterface:
    """`read_interface` of a graph in memory, float or QDQ; `name` stands in messages.

    Raises:
        ToolkitError: as `read_interface`; whole-number input together with a normalisation.
    """
    image = _image_input(model, name)
    sizes = _sizes(image) or []
    layout = _layout(image, sizes, name)
    batch, *rest = sizes
    height_width_last = rest if layout == "NCHW" else [rest[2], rest[0], rest[1]]
    output, classes = _output(model, name)
    logits, kind = _before_squashing(model, output)
    dtype = INPUT_TYPES[image.type.tensor_type.elem_type]
    found = GraphInterface(
        input_name=image.name,
        output_name=output,
        layout=layout,
        dtype=dtype,
        pixel_scale=255.0 if dtype == "uint8" else 1.0,
        output=kind,
        logits_name=logits,
        classes=classes,
        input_shape=(height_width_last[0], height_width_last[1], height_width_last[2]),
        batch=batch,
    )
    return found if normalization is None else with_normalization(found, normalization, name)


def with_inferred_shapes(model: ModelProto) -> ModelProto:
    """A copy of `model` with all types and shapes that follow from it; `model` itself where none can be found."""
    try:
        return onnx.shape_inference.infer_shapes(model)
    except (onnx.shape_inference.InferenceError, ValueError):  # operators that onnx does not know; more than 2 GB
        return model


def with_normalization(interface: GraphInterface, normalization: Normalization, name: str) -> GraphInterface:
    """The interface of a graph whose pixels are to be normalised first.

    Raises:
        ToolkitError: the graph takes whole numbers, or another number of channels.
    """
    channels, given = interface.input_shape[0], len(normalization.mean)
    if interface.dtype == "uint8" or channels not in (None, given):
        reason = "takes uint8 pixels" if interface.dtype == "uint8" else f"takes {channels} channels"
        raise ToolkitError(
            "the normalisation does not fit the ONNX file",
            found=f"{name} {reason}; mean and standard deviation have {given} values",
            fix="give one mean and standard deviation per channel, and none for a graph that takes uint8",
        )
    return replace(interface, normalization=normalization)


def _image_input(model: ModelProto, name: str) -> ValueInfoProto:
    constants = {item.name for item in model.graph.initializer}
    inputs = [item for item in model.graph.input if item.name not in constants]
    if len(inputs) == 1:
        image: ValueInfoProto = inputs[0]
        tensor = image.type.tensor_type
        if tensor.elem_type in INPUT_TYPES and len(_sizes(image) or []) == 4:
            return image
    raise ToolkitError(
        "the ONNX file is no image classifier",
        found=f"{name}: inputs {', '.join(map(_describe, inputs)) or 'none'}",
        fix=FIX + ", of type float32, float16 or uint8",
    )


def _layout(image: ValueInfoProto, sizes: Sequence[int | None], name: str) -> Layout:
    for likely in (CHANNELS[:2], CHANNELS):  # an image four pixels high is likelier than one with transparency
        if sizes[1] in likely:
            return "NCHW"
        if sizes[3] in likely:
            return "NHWC"
    if sizes[1] is None:
        return "NCHW"
    raise ToolkitError(
        "the ONNX file takes no images",
        found=f"{name}: input {_describe(image)}; neither its second nor its last axis has 1, 3 or 4 channels",
        fix=FIX,
    )


def _output(model: ModelProto, name: str) -> tuple[str, int | None]:
    """The name of the one output [N, classes], and the number of classes if the file says it."""
    outputs = list(model.graph.output)
    if not all(_sizes(item) and None not in (_sizes(item) or [])[1:] for item in outputs):
        inferred = {item.name: item for item in with_inferred_shapes(model).graph.output}
        outputs = [inferred.get(item.name, item) for item in outputs]
    fitting = [item for item in outputs if _may_be_logits(item, unknown=len(outputs) == 1)]
    if len(fitting) != 1:
        raise ToolkitError(
            "the ONNX file is no classifier",
            found=f"{name}: outputs {', '.join(map(_describe, outputs))}",
            fix=FIX + "; detectors, segmentation and several outputs of that form are not supported",
        )
    sizes = _sizes(fitting[0])
    return fitting[0].name, sizes[1] if sizes else None


def _may_be_logits(item: ValueInfoProto, *, unknown: bool) -> bool:
    sizes = _sizes(item)
    if item.type.tensor_type.elem_type not in FLOATS or sizes is None:
        return unknown and item.type.tensor_type.elem_type in FLOATS
    return len(sizes) == 2 and sizes[1] != 1


def _sizes(item: ValueInfoProto) -> list[int | None] | None:
    tensor = item.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return [axis.dim_value if axis.HasField("dim_value") and axis.dim_value > 0 else None for axis in tensor.shape.dim]


def _describe(item: ValueInfoProto) -> str:
    kind = str(TensorProto.DataType.Name(item.type.tensor_type.elem_type)).lower()
    sizes = _sizes(item)
    shape = "[?]" if sizes is None else f"[{', '.join('any' if size is None else str(size) for size in sizes)}]"
    return f"{item.name}: {kind} {shape}"


def _before_squashing(model: ModelProto, output: str) -> tuple[str, OutputKind]:
    """The input of the Softmax over classes, or of the Sigmoid, that makes `output`, else the output, and its kind."""
    producers = {name: node for node in model.graph.node for name in node.output}
    node = producers.get(output)
    while node is not None and node.op_type in TRANSPARENT:
        node = producers.get(node.input[0])
    if node is not None and _is_softmax(node):
        return str(node.input[0]), "probabilities"
    if node is not None and node.op_type == "Sigmoid":
        return str(node.input[0]), "sigmoids"
    return output, "logits"


def _is_softmax(node: NodeProto) -> bool:
    if node.op_type != "Softmax":
        return False
    axis = next((helper.get_attribute_value(item) for item in node.attribute if item.name == "axis"), -1)
    return axis in (1, -1)
