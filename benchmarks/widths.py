"""What `--round-to auto` chooses against the default of 8, and against widths that are not rounded.

    python benchmarks/widths.py [--networks cnn8,resnet18] [--ratios 0.3,0.5,0.6,0.7,0.8] [--threads 1] [--json FILE]

Networks and images are those of benchmarks/latency.py: the shipped cnn8, and resnet18 (32x32) with random weights,
pruned and not tuned. Times are of the graph that would ship, over that of widths that are not rounded.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from latency import network

from toolkit.config import BenchmarkConfig, ExportConfig, PruneConfig, QuantizeConfig
from toolkit.evaluators.environment import environment_record, usable_threads
from toolkit.evaluators.latency import Stopclock
from toolkit.evaluators.widths import Candidates, RoundingChoice, choose_rounding


def measure(name: str, ratio: float, config: BenchmarkConfig) -> tuple[RoundingChoice, float]:
    """The search for one network and ratio, and its seconds."""
    model, images = network(name)
    pixels = images.take(np.arange(min(len(images), max(config.batches)))).images.numpy()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        how = Candidates(PruneConfig(ratio=ratio), ExportConfig(), QuantizeConfig(int8=True), images, Path(folder))
        found = choose_rounding(model, how, Stopclock(config, pixels))
    return found, time.perf_counter() - start


def show(name: str, ratio: float, found: RoundingChoice) -> None:
    """One row per multiple."""
    for one in found.tried:
        mark = "**" if one.round_to == found.chosen else ""
        ours = f"{one.time.value:.3f} [{one.time.low:.3f}, {one.time.high:.3f}]"
        print(
            f"| {name} | {ratio:g} | {mark}{one.round_to}{mark} | {one.macs / found.tried[0].macs:.3f} | {ours} | "
            f"{one.float_time.value:.3f} | {one.per_mac.value:.3f} | {one.graph} | {'yes' if one.admitted else 'no'} |",
            flush=True,
        )


def main() -> None:
    """Run all, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="cnn8,resnet18")
    parser.add_argument("--ratios", default="0.3,0.5,0.6,0.7,0.8")
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    threads = usable_threads(arguments.threads)
    config = BenchmarkConfig(batches=tuple(map(int, arguments.batches.split(","))), threads=threads)
    print("| network | pruned | multiple | MACs | time | float time | per MAC | graph | counts |")
    print("|---|---|---|---|---|---|---|---|---|")
    results: list[dict[str, Any]] = []
    for name in arguments.networks.split(","):
        for ratio in map(float, arguments.ratios.split(",")):
            found, seconds = measure(name, ratio, config)
            show(name, ratio, found)
            results.append({"network": name, "ratio": ratio, "seconds": seconds, **asdict(found)})
            if arguments.json:
                record = {"results": results, "environment": environment_record(threads)}
                arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
