"""How the ResNet-18 of docs/results/2026-11-30-cifar-resnet18 was made more robust from its ONNX file, and attacked.

    python benchmarks/resnet18_cifar.py rebuild before.onnx model.pt --data folder:CIFAR
    python benchmarks/resnet18_cifar.py mean ONE.pt OTHER.pt model.pt
    python benchmarks/resnet18_cifar.py attack model.onnx --data folder:CIFAR --json FILE

`rebuild` makes the pruned float network again from an integer graph whose batch norms are folded: weights as in the
graph, and behind every convolution a batch norm with the statistics of attacked training images that changes nothing.
What the norm of a filter is then is free, and decides how fast it learns; it gets the one at which gradient and weight
decay are in balance at a rate of 0.1. `mean` is the mean of the weights of two networks of the same shape, statistics
of batch norm included (Wortsman et al. 2022). `attack` counts preset `paper` on all test images, or the first `--n`:
PGD made on the graph's twin, judged by ONNX Runtime, at the last step (as the toolkit's PGD) and at any. Sums
are exact on any machine: the graph runs as it stands in the file.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from toolkit.artifacts import ModelSpec, Normalization, Normalized, Proportion, Split, TorchModel
from toolkit.attacks.pgd import constrain
from toolkit.attacks.surrogate import Surrogate
from toolkit.attacks.threat import PRESETS
from toolkit.config import DataConfig, PruneConfig
from toolkit.data.sources import DataSource, load_source
from toolkit.data.splits import make_splits
from toolkit.evaluators.environment import environment_record, usable_threads
from toolkit.evaluators.surrogate import build_twin
from toolkit.exporters.session import OnnxPredictor
from toolkit.models.checkpoint import save_checkpoint
from toolkit.models.registry import build_network
from toolkit.pruning import prune
from toolkit.training.adversary import Adversary, TrainingAttack
from toolkit.training.losses import cross_entropy_of

NORMALIZATION = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PLAN = PRESETS["paper", "cifar10"]
BATCH = 125
SHOWN = 2048
"""Training images that give the statistics and the gradients."""
RATE_OVER_DECAY = 10.0
"""The square of a filter's norm in balance, over the gradient at norm 1: the root of rate / (2 * decay)."""


