from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from PIL import Image
from torchvision.transforms import v2

from toolkit.config import DataConfig
from toolkit.data.sources import load_source
from toolkit.errors import ToolkitError
from toolkit.exporters.end_to_end import (
    EndToEndModel,
    compare_end_to_end,
    export_end_to_end,
    run_end_to_end,
)
from toolkit.exporters.preprocessing import GUARD, Preprocessing, open_image
from toolkit.exporters.session import OnnxPredictor

GAIN = 0.05
"""Logits per grey level of the networks that hand their pixels on."""
Array = npt.NDArray[Any]


def save(path: Path, nodes: list[onnx.NodeProto], shape: tuple[int, ...], classes: int, constants: dict[str, Array],
         opset: int = 20) -> Path:  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["N", *shape])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["N", classes])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


def pixel_network(path: Path, shape: tuple[int, int, int], opset: int = 20) -> Path:
    """A network whose logits are its pixels, so that the probabilities tell every one of them."""
    nodes = [helper.make_node("Flatten", ["image"], ["flat"]), helper.make_node("Mul", ["flat", "gain"], ["logits"])]
    return save(path, nodes, shape, int(np.prod(shape)), {"gain": np.array(255 * GAIN, dtype=np.float32)}, opset)


def linear_network(path: Path, shape: tuple[int, int, int], weights: Array, bias: Array) -> Path:
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weights", "bias"], ["logits"], transB=1),
    ]
    return save(path, nodes, shape, len(bias), {"weights": weights, "bias": bias})


def levels(model: EndToEndModel, data: bytes) -> Array:
    """Differences in grey levels between what the graph's network sees and what the reference gives it."""
    expected = model.preprocessing.reference(data).reshape(-1).astype(np.float64) * 255 * GAIN
    seen = np.log(model.predict(data).astype(np.float64))
    return np.asarray((seen - (expected - np.log(np.exp(expected).sum()))) / GAIN)


