"""`model.e2e.onnx`: one file that takes an encoded image and returns probabilities, by onnxruntime-extensions.

The graph decodes, chooses the channels, resizes and crops as torchvision does on PIL images (`Resize` of the shorter
side with antialiasing, `CenterCrop`, division by 255), runs the network and ends in a softmax; its batch is 1.
The library's own `Resize` step rounds the longer side where torchvision cuts it off, and hands on grey JPEG files with
one channel and CMYK files with four; so the steps here are our own, of ONNX's operators, around its decoder.

Traps of the decoder (onnxruntime-extensions 0.15): a damaged JPEG ends the PROCESS (libjpeg's `exit`), it raises
nothing. The graph refuses bytes that are no whole JPEG or PNG file before they reach it; what is damaged inside still
does that, so `EndToEndModel.predict` lets Pillow read the image first, and a server must do the same.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, compose, helper, parser

from toolkit.artifacts import Predictor, Proportion
from toolkit.errors import ToolkitError
from toolkit.exporters.onnx import load_onnx

EXTENSIONS = "com.microsoft.extensions"
GUARD = "not_a_whole_JPEG_or_PNG_file"
"""Name of the node that fails on bytes that must not reach the decoder; ONNX Runtime's error quotes it."""
MODES = {1: "L", 3: "RGB"}
METADATA_KEY = "preprocessing"

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image file becomes the network's input.

    The image is scaled, keeping its proportions, until it just covers `resize` (for a square: until its shorter side
    has that length; the longer one is rounded down, as torchvision does); then the centre `crop` is cut out.
    """

    channels: int
    resize: tuple[int, int]
    """(height, width) to cover"""
    crop: tuple[int, int]
    """(height, width) of the network's input"""

    @classmethod
    def of(cls, input_shape: tuple[int, int, int], resize: int | None = None) -> Preprocessing:
        """The rule for a network's (channels, height, width).

        Args:
            input_shape: (channels, height, width) of the network's input.
            resize: length of the shorter side before the crop, in pixels; None: no more than the crop needs.

        Raises:
            ToolkitError: neither 1 nor 3 channels, or a resize smaller than the crop.
        """
        channels, height, width = input_shape
        if channels not in MODES:
            raise ToolkitError(
                "model.e2e.onnx is for networks with 1 or 3 input channels",
                found=f"{channels} channels, input shape {input_shape}",
                fix="leave it out with `end_to_end: false` under `export:` in the config, and ship model.onnx",
            )
        if resize is not None and resize < max(height, width):
            raise ToolkitError(
                "the resize is smaller than the crop",
                found=f"resize to {resize}, crop to {height} x {width}",
                fix=f"resize the shorter side to at least {max(height, width)} pixels",
            )
        cover = (height, width) if resize is None else (resize, resize)
        return cls(channels, cover, (height, width))

    def scaled_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image of this size is scaled to."""
        cover_height, cover_width = self.resize
        if cover_height * width >= cover_width * height:
            return cover_height, cover_height * width // height
        return cover_width * height // width, cover_width

    def reference(self, data: bytes) -> FloatArray:
        """The same by Pillow and torchvision: encoded bytes to float32 [1, C, H, W] in [0, 1]."""
        from torchvision.transforms.v2 import functional

        with open_image(data) as image:
            converted = image.convert(MODES[self.channels])
        size = self.scaled_size(converted.height, converted.width)
        resized = functional.resize(converted, list(size), antialias=True)
        cropped = functional.center_crop(resized, list(self.crop))
        pixels = np.asarray(cropped, dtype=np.float32).reshape(*self.crop, self.channels)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None] / np.float32(255))


@dataclass(frozen=True, slots=True)
class EndToEndComparison:
    """model.e2e.onnx against Pillow's and torchvision's preprocessing before the same network, on the same files."""

    max_difference: float
    """Largest difference of a probability."""
    worst_file: str
    agreement: Proportion
    """Files on which both name the same class."""


def open_image(data: bytes) -> Any:
    """Decode a JPEG or PNG file with Pillow, all of it.

    Raises:
        ToolkitError: the bytes are no JPEG or PNG image, or are damaged.
    """
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        start = data[:8].hex(" ") or "nothing"
        raise ToolkitError(
            "the image cannot be decoded",
            found=f"{len(data):,} bytes that start with {start} ({type(error).__name__})",
            fix="give the bytes of a whole JPEG or PNG file",
        ) from error
    if image.mode.startswith("I"):
        raise ToolkitError(
            "the image has more than 8 bits a channel",
            found=f"{image.format} of mode {image.mode}, {image.width} x {image.height}",
            fix="save it with 8 bits a channel; Pillow and the graph's decoder scale 16 bits differently",
        )
    return image


def export_end_to_end(
    model_path: Path,
    output: Path,
    *,
    input_shape: tuple[int, int, int],
    class_names: Sequence[str],
    resize: int | None = None,
) -> Path:
    """Put decoding, channels, resize and crop before an ONNX classifier and a softmax behind it.

    Args:
        model_path: float or quantised classifier; input float32 [N, C, H, W] in [0, 1], output logits [N, classes].
        output: the file to write. Input `image`: uint8 [bytes], a JPEG or PNG file, grey, RGB, RGBA, palette or CMYK
            (JPEG), 8 bits a channel, EXIF rotation not applied. Output `probabilities`: float32 [1, classes].
        input_shape: (channels, height, width) of the network's input.
        class_names: written into the metadata, in the order of the outputs.
        resize: length of the shorter side before the centre crop; None: no more than the crop needs.

    Returns:
        `output`.

    Raises:
        ToolkitError: other than 1 or 3 channels, an opset below 18, or a file that is not such a classifier.
    """
    rule = Preprocessing.of(input_shape, resize)
    network = load_onnx(model_path)
    _check_network(network, model_path, input_shape, len(class_names))
    opset = _opset(network)
    before = _imports(parser.parse_graph(_before_text(rule)), network)
    after = _imports(parser.parse_graph(_after_text(len(class_names))), network)
    for node in before.graph.node:
        if "tested" in node.output:
            node.name = GUARD

    network = _prefixed(network)
    source, logits = network.graph.input[0].name, network.graph.output[0].name
    merged = compose.merge_models(before, network, io_map=[("pixels", source)])
    merged = compose.merge_models(merged, after, io_map=[(logits, "scores")])
    _write_metadata(merged, rule, class_names)
    del merged.opset_import[:]
    merged.opset_import.extend(_opsets(network, opset))
    _strip(merged.graph)
    merged.doc_string, merged.graph.name = "", "end_to_end"
    onnx.checker.check_model(merged)
    output.write_bytes(merged.SerializeToString(deterministic=True))
    return output


class EndToEndModel:
    """A session on a model.e2e.onnx, on the CPU (the decoder has no other form)."""

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        self._session = _session(path, threads)
        metadata = self._session.get_modelmeta().custom_metadata_map
        if METADATA_KEY not in metadata:
            raise ToolkitError(
                "the file is no end-to-end model",
                found=f"{path.name} without '{METADATA_KEY}' in its metadata",
                fix="name a model.e2e.onnx as `toolkit harden` writes it into a bundle",
            )
        values = json.loads(metadata[METADATA_KEY])
        self.preprocessing = Preprocessing(values["channels"], tuple(values["resize"]), tuple(values["crop"]))

    def predict(self, data: bytes) -> FloatArray:
        """Probabilities float32 [classes] of one encoded image; Pillow reads it first (see the module's traps).

        Raises:
            ToolkitError: the bytes are no JPEG or PNG image, or are damaged.
        """
        open_image(data).close()
        (probabilities,) = self._session.run(None, {"image": np.frombuffer(data, dtype=np.uint8)})
        return np.asarray(probabilities[0], dtype=np.float32)


def run_end_to_end(path: Path, data: bytes) -> FloatArray:
    """Probabilities float32 [classes] of one encoded image; for many images, keep an `EndToEndModel`."""
    return EndToEndModel(path).predict(data)


def compare_end_to_end(path: Path, files: Sequence[Path], reference: Predictor) -> EndToEndComparison:
    """Compare a model.e2e.onnx with Pillow's and torchvision's preprocessing before `reference`.

    Args:
        path: the end-to-end file.
        files: JPEG or PNG files.
        reference: the same network without the preprocessing.

    Raises:
        ToolkitError: there are no files, or one cannot be decoded.
    """
    import torch

    if not files:
        raise ToolkitError("no files to compare on", found="an empty list", fix="name at least one JPEG or PNG file")
    model = EndToEndModel(path)
    worst, worst_file, agreed = -1.0, files[0].name, 0
    for file in files:
        data = file.read_bytes()
        measured = model.predict(data)
        logits = reference.predict(torch.from_numpy(model.preprocessing.reference(data)))
        expected = torch.softmax(logits.double(), dim=1)[0].numpy()
        difference = float(np.abs(measured - expected).max())
        agreed += int(measured.argmax() == expected.argmax())
        if difference > worst:
            worst, worst_file = difference, file.name
    return EndToEndComparison(worst, worst_file, Proportion(agreed, len(files)))


def _before_text(rule: Preprocessing) -> str:
    """The graph from encoded bytes to pixels, in ONNX's textual form."""
    channels, (cover_height, cover_width), (height, width) = rule.channels, rule.resize, rule.crop
    # The type of `decoded` is declared: nothing infers it, and ONNX Runtime would conclude empty sizes for the Resize.
    # Pillow's L (ITU-R 601-2) in 16-bit fixed point; every value stays below 2**24, so float32 is exact.
    grey = """
        weights = Constant <value = float[3, 1] {19595, 38470, 7471}> ()
        half = Constant <value = float {32768}> ()
        one16 = Constant <value = float {65536}> ()
        rgb_float = Cast <to = 1> (rgb)
        luma = MatMul (rgb_float, weights)
        luma_half = Add (luma, half)
        luma_scaled = Div (luma_half, one16)
        luma_floor = Floor (luma_scaled)
        chosen = Cast <to = 2> (luma_floor)"""
    choose = grey if channels == 1 else "chosen = Identity (rgb)"
    return f"""
    before (uint8[bytes] image) => (float[1, {channels}, {height}, {width}] pixels)
    <uint8[height, width, planes] decoded> {{
        zero = Constant <value = int64[1] {{0}}> ()
        one = Constant <value = int64[1] {{1}}> ()
        two = Constant <value = int64[1] {{2}}> ()
        four = Constant <value = int64[1] {{4}}> ()
        last = Constant <value = int64[1] {{-1}}> ()
        end = Constant <value = int64[1] {{{2**62}}}> ()
        half_float = Constant <value = float[1] {{0.5}}> ()

        padding = Constant <value = uint8[4] {{0, 0, 0, 0}}> ()
        padded = Concat <axis = 0> (image, padding)
        png_magic = Constant <value = uint8[4] {{137, 80, 78, 71}}> ()
        jpeg_magic = Constant <value = uint8[2] {{255, 216}}> ()
        jpeg_end_high = Constant <value = uint8 {{255}}> ()
        jpeg_end_low = Constant <value = uint8 {{217}}> ()
        start4 = Slice (padded, zero, four)
        start2 = Slice (padded, zero, two)
        is_png = Equal (start4, png_magic)
        is_jpeg = Equal (start2, jpeg_magic)
        without_last = Slice (padded, zero, last)
        without_first = Slice (padded, one, end)
        highs = Equal (without_last, jpeg_end_high)
        lows = Equal (without_first, jpeg_end_low)
        ends = And (highs, lows)
        is_png_number = Cast <to = 7> (is_png)
        is_jpeg_number = Cast <to = 7> (is_jpeg)
        ends_number = Cast <to = 7> (ends)
        png = ReduceMin <keepdims = 0> (is_png_number)
        jpeg_start = ReduceMin <keepdims = 0> (is_jpeg_number)
        jpeg_end = ReduceMax <keepdims = 0> (ends_number)
        jpeg = Mul (jpeg_start, jpeg_end)
        whole = Max (png, jpeg)
        length = Shape (image)
        whole_length = Mul (length, whole)
        rest = Sub (one, whole)
        impossible = Sub (whole_length, rest)
        impossible_twice = Sub (impossible, rest)
        tested = Reshape (image, impossible_twice)

        decoded = {EXTENSIONS}.DecodeImage <color_space = "rgb"> (tested)
        full = Shape (decoded)
        image_height, image_width, planes = Split <axis = 0, num_outputs = 3> (full)
        is_cmyk_one = Equal (planes, four)
        is_cmyk = Squeeze (is_cmyk_one)
        rgb = If (is_cmyk) <
            then_branch = cmyk () => (uint8[h, w, 3] from_cmyk) {{
                three = Constant <value = int64[1] {{3}}> ()
                axis = Constant <value = int64[1] {{2}}> ()
                white = Constant <value = float {{255}}> ()
                decoded_float = Cast <to = 1> (decoded)
                ink = Slice (decoded_float, zero, three, axis)
                key = Slice (decoded_float, three, end, axis)
                product = Mul (ink, key)
                quotient = Div (product, white)
                rounded = Round (quotient)
                from_cmyk = Cast <to = 2> (rounded)
            }},
            else_branch = plain () => (uint8[h, w, 3] from_plain) {{
                three_planes = Constant <value = int64[3] {{1, 1, 3}}> ()
                from_plain = Expand (decoded, three_planes)
            }}
        >
        {choose}
        planar = Transpose <perm = [2, 0, 1]> (chosen)
        single = Unsqueeze (planar, zero)

        cover_height = Constant <value = int64[1] {{{cover_height}}}> ()
        cover_width = Constant <value = int64[1] {{{cover_width}}}> ()
        across = Mul (cover_height, image_width)
        down = Mul (cover_width, image_height)
        wide = GreaterOrEqual (across, down)
        long_width = Div (across, image_height)
        long_height = Div (down, image_width)
        new_height = Where (wide, cover_height, long_height)
        new_width = Where (wide, long_width, cover_width)
        kept = Constant <value = int64[2] {{1, {channels}}}> ()
        sizes = Concat <axis = 0> (kept, new_height, new_width)
        resized = Resize <mode = "linear", antialias = 1, coordinate_transformation_mode = "half_pixel">
            (single, , , sizes)

        crop_size = Constant <value = int64[2] {{{height}, {width}}}> ()
        new_size = Concat <axis = 0> (new_height, new_width)
        spare = Sub (new_size, crop_size)
        spare_float = Cast <to = 1> (spare)
        margin_float = Mul (spare_float, half_float)
        margin_rounded = Round (margin_float)
        first = Cast <to = 7> (margin_rounded)
        beyond = Add (first, crop_size)
        axes = Constant <value = int64[2] {{2, 3}}> ()
        cropped = Slice (resized, first, beyond, axes)
        cropped_float = Cast <to = 1> (cropped)
        levels = Constant <value = float {{255}}> ()
        pixels = Div (cropped_float, levels)
    }}"""


def _after_text(classes: int) -> str:
    return f"""
    after (float[1, {classes}] scores) => (float[1, {classes}] probabilities) {{
        probabilities = Softmax <axis = 1> (scores)
    }}"""


def _check_network(network: onnx.ModelProto, path: Path, shape: tuple[int, int, int], classes: int) -> None:
    """Refuse what is not a classifier of `shape` with `classes` outputs in a fitting opset."""
    fix = "name a classifier with one input [N, C, H, W] and one output [N, classes], as `toolkit export` writes it"
    inputs, outputs = network.graph.input, network.graph.output
    if len(inputs) != 1 or len(outputs) != 1:
        raise ToolkitError(
            "the ONNX file is no image classifier",
            found=f"{path.name} with {len(inputs)} inputs and {len(outputs)} outputs",
            fix=fix,
        )
    wanted = {"input": ([None, *shape], inputs[0]), "output": ([None, classes], outputs[0])}
    for side, (sizes, value) in wanted.items():
        dims = value.type.tensor_type.shape.dim
        fits = len(dims) == len(sizes) and all(
            not dim.HasField("dim_value") or dim.dim_value == (size or 1) for dim, size in zip(dims, sizes, strict=True)
        )
        if not fits or value.type.tensor_type.elem_type != TensorProto.FLOAT:
            found = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in dims]
            raise ToolkitError(
                f"the ONNX file's {side} does not fit the model",
                found=f"{path.name}: {side} '{value.name}' {found}, wanted float32 {['N', *sizes[1:]]}",
                fix=fix,
            )
    if _opset(network) < 18:
        raise ToolkitError(
            "the antialiased resize needs opset 18 or later",
            found=f"{path.name} with opset {_opset(network)}",
            fix="export the network again with --opset 18 or more",
        )


