"""The ensemble and the fast composition against the standard AutoAttack of its authors: robust accuracy and time.

    make peers
    .venv-peers/bin/python benchmarks/autoattack.py NETWORK.pt... [--n 1000] [--eps 0.05,0.1] [--json FILE]

Every attack runs in a process of its own, one after the other, on the same images and the same torch network, and is
scored in float32 on it. Times include everything an attack does, clean predictions too, but not the loading.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from toolkit.artifacts import Proportion, Split, TorchModel
from toolkit.attacks.ensemble import compose
from toolkit.attacks.threat import PgdPlan, resolve_plan
from toolkit.config import DataConfig, ModelConfig, ModelRunConfig, ThreatConfig
from toolkit.evaluators.accuracy import correct
from toolkit.evaluators.environment import environment_record, usable_threads
from toolkit.evaluators.evaluation import Conditions
from toolkit.evaluators.robustness import evaluate_robustness
from toolkit.prepare import prepare
from toolkit.progress import set_quiet

ATTACKS = ("fast", "ensemble", "pyautoattack")


def ours(model: TorchModel, split: Split, plan: PgdPlan, composition: str) -> Proportion:
    """Worst case over the transfer matrix's PGD and a composition."""
    passes = compose(composition, len(model.spec.class_names))
    conditions = Conditions(plan, model.spec.normalization, seed=0, passes=passes)
    return evaluate_robustness({"float": model}, {"torch": model}, split, conditions).worst_case["torch"]


def theirs(model: TorchModel, split: Split, plan: PgdPlan) -> Proportion:
    """AutoAttack's standard composition, as its authors run it, scored as everything else."""
    from pyautoattack import AutoAttack

    batch = next(split.batches(len(split)))
    attack = AutoAttack(
        model.module, norm="Linf", eps=plan.threat.eps, version="standard", seed=0, device="cpu", verbose=False
    )
    attacked = attack.run_standard_evaluation(batch.images, batch.labels, bs=250)
    return Proportion.of(correct(model, attacked, batch.labels) & correct(model, batch.images, batch.labels))


def serve(pipe: Connection, path: Path, eps: float, images: int, name: str, threads: int) -> None:
    """One attack in a process of its own."""
    set_quiet(True)
    data = DataConfig(source="fashion-mnist", evaluation=images)
    prepared = prepare(ModelRunConfig(model=ModelConfig(path=path), data=data, threads=threads))
    model, split = prepared.model, prepared.splits.evaluation
    plan = resolve_plan(ThreatConfig(eps=eps), "fashion-mnist")
    start = time.perf_counter()
    robust = theirs(model, split, plan) if name == "pyautoattack" else ours(model, split, plan, name)
    pipe.send((robust, time.perf_counter() - start))


def run(path: Path, eps: float, images: int, name: str, threads: int) -> tuple[Proportion, float]:
    """Robust accuracy and seconds of one attack."""
    context = multiprocessing.get_context("spawn")
    mine, yours = context.Pipe()
    process = context.Process(target=serve, args=(yours, path, eps, images, name, threads))
    process.start()
    yours.close()
    robust, seconds = mine.recv()
    process.join()
    return robust, seconds


def compare(path: Path, eps: float, images: int, threads: int) -> list[dict[str, Any]]:
    """All attacks on one network at one radius, in turn."""
    found = {name: run(path, eps, images, name, threads) for name in ATTACKS}
    reference, reference_seconds = found["pyautoattack"]
    return [
        {
            "network": path.stem,
            "eps": eps,
            "attack": name,
            "robust": robust.as_dict(),
            "seconds": seconds,
            "points_above": 100 * (robust.value - reference.value),
            "share_of_time": seconds / reference_seconds,
        }
        for name, (robust, seconds) in found.items()
    ]


def main() -> None:
    """Run all, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", type=Path)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--eps", default="0.05,0.1")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    threads = usable_threads(arguments.threads)
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    print("| network | eps | attack | robust accuracy | seconds | points above pyautoattack | share of its time |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for path in arguments.networks:
        for eps in map(float, arguments.eps.split(",")):
            for row in compare(path, eps, arguments.n, threads):
                rows.append(row)
                share = Proportion(row["robust"]["correct"], row["robust"]["total"])
                print(
                    f"| {row['network']} | {eps:g} | {row['attack']} | {share} | {row['seconds']:.1f} | "
                    f"{row['points_above']:+.2f} | {row['share_of_time']:.3f} |",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"rows": rows, "environment": environment_record(threads)}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
