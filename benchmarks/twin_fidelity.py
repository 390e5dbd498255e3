"""How faithful the differentiable twin of an ONNX file is to the ONNX Runtime session that runs it.

    python benchmarks/twin_fidelity.py --data folder:DIR [--networks cnn8,resnet18,...] [--threads N] [--json FILE]

Every network comes as float graph, as this toolkit quantises it, and as plain onnxruntime quantises it: QDQ with all
defaults (int8 activations, weights per tensor) and QOperator with uint8 activations and weights per channel. Compared
are labels and logits on clean images and on images attacked by PGD on the twin itself. Random weights prove nothing:
batch norms are settled on real images, and the last layer is fitted to their labels by ridge regression.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
import torchvision
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn
from torch.nn import functional

from toolkit import progress
from toolkit.artifacts import ModelSpec, Normalization, Normalized, Predictor, Split, TorchModel
from toolkit.attacks.pgd import pgd
from toolkit.attacks.surrogate import Surrogate, resolve_precision
from toolkit.attacks.threat import PgdPlan, ThreatModel
from toolkit.config import DataConfig, ExportConfig, QuantizeConfig
from toolkit.data.images import ArrayImages
from toolkit.data.sources import DataSource, load_source
from toolkit.errors import ToolkitError
from toolkit.evaluators.environment import environment_record, usable_threads
from toolkit.evaluators.fidelity import compare
from toolkit.evaluators.saturation_emulation import twin_of_session
from toolkit.evaluators.surrogate import twin_model
from toolkit.exporters.calibration import CalibrationReader
from toolkit.exporters.onnx import export_onnx
from toolkit.exporters.quantize import quantize_int8
from toolkit.exporters.session import OnnxPredictor
from toolkit.models.loading import assemble, read_model_file, resolve_path
from toolkit.models.networks import resnet18

CLASSES = 10
FIT, CALIBRATION = 800, 100
EPS, STEPS = 4 / 255, 4
BATCH = 64
NORMALIZATION = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
Builder = Callable[[], nn.Module]


def _torchvision(name: str, **options: Any) -> Builder:
    def build() -> nn.Module:
        network: nn.Module = getattr(torchvision.models, name)(num_classes=CLASSES, **options)
        return network

    return build


NETWORKS: dict[str, tuple[Builder, int]] = {
    "resnet18": (lambda: resnet18(CLASSES, (3, 32, 32)), 32),
    "mobilenet_v3_small": (_torchvision("mobilenet_v3_small"), 64),
    "shufflenet_v2_x1_0": (_torchvision("shufflenet_v2_x1_0"), 64),
    "regnet_y_400mf": (_torchvision("regnet_y_400mf"), 64),
    "densenet121": (_torchvision("densenet121"), 64),
    "efficientnet_b0": (_torchvision("efficientnet_b0"), 64),
    "vit_b_16": (_torchvision("vit_b_16", image_size=64), 64),
    "swin_t": (_torchvision("swin_t"), 64),
    "convnext_tiny": (_torchvision("convnext_tiny"), 64),
    "squeezenet1_1": (_torchvision("squeezenet1_1"), 64),
    "googlenet": (_torchvision("googlenet", init_weights=True, aux_logits=False), 64),
}
"""Besides the shipped cnn8: how to build each, and the side of its images."""
GRAPHS = ("float", "ours int8", "onnxruntime QDQ", "onnxruntime QOperator")


@dataclass(frozen=True)
class Material:
    """A network whose logits mean something, images to calibrate on and images to compare on."""

    model: TorchModel
    calibration: Split
    images: Tensor
    labels: Tensor


def resized(part: Any, count: int, side: int | None, seed: int) -> Split:
    """`count` images, chosen at random, as a split in memory; side None: as they are."""
    chosen = np.random.default_rng(seed).choice(len(part.labels), count, replace=False).astype(np.int64)
    pixels = torch.from_numpy(part.pixels(chosen)).float()
    if pixels.shape[1] == 1 and side is not None:
        pixels = pixels.expand(-1, 3, -1, -1)
    if side is not None:
        pixels = functional.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
    array = pixels.round().clamp(0, 255).byte().numpy()
    images = ArrayImages(part.name, part.class_names, array, part.labels[chosen])
    return Split(images, np.arange(count, dtype=np.int64))


def shipped(source: DataSource, count: int) -> Material:
    """The trained cnn8 on Fashion-MNIST."""
    evaluation = resized(source.evaluation, count, None, 1)
    model = assemble(
        read_model_file(resolve_path(Path("shipped:cnn8"))),
        arch=None,
        class_names=source.train.class_names,
        input_shape=(1, 28, 28),
        normalization=Normalization((0.5,), (0.5,)),
        dataset=source.name,
    )
    batch = evaluation.take(np.arange(count, dtype=np.int64))
    return Material(model, resized(source.train, CALIBRATION, None, 2), batch.images, batch.labels)


def trained(path: Path, source: DataSource, count: int) -> Material:
    """A network of this toolkit that was trained on `source`, at the images' own size."""
    side = source.evaluation.pixels(np.zeros(1, dtype=np.int64)).shape[-1]
    model = assemble(
        read_model_file(resolve_path(path)),
        arch=None,
        class_names=source.train.class_names,
        input_shape=(3, side, side),
        normalization=NORMALIZATION,
        dataset=source.name,
    )
    evaluation = resized(source.evaluation, count, None, 1).take(np.arange(count, dtype=np.int64))
    calibration = resized(source.train, CALIBRATION, None, 2)
    return Material(model, calibration, evaluation.images, evaluation.labels)


