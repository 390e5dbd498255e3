from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from toolkit.errors import ToolkitError
from toolkit.exporters.calibration import CalibrationReader
from toolkit.exporters.observer import BINS, activation_bytes, observe

from .small import pictures, wrap
from .test_quantize import export, tiny_twin


def test_extremes_and_histograms_are_those_of_torch_on_all_images_at_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4))
    model, split = wrap(network, (1, 8, 8)), pictures(70, (1, 8, 8))
    proto = onnx.load(export(model, tmp_path).path)
    names = ["image", *(node.output[0] for node in proto.graph.node if node.op_type in ("Conv", "Relu", "Gemm"))]
    reader = CalibrationReader(split, "image", batch_size=32)
    found = observe(proto, names, reader, histograms=True)
    images = split.take(split.indices).images
    with torch.no_grad():
        hidden = network[0]((images - model.module.mean) / model.module.std)
        wanted = [images, hidden, hidden.relu(), model.module(images)]
    for name, values in zip(names, wanted, strict=True):
        one, flat = found[name], values.numpy().ravel().astype(np.float64)
        assert np.allclose((one.low, one.high), (flat.min(), flat.max()), atol=1e-5), name
        lows, highs = zip(*((part.min(), part.max()) for part in values.split(32)), strict=True)
        assert np.allclose((one.mean_low, one.mean_high), (np.mean(lows), np.mean(highs)), atol=1e-5), name
        assert one.counts is not None and int(one.counts.sum()) + one.zeros == flat.size, name
        assert one.zeros == int((flat == 0).sum())
        rest = flat[flat != 0]
        assert np.average(one.centres, weights=one.counts) == pytest.approx(rest.mean(), abs=np.ptp(flat) / BINS)
        exact = np.histogram(rest, 64, (one.low, one.high))[0]
        assert np.abs(one.counts.reshape(64, -1).sum(1) - exact).sum() <= max(2, 0.002 * len(rest)), name
    plain = observe(proto, names, reader, histograms=False)
    assert all(plain[name].counts is None and plain[name].high == found[name].high for name in names)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    """Python's own memory; what the runtime holds is measured in benchmarks."""
    proto = onnx.load(tiny_twin(tmp_path).path)
    peaks = []
    for count in (64, 1024):
        reader = CalibrationReader(pictures(count, (1, 8, 8)), "image", batch_size=32)
        observe(proto, ["image", "conv2d"], reader, histograms=True)  # caches warm
        reader.rewind()
        tracemalloc.start()
        observe(proto, ["image", "conv2d"], reader, histograms=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2**16, "960 more images alone are 240 KiB"


def test_what_is_no_number_is_refused_by_name(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3))
    with torch.no_grad():
        network.get_parameter("0.weight").fill_(3e38)
    proto = onnx.load(export(wrap(network, (1, 8, 8)), tmp_path).path)
    with pytest.raises(ToolkitError, match="no finite numbers") as caught:
        observe(proto, ["conv2d"], CalibrationReader(pictures(8, (1, 8, 8)), "image"), histograms=False)
    assert "'conv2d'" in caught.value.found


def test_bytes_of_one_image_with_its_activations(tmp_path: Path) -> None:
    proto = onnx.load(tiny_twin(tmp_path).path)
    assert activation_bytes(proto, ["image"]) == 4 * 64
    assert activation_bytes(proto, ["image", "conv2d"]) == 4 * (64 + 4 * 16)
    assert activation_bytes(proto, []) == 0