def _opset(model: onnx.ModelProto) -> int:
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def _opsets(network: onnx.ModelProto, opset: int) -> list[onnx.OperatorSetIdProto]:
    """The network's own operator sets and the decoder's."""
    domains = {entry.domain: entry.version for entry in network.opset_import if entry.domain not in ("", "ai.onnx")}
    return [helper.make_opsetid(domain, version) for domain, version in {"": opset, **domains, EXTENSIONS: 1}.items()]


def _imports(graph: onnx.GraphProto, network: onnx.ModelProto) -> onnx.ModelProto:
    """A model around `graph` with the opset and the format version of `network`, so that the two can be merged."""
    opsets = [helper.make_opsetid("", _opset(network)), helper.make_opsetid(EXTENSIONS, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=network.ir_version, producer_name="toolkit")


def _prefixed(network: onnx.ModelProto) -> onnx.ModelProto:
    """The network with `network/` before every name, so that none clashes with ours.

    A quantised graph's intermediate types repeat names ("overlapping names"); they are not needed, and cleared.
    """
    del network.graph.value_info[:]
    prefixed: onnx.ModelProto = compose.add_prefix(network, "network/", rename_functions=False)
    return prefixed


def _write_metadata(model: onnx.ModelProto, rule: Preprocessing, class_names: Sequence[str]) -> None:
    """Keep what the network's file says of itself; add the classes and the preprocessing."""
    kept = {entry.key: entry.value for entry in model.metadata_props}
    ours = {"class_names": json.dumps(list(class_names)), METADATA_KEY: json.dumps(asdict(rule))}
    helper.set_model_props(model, {**kept, **ours})


def _strip(graph: onnx.GraphProto) -> None:
    """Remove the exporter's traces (source lines, local paths) from a graph and its branches."""
    del graph.metadata_props[:]
    graph.doc_string = ""
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _strip(attribute.g)
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""


def _session(path: Path, threads: int | None) -> Any:
    """A CPU session with the decoder's library; here and not in session.py, for the library belongs to this module."""
    import onnxruntime
    import onnxruntime_extensions

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions share no public base class
        raise ToolkitError(
            "the end-to-end model cannot be loaded",
            found=f"{path.name}: {str(error).splitlines()[0]}",
            fix="name a model.e2e.onnx as `toolkit harden` writes it into a bundle",
        ) from error
