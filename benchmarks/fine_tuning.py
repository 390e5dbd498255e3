"""The whole of `toolkit harden`, evidence included, against the paper's own loop for the fine-tuning alone, in one run.

    python benchmarks/fine_tuning.py [--prune 0.5] [--runs 3] [--batches 100] [--threads N] [--json FILE] [-- FLAGS...]

The paper's loop (Thorsteinsson et al. 2024) is written out as published: PGD of 20 steps whose gradients gather in the
weights too, stochastic gradient descent, batches of 64, three epochs of Fashion-MNIST, here on the pruned network. All
its batches cost the same, so only some are timed, before and after every run of `harden`, and their time is scaled to
three epochs; what it does not do (pruning, int8, evidence) costs it nothing. `harden` is the command line with three
epochs, from its start to its end. FLAGS are handed to it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toolkit.artifacts import Split
from toolkit.attacks.threat import PRESETS
from toolkit.config import DataConfig, PruneConfig
from toolkit.data.sources import load_source
from toolkit.evaluators.environment import environment_record, usable_threads
from toolkit.evaluators.timing import ratio_interval
from toolkit.models.loading import assemble, read_model_file, resolve_path
from toolkit.pruning import prune

EPOCHS, BATCH, STEPS, RATE = 3, 64, 20, 0.1
EPOCH = -(-60_000 // BATCH)
"""Batches of an epoch: the last one is smaller."""
WARM_UP = 10
"""Batches."""


def serve(pipe: Connection, ratio: float, threads: int) -> None:
    """The published loop in a process of its own: at every number of batches their seconds."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    source = load_source(DataConfig(source="fashion-mnist"))
    model = assemble(
        read_model_file(resolve_path(Path("shipped:cnn8"))),
        arch="cnn8",
        class_names=source.train.class_names,
        input_shape=source.train.shape,
        normalization=source.normalization_hint,
        dataset=source.name,
    )
    if ratio:
        model = prune(model, PruneConfig(ratio=ratio)).model
    network = model.module.network.train()
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    mean, std = model.module.mean, model.module.std
    whole = np.arange(len(source.train.labels))
    everything = Split(source.train, whole).take(whole)
    normalised, labels = (everything.images - mean) / std, everything.labels
    plan, loss_function = PRESETS["paper", "fashion-mnist"], nn.CrossEntropyLoss()
    eps, size = plan.threat.eps, plan.step_size
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)

    def step(x: Tensor, y: Tensor) -> None:
        delta = torch.zeros_like(x, requires_grad=True)
        for _ in range(STEPS):
            loss_function(network(x + delta), y).backward()
            assert delta.grad is not None
            delta.data = (delta + size * delta.grad.detach().sign()).clamp(-eps, eps)
            delta.grad.zero_()
        optimizer.zero_grad()
        loss_function(network(x + delta.detach()), y).backward()
        optimizer.step()

    pipe.send(len(labels))
    with contextlib.suppress(EOFError):  # the other end is gone: all is measured
        while count := pipe.recv():
            start = time.perf_counter()
            for rows in torch.split(torch.randperm(len(labels))[: count * BATCH], BATCH):
                step(normalised[rows], labels[rows])
            pipe.send(time.perf_counter() - start)


class PaperLoop:
    """The published loop, which waits in its process while others are timed."""

    def __init__(self, ratio: float, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, ratio, threads), daemon=True).start()
        self.batches: int = EPOCHS * -(-self._pipe.recv() // BATCH)
        """Of the three epochs."""
        self._time(WARM_UP)

    def _time(self, batches: int) -> float:
        self._pipe.send(batches)
        return float(self._pipe.recv())

    def seconds(self, batches: int) -> float:
        """Of three epochs, from that many batches of one."""
        return self._time(batches) / batches * self.batches


def harden(ratio: float, threads: int, flags: list[str]) -> tuple[float, dict[str, Any]]:
    """Seconds of one run of the command line, and its report."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "toolkit", "harden", "shipped:cnn8", "--data", "fashion-mnist", "--int8"),
            *("--threat", "paper", "--prune", str(ratio), "--epochs", str(EPOCHS), "--threads", str(threads)),
            *(*flags, "--output", str(Path(folder) / "bundle"), "--json", "--quiet"),
        ]
        start = time.perf_counter()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return time.perf_counter() - start, json.loads(done.stdout)


def main() -> None:
    """Measure in turns, print, and write the raw numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flags", nargs="*")
    parser.add_argument("--prune", type=float, default=0.5)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batches", type=int, default=100, help="of the paper's loop, timed before and after each run")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    if not 1 <= arguments.batches <= EPOCH:
        parser.error(f"--batches: 1 to {EPOCH}, the batches of an epoch")
    threads = usable_threads(arguments.threads)
    paper = {"pruned": PaperLoop(arguments.prune, threads), "not pruned": PaperLoop(0.0, threads)}
    rows: list[dict[str, Any]] = []
    before = {name: loop.seconds(arguments.batches) for name, loop in paper.items()}
    for number in range(arguments.runs):
        seconds, report = harden(arguments.prune, threads, arguments.flags)
        after = {name: loop.seconds(arguments.batches) for name, loop in paper.items()}
        rows.append(
            {
                "harden_seconds": seconds,
                "paper_seconds": {name: (before[name] + after[name]) / 2 for name in paper},
                "timings": report["timings"],
                "n": report["accuracy"]["deployed"]["total"],
                "clean": report["accuracy"]["deployed"],
                "robust": report["robust_accuracy"]["deployed"],
            }
        )
        before = after
        print(f"run {number}: harden {seconds:.0f} s, the paper's loop {rows[-1]['paper_seconds']} s", file=sys.stderr)
        if arguments.json:
            record = {"flags": arguments.flags, "prune": arguments.prune, "batches": arguments.batches, "rows": rows}
            record["environment"] = environment_record(threads)
            arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    ours = np.array([row["harden_seconds"] for row in rows])
    print("| the paper's loop on | its seconds | harden, all of it | times as fast |\n| --- | --- | --- | --- |")
    for name in paper:
        theirs = np.array([row["paper_seconds"][name] for row in rows])
        ratio = ratio_interval(theirs, ours)
        times = (
            f"{np.median(theirs):.0f} | {np.median(ours):.0f} | {ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
        )
        print(f"| {name} | {times} |")


if __name__ == "__main__":
    main()
