"""`model.e2e.onnx`: one file that takes an encoded image and returns probabilities, by onnxruntime-extensions.

The graph decodes, chooses the channels, resizes and crops as torchvision does on PIL images (`Resize` of the shorter
side with antialiasing, `CenterCrop`, division by 255), runs the network and ends in a softmax; its batch is 1.
The library's own steps round the longer side where torchvision cuts it off, resize with errors at the borders, and hand
on grey JPEG files with one channel and CMYK files with four; so all but its decoder is of ONNX's own operators here.

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
from toolkit.exporters.preprocessing import EXTENSIONS, FloatArray, Preprocessing, open_image, preprocessing_graph
from toolkit.exporters.rewrites import strip_metadata
from toolkit.exporters.session import make_session

METADATA_KEY = "preprocessing"


@dataclass(frozen=True, slots=True)
class EndToEndComparison:
    """model.e2e.onnx against Pillow's and torchvision's preprocessing before the same network, on the same files."""

    max_difference: float
    """Largest difference of a probability, over the files as they are."""
    worst_file: str
    agreement: Proportion
    """Files on which both name the same class."""
    lossless_difference: float
    """The same with Pillow's pixels handed over as PNG: what the graph's own steps contribute, without its decoder.

    Two correct decoders give different colours for JPEG files with subsampled chroma: libjpeg-turbo, in Pillow, blends
    neighbours, libjpeg 9, in the graph, interpolates by cosines; at edges in small images they are 50 levels apart.
    """
    lossless_agreement: Proportion


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
    before = _imports(preprocessing_graph(rule), network)
    after = _imports(parser.parse_graph(_after_text(len(class_names))), network)
    network = _prefixed(network)
    source, logits = network.graph.input[0].name, network.graph.output[0].name
    merged = compose.merge_models(before, network, io_map=[("pixels", source)])
    merged = compose.merge_models(merged, after, io_map=[(logits, "scores")])
    _write_metadata(merged, rule, class_names)
    del merged.opset_import[:]
    merged.opset_import.extend(_opsets(network, opset))
    strip_metadata(merged)
    merged.graph.name = "end_to_end"
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
        try:
            (probabilities,) = self._session.run(None, {"image": np.frombuffer(data, dtype=np.uint8)})
        except Exception as error:  # ONNX Runtime's own exceptions share no public base class
            raise ToolkitError(
                "the graph's decoder refuses an image that Pillow reads",
                found=str(error).splitlines()[0][-160:],
                fix="save the image again as a plain JPEG or PNG file",
            ) from error
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
    pairs, lossless = [], []
    for file in files:
        data = file.read_bytes()
        logits = reference.predict(torch.from_numpy(model.preprocessing.reference(data)))
        expected = torch.softmax(logits.double(), dim=1)[0].numpy()
        pairs.append((model.predict(data), expected))
        lossless.append((model.predict(_as_png(data)), expected))
    differences = [_difference(*pair) for pair in pairs]
    worst = int(np.argmax(differences))
    return EndToEndComparison(
        max_difference=differences[worst],
        worst_file=files[worst].name,
        agreement=_agreement(pairs),
        lossless_difference=max(_difference(*pair) for pair in lossless),
        lossless_agreement=_agreement(lossless),
    )


Pair = tuple[FloatArray, npt.NDArray[np.float64]]


def _difference(measured: FloatArray, expected: npt.NDArray[np.float64]) -> float:
    return float(np.abs(measured - expected).max())


def _agreement(pairs: Sequence[Pair]) -> Proportion:
    return Proportion(sum(bool(ours.argmax() == theirs.argmax()) for ours, theirs in pairs), len(pairs))


def _as_png(data: bytes) -> bytes:
    """The image that Pillow decodes, packed without loss."""
    packed = io.BytesIO()
    with open_image(data) as image:
        grey = image.mode in ("1", "L", "LA")
        image.convert("L" if grey else "RGB").save(packed, "PNG", compress_level=1)
    return packed.getvalue()


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
            "the preprocessing needs opset 18 or later",
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


def _session(path: Path, threads: int | None) -> Any:
    """A CPU session with the decoder's library."""
    import onnxruntime_extensions

    try:
        return make_session(path, threads=threads, spinning=False, custom_ops=onnxruntime_extensions.get_library_path())
    except ToolkitError as error:
        raise ToolkitError(
            "the end-to-end model cannot be loaded",
            found=error.found,
            fix="name a model.e2e.onnx as `toolkit harden` writes it into a bundle",
        ) from error
