"""Other precisions than int8: simulated in torch beside the real graphs that ONNX Runtime runs, on the same images.

    python benchmarks/precision_sweep.py BUNDLE... [--bits 16,8,4,2,1,...] [--n 2000] [--rounds 20] [--json FILE]

Of every bundle of `toolkit harden`, model.pt is simulated at every number of bits, and model.fp32.onnx is quantised at
int8, at int16 activations and at int4 weights. Simulated and real ones are each attacked by the run's PGD made on the
float network and on their own form (the fake-quantised network; the twin of the graph), all steps on all images; the
worse of both counts, per image. Everything runs through the command line, with one thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REAL = {
    "int8": (),
    "activations int16": ("--activation-bits", "16"),
    "linear weights int4": ("--weight-bits", "4"),
    "both": ("--activation-bits", "16", "--weight-bits", "4"),
}
"""Graphs that ONNX Runtime runs, and the flags that make them."""
SIMULATED = {"int8": "8/8", "activations int16": "8/16"}
"""The simulated row of the same bits, where all layers of the graph have them."""


def toolkit(*arguments: str) -> Any:
    """What one command prints with --json."""
    command = [sys.executable, "-m", "toolkit", *arguments, "--json", "-q"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(bundle: Path, bits: str, images: int, rounds: int) -> dict[str, Any]:
    """Everything of one bundle."""
    settings = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
    data, preset = settings["data"]["source"], settings["threat"]["preset"]
    common = ("--data", data, "--threat", preset, "--n", str(images), "--threads", "1")
    model, twin = str(bundle / "model.pt"), str(bundle / "model.fp32.onnx")
    simulated = toolkit("simulate", model, "--bits", bits, *common)
    real = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in REAL.items():
            file = str(Path(folder, f"{name.replace(' ', '-')}.onnx"))
            made = toolkit("quantize", twin, "--data", data, "--threads", "1", *flags, "--output", file)
            found = toolkit("attack", model, "--target", file, "--attacks", "pgd", *common)
            kernels: dict[str, int] = {}
            for row in made["layers"]:
                kernels[row["kernel"]] = kernels.get(row["kernel"], 0) + 1
            real[name] = {
                "clean": found["accuracy"]["deployed"],
                "robust": found["robust_accuracy"]["deployed"],
                "fidelity": found["fidelity"],
                "integer_coverage": made["integer_coverage"],
                "kernels": kernels,
                "bytes": made["bytes"],
            }
        files = [str(Path(folder, f"{name.replace(' ', '-')}.onnx")) for name in REAL]
        rows = toolkit("benchmark", twin, *files, "--threads", "1", "--rounds", str(rounds))
    for row in rows:
        for name in REAL:
            if row["file"] == f"{name.replace(' ', '-')}.onnx":
                real[name].setdefault("latency", []).append(row)
    return {"bundle": bundle.name, "pruned": settings["model"]["prune_ratio"], "simulated": simulated, "real": real}


def show(found: dict[str, Any]) -> str:
    """The tables of one bundle in Markdown."""
    rows = found["simulated"]["rows"]
    lines = [
        f"### {found['bundle']}\n",
        "| SIMULATED bits, weights/activations | clean | PGD, worse of both | on it | on float |",
    ]
    lines.append("| --- | --- | --- | --- | --- |")
    for row in rows:
        label = "float" if row["bits"] == "32/32" else row["bits"]
        lines.append(
            f"| {label} | {share(row['clean'])} | {share(row['robust'])} | {row['robust_own']['value']:.2%} "
            f"| {row['robust_transfer']['value']:.2%} |"
        )
    lines += [
        "",
        "| REAL graph | clean | PGD, worse of both | minus simulated | integer MACs | kernels | bytes | time / twin |",
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    by_bits = {row["bits"]: row for row in rows}
    for name, row in found["real"].items():
        other = by_bits.get(SIMULATED.get(name, ""))
        lost = (
            "not comparable"
            if other is None
            else ", ".join(f"{100 * (row[key]['value'] - other[key]['value']):+.2f}" for key in ("clean", "robust"))
        )
        times = "; ".join(
            f"batch {t['batch']}: {t['ratio']:.2f} [{t['ratio_low']:.2f}, {t['ratio_high']:.2f}]"
            for t in row["latency"]
        )
        kernels = ", ".join(f"{count} {kernel}" for kernel, count in row["kernels"].items())
        lines.append(
            f"| {name} | {share(row['clean'])} | {share(row['robust'])} | {lost} | {row['integer_coverage']:.1%} "
            f"| {kernels} | {row['bytes']['deployed']:,} | {times} |"
        )
    return "\n".join(lines)


def share(found: dict[str, Any]) -> str:
    """A share with its interval."""
    return f"{found['value']:.2%} [{found['low']:.2%}, {found['high']:.2%}]"


def main() -> None:
    """Measure all bundles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--bits", default="16,8,4,2,1,8/16,4/8,2/8,1/8,8/4,4/32,1/32")
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = []
    for bundle in arguments.bundles:
        found.append(measure(bundle, arguments.bits, arguments.n, arguments.rounds))
        print(show(found[-1]) + "\n", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
