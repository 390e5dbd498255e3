"""Speed of one PGD step against its peers, in one run, and the robust accuracy that each of them finds.

    python benchmarks/attack_speed.py [--model model.pt] [--threads N] [--rounds N] [--json FILE]

Measured are (a) the loop of Thorsteinsson et al. (2024) as published, (b) PGD of torchattacks, and this toolkit's
attack in (c) float32 and (d) the precision that it picks by itself. Each runs in a process of its own, as its users run
it: this toolkit changes how its process keeps freed memory, which would make its peers faster than they are. Rounds are
interleaved, so that a disturbance of the machine meets all; what is reported is the median of the rounds' ratios with
its bootstrap interval.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toolkit.artifacts import ModelSpec, Normalization, Normalized, Proportion, Split, TorchModel
from toolkit.attacks.forms import Precision
from toolkit.attacks.pgd import pgd
from toolkit.attacks.surrogate import Surrogate, resolve_precision
from toolkit.attacks.threat import PRESETS, PgdPlan
from toolkit.config import DataConfig, TrainConfig
from toolkit.data.sources import load_source
from toolkit.data.splits import make_splits
from toolkit.evaluators.environment import environment_record, usable_threads
from toolkit.evaluators.timing import Interval, collector_off, ratio_interval
from toolkit.models.loading import assemble, read_model_file, resolve_path
from toolkit.models.networks import cnn8, resnet18
from toolkit.training.loop import train
from toolkit.training.losses import ATTACKED

try:
    import torchattacks
except ImportError as error:
    raise SystemExit(
        "this benchmark needs torchattacks: pip install --no-deps torchattacks==3.3.0 (see constraints-peers.txt)"
    ) from error

Attack = Callable[[Tensor, Tensor], Tensor]
STEPS = 4
"""Steps of one timed attack."""
OURS, PEERS = ("ours float32", "ours auto"), ("paper", "torchattacks")
BATCHES = {"cnn8": 256, "resnet18": 64}
NETWORKS: dict[str, tuple[tuple[int, int, int], Callable[..., nn.Module], str]] = {
    "cnn8": ((1, 28, 28), cnn8, "fashion-mnist"),
    "resnet18": ((3, 32, 32), resnet18, "cifar10"),
}
LARGEST_DIFFERENCE = 0.003
"""By how much the robust accuracy of two of the same threat model may differ."""


def paper_attack(model: TorchModel, plan: PgdPlan) -> Attack:
    """The published loop: the perturbation is on the normalised image, and the weights collect gradients too."""
    module, loss_function = model.copy().module, nn.CrossEntropyLoss()
    eps, size, mean, std = plan.threat.eps, plan.step_size, module.mean, module.std

    def attack(images: Tensor, labels: Tensor) -> Tensor:
        x = (images - mean) / std
        delta = torch.zeros_like(x, requires_grad=True)
        for _ in range(plan.steps):
            loss = loss_function(module.network(x + delta), labels)
            loss.backward()
            assert delta.grad is not None
            delta.data = (delta + size * delta.grad.detach().sign()).clamp(-eps, eps)
            delta.grad.zero_()
        return ((x + delta) * std + mean).detach()

    return attack


def torchattacks_attack(model: TorchModel, plan: PgdPlan) -> Attack:
    """PGD of torchattacks: pixels, clipped; the module's normalisation is inside."""
    attack: Attack = torchattacks.PGD(
        model.copy().module, eps=plan.threat.eps, alpha=plan.step_size, steps=plan.steps, random_start=False
    )
    return attack


def our_attack(model: TorchModel, plan: PgdPlan, precision: Precision) -> Attack:
    """This toolkit's."""
    surrogate = Surrogate(model.module, model.spec.normalization, precision)

    def attack(images: Tensor, labels: Tensor) -> Tensor:
        return pgd(surrogate, images, labels, plan)

    return attack


def _without_start(plan: PgdPlan, steps: int) -> PgdPlan:
    return PgdPlan(plan.preset, plan.threat, steps, plan.step_size, random_start=False)


@dataclass(frozen=True)
class Speed:
    """Images per second of one PGD step (median round), and by how many times ours beats each peer."""

    network: str
    batch: int
    images_per_second: Mapping[str, float]
    ratios: Mapping[str, Interval]

    def record(self) -> dict[str, Any]:
        """As plain data."""
        ratios = {name: [ratio.value, ratio.low, ratio.high] for name, ratio in self.ratios.items()}
        return {**self.__dict__, "images_per_second": dict(self.images_per_second), "ratios": ratios}