def settled(name: str, source: DataSource, count: int) -> Material:
    """A network with settled batch norms and a fitted head."""
    torch.manual_seed(0)
    build, side = NETWORKS[name]
    network = build()
    for key, parameter in network.named_parameters():
        if key.endswith("layer_scale"):
            nn.init.constant_(parameter, 0.5)  # 1e-6 at birth: its block would not count
    fit = resized(source.train, FIT, side, 0)
    module = Normalized(network, NORMALIZATION)
    batch = fit.take(np.arange(FIT, dtype=np.int64))
    settle(module, batch.images)
    fit_head(module, batch.images, batch.labels)
    spec = ModelSpec(name, source.train.class_names, (3, side, side), NORMALIZATION)
    evaluation = resized(source.evaluation, count, side, 1).take(np.arange(count, dtype=np.int64))
    return Material(
        TorchModel(module, spec), resized(source.train, CALIBRATION, side, 2), evaluation.images, evaluation.labels
    )


def settle(module: Normalized, images: Tensor) -> None:
    """Replace the statistics of all batch norms by those of real images."""
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average over all batches
    if norms:
        module.train()
        with torch.inference_mode():
            for part in torch.split(images, 250)[:4]:
                module(part)
    module.eval()


def fit_head(module: Normalized, images: Tensor, labels: Tensor) -> None:
    """Ridge regression of the labels on what the last layer reads, its logits' standard deviation 1."""
    last = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]
    seen: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    with torch.inference_mode():
        for part in torch.split(images, BATCH):
            module(part)
    hook.remove()
    features = torch.cat([part.mean(dim=(2, 3)) if part.ndim == 4 else part for part in seen])
    mean, scale = features.mean(0), features.std(0).clamp_min(1e-6)
    centred = (features - mean) / scale
    wanted = functional.one_hot(labels, CLASSES).float() - 1 / CLASSES
    gram = centred.T @ centred / len(images)
    solution = torch.linalg.solve(gram + 0.1 * torch.eye(len(gram)), centred.T @ wanted / len(images))
    weight = (solution / scale[:, None]).T / (centred @ solution).std()
    with torch.no_grad():
        last.weight.copy_(weight.view_as(last.weight))
        assert last.bias is not None
        last.bias.copy_(-weight @ mean)
        if isinstance(last, nn.Conv2d):
            last.bias.add_(3.0)  # a ReLU follows


