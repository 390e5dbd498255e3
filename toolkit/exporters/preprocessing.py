"""From an image file to a network's input: the rule, by Pillow and torchvision, and the same as an ONNX graph."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import parser

from toolkit.errors import ToolkitError

EXTENSIONS = "com.microsoft.extensions"
GUARD = "not_a_whole_JPEG_or_PNG_file"
"""Name of the node that fails on bytes that must not reach the decoder; ONNX Runtime's error quotes it."""
MODES = {1: "L", 3: "RGB"}

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


def preprocessing_graph(rule: Preprocessing) -> onnx.GraphProto:
    """The graph from `image`, encoded bytes uint8 [n], to `pixels`, float32 [1, C, H, W]; needs opset 18."""
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
    graph = parser.parse_graph(f"""
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
        zero_double = Constant <value = double {{0.0}}> ()
        half_double = Constant <value = double {{0.5}}> ()
        one_double = Constant <value = double {{1.0}}> ()
        half_level = Constant <value = float {{0.5}}> ()
        {_weights_text("x", "image_width", "new_width")}
        {_weights_text("y", "image_height", "new_height")}
        levels_in = Cast <to = 1> (single)
        x_columns = Transpose <perm = [1, 0]> (x_weights)
        narrow = MatMul (levels_in, x_columns)
        narrow_half = Add (narrow, half_level)
        narrow_rounded = Floor (narrow_half)
        low = MatMul (y_weights, narrow_rounded)
        low_half = Add (low, half_level)
        resized = Floor (low_half)

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
        levels = Constant <value = float {{255}}> ()
        pixels = Div (cropped, levels)
    }}""")
    for node in graph.node:
        if "tested" in node.output:
            node.name = GUARD
    return graph


def _weights_text(axis: str, old: str, new: str) -> str:
    """Pillow's bilinear weights, antialiased, as a matrix [new, old]: a triangle as wide as the reduction, normalised.

    ONNX Runtime's own antialiased `Resize` is up to 8 levels of 255 off at the borders (1.31), in float and in uint8.
    """
    return f"""
        {axis}_old_one = Cast <to = 11> ({old})
        {axis}_new_one = Cast <to = 11> ({new})
        {axis}_old = Squeeze ({axis}_old_one)
        {axis}_new = Squeeze ({axis}_new_one)
        {axis}_scale = Div ({axis}_old, {axis}_new)
        {axis}_support = Max ({axis}_scale, one_double)
        {axis}_to = Range (zero_double, {axis}_new, one_double)
        {axis}_to_middle = Add ({axis}_to, half_double)
        {axis}_centre = Mul ({axis}_to_middle, {axis}_scale)
        {axis}_rows = Unsqueeze ({axis}_centre, one)
        {axis}_from = Range (zero_double, {axis}_old, one_double)
        {axis}_from_middle = Add ({axis}_from, half_double)
        {axis}_apart = Sub ({axis}_from_middle, {axis}_rows)
        {axis}_distance = Abs ({axis}_apart)
        {axis}_part = Div ({axis}_distance, {axis}_support)
        {axis}_left = Sub (one_double, {axis}_part)
        {axis}_triangle = Max ({axis}_left, zero_double)
        {axis}_sum = ReduceSum <keepdims = 1> ({axis}_triangle, one)
        {axis}_normal = Div ({axis}_triangle, {axis}_sum)
        {axis}_weights = Cast <to = 1> ({axis}_normal)"""