def photo(width: int, height: int) -> Image.Image:
    """Smooth colours with edges and some noise, like a photograph."""
    generator = np.random.default_rng(3)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    planes = np.stack([np.sin(6 * x + 2 * y), np.cos(4 * y - x), np.sin(9 * x * y + 1)], axis=-1) * 90 + 128
    planes[(x - 0.4) ** 2 + (y - 0.3) ** 2 < 0.03] *= 0.4
    noisy = planes + generator.normal(0, 3, planes.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def packed(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_alpha(image: Image.Image) -> Image.Image:
    both = image.copy()
    both.putalpha(image.convert("L").rotate(90).resize(image.size))
    return both


ENCODINGS: dict[str, Callable[[Image.Image], bytes]] = {
    "png": lambda image: packed(image, "PNG"),
    "grey png": lambda image: packed(image.convert("L"), "PNG"),
    "grey and alpha": lambda image: packed(with_alpha(image).convert("LA"), "PNG"),
    "rgba": lambda image: packed(with_alpha(image), "PNG"),
    "palette": lambda image: packed(image.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
    "palette with a transparent colour": lambda image: packed(image.convert("P"), "PNG", transparency=3),
    "jpeg": lambda image: packed(image, "JPEG", quality=92, subsampling=0),
    "progressive jpeg": lambda image: packed(image, "JPEG", quality=92, subsampling=0, progressive=True),
    "grey jpeg": lambda image: packed(image.convert("L"), "JPEG"),
    "cmyk jpeg": lambda image: packed(image.convert("CMYK"), "JPEG", subsampling=0),
}


@pytest.fixture(scope="module", params=[3, 1], ids=["rgb", "grey"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EndToEndModel:
    folder, shape = tmp_path_factory.mktemp("e2e"), (int(request.param), 16, 16)
    names = [str(index) for index in range(int(np.prod(shape)))]
    network = pixel_network(folder / "model.onnx", shape)
    return EndToEndModel(export_end_to_end(network, folder / "e2e.onnx", input_shape=shape, class_names=names))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("size", [(16, 16), (61, 40), (40, 67), (11, 9)], ids=str)
def test_every_encoding_and_size_gives_torchvisions_pixels(
    model: EndToEndModel, encoding: str, size: tuple[int, int]
) -> None:
    difference = np.abs(levels(model, ENCODINGS[encoding](photo(*size))))
    assert difference.max() < 1.1  # one level, where decoders round apart or a sum ends in exactly a half
    assert difference.mean() < 0.1
    if size == (16, 16) and "jpeg" not in encoding:
        assert difference.max() < 0.01


def test_subsampled_chroma_differs_by_the_decoder_alone(model: EndToEndModel) -> None:
    difference = np.abs(levels(model, packed(photo(200, 160), "JPEG", quality=90, subsampling=2)))
    assert difference.max() < 8
    assert difference.mean() < 0.5


def test_extreme_reductions_agree_too(tmp_path: Path) -> None:
    names = [str(index) for index in range(3 * 8 * 8)]
    network = pixel_network(tmp_path / "model.onnx", (3, 8, 8))
    model = EndToEndModel(export_end_to_end(network, tmp_path / "e.onnx", input_shape=(3, 8, 8), class_names=names))
    for size in ((500, 375), (9, 900), (1, 1)):
        assert np.abs(levels(model, packed(photo(*size), "PNG"))).max() < 1.1


@pytest.mark.parametrize("size", [(40, 30), (31, 64), (16, 16), (7, 12), (101, 33)], ids=str)
@pytest.mark.parametrize("resize", [16, 20])
def test_reference_is_torchvisions_usual_transform(size: tuple[int, int], resize: int) -> None:
    data = packed(photo(*size), "PNG")
    usual = v2.Compose([v2.Resize(resize), v2.CenterCrop(16), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    with open_image(data) as image:
        expected = usual(image.convert("RGB"))
    ours = Preprocessing.of((3, 16, 16), resize).reference(data)
    np.testing.assert_allclose(ours[0], expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 12, 20), (1, 20, 12)], ids=str)
def test_oblong_networks_cover_their_input(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    network = pixel_network(tmp_path / "model.onnx", shape)
    names = [str(index) for index in range(int(np.prod(shape)))]
    path = export_end_to_end(network, tmp_path / "e2e.onnx", input_shape=shape, class_names=names, resize=24)
    model = EndToEndModel(path)
    for size in ((50, 21), (21, 50), (13, 13)):
        height, width = Preprocessing.of(shape).scaled_size(size[1], size[0])
        assert (height, width) >= shape[1:] or (height >= shape[1] and width >= shape[2])
        assert np.abs(levels(model, packed(photo(*size), "PNG"))).max() < 1.1


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A nearest-class-mean classifier of the embedded sample, and 100 of its test images as files of many kinds."""
    folder = tmp_path_factory.mktemp("real")
    source = load_source(DataConfig(source="sample"))
    train, test = source.train, source.evaluation
    chosen = np.arange(0, len(train.labels), 5)
    pixels = train.pixels(chosen).reshape(len(chosen), -1) / 255
    means = np.stack([pixels[train.labels[chosen] == label].mean(axis=0) for label in range(10)])
    weights, bias = means.astype(np.float32), (-(means**2).sum(axis=1) / 2).astype(np.float32)
    network = linear_network(folder / "model.onnx", (1, 28, 28), weights / 4, bias / 4)
    files = []
    sizes = [(28, 28), (56, 56), (90, 61), (20, 20), (300, 200)]
    for index, image in enumerate(test.pixels(np.arange(100))):
        grey = Image.fromarray(image[0]).resize(sizes[index % 5], Image.Resampling.BICUBIC)
        kind = ("png", "jpg")[index // 5 % 2]
        files.append(folder / f"{index}.{kind}")
        grey.convert(("L", "RGB")[index // 10 % 2]).save(files[-1])
    return network, files


def test_a_hundred_real_files_agree_with_torchvision(real: tuple[Path, list[Path]], tmp_path: Path) -> None:
    network, files = real
    path = export_end_to_end(network, tmp_path / "e2e.onnx", input_shape=(1, 28, 28), class_names=list("abcdefghij"))
    compared = compare_end_to_end(path, files, OnnxPredictor(network))
    assert compared.agreement.total == 100 and compared.agreement.correct >= 99
    assert compared.max_difference < 0.01
    assert compared.lossless_difference < 0.01 and compared.lossless_agreement.correct >= 99
    assert compared.worst_file in {file.name for file in files}
    assert run_end_to_end(path, files[0].read_bytes()).sum() == pytest.approx(1)


def test_a_quantised_network_is_taken(tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    generator = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["features"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["features"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["logits"]),
    ]
    kernel = generator.normal(size=(5, 3, 3, 3)).astype(np.float32)
    float_path = save(tmp_path / "float.onnx", nodes, (3, 16, 16), 5, {"kernel": kernel})

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = [{"image": generator.random((4, 3, 16, 16), dtype=np.float32)}]

        def get_next(self) -> dict[str, Array] | None:
            return self.left.pop() if self.left else None

    integer_path = tmp_path / "model.onnx"
    quantize_static(float_path, integer_path, Reader(), quant_format=QuantFormat.QDQ,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)  # fmt: skip
    path = export_end_to_end(integer_path, tmp_path / "e2e.onnx", input_shape=(3, 16, 16), class_names=list("abcde"))
    file = tmp_path / "photo.png"
    file.write_bytes(packed(photo(16, 16), "PNG"))
    assert compare_end_to_end(path, [file], OnnxPredictor(integer_path)).max_difference < 1e-5


def test_the_file_describes_itself_and_names_no_path(tmp_path: Path) -> None:
    network = pixel_network(tmp_path / "model.onnx", (1, 2, 2))
    planted = onnx.load(network)
    planted.graph.node[0].metadata_props.add(key="pkg.torch.onnx.stack_trace", value="/secret/place/network.py")
    planted.graph.node[1].doc_string = "/secret/place/network.py"
    helper.set_model_props(planted, {"threat": "pixel"})
    onnx.save(planted, network)
    path = export_end_to_end(network, tmp_path / "e2e.onnx", input_shape=(1, 2, 2), class_names=list("abcd"))
    content = path.read_bytes()
    assert b"secret" not in content and str(tmp_path).encode() not in content
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert metadata["threat"] == "pixel"
    assert json.loads(metadata["class_names"]) == list("abcd")
    assert EndToEndModel(path).preprocessing == Preprocessing.of((1, 2, 2))
    again = export_end_to_end(network, tmp_path / "again.onnx", input_shape=(1, 2, 2), class_names=list("abcd"))
    assert again.read_bytes() == content


@pytest.mark.parametrize(
    "data",
    [b"", b"GIF89a and more", b"\xff\xd8 starts like a JPEG", packed(photo(40, 30), "JPEG")[:300]],
    ids=["nothing", "gif", "fake jpeg", "cut jpeg"],
)
def test_bytes_that_would_end_the_process_are_refused(model: EndToEndModel, data: bytes) -> None:
    with pytest.raises(Exception, match=f"{GUARD}|Invalid image"):
        model._session.run(None, {"image": np.frombuffer(data, dtype=np.uint8)})
    with pytest.raises(ToolkitError, match="the image cannot be decoded"):
        model.predict(data)


def test_damage_inside_a_jpeg_is_found_by_pillow_first(model: EndToEndModel) -> None:
    data = bytearray(packed(photo(40, 30), "JPEG"))
    start = data.index(b"\xff\xc4")  # the Huffman table
    data[start + 5 : start + 20] = b"\xff" * 15
    with pytest.raises(ToolkitError, match="the image cannot be decoded"):
        model.predict(bytes(data))


def test_what_pillow_reads_and_the_graph_does_not_is_an_error_of_ours(
    model: EndToEndModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.exporters.end_to_end.open_image", lambda _data: photo(4, 4))
    with pytest.raises(ToolkitError, match="decoder refuses an image that Pillow reads"):
        model.predict(b"no image")


def test_sixteen_bits_a_channel_are_refused() -> None:
    deep = Image.fromarray(np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000)
    with pytest.raises(ToolkitError, match="more than 8 bits") as caught:
        open_image(packed(deep, "PNG"))
    assert "4 x 4" in caught.value.found


def test_other_channel_counts_are_refused() -> None:
    with pytest.raises(ToolkitError, match="1 or 3 input channels") as caught:
        Preprocessing.of((4, 8, 8))
    assert "4 channels" in caught.value.found


def test_a_resize_below_the_crop_is_refused() -> None:
    with pytest.raises(ToolkitError, match="smaller than the crop"):
        Preprocessing.of((3, 8, 8), 7)


def test_an_old_opset_is_refused(tmp_path: Path) -> None:
    network = pixel_network(tmp_path / "model.onnx", (1, 2, 2), opset=17)
    with pytest.raises(ToolkitError, match="needs opset 18") as caught:
        export_end_to_end(network, tmp_path / "e2e.onnx", input_shape=(1, 2, 2), class_names=list("abcd"))
    assert "opset 17" in caught.value.found
    assert not (tmp_path / "e2e.onnx").exists()


@pytest.mark.parametrize(("shape", "names", "side"), [((3, 2, 2), "abcd", "input"), ((1, 2, 2), "abc", "output")])
def test_a_network_of_another_shape_is_refused(
    tmp_path: Path, shape: tuple[int, int, int], names: str, side: str
) -> None:
    network = pixel_network(tmp_path / "model.onnx", (1, 2, 2))
    with pytest.raises(ToolkitError, match=f"{side} does not fit"):
        export_end_to_end(network, tmp_path / "e2e.onnx", input_shape=shape, class_names=names)


def test_two_inputs_are_refused(tmp_path: Path) -> None:
    network = onnx.load(pixel_network(tmp_path / "model.onnx", (1, 2, 2)))
    network.graph.input.append(helper.make_tensor_value_info("second", onnx.TensorProto.FLOAT, [1]))
    onnx.save(network, tmp_path / "two.onnx")
    with pytest.raises(ToolkitError, match="no image classifier"):
        export_end_to_end(tmp_path / "two.onnx", tmp_path / "e.onnx", input_shape=(1, 2, 2), class_names=list("abcd"))


def test_a_plain_model_is_no_end_to_end_model(tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match="is no end-to-end model"):
        EndToEndModel(pixel_network(tmp_path / "model.onnx", (1, 2, 2)))


def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "e2e.onnx").write_bytes(b"nothing")
    with pytest.raises(ToolkitError, match="cannot be loaded"):
        EndToEndModel(tmp_path / "e2e.onnx")


def test_comparing_nothing_is_refused(tmp_path: Path) -> None:
    network = pixel_network(tmp_path / "model.onnx", (1, 2, 2))
    with pytest.raises(ToolkitError, match="no files to compare"):
        compare_end_to_end(network, [], OnnxPredictor(network))
