"""One gradient of an attack with batch norm folded into convolutions, against the same without.

    python benchmarks/folding.py [--threads 1] [--rounds 20] [--batch 64] [--json FILE]

Both compute the same network (resnet18 of random weights, images of CIFAR-10's size) in one process, in turn, in
float32 and in the precision that the toolkit picks by itself. What is reported is the median of the rounds' ratios
(folded over not) with its 95 % bootstrap interval, and how far the two gradients are apart.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from toolkit.artifacts import Normalization, Normalized
from toolkit.attacks.forms import Precision
from toolkit.attacks.surrogate import Surrogate, resolve_precision
from toolkit.evaluators.environment import environment_record
from toolkit.evaluators.timing import collector_off, foreign_load, ratio_interval
from toolkit.models.networks import resnet18

SHAPE, CLASSES = (3, 32, 32), 10
HALF = Normalization((0.5,) * 3, (0.5,) * 3)


def without_folding(module: Normalized, precision: Precision) -> Surrogate:
    """A surrogate that keeps its batch norms."""
    with patch("toolkit.attacks.surrogate.fold", lambda network, _images: (network, ())):
        return Surrogate(module, HALF, precision, input_shape=SHAPE)


def compare(precision: Precision, batch: int, rounds: int) -> dict[str, Any]:
    """Time both in turn."""
    torch.manual_seed(0)
    module = Normalized(resnet18(CLASSES, SHAPE), HALF).eval()
    both = {
        "plain": without_folding(module, precision),
        "folded": Surrogate(module, HALF, precision, input_shape=SHAPE),
    }
    norms = {name: sum(isinstance(m, nn.BatchNorm2d) for m in one._network.modules()) for name, one in both.items()}
    if norms["folded"] or not norms["plain"]:
        raise SystemExit(f"nothing to compare: {norms} batch norms")
    images, labels = torch.rand(batch, *SHAPE), torch.randint(0, CLASSES, (batch,))
    gradients = {name: one.gradient(images, labels) for name, one in both.items()}
    seconds: dict[str, list[float]] = {name: [] for name in both}
    with collector_off(), foreign_load() as load:
        for _ in range(rounds):
            for name, one in both.items():
                start = time.perf_counter()
                one.gradient(images, labels)
                seconds[name].append(time.perf_counter() - start)
    ratio = ratio_interval(np.array(seconds["folded"]), np.array(seconds["plain"]))
    cosine = functional.cosine_similarity(gradients["plain"].flatten(1), gradients["folded"].flatten(1))
    return {
        "precision": precision,
        "ms_per_image": {name: 1000 * float(np.median(values)) / batch for name, values in seconds.items()},
        "folded over plain": asdict(ratio),
        "least cosine of the gradients": float(cosine.min()),
        "foreign_load": load(),
    }


def main() -> None:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    precisions = dict.fromkeys(("float32", resolve_precision("auto")))
    rows = [compare(precision, arguments.batch, arguments.rounds) for precision in precisions]
    for row in rows:
        print(json.dumps(row))
    if arguments.json:
        found = {"rows": rows, "batch": arguments.batch, "environment": environment_record(arguments.threads)}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
