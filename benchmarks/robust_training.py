"""Ways of robust fine-tuning against plain PGD fine-tuning, at equal time, from the shipped network.

    python benchmarks/robust_training.py [--ratios 0.5,0.8] [--threat paper] [--epochs 4] [--teacher FILE] --work DIR

All on Fashion-MNIST. The optimiser steps of all methods are timed interleaved; `--epochs` epochs of PGD-5 fix the time,
and every other method gets as many epochs as fit into it. Then each network is exported, quantised to int8, and both
graphs are attacked: PGD-20 of the preset, and the composition `--attacks` on what is left (worst case, by transfer from
the float network). A run that is cut short goes on where it stopped: networks, checkpoints and figures are in `--work`.

A teacher for `distill` is the unpruned network, tuned: `toolkit harden shipped:cnn8 --data fashion-mnist --prune 0
--threat paper --epochs 8 --allow-float --output teacher`, then `--teacher teacher/model.pt`; its time is not counted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

from toolkit.artifacts import TorchModel
from toolkit.attacks.ensemble import compose
from toolkit.bundle import sha256
from toolkit.config import ExportConfig, HardenConfig, QuantizeConfig, TrainConfig, build
from toolkit.evaluators.environment import environment_record
from toolkit.evaluators.evaluation import Conditions
from toolkit.evaluators.robustness import evaluate_robustness
from toolkit.exporters.onnx import export_onnx
from toolkit.exporters.quantize import quantize_int8
from toolkit.exporters.session import OnnxPredictor
from toolkit.models.checkpoint import save_checkpoint
from toolkit.prepare import PreparedAttack, load_teacher, prepare_attack
from toolkit.pruning import prune
from toolkit.training.loop import train
from toolkit.training.run import Run

REFERENCE = "PGD-5"
METHODS: dict[str, dict[str, Any]] = {
    REFERENCE: {"objective": "adversarial", "attack_steps": 5},
    "PGD-7": {"objective": "adversarial", "attack_steps": 7},
    "PGD-3": {"objective": "adversarial", "attack_steps": 3},
    "PGD-2, averaged": {"objective": "adversarial", "attack_steps": 2, "ema": 0.999},
    "FGSM": {"objective": "fgsm"},
    "FGSM, averaged": {"objective": "fgsm", "ema": 0.999},
    "TRADES-3": {"objective": "trades", "attack_steps": 3},
    "distillation": {"objective": "distill", "attack_steps": 1, "clean_share": 0.0},
}
WARM_UP, ROUNDS, STEPS = 3, 10, 4
"""Of the timing: optimiser steps before it, rounds, and steps of each method in a round."""


def settings(method: str, epochs: int, teacher: Path | None) -> TrainConfig:
    """The configuration of a method."""
    values = {"ema": 0.0, **METHODS[method], "epochs": epochs}
    return TrainConfig.model_validate(values | ({"teacher": teacher} if values["objective"] == "distill" else {}))


class Bench:
    """One pruned network, its data, and where files are kept."""

    def __init__(self, arguments: argparse.Namespace, ratio: float, methods: list[str]) -> None:
        self.arguments, self.ratio, self.methods = arguments, ratio, methods
        values = {
            "model": {"path": arguments.model},
            "data": {"source": "fashion-mnist"},
            "threat": {"preset": arguments.threat},
            "prune": {"ratio": ratio},
            "seed": arguments.seed,
            "threads": arguments.threads,
        }
        config = build(HardenConfig, values)
        self.prepared: PreparedAttack = prepare_attack(config)
        self.student = prune(self.prepared.model, config.prune).model
        self.teacher: TorchModel | None = None
        if arguments.teacher is not None:
            training = TrainConfig(objective="distill", teacher=arguments.teacher)
            self.teacher = load_teacher(training, self.student.spec, self.prepared.splits)

    def run_of(self, method: str) -> Run:
        """A training of `method`, not yet begun."""
        parts, config = self.prepared.splits, settings(method, 1, self.arguments.teacher)
        return Run(self.student, parts.train, parts.validation, config, self.prepared.plan, 0, self.teacher)

    def milliseconds(self) -> dict[str, float]:
        """The median time of an optimiser step, by method; all methods in turn."""
        runs = {method: self.run_of(method) for method in self.methods}
        times: dict[str, list[float]] = {method: [] for method in runs}
        for number in range(WARM_UP + ROUNDS):
            for method, run in runs.items():
                start = time.perf_counter()
                for _ in range(STEPS):
                    run.advance()
                if number >= WARM_UP:
                    times[method].append(1e3 * (time.perf_counter() - start) / STEPS)
        return {method: statistics.median(found) for method, found in times.items()}

    def measure(self, method: str, epochs: int, name: str) -> dict[str, Any]:
        """Train by `method` and judge what comes out."""
        work, parts, plan = self.arguments.work, self.prepared.splits, self.prepared.plan
        start = time.perf_counter()
        tuned = train(
            self.student,
            parts.train,
            parts.validation,
            settings(method, epochs, self.arguments.teacher),
            plan,
            seed=self.arguments.seed,
            label=name,
            checkpoint=work / f"{name}.partial",
            resume=True,
            teacher=self.teacher,
        )
        seconds = time.perf_counter() - start
        save_checkpoint(tuned.model, work / f"{name}.pt")
        record = tuned.model.spec.training[-1]
        return {
            "seconds": seconds,
            "best_epoch": tuned.best_epoch,
            "collapse": record["collapse"],
            **self.judge(tuned.model, name),
        }

    def judge(self, model: TorchModel, name: str) -> dict[str, Any]:
        """Clean and robust accuracy of the float and the int8 graph."""
        work, splits, plan = self.arguments.work, self.prepared.splits, self.prepared.plan
        normalization = model.spec.normalization
        fp32 = export_onnx(model, work / f"{name}.fp32.onnx", ExportConfig())
        made = quantize_int8(
            fp32,
            work / f"{name}.int8.onnx",
            splits.calibration,
            QuantizeConfig(int8=True),
            input_margin=plan.threat.margin(normalization),
        )
        found = evaluate_robustness(
            {"float": model},
            {"fp32": OnnxPredictor(fp32.path), "deployed": OnnxPredictor(made.model.path)},
            splits.evaluation.first(self.arguments.n),
            Conditions(
                plan, normalization, 0, compose(self.arguments.attacks, len(model.spec.class_names)), precision="auto"
            ),
        )
        robust = {cell.target: cell.robust.as_dict() for cell in found.transfers}
        return {
            key: {
                "clean": found.clean[key].as_dict(),
                "pgd": robust[key],
                "worst_case": found.worst_case[key].as_dict(),
            }
            for key in ("fp32", "deployed")
        }


def saved_rows(path: Path) -> dict[str, dict[str, Any]]:
    """What earlier runs measured, by name."""
    if not path.is_file():
        return {}
    return {row["name"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| pruned | method | ms per step | epochs | seconds | clean, int8 | PGD-20, int8 | worst case, int8 | float |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        int8, fp32 = row["deployed"], row["fp32"]
        figures = [f"{int8[key]['value']:.2%}" for key in ("clean", "pgd", "worst_case")]
        floats = f"{fp32['clean']['value']:.2%} / {fp32['worst_case']['value']:.2%}"
        cells = [row["ratio"], row["method"], f"{row['step_ms']:.1f}", row["epochs"], f"{row['seconds']:.0f}"]
        lines.append(f"| {' | '.join(map(str, [*cells, *figures, floats]))} |")
    return "\n".join(lines)


def digest(arguments: argparse.Namespace) -> str:
    """Of what else a row depends on."""
    facts = (arguments.model, arguments.teacher and sha256(arguments.teacher), arguments.attacks, arguments.n)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:8]


def main() -> None:
    """Run all methods at all ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", default="0.5,0.8")
    parser.add_argument("--methods", help="some of the methods, with semicolons between")
    parser.add_argument("--threat", default="paper", choices=("paper", "pixel"))
    parser.add_argument("--epochs", type=int, default=4, help="of PGD-5, which fix the time")
    parser.add_argument("--model", default="shipped:cnn8")
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--attacks", default="fast")
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="one, where other work keeps the other cores busy")
    parser.add_argument("--work", type=Path, required=True, help="a folder for networks, checkpoints and results")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    methods = arguments.methods.split(";") if arguments.methods else list(METHODS)
    methods = [method for method in methods if METHODS[method]["objective"] != "distill" or arguments.teacher]
    results = arguments.work / "results.jsonl"
    rows = []
    for ratio in map(float, arguments.ratios.split(",")):
        bench = Bench(arguments, ratio, [REFERENCE, *(method for method in methods if method != REFERENCE)])
        how = f"{arguments.threat}-{ratio}-{arguments.epochs}-{arguments.seed}-{digest(arguments)}"
        names = {m: f"{m}-{how}".lower() for m in methods}
        cost = bench.milliseconds() if set(names.values()) - set(saved_rows(results)) else {}
        for method, name in names.items():
            if name not in saved_rows(results):
                epochs = max(1, round(arguments.epochs * cost[REFERENCE] / cost[method]))
                row = {"name": name, "ratio": ratio, "method": method, "epochs": epochs, "step_ms": cost[method]}
                row |= bench.measure(method, epochs, name)
                row["environment"] = environment_record(bench.prepared.threads)
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            rows.append(saved_rows(results)[name])
    print(show(rows))


if __name__ == "__main__":
    main()
