"""What `toolkit harden` reaches on all of Fashion-MNIST with the shipped network, or another.

    python benchmarks/harden_figures.py [--model MODEL] [--threat paper] [--ratios 0.5,0.8] [--seeds 0,1,2]
                                        [--json FILE] [--keep FOLDER] [-- FLAGS...]

MODEL is a cnn8, say one that was trained adversarially. FLAGS are handed to `toolkit harden`, say `--epochs 20`. Robust
accuracy is the worst case of the attacks asked for (`fast` unless FLAGS say otherwise), over all surrogates. Every row
is one run of the command line, its bundle in a temporary folder or, with `--keep`, in FOLDER; all figures are those of
the deployed int8 graph on the 10,000 test images. Beside them stand the float figures of the paper (Thorsteinsson et
al. 2024, table 3: pruned 0.8 from the standard network, adversarially fine-tuned, not quantised).
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


def measure(model: str, threat: str, ratio: float, seed: int, keep: Path | None, flags: list[str]) -> dict[str, Any]:
    """One run and the figures that count."""
    with tempfile.TemporaryDirectory() as folder:
        output = (keep or Path(folder)) / f"{threat}-{ratio}-{seed}"
        command = [
            *(sys.executable, "-m", "toolkit", "harden", model, "--data", "fashion-mnist", "--int8"),
            *("--threat", threat, "--prune", str(ratio), "--seed", str(seed), *flags),
            *("--output", str(output), "--json"),
        ]
        start = time.perf_counter()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - start
    report = json.loads(done.stdout)
    return {
        "model": Path(model).name,
        "threat": threat,
        "flags": flags,
        "ratio": ratio,
        "seed": seed,
        "seconds": seconds,
        "finetune_seconds": report["timings"]["finetune"],
        "clean": report["accuracy"]["deployed"],
        "robust": report["robust_accuracy"]["deployed"],
        "clean_fp32": report["accuracy"]["fp32"]["value"],
        "robust_fp32": report["robust_accuracy"]["fp32"]["value"],
        "robust_from_file": report["robust_accuracy"]["deployed_from_file"],
        "cells": [[c["surrogate"], c["target"], c["value"]] for c in report["robustness"]],
        "passes": report["worst_case"]["passes"],
        "integer_coverage": report["quantization"]["integer_coverage"],
        "timings": report["timings"],
        "environment": report["environment"],
        "alarms": report["soundness"],
    }


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| pruned | seed | clean, deployed | worst case, deployed | int8 minus float, clean | worst case | integer "
        "| seconds | of them tuning |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        clean, robust = (f"{row[key]['value']:.2%} [{row[key]['low']:.2%}, {row[key]['high']:.2%}]" for key in FIGURES)
        lost = [100 * (row[key]["value"] - row[f"{key}_fp32"]) for key in FIGURES]
        cells = (row["ratio"], row["seed"], clean, robust, f"{lost[0]:+.2f}", f"{lost[1]:+.2f}")
        times = f"{row['seconds']:.0f} | {row['finetune_seconds']:.0f}"
        lines.append(f"| {' | '.join(map(str, cells))} | {row['integer_coverage']:.1%} | {times} |")
    if rows[0]["threat"] == "paper":
        published = f"{PAPER['clean']:.2%} | {PAPER['robust']:.2%} under PGD-20"
        lines.append(f"| 0.8, the paper's, float | 3 seeds | {published} | | | | | |")
    return "\n".join(lines)


FIGURES = ("clean", "robust")


def main() -> None:
    """Run all ratios with all seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flags", nargs="*")
    parser.add_argument("--model", default="shipped:cnn8")
    parser.add_argument("--threat", default="paper")
    parser.add_argument("--ratios", default="0.5,0.8")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    rows = []
    for ratio in map(float, arguments.ratios.split(",")):
        for seed in map(int, arguments.seeds.split(",")):
            rows.append(measure(arguments.model, arguments.threat, ratio, seed, arguments.keep, arguments.flags))
            print(json.dumps({key: rows[-1][key] for key in ("ratio", "seed", "seconds")}), file=sys.stderr)
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(show(rows))


if __name__ == "__main__":
    main()