def plain_quantised(float_path: Path, path: Path, calibration: Split, form: Literal["QDQ", "QOperator"]) -> None:
    """What a user of onnxruntime gets without this toolkit."""
    name = onnx.load(float_path).graph.input[0].name
    prepared = float_path.with_suffix(".prepared.onnx")
    options: dict[str, Any] = {"quant_format": QuantFormat.QDQ}
    if form == "QOperator":
        options = {"quant_format": QuantFormat.QOperator, "activation_type": QuantType.QUInt8, "per_channel": True}
    with quiet():
        quant_pre_process(str(float_path), str(prepared))
        quantize_static(
            prepared, path, CalibrationReader(calibration, name), extra_options={"CalibStridedMinMax": 1}, **options
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The quantiser prints and logs."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def graphs(material: Material, folder: Path) -> Iterator[tuple[str, Path]]:
    """The four files of one network, one after the other."""
    exported = export_onnx(material.model, folder / "float.onnx", ExportConfig())
    yield "float", exported.path
    quantize_int8(exported, folder / "ours.onnx", material.calibration, QuantizeConfig())
    yield "ours int8", folder / "ours.onnx"
    for form in ("QDQ", "QOperator"):
        path = folder / f"{form}.onnx"
        plain_quantised(exported.path, path, material.calibration, form)
        yield f"onnxruntime {form}", path


class Recorded:
    """A predictor that computes every batch once."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def predict(self, images: Tensor) -> Tensor:
        """The predictor's logits."""
        if id(images) not in self._known:
            self._known[id(images)] = images, self._predictor.predict(images)
        return self._known[id(images)][1]


def measure(path: Path, material: Material) -> dict[str, Any]:
    """Fidelity of the twin of one file to the session as deployed, and how far optimisation alone moves the session."""
    start = time.perf_counter()
    twin = twin_of_session(path)
    plan = PgdPlan("benchmark", ThreatModel("linf", EPS, "pixels", clip=True), STEPS, EPS / 3, random_start=True)
    attacker = Surrogate(twin.module, twin.normalization, resolve_precision("auto"), input_shape=twin.input_shape)
    clean, labels = torch.split(material.images, BATCH), torch.split(material.labels, BATCH)
    generator = torch.Generator().manual_seed(0)
    attacked = [pgd(attacker, *pair, plan, generator).cpu() for pair in zip(clean, labels, strict=True)]
    model = Recorded(twin_model(twin))
    deployed, plain = (Recorded(OnnxPredictor(path, optimized=optimized)) for optimized in (True, False))
    logits = torch.cat([deployed.predict(part) for part in clean])
    hits = [(deployed.predict(part).argmax(1) == truth).sum() for part, truth in zip(attacked, labels, strict=True)]
    return {
        "quantised": twin.quantised,
        "deployed": compare(model, deployed, clean, attacked, nn.Identity()).as_dict(),
        "unoptimised": compare(model, plain, clean, attacked, nn.Identity()).as_dict(),
        "session_against_itself": compare(plain, deployed, clean, attacked, nn.Identity()).as_dict(),
        "accuracy": float((logits.argmax(1) == material.labels).float().mean()),
        "robust": int(sum(hits)) / len(material.labels),
        "labels_used": len(set(logits.argmax(1).tolist())),
        "spread": float(logits.std()),
        "seconds": time.perf_counter() - start,
    }


def run(names: list[str], source: DataSource, grey: DataSource, count: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of every network, one network after the other; a name that ends in .pt is a trained network's file."""
    for name in names:
        rows = []
        if name.endswith(".pt"):
            material = trained(Path(name), source, count)
            name = f"{material.model.spec.architecture}, trained"
        else:
            material = shipped(grey, count) if name == "cnn8" else settled(name, source, count)
        with tempfile.TemporaryDirectory() as folder:
            for graph, path in graphs(material, Path(folder)):
                row = {"network": name, "graph": graph, "images": count}
                try:
                    row |= measure(path, material)
                except ToolkitError as error:
                    row["error"] = str(error)
                rows.append(row)
                print(line(row), flush=True)
        yield rows


HEADER = (
    "| network | graph | labels, clean | labels, attacked | logit difference | session itself: labels | difference |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    if "error" in row:
        return f"| {row['network']} | {row['graph']} | {row['error'].splitlines()[1].strip()} | | | | |"
    deployed, plain = row["deployed"], row["session_against_itself"]
    shares = [deployed[f"agreement_{key}"]["value"] for key in ("clean", "attacked")]
    both = sum(plain[f"agreement_{key}"]["correct"] for key in ("clean", "attacked")) / (2 * row["images"])
    cells = (row["network"], row["graph"], *(f"{share:.2%}" for share in shares), f"{deployed['relative']:.1e}")
    return f"| {' | '.join(cells)} | {both:.2%} | {plain['relative']:.1e} |"


def main() -> None:
    """Measure all networks and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default="sample", help="colour images are best: folder:DIR")
    parser.add_argument("--grey", default="sample", help="Fashion-MNIST, for cnn8: sample or fashion-mnist")
    names = ",".join(("cnn8", *NETWORKS))
    parser.add_argument("--networks", default=names, help="their names, or files that this toolkit has trained (.pt)")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None, help="write the results here")
    arguments = parser.parse_args()
    threads = usable_threads(arguments.threads)
    torch.set_num_threads(threads)
    progress.set_quiet(True)
    source, grey = (load_source(DataConfig(source=name)) for name in (arguments.data, arguments.grey))
    print(HEADER)
    rows: list[dict[str, Any]] = []
    for found in run(arguments.networks.split(","), source, grey, arguments.images):
        rows += found
        if arguments.json:  # after every network: a run that is cut short keeps what it has
            record = {"eps": EPS, "steps": STEPS, "rows": rows, "environment": environment_record(threads)}
            arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
