"""The ensemble and the fast composition against the standard AutoAttack of its authors: robust accuracy and time.

    make peers
    .venv-peers/bin/python benchmarks/autoattack.py NETWORK.pt... [--n 1000] [--eps 0.05,0.1] [--json FILE]
    .venv-peers/bin/python benchmarks/autoattack.py --bundle BUNDLE... [--n 1000] [--json FILE]

Every attack runs in a process of its own, one after the other, on the same images and the same torch network, and is
scored in float32 on it. Times include all that an attack does, clean predictions too, but not the loading. `fast` and
`ensemble` are the compositions alone, as AutoAttack is; `evaluation` is what `toolkit attack` makes of `fast`: after
the transfer matrix, with all of its steps on all images, and with the attacked images as 8-bit files.

With --bundle an outside expert attacks model.onnx: AutoAttack on the float network and on a twin of the integer graph,
each image scored on model.onnx and the worst of both counted, against what `toolkit attack` says of the same file.
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
from torch import Tensor

from toolkit.artifacts import Proportion, Split, TorchModel
from toolkit.attacking import attack
from toolkit.attacks.ensemble import compose
from toolkit.attacks.threat import PgdPlan, resolve_plan
from toolkit.bundle import read_config
from toolkit.config import AttackRunConfig, DataConfig, ModelConfig, ModelRunConfig, ThreatConfig
from toolkit.evaluators.accuracy import correct
from toolkit.evaluators.environment import environment_record, usable_threads
from toolkit.evaluators.evaluation import Clock, Conditions, Evaluation
from toolkit.evaluators.journal import Journal
from toolkit.evaluators.robustness import arm, evaluate_robustness
from toolkit.evaluators.saturation_emulation import twin_of_session
from toolkit.evaluators.scoring import Judges, Ledger, clean_flags
from toolkit.evaluators.surrogate import twin_model
from toolkit.evaluators.worst_case import pursue
from toolkit.exporters.session import OnnxPredictor
from toolkit.prepare import prepare
from toolkit.progress import set_quiet

HEADER = (
    *("network", "eps", "attack", "robust accuracy", "seconds", "points above the last", "share of its time"),
    "of its CPU time",
)
ATTACKS = ("fast", "ensemble", "evaluation", "pyautoattack")


def ours(model: TorchModel, split: Split, plan: PgdPlan, name: str) -> Proportion:
    """Worst case over a composition, or over the transfer matrix and `fast`."""
    passes = compose("fast" if name == "evaluation" else name, len(model.spec.class_names))
    conditions = Conditions(plan, model.spec.normalization, seed=0, passes=passes)
    if name == "evaluation":
        return evaluate_robustness({"float": model}, {"torch": model}, split, conditions).worst_case["torch"]
    judges = Judges({"torch": model}, plan.threat, conditions.normalization, files=False)
    ledger = Ledger(clean_flags(judges, split, lambda _: None), judges, files=False, keep_near=conditions.keep_near)
    pursue(arm({"float": model}, conditions), {}, Evaluation(judges, ledger, split, conditions, Journal(), Clock()))
    return ledger.proportions()["torch"]


def auto_attack(model: TorchModel, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    """Images attacked by AutoAttack's standard composition in l-inf."""
    from pyautoattack import AutoAttack

    peer = AutoAttack(model.module, norm="Linf", eps=eps, version="standard", seed=0, device="cpu")
    attacked: Tensor = peer.run_standard_evaluation(images, labels, batch_size=250)[0]
    return attacked.detach()


def theirs(model: TorchModel, split: Split, plan: PgdPlan) -> Proportion:
    """AutoAttack's standard composition, as its authors run it, scored as everything else."""
    batch = next(split.batches(len(split)))
    attacked = auto_attack(model, batch.images, batch.labels, plan.threat.eps)
    return Proportion.of(correct(model, attacked, batch.labels) & correct(model, batch.images, batch.labels))