def serve(pipe: Connection, network: str, batch: int, name: str, threads: int) -> None:
    """One attack in a process of its own: at every message one timed attack, answered with its seconds."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    shape, builder, data_key = NETWORKS[network]
    normalization = Normalization((0.5,) * shape[0], (0.5,) * shape[0])
    spec = ModelSpec(network, tuple(map(str, range(10))), shape, normalization)
    model = TorchModel(Normalized(builder(10, shape), normalization).eval(), spec)
    images, labels = torch.rand(batch, *shape), torch.randint(0, 10, (batch,))
    paper, pixel = (_without_start(PRESETS[preset, data_key], STEPS) for preset in ("paper", "pixel"))
    attack = {
        "paper": lambda: paper_attack(model, paper),
        "torchattacks": lambda: torchattacks_attack(model, pixel),
        "ours float32": lambda: our_attack(model, pixel, "float32"),
        "ours auto": lambda: our_attack(model, pixel, resolve_precision("auto")),
    }[name]()
    with collector_off():
        while pipe.recv():
            start = time.perf_counter()
            attack(images, labels)
            pipe.send(time.perf_counter() - start)


def measure_speed(network: str, batch: int, rounds: int, threads: int) -> Speed:
    """Interleaved rounds on a network with random weights and random images; the first two warm up."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name in (*PEERS, *OURS):
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, network, batch, name, threads), daemon=True))
        processes[-1].start()
    times: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(rounds + 2):
        for name, pipe in pipes.items():
            pipe.send(True)
            times[name].append(pipe.recv())
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(False)
        process.join()
    seconds = {name: np.array(values[2:]) for name, values in times.items()}
    speeds = {name: batch * STEPS / float(np.median(values)) for name, values in seconds.items()}
    ratios = {f"{our} / {peer}": ratio_interval(seconds[peer], seconds[our]) for our in OURS for peer in PEERS}
    return Speed(network, batch, speeds, ratios)


def robust_network(path: Path, split: Split, validation: Split) -> TorchModel:
    """The network at `path`, if it is a robust one, else tuned adversarially for two epochs."""
    model = assemble(
        read_model_file(resolve_path(path)),
        arch="cnn8",
        class_names=split.images.class_names,
        input_shape=split.images.shape,
        normalization=Normalization((0.5,), (0.5,)),
        dataset="sample",
    )
    if any(entry["objective"] in ATTACKED for entry in model.spec.training):
        return model
    config = TrainConfig(objective="adversarial", epochs=2, attack_steps=3)
    return train(model, split, validation, config, PRESETS["pixel", "fashion-mnist"], seed=0).model


def measure_robustness(model: TorchModel, images: Split) -> dict[str, dict[str, Proportion]]:
    """Robust accuracy under PGD-20, scored in float32 on the model itself, by threat model and attack."""
    found: dict[str, dict[str, Proportion]] = {}
    for preset, peer, build in (("paper", "paper", paper_attack), ("pixel", "torchattacks", torchattacks_attack)):
        plan = _without_start(PRESETS[preset, "fashion-mnist"], 20)
        attacks = {
            peer: build(model, plan),
            "ours float32": our_attack(model, plan, "float32"),
            "ours auto": our_attack(model, plan, resolve_precision("auto")),
        }
        found[preset] = {name: _robust(model, attack, images) for name, attack in attacks.items()}
    return found


def _robust(model: TorchModel, attack: Attack, images: Split) -> Proportion:
    correct = [
        model.predict(attack(batch.images, batch.labels)).argmax(dim=1).eq(batch.labels)
        for batch in images.batches(250)
    ]
    return Proportion.of(torch.cat(correct))


def main() -> int:
    """Measure, print, and exit with 1 if the robust accuracies differ by more than they may."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("shipped:cnn8"), help="cnn8 for the robust accuracy")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--images", type=int, default=2000, help="evaluation images for the robust accuracy; 0: none")
    parser.add_argument("--json", type=Path, default=None, help="write the results here")
    arguments = parser.parse_args()
    threads = usable_threads(arguments.threads)
    torch.set_num_threads(threads)
    speeds = [measure_speed(network, batch, arguments.rounds, threads) for network, batch in BATCHES.items()]
    robust: dict[str, dict[str, Proportion]] = {}
    if arguments.images:
        config = DataConfig(source="sample", evaluation=arguments.images)
        splits = make_splits(load_source(config), config, seed=0)
        robust = measure_robustness(robust_network(arguments.model, splits.train, splits.validation), splits.evaluation)
    show(speeds, robust, arguments.rounds)
    if arguments.json:
        record = {
            "rounds": arguments.rounds,
            "steps_per_round": STEPS,
            "precision_of_auto": resolve_precision("auto"),
            "speed": [speed.record() for speed in speeds],
            "robust": {name: {key: value.as_dict() for key, value in row.items()} for name, row in robust.items()},
            "environment": environment_record(threads),
            "torchattacks": torchattacks.__version__,
        }
        arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    spread = [max(p.value for p in row.values()) - min(p.value for p in row.values()) for row in robust.values()]
    return int(any(difference > LARGEST_DIFFERENCE for difference in spread))


def show(speeds: list[Speed], robust: dict[str, dict[str, Proportion]], rounds: int) -> None:
    """Print the tables."""
    for speed in speeds:
        print(f"{speed.network}, batch {speed.batch}: images/s of one PGD step, {rounds} interleaved rounds")
        for name, value in speed.images_per_second.items():
            print(f"  {name:<28}{value:>10,.0f}")
        for name, ratio in speed.ratios.items():
            print(f"  {name:<28}{ratio.value:>9.2f}x  [{ratio.low:.2f}, {ratio.high:.2f}]")
    for preset, row in robust.items():
        print(f"robust accuracy of cnn8 under PGD-20, {preset}, scored in float32")
        for name, proportion in row.items():
            print(f"  {name:<28}{proportion}")


if __name__ == "__main__":
    raise SystemExit(main())
