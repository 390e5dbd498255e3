"""What `toolkit harden` reaches on all of Fashion-MNIST with the shipped network, preset `paper`, three epochs.

    python benchmarks/harden_figures.py [--ratios 0.5,0.8] [--seeds 0,1,2] [--json FILE]

Every row is one run of the command line, its bundle in a temporary folder; all figures are those of the deployed int8
graph on the 10,000 test images. Beside them stand the float figures of the paper (Thorsteinsson et al. 2024, table 3:
pruned 0.8 from the standard network, adversarially fine-tuned, not quantised).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PAPER = {"clean": 0.8391, "robust": 0.7674}
"""Float, pruned 0.8, mean of three seeds."""


def measure(ratio: float, seed: int) -> dict[str, Any]:
    """One run and the figures that count."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        command = [
            *(sys.executable, "-m", "toolkit", "harden", "shipped:cnn8", "--data", "fashion-mnist", "--int8"),
            *("--threat", "paper", "--prune", str(ratio), "--epochs", "3", "--seed", str(seed)),
            *("--output", str(output), "--json"),
        ]
        start = time.perf_counter()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - start
    report = json.loads(done.stdout)
    return {
        "ratio": ratio,
        "seed": seed,
        "seconds": seconds,
        "clean": report["accuracy"]["deployed"],
        "robust": report["robust_accuracy"]["deployed"],
        "clean_fp32": report["accuracy"]["fp32"]["value"],
        "robust_fp32": report["robust_accuracy"]["fp32"]["value"],
        "integer_coverage": report["quantization"]["integer_coverage"],
        "timings": report["timings"],
        "environment": report["environment"],
        "alarms": report["soundness"],
    }


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| pruned | seed | clean, deployed | robust, deployed | int8 minus float, clean | robust | integer | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        clean, robust = (f"{row[key]['value']:.2%} [{row[key]['low']:.2%}, {row[key]['high']:.2%}]" for key in FIGURES)
        lost = [100 * (row[key]["value"] - row[f"{key}_fp32"]) for key in FIGURES]
        cells = (row["ratio"], row["seed"], clean, robust, f"{lost[0]:+.2f}", f"{lost[1]:+.2f}")
        lines.append(f"| {' | '.join(map(str, cells))} | {row['integer_coverage']:.1%} | {row['seconds']:.0f} |")
    lines.append(f"| 0.8, paper, float | 3 seeds | {PAPER['clean']:.2%} | {PAPER['robust']:.2%} | | | | |")
    return "\n".join(lines)


FIGURES = ("clean", "robust")


def main() -> None:
    """Run all ratios with all seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", default="0.5,0.8")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for ratio in map(float, arguments.ratios.split(",")):
        for seed in map(int, arguments.seeds.split(",")):
            rows.append(measure(ratio, seed))
            print(json.dumps({key: rows[-1][key] for key in ("ratio", "seed", "seconds")}), file=sys.stderr)
    print(show(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
