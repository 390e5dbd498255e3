"""The operators that a twin converts, by name: a literal mapping from ONNX to torch.

Every entry takes the node's attributes and gives the function of its inputs; it raises `Unconvertible` for forms of the
operator that torch does not have.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from toolkit.evaluators.twin import layers, quantised, shapes
from toolkit.evaluators.twin.values import Pooled, Scaled, moves, plain, scales

Attributes = Mapping[str, Any]
Function = Callable[..., Any]
Builder = Callable[[Attributes], Function]


class Unconvertible(Exception):
    """A form of a known operator that cannot be converted; the text says which."""


def on_tensors(function: Function) -> Function:
    """Give an operator plain tensors."""

    def multiplied_out(*values: Any, **attributes: Any) -> Any:
        return function(*map(plain, values), **attributes)

    return multiplied_out


class _Straight(torch.autograd.Function):
    """A function of steps, with the gradient of the identity (Bengio et al. 2013)."""

    @staticmethod
    def forward(_: Any, value: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(value)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(function: Callable[[Tensor], Tensor]) -> Function:
    """Let gradients through a function that has none of use; whole numbers it leaves alone."""

    def stepped(value: Tensor) -> Tensor:
        found: Tensor = _Straight.apply(value, function) if value.is_floating_point() else function(value)
        return found

    return stepped


def fixed(function: Function) -> Builder:
    """An operator without attributes, on plain tensors."""
    wrapped = on_tensors(function)
    return lambda _: wrapped


def with_attributes(
    function: Function, *names: str, wrap: Callable[[Function], Function] = on_tensors, **defaults: Any
) -> Builder:
    """An operator that takes the named attributes as keyword arguments, those that the node has."""
    wrapped = wrap(function)

    def build(attributes: Attributes) -> Function:
        chosen = {name: attributes[name] for name in names if name in attributes}
        return functools.partial(wrapped, **defaults, **chosen)

    return build


def _unchanged(value: Any, *_: Any) -> Any:
    return value


def _clip(value: Any, low: Tensor | None = None, high: Tensor | None = None, **ends: float) -> Any:
    low_end = float(plain(low)) if low is not None else ends.get("min")
    high_end = float(plain(high)) if high is not None else ends.get("max")
    return plain(value).clamp(low_end, high_end) if (low_end, high_end) != (None, None) else value


def _divide(first: Tensor, second: Tensor) -> Tensor:
    if first.is_floating_point() or second.is_floating_point():
        return first / second
    return torch.div(first, second, rounding_mode="trunc")


def _modulo(first: Tensor, second: Tensor, *, fmod: int = 0) -> Tensor:
    return torch.fmod(first, second) if fmod else torch.remainder(first, second)


def _fold(function: Function) -> Function:
    return lambda *values: functools.reduce(function, values)


def _mean(*values: Tensor) -> Tensor:
    total: Tensor = functools.reduce(operator.add, values)
    return total / len(values)


def _hard_sigmoid(value: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(alpha * value + beta, 0, 1)


def _prelu(value: Tensor, slope: Tensor) -> Tensor:
    return torch.where(value < 0, value * slope, value)


def _swish(value: Tensor, *, alpha: float = 1.0) -> Tensor:
    return value * torch.sigmoid(alpha * value)


SELU_ALPHA, SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875
INTEGERS = {6: torch.int32, 7: torch.int64, 9: torch.bool}
FLOATS = {1, 10, 11, 16}


def _cast(value: Tensor, *, to: int) -> Tensor:
    """Cast; floating tensors keep the twin's precision, and casts to integers are straight-through.

    Integers that a gradient is wanted through stay floating: what follows computes the same with them.
    """
    if to in FLOATS:
        return value if value.is_floating_point() else value.to(torch.float32)
    if value.is_floating_point() and (to not in INTEGERS or (value.requires_grad and INTEGERS[to] != torch.bool)):
        whole: Tensor = straight_through(torch.trunc)(value)
        return whole
    return value.to(INTEGERS[to]) if to in INTEGERS else value


def _concat(*values: Any, axis: int) -> Any:
    first = values[0]
    if all(isinstance(value, Scaled) and value.scale is first.scale for value in values) and first.scale.numel() == 1:
        return first._replace(values=shapes.concat(*(value.values for value in values), axis=axis))
    return shapes.concat(*map(plain, values), axis=axis)


def _softmax(attributes: Attributes, function: Function) -> Function:
    axis = attributes.get("axis", -1 if attributes["opset"] >= 13 else 1)

    def flattened(value: Tensor) -> Any:
        if attributes["opset"] >= 13:
            return function(value, axis)
        return function(value.flatten(axis % value.ndim), -1).reshape(value.shape)  # one axis of all from `axis` on

    return on_tensors(flattened)


def _softmax_of_integers(attributes: Attributes) -> Function:
    if attributes.get("in_float") or attributes["opset"] < 13:
        return _softmax(attributes, torch.softmax)
    return functools.partial(quantised.softmax, axis=attributes.get("axis", -1))


def _reduce(function: Function, *, homogeneous: bool = False) -> Builder:
    def build(attributes: Attributes) -> Function:
        keep = bool(attributes.get("keepdims", 1))
        nothing = bool(attributes.get("noop_with_empty_axes", 0))

        def reduced(value: Tensor, given: Tensor | None = None) -> Any:
            axes = shapes.ints(given if given is not None else attributes.get("axes"))
            if not axes and nothing:
                return value
            return function(value, tuple(axes or range(value.ndim)), keep)

        return scales(reduced) if homogeneous else on_tensors(reduced)

    return build


def _product(value: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted((axis % value.ndim for axis in axes), reverse=True):
        value = value.prod(axis, keepdim=keep)
    return value


def _gelu(attributes: Attributes) -> Function:
    return functools.partial(on_tensors(functional.gelu), approximate=attributes.get("approximate", "none"))


def _gemm(attributes: Attributes) -> Function:
    trans = bool(attributes.get("transA", 0)), bool(attributes.get("transB", 0))
    return functools.partial(
        quantised.gemm, alpha=attributes.get("alpha", 1.0), beta=attributes.get("beta", 1.0), trans=trans,
        aligned=attributes.get("aligned", False),
    )  # fmt: skip


def _transposed_convolution(attributes: Attributes) -> Function:
    pads = list(attributes.get("pads", []))
    half = len(pads) // 2
    if attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or "output_shape" in attributes:
        raise Unconvertible("automatic padding")
    if pads[:half] != pads[half:]:
        raise Unconvertible("asymmetric padding")
    return with_attributes(
        layers.transposed_convolution, "strides", "dilations", "pads", "output_padding", "group"
    )(attributes)  # fmt: skip


def _average_pool(attributes: Attributes) -> Function:
    if any(step != 1 for step in attributes.get("dilations", [])):
        raise Unconvertible("dilation")
    names = ("kernel_shape", "strides", "pads", "ceil_mode", "count_include_pad", "auto_pad")
    pool = with_attributes(layers.average_pool, *names)(attributes)
    return lambda value: Pooled(pool(value)) if isinstance(value, Scaled) else pool(value)


def _selu(attributes: Attributes) -> Function:
    return on_tensors(
        lambda value: attributes.get("gamma", SELU_GAMMA) * functional.elu(value, attributes.get("alpha", SELU_ALPHA))
    )


def _resize(attributes: Attributes) -> Function:
    mode = attributes.get("mode", "nearest")
    coordinates = attributes.get("coordinate_transformation_mode", "half_pixel")
    nearest = mode == "nearest" and (coordinates, attributes.get("nearest_mode")) == ("asymmetric", "floor")
    smooth = mode in ("linear", "cubic") and coordinates in ("half_pixel", "pytorch_half_pixel", "align_corners")
    if attributes.get("axes") is not None or attributes.get("exclude_outside"):
        raise Unconvertible("axes, or without what is outside")
    if attributes.get("antialias") or not (nearest or smooth) or attributes.get("cubic_coeff_a", -0.75) != -0.75:
        raise Unconvertible(f"{mode}, {coordinates}, antialias={attributes.get('antialias', 0)}")
    return functools.partial(on_tensors(shapes.resize), mode=mode, coordinates=coordinates)


def _pad(attributes: Attributes) -> Function:
    chosen = {"mode": attributes.get("mode", "constant"), "pads": attributes.get("pads")}
    return functools.partial(on_tensors(shapes.pad), **chosen, constant=attributes.get("value", 0.0))


def _einsum(attributes: Attributes) -> Function:
    return on_tensors(functools.partial(torch.einsum, attributes["equation"]))


def _constant(attributes: Attributes) -> Function:
    value = attributes.get("value")
    if not isinstance(value, Tensor):
        kind = next((name for name in attributes if name.startswith("value_")), None)
        if kind is None or "string" in kind:
            raise Unconvertible("a constant that is no tensor")
        value = torch.tensor(attributes[kind], dtype=torch.int64 if "int" in kind else torch.float32)
    return lambda: value


def _split(attributes: Attributes) -> Function:
    return with_attributes(shapes.split, "axis", "split", "parts", wrap=moves)(attributes)


def _fused_matmul(
    first: Tensor,
    second: Tensor,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    left, right = first.mT if transA else first, second.mT if transB else second
    return alpha * torch.matmul(left, right)


def _normalised_sum(*values: Any, **attributes: Any) -> Tensor:
    """SkipLayerNormalization: LayerNormalization of a sum, first output."""
    missing: list[Any] = [None] * (5 - len(values))
    first, second, scale, shift, bias = [*values, *missing]
    total = first + second if bias is None else first + second + bias
    return layers.layer_normalization(total, scale, shift, epsilon=attributes.get("epsilon", 1e-12))


QUANTISER = ("axis", "offset", "ends", "integer_kernel", "pixels")
OPERATORS: Mapping[str, Builder] = {
    "Abs": fixed(torch.abs), "Add": lambda _: quantised.add, "And": fixed(torch.logical_and),
    "ArgMax": lambda a: on_tensors(lambda x: x.argmax(a.get("axis", 0), keepdim=bool(a.get("keepdims", 1)))),
    "AveragePool": _average_pool,
    "BatchNormalization": with_attributes(layers.batch_normalization, "epsilon"),
    "Cast": with_attributes(_cast, "to"), "CastLike": lambda _: _unchanged, "Ceil": fixed(straight_through(torch.ceil)),
    "Celu": lambda a: on_tensors(functools.partial(functional.celu, alpha=a.get("alpha", 1.0))),
    "Clip": with_attributes(_clip, "min", "max", wrap=lambda function: function),
    "Concat": with_attributes(_concat, "axis", wrap=lambda function: function),
    "Constant": _constant, "ConstantOfShape": with_attributes(shapes.constant_of_shape, "value"),
    "Conv": with_attributes(
        layers.convolution, "strides", "dilations", "pads", "group", "auto_pad", "aligned", "in_float", wrap=lambda f: f
    ),
    "ConvTranspose": _transposed_convolution, "Cos": fixed(torch.cos),
    "DepthToSpace": with_attributes(shapes.depth_to_space, "blocksize", "mode"),
    "DequantizeLinear": with_attributes(quantised.dequantize, "axis", "offset", wrap=lambda f: f),
    "Div": fixed(_divide), "Dropout": lambda _: _unchanged, "Einsum": _einsum,
    "Elu": lambda a: on_tensors(functools.partial(functional.elu, alpha=a.get("alpha", 1.0))),
    "Equal": fixed(torch.eq), "Erf": fixed(torch.erf), "Exp": fixed(torch.exp),
    "Expand": with_attributes(shapes.expand, wrap=moves),
    "Flatten": with_attributes(shapes.flatten, "axis", wrap=moves),
    "Floor": fixed(straight_through(torch.floor)), "Gather": with_attributes(shapes.gather, "axis", wrap=moves),
    "GatherElements": with_attributes(shapes.gather_elements, "axis"), "Gelu": _gelu, "Gemm": _gemm,
    "GlobalAveragePool": with_attributes(layers.global_average_pool, wrap=scales),
    "GlobalMaxPool": with_attributes(layers.global_max_pool, wrap=moves),
    "Greater": fixed(torch.gt), "GreaterOrEqual": fixed(torch.ge),
    "GroupNormalization": with_attributes(layers.group_normalization, "num_groups", "epsilon"),
    "HardSigmoid": with_attributes(_hard_sigmoid, "alpha", "beta"), "HardSwish": fixed(functional.hardswish),
    "Identity": lambda _: _unchanged,
    "InstanceNormalization": with_attributes(layers.instance_normalization, "epsilon"),
    "LRN": with_attributes(layers.local_response_normalization, "size", "alpha", "beta", "bias"),
    "LayerNormalization": with_attributes(layers.layer_normalization, "axis", "epsilon", "quantised"),
    "LeakyRelu": lambda a: scales(functools.partial(functional.leaky_relu, negative_slope=a.get("alpha", 0.01))),
    "Less": fixed(torch.lt), "LessOrEqual": fixed(torch.le), "Log": fixed(torch.log),
    "LogSoftmax": lambda a: _softmax(a, torch.log_softmax), "MatMul": lambda _: quantised.matmul,
    "Max": fixed(_fold(torch.maximum)),
    "MaxPool": with_attributes(
        layers.max_pool, "kernel_shape", "strides", "pads", "dilations", "ceil_mode", "auto_pad", wrap=moves
    ),
    "Mean": fixed(_mean), "Min": fixed(_fold(torch.minimum)), "Mish": fixed(functional.mish),
    "Mod": with_attributes(_modulo, "fmod"), "Mul": lambda _: quantised.multiply, "Neg": fixed(torch.neg),
    "Not": fixed(torch.logical_not), "Or": fixed(torch.logical_or), "PRelu": fixed(_prelu), "Pad": _pad,
    "Pow": fixed(torch.pow),
    "QuantizeLinear": with_attributes(quantised.quantize, *QUANTISER, wrap=lambda f: f),
    "RMSNormalization": with_attributes(layers.rms_normalization, "axis", "epsilon"),
    "Range": fixed(shapes.arange), "Reciprocal": fixed(torch.reciprocal),
    "ReduceL2": _reduce(lambda x, axes, keep: x.norm(dim=axes, keepdim=keep)),
    "ReduceMax": _reduce(torch.amax, homogeneous=True), "ReduceMean": _reduce(torch.mean, homogeneous=True),
    "ReduceMin": _reduce(torch.amin, homogeneous=True), "ReduceProd": _reduce(_product),
    "ReduceSum": _reduce(torch.sum, homogeneous=True),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: x.square().sum(axes, keep)),
    "Relu": lambda _: quantised.relu, "Reshape": with_attributes(shapes.reshape, "allowzero", wrap=moves),
    "Resize": _resize, "Round": fixed(straight_through(torch.round)), "ScatterND": fixed(shapes.scatter_nd),
    "Selu": _selu, "Shape": with_attributes(shapes.shape, "start", "end"),
    "Sigmoid": fixed(torch.sigmoid), "Sign": fixed(straight_through(torch.sign)), "Sin": fixed(torch.sin),
    "Slice": with_attributes(shapes.slice_, "starts", "ends", "axes", wrap=moves),
    "Softmax": _softmax_of_integers, "Softplus": fixed(functional.softplus),
    "Softsign": fixed(functional.softsign), "SpaceToDepth": with_attributes(shapes.space_to_depth, "blocksize"),
    "Split": _split, "Sqrt": fixed(torch.sqrt), "Squeeze": with_attributes(shapes.squeeze, "axes", wrap=moves),
    "Sub": fixed(operator.sub), "Sum": fixed(_fold(torch.add)), "Swish": with_attributes(_swish, "alpha"),
    "Tanh": fixed(torch.tanh), "Tile": fixed(shapes.tile),
    "Transpose": with_attributes(shapes.transpose, "perm", wrap=moves),
    "Unsqueeze": with_attributes(shapes.unsqueeze, "axes", wrap=moves), "Where": fixed(torch.where),
    "com.microsoft:BiasGelu": fixed(lambda value, bias: functional.gelu(value + bias)),
    "com.microsoft:DequantizeLinear": with_attributes(quantised.dequantize, "axis", "offset", wrap=lambda f: f),
    "com.microsoft:FastGelu": fixed(
        lambda value, bias=None: functional.gelu(value if bias is None else value + bias, approximate="tanh")
    ),
    "com.microsoft:FusedMatMul": with_attributes(_fused_matmul, "alpha", "transA", "transB"),
    "com.microsoft:Gelu": fixed(functional.gelu),
    "com.microsoft:QuantizeLinear": with_attributes(quantised.quantize, *QUANTISER, wrap=lambda f: f),
    "com.microsoft:QuickGelu": with_attributes(_swish, "alpha"),
    "com.microsoft:SkipLayerNormalization": with_attributes(_normalised_sum, "epsilon"),
}  # fmt: skip
"""Named as in ONNX; operators of another domain than ONNX's own carry it in front."""