def expert(bundle: Path, images: int, threads: int) -> dict[str, Any]:
    """What is left of model.onnx under our attacks and under those of an outside expert, on the same images."""
    torch.set_num_threads(threads)
    data = DataConfig(evaluation=images)
    config = AttackRunConfig(model=ModelConfig(path=bundle), data=data, threads=threads)
    start = time.perf_counter()
    report = attack(config)
    our_seconds = time.perf_counter() - start
    saved = read_config(bundle)
    data = saved.data.model_copy(update={"evaluation": images})
    model = ModelConfig(path=bundle / "model.pt")
    prepared = prepare(ModelRunConfig(model=model, data=data, seed=saved.seed, threads=threads))
    plan = resolve_plan(saved.threat, prepared.source.threat_key)
    if not plan.threat.clip or plan.threat.space != "pixels":
        raise SystemExit("AutoAttack knows radii in clipped pixels only: give bundles of --threat pixel")
    batch = next(prepared.splits.evaluation.batches(images))
    deployed = OnnxPredictor(bundle / "model.onnx")
    robust = correct(deployed, batch.images, batch.labels)
    start = time.perf_counter()
    for network in (
        prepared.model,
        twin_model(twin_of_session(bundle / "model.onnx"), prepared.model.spec.class_names),
    ):
        robust &= correct(deployed, auto_attack(network, batch.images, batch.labels, plan.threat.eps), batch.labels)
    found = Proportion.of(robust)
    claimed = report.robust_accuracy["deployed"]
    return {
        "bundle": bundle.name,
        "eps": plan.threat.eps,
        "claimed": claimed.model_dump(),
        "expert": found.as_dict(),
        "points_above": 100 * (claimed.value - found.value),
        "our_seconds": our_seconds,
        "expert_seconds": time.perf_counter() - start,
    }


def serve(pipe: Connection, path: Path, eps: float, images: int, name: str, threads: int) -> None:
    """One attack in a process of its own."""
    set_quiet(True)
    data = DataConfig(source="fashion-mnist", evaluation=images)
    prepared = prepare(ModelRunConfig(model=ModelConfig(path=path), data=data, threads=threads))
    model, split = prepared.model, prepared.splits.evaluation
    plan = resolve_plan(ThreatConfig(eps=eps), "fashion-mnist")
    start, busy = time.perf_counter(), time.process_time()
    robust = theirs(model, split, plan) if name == "pyautoattack" else ours(model, split, plan, name)
    pipe.send((robust, time.perf_counter() - start, time.process_time() - busy))


def run(path: Path, eps: float, images: int, name: str, threads: int) -> tuple[Proportion, float, float]:
    """Robust accuracy, seconds and processor seconds of one attack."""
    context = multiprocessing.get_context("spawn")
    mine, yours = context.Pipe()
    process = context.Process(target=serve, args=(yours, path, eps, images, name, threads))
    process.start()
    yours.close()
    robust, seconds, busy = mine.recv()
    process.join()
    return robust, seconds, busy


def compare(path: Path, eps: float, images: int, attacks: list[str], threads: int) -> list[dict[str, Any]]:
    """All attacks on one network at one radius, in turn; compared with the last."""
    found = {name: run(path, eps, images, name, threads) for name in attacks}
    reference, reference_seconds, reference_busy = found[attacks[-1]]
    return [
        {
            "network": path.stem,
            "eps": eps,
            "attack": name,
            "robust": robust.as_dict(),
            "seconds": seconds,
            "cpu_seconds": busy,
            "points_above": 100 * (robust.value - reference.value),
            "share_of_time": seconds / reference_seconds,
            "share_of_cpu_time": busy / reference_busy,
        }
        for name, (robust, seconds, busy) in found.items()
    ]


def main() -> None:
    """Run all, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", type=Path)
    parser.add_argument("--bundle", nargs="+", type=Path, default=[])
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--eps", default="0.05,0.1")
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="some of them; shares of time need pyautoattack")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    threads = usable_threads(arguments.threads)
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    for bundle in arguments.bundle:
        rows.append(expert(bundle, arguments.n, threads))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.networks:
        print(f"| {' | '.join(HEADER)} |")
        print("| --- " * len(HEADER) + "|")
    for path in arguments.networks:
        for eps in map(float, arguments.eps.split(",")):
            for row in compare(path, eps, arguments.n, arguments.attacks.split(","), threads):
                rows.append(row)
                share = Proportion(row["robust"]["correct"], row["robust"]["total"])
                print(
                    f"| {row['network']} | {eps:g} | {row['attack']} | {share} | {row['seconds']:.1f} | "
                    f"{row['points_above']:+.2f} | {row['share_of_time']:.3f} | "
                    f"{row['share_of_cpu_time']:.3f} |",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"rows": rows, "environment": environment_record(threads)}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
