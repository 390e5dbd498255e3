from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.sums import exact_sums
from toolkit import progress
from toolkit.artifacts import ModelSpec, Normalized, OnnxModel, Split, TorchModel
from toolkit.config import DataConfig, ExportConfig
from toolkit.data.sources import load_source
from toolkit.exporters.onnx import export_onnx
from toolkit.models.networks import cnn8

from .small import GREY


@pytest.fixture(autouse=True)
def _no_progress() -> Iterator[None]:
    progress.set_quiet(True)
    yield
    progress.set_quiet(False)


@pytest.fixture(scope="package", autouse=True)
def _exact_sums() -> Iterator[None]:
    """What is compared here is the graph."""
    with exact_sums():
        yield


@dataclass(frozen=True)
class Trained:
    """A cnn8 fitted to the embedded sample, its float twin, and images that it has not seen."""

    model: TorchModel
    twin: OnnxModel
    calibration: Split
    evaluation: Split


def fit_last_layer(module: Normalized, split: Split) -> None:
    """Ridge regression of the labels on the random features of all other layers: three quarters right, in a second."""
    assert isinstance(module.network, nn.Sequential)
    last = module.network[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        for layer in module.network:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        batch = split.take(np.arange(len(split), dtype=np.int64))
        features = module.network[:-1]((batch.images - module.mean) / module.std)
        centred = features - features.mean(0)
        wanted = 20 * (nn.functional.one_hot(batch.labels, 10) - 0.1)
        gram = centred.T @ centred / len(split)
        ridge = 0.1 * float(gram.diagonal().mean()) * torch.eye(len(gram))
        last.weight.copy_(torch.linalg.solve(gram + ridge, centred.T @ wanted / len(split)).T)
        last.bias.copy_(-last.weight @ features.mean(0))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    source = load_source(DataConfig(source="sample"))
    torch.manual_seed(0)
    module = Normalized(cnn8(), GREY)
    fit_last_layer(module, Split(source.train, np.arange(4000, dtype=np.int64)))
    spec = ModelSpec("cnn8", source.train.class_names, (1, 28, 28), GREY)
    model = TorchModel(module, spec)
    path: Path = tmp_path_factory.mktemp("trained") / "model.fp32.onnx"
    twin = export_onnx(model, path, ExportConfig(), metadata={"classes": "ten"})
    held_out = np.arange(8000, 8256, dtype=np.int64)
    evaluation = Split(source.evaluation, np.arange(len(source.evaluation.labels), dtype=np.int64))
    return Trained(model, twin, Split(source.train, held_out), evaluation)
