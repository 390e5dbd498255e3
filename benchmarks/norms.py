"""DenseNet's BatchNorms behind concatenations in the integer graph: float islands, Mul and Add, depthwise convolutions.

    python benchmarks/norms.py [--size 64] [--batches 1,8] [--rounds 8] [--json FILE]

densenet121 with random weights and norms of random factors; so accuracy is the error of the logits over their variance.
CPU time of the process with one thread; all graphs stay alive (no pool spins) and alternate; ratios are medians of
paired rounds with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import torch
import torchvision
from onnx import helper, numpy_helper
from openvino_nncf import compare, onnxruntime_caller

from toolkit.artifacts import ModelSpec, Normalization, Normalized, OnnxModel, Split, TorchModel
from toolkit.config import ExportConfig, QuantizeConfig
from toolkit.data.images import ArrayImages
from toolkit.evaluators.cost import integer_coverage
from toolkit.evaluators.environment import environment_record
from toolkit.evaluators.timing import ratio_interval
from toolkit.exporters import integers, quantize
from toolkit.exporters.affine import norms_to_convolutions
from toolkit.exporters.onnx import export_onnx
from toolkit.exporters.session import OnnxPredictor

CLASSES = tuple(map(str, range(10)))


def network(size: int) -> tuple[TorchModel, Split]:
    """densenet121 with norms that scale and shift, and noise to calibrate with."""
    torch.manual_seed(0)
    inner, normalization = torchvision.models.densenet121(num_classes=10), Normalization((0.5,) * 3, (0.25,) * 3)
    module = Normalized(inner, normalization)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 3, size, size), dtype=np.uint8)
    for norm in inner.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = None
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
            torch.nn.init.normal_(norm.bias, 0, 0.2)
    with torch.no_grad():
        module.train()(torch.from_numpy(pixels[:32]).float() / 255)
    model = TorchModel(module.eval(), ModelSpec("densenet121", CLASSES, (3, size, size), normalization))
    count = np.arange(64, dtype=np.int64)
    return model, Split(ArrayImages("noise", CLASSES, pixels, count % 10), count)


def multiply_and_add(path: Path, output: Path) -> Path:
    """The float graph with its norms as Mul and Add."""
    model = onnx.load(path)
    norms_to_convolutions(model)
    graph = model.graph
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    for index, node in reversed(list(enumerate(graph.node))):
        if node.op_type == "Conv" and node.input[1].endswith("_factor"):
            factor, offset = (constants[name].reshape(1, -1, 1, 1) for name in node.input[1:])
            made, names = node.output[0], [f"{node.output[0]}_{part}" for part in ("by", "product", "plus")]
            graph.initializer.append(numpy_helper.from_array(factor, names[0]))
            graph.initializer.append(numpy_helper.from_array(offset, names[2]))
            added = [
                helper.make_node("Mul", [node.input[0], names[0]], [names[1]], name=f"{node.name}_mul"),
                helper.make_node("Add", [names[1], names[2]], [made], name=f"{node.name}_add"),
            ]
            del graph.node[index]
            for place, new in enumerate(added):
                graph.node.insert(index + place, new)
    onnx.save(model, output)
    return output


def files(model: TorchModel, images: Split, folder: Path) -> dict[str, Path]:
    """The float graph and three integer ones."""
    how = QuantizeConfig(int8=True)
    fp32 = export_onnx(model, folder / "fp32.onnx", ExportConfig())
    found = {"float": fp32.path}
    with mock.patch.object(integers, "norms_to_convolutions"):
        for name, path in (("islands", fp32.path), ("mul and add", multiply_and_add(fp32.path, folder / "mul.onnx"))):
            found[name] = folder / f"{name}.onnx"
            quantize.quantize_int8(OnnxModel(path, "fp32"), found[name], images, how)
    found["depthwise"] = folder / "depthwise.onnx"
    quantize.quantize_int8(fp32, found["depthwise"], images, how)
    return found


def main() -> None:
    """Run all, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, images = network(arguments.size)
    pixels = images.take(images.indices).images
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        graphs = files(model, images, Path(folder))
        answers = {name: OnnxPredictor(path).predict(pixels) for name, path in graphs.items()}
        variance = answers["float"].var()
        errors = {name: float((found - answers["float"]).square().mean() / variance) for name, found in answers.items()}
        nodes = {name: Counter(node.op_type for node in onnx.load(path).graph.node) for name, path in graphs.items()}
        covered = {name: integer_coverage(path, threads=1) for name, path in graphs.items()}
        print(
            "| graph | batch | CPU ms | over float | logit error | float norms | DequantizeLinear after optimisation |"
        )
        print("|---|---|---|---|---|---|---|")
        for batch in map(int, arguments.batches.split(",")):
            feed = np.ascontiguousarray(pixels[:batch].numpy())
            times = compare({name: onnxruntime_caller(path, feed) for name, path in graphs.items()}, arguments.rounds)
            for name, found in times.items():
                ratio, left = ratio_interval(found, times["float"]), covered[name].leftovers
                row = {"graph": name, "batch": batch, "ms": 1000 * float(np.median(found)), "ratio": ratio.value}
                row |= {"low": ratio.low, "high": ratio.high, "error": errors[name], "leftovers": dict(left)}
                rows.append({**row, "norms": nodes[name]["BatchNormalization"]})
                print(
                    f"| {name} | {batch} | {row['ms']:.2f} | {ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] | "
                    f"{errors[name]:.3f} | {rows[-1]['norms']} | {left['DequantizeLinear']} |",
                    flush=True,
                )
    if arguments.json:
        record = {"results": rows, "environment": environment_record(1)}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