@dataclass
class Folded:
    """A convolution with what was folded into it, and the moments of its output on attacked images."""

    convolution: nn.Conv2d
    norm: nn.BatchNorm2d
    weight: Tensor
    bias: Tensor
    total: Tensor
    squares: Tensor
    count: int = 0

    def observe(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        """Hook that takes in one batch of outputs [n, C, H, W] of the convolution without its bias."""
        self.total = self.total + output.double().sum((0, 2, 3))
        self.squares = self.squares + output.double().square().sum((0, 2, 3))
        self.count += output.numel() // output.shape[1]

    def install(self, norms: Tensor) -> None:
        """Give the filters these norms [C], and the batch norm what undoes it."""
        mean = self.total / self.count
        variance = self.squares / self.count - mean.square()
        factor = norms / self.weight.flatten(1).norm(dim=1)
        self.convolution.weight.data = (self.weight * factor.view(-1, 1, 1, 1)).float()
        self.norm.running_mean = (mean * factor).float()
        self.norm.running_var = (variance * factor.square()).float()
        self.norm.weight.data = ((variance * factor.square() + self.norm.eps).sqrt() / factor).float()
        self.norm.bias.data = (self.bias + mean).float()


def rebuild(path: Path, data: str) -> TorchModel:
    """The network of an integer graph that `harden` wrote of a ResNet-18 with half of its filters."""
    torch.manual_seed(0)
    source, train = training_part(data)
    spec = ModelSpec("resnet18", tuple(source.train.class_names), source.train.shape, NORMALIZATION, data)
    whole = Normalized(build_network("resnet18", len(spec.class_names), spec.input_shape), NORMALIZATION)
    model = prune(TorchModel(whole.eval(), spec), PruneConfig(ratio=0.5)).model
    layers = read_weights(model.network, path)
    for layer in layers:  # at first without statistics
        layer.convolution.weight.data = layer.weight.float()
        assert layer.norm.running_mean is not None and layer.norm.running_var is not None
        layer.norm.running_mean.zero_()
        layer.norm.running_var.fill_(1.0)
        layer.norm.weight.data.fill_((1 + layer.norm.eps) ** 0.5)
        layer.norm.bias.data = layer.bias.float()
    batches = attacked_images(model, train)
    hooks = [layer.convolution.register_forward_hook(layer.observe) for layer in layers]
    with torch.inference_mode():
        before = torch.cat([model.module(shown) for shown, _ in batches])
    for hook in hooks:
        hook.remove()
    for layer in layers:
        layer.install(torch.ones(len(layer.bias), dtype=torch.float64))
    gradients = filter_gradients(model.module, layers, batches)
    for layer, gradient in zip(layers, gradients, strict=True):
        layer.install((RATE_OVER_DECAY * gradient).sqrt().clamp(0.1, 2.0))
    with torch.inference_mode():
        after = torch.cat([model.module(shown) for shown, _ in batches])
    print(f"logits differ by at most {float((after - before).abs().max()):.2g} from those with everything folded")
    return replace(model, training_hashes=np.unique(train.hashes))


def read_weights(network: nn.Module, path: Path) -> list[Folded]:
    """Every convolution with the graph's weight and bias; the classifier's are set."""
    arrays = {one.name: numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}
    layers = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            weight, bias = read(arrays, f"{name}.weight"), read(arrays, f"{name}.weight_bias")
            if name == "conv1":  # reads codes of pixels, 0.5 / scale of which are one unit behind the normalisation
                weight = weight * 0.5 / float(arrays["image_scale"])
            norm = network.get_submodule(name.replace("conv", "bn").replace("downsample.0", "downsample.1"))
            assert isinstance(norm, nn.BatchNorm2d)
            layers.append(Folded(module, norm, weight, bias, torch.zeros_like(bias), torch.zeros_like(bias)))
    classifier = network.get_submodule("fc")
    assert isinstance(classifier, nn.Linear)
    classifier.weight.data, classifier.bias.data = read(arrays, "fc.weight").float(), read(arrays, "fc.bias").float()
    return layers


def read(arrays: dict[str, np.ndarray], name: str) -> Tensor:
    """One tensor of the graph, float64."""
    codes = arrays[f"network.{name}_quantized"].astype(np.float64)
    scale = arrays[f"network.{name}_{'scale' if name.endswith('.weight') else 'quantized_scale'}"].astype(np.float64)
    return torch.from_numpy(codes * scale.reshape(-1, *[1] * (codes.ndim - 1)))


def training_part(data: str) -> tuple[DataSource, Split]:
    """The data set, and its training part."""
    config = DataConfig(source=data)
    source = load_source(config)
    return source, make_splits(source, config, 0).train


def attacked_images(model: TorchModel, train: Split) -> list[tuple[Tensor, Tensor]]:
    """Batches of training images, attacked in one step, with their labels."""
    adversary, generator = Adversary(model.module, model.spec, "float32"), torch.Generator().manual_seed(1)
    rows = np.random.default_rng(5).permutation(len(train))[:SHOWN]
    attack, found = TrainingAttack.fast(PLAN.threat), []
    for start in range(0, len(rows), 128):
        batch = train.take(rows[start : start + 128])
        loss = cross_entropy_of(batch.labels)
        found.append((adversary.attack(model.module, batch.images, loss, attack, generator), batch.labels))
    return found


def filter_gradients(module: Normalized, layers: list[Folded], batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Root of the mean square of every filter's gradient, in training mode, float64 [C] a layer."""
    sums = [torch.zeros(len(layer.bias), dtype=torch.float64) for layer in layers]
    module.train().requires_grad_(True)
    for shown, labels in batches:
        module.zero_grad()
        torch.autograd.backward(functional.cross_entropy(module(shown), labels))
        for total, layer in zip(sums, layers, strict=True):
            assert layer.convolution.weight.grad is not None
            total += layer.convolution.weight.grad.double().flatten(1).square().sum(1)
    module.eval()
    return [(total / len(batches)).sqrt() for total in sums]


def mean(one: Path, other: Path, output: Path) -> None:
    """Write the second checkpoint with the mean of both's weights."""
    first, second = (torch.load(path, weights_only=True) for path in (one, other))
    for name, value in second["state_dict"].items():
        if value.is_floating_point():
            second["state_dict"][name] = torch.lerp(first["state_dict"][name], value, 0.5)
    torch.save(second, output)


def attack(path: Path, data: str, count: int | None) -> dict[str, object]:
    """Clean accuracy and accuracy under PGD on the twin, of all test images or the first `count`."""
    config, start = DataConfig(source=data), time.monotonic()
    split = make_splits(load_source(config), config, 0).evaluation
    split = split if count is None else split.first(count)
    judge = OnnxPredictor(path, optimized=False)
    twin = build_twin(path, judge.interface)
    surrogate = Surrogate(twin.module, NORMALIZATION, input_shape=twin.input_shape)
    clean, last, always = (np.zeros(len(split), dtype=bool) for _ in range(3))
    for first in range(0, len(split), BATCH):
        rows = np.arange(first, min(len(split), first + BATCH))
        batch = split.take(rows)
        clean[rows], last[rows], always[rows] = follow(surrogate, judge, batch.images, batch.labels)
        done = int(rows[-1]) + 1
        print(f"{done} images: clean {clean.sum()}, last step {last.sum()}, any step {always.sum()}", flush=True)
    counts = {"clean": clean, "PGD, last step": last, "PGD, any step": always}
    return {
        **{name: Proportion.of(torch.from_numpy(found)).as_dict() for name, found in counts.items()},
        "seconds": round(time.monotonic() - start, 1),
        "environment": environment_record(torch.get_num_threads()),
    }


def follow(surrogate: Surrogate, judge: OnnxPredictor, shown: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which images the session has right: clean, at the last step, and at every step."""
    scale = PLAN.threat.pixel_scale(NORMALIZATION)
    attacked, loss = shown, cross_entropy_of(labels)
    clean = always = right = judge.predict(shown).argmax(1).eq(labels)
    for _ in range(PLAN.steps):
        gradient = surrogate.differentiate(attacked, loss).gradient
        attacked = constrain(attacked + PLAN.step_size * scale * (gradient * scale).sign(), shown, PLAN.threat, scale)
        right = judge.predict(attacked).argmax(1).eq(labels)
        always = always & right
    return clean, right, always


def main() -> None:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, files in (("rebuild", ("graph", "output")), ("mean", ("one", "other", "output")), ("attack", ("graph",))):
        command = commands.add_parser(name)
        for file in files:
            command.add_argument(file, type=Path)
        command.add_argument("--threads", type=int)
        if name != "mean":
            command.add_argument("--data", required=True)
    commands.choices["attack"].add_argument("--json", type=Path)
    commands.choices["attack"].add_argument("--n", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(usable_threads(arguments.threads))
    if arguments.command == "rebuild":
        save_checkpoint(rebuild(arguments.graph, arguments.data), arguments.output)
    elif arguments.command == "mean":
        mean(arguments.one, arguments.other, arguments.output)
    else:
        found = attack(arguments.graph, arguments.data, arguments.n)
        print(json.dumps(found, indent=1))
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
