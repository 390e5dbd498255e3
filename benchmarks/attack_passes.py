"""What every pass of a composition costs and fools, and how near the boundary the images were that it fooled.

    python benchmarks/attack_passes.py NETWORK.pt... [--eps 0.1] [--attacks fast,ensemble] [--seeds 0,1] [--json FILE]

On test images of Fashion-MNIST, in l-inf in pixels, scored in float32 on the torch network. `from`: the share of the
way from the clean margin to the boundary that earlier attacks had brought an image, least of those that the pass
fooled: a pass that fools nothing below some share need not be made on images that are farther away. Seconds are
processor time.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from toolkit.artifacts import derive_seed
from toolkit.attacks.ensemble import compose
from toolkit.attacks.threat import resolve_plan
from toolkit.config import DataConfig, ModelConfig, ModelRunConfig, ThreatConfig
from toolkit.evaluators.environment import environment_record, usable_threads
from toolkit.evaluators.evaluation import Clock, Conditions, Evaluation
from toolkit.evaluators.journal import Journal
from toolkit.evaluators.robustness import arm
from toolkit.evaluators.scoring import Judges, Ledger, clean_flags
from toolkit.evaluators.worst_case import pursue
from toolkit.prepare import Prepared, prepare


def passes(prepared: Prepared, eps: float, attacks: str, seed: int) -> dict[str, Any]:
    """One composition on one network, pass by pass."""
    model, split = prepared.model, prepared.splits.evaluation
    plan = resolve_plan(ThreatConfig(eps=eps), "fashion-mnist")
    conditions = Conditions(plan, model.spec.normalization, seed, compose(attacks, len(model.spec.class_names)))
    judges = Judges({"torch": model}, plan.threat, conditions.normalization, files=False)
    ledger = Ledger(clean_flags(judges, split, lambda _: None), judges, files=False, keep_near=conditions.keep_near)
    armed = arm({"float": model}, conditions)
    rows: list[dict[str, Any]] = []
    for number, how in enumerate(sorted(conditions.passes, key=lambda how: how.by_queries)):
        alone = replace(conditions, passes=(how,), seed=derive_seed(seed, number))
        progress, standing, start = ledger.progress("torch"), ledger.worst["torch"].clone(), time.process_time()
        records, _ = pursue(armed, {}, Evaluation(judges, ledger, split, alone, Journal(), Clock()))
        found = progress[standing & ~ledger.worst["torch"]]
        rows.append(
            {
                "pass": str(how),
                "near": how.near,
                "images": records[0].attempted if records else 0,
                "fooled": len(found),
                "from": float(found.min()) if len(found) else None,
                "cpu_seconds": time.process_time() - start,
            }
        )
    left = ledger.proportions()["torch"]
    return {"eps": eps, "attacks": attacks, "seed": seed, "left": left.as_dict(), "passes": rows}


def show(found: dict[str, Any]) -> str:
    """One composition as a Markdown table."""
    seconds = sum(row["cpu_seconds"] for row in found["passes"])
    lines = [
        f"{found['network']}, eps {found['eps']:g}, {found['attacks']}, seed {found['seed']}: "
        f"{found['left']['value']:.2%} left, {seconds:.1f} CPU s",
        "",
        "| pass | near | images | fooled | from | CPU s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["passes"]:
        nearest = "" if row["from"] is None else f"{row['from']:.3f}"
        cells = [row["pass"], f"{row['near']:g}", row["images"], row["fooled"], nearest, f"{row['cpu_seconds']:.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run all, print tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", type=Path)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--attacks", default="fast,ensemble", help="compositions or attacks, each on its own")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    threads = usable_threads(arguments.threads)
    torch.set_num_threads(threads)
    found: list[dict[str, Any]] = []
    for path in arguments.networks:
        data = DataConfig(source="fashion-mnist", evaluation=arguments.n)
        prepared = prepare(ModelRunConfig(model=ModelConfig(path=path), data=data, threads=threads))
        for seed in map(int, arguments.seeds.split(",")):
            for attacks in arguments.attacks.split(","):
                one = passes(prepared, arguments.eps, attacks, seed)
                found.append({"network": path.stem, "n": arguments.n, **one})
                print(show(found[-1]), flush=True)
    if arguments.json:
        record = {"rows": found, "environment": environment_record(threads)}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
