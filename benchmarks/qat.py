"""Quantisation-aware fine-tuning against quantisation after the same fine-tuning: same network, seed and epochs.

    python benchmarks/qat.py int8 [--epochs 4] [--ratio 0.5] --work DIR
    python benchmarks/qat.py simulated --bits 4 [--epochs 6] [--ratio 0.875] [--images 8000] [--n 1000] --work DIR

`int8`: the shipped network on Fashion-MNIST, pruned and fine-tuned adversarially under the preset `paper`; the two
integer ONNX graphs are judged by clean images, PGD-20 and `--attacks`, made on the float network and on the graph's own
twin. `simulated`: ResNet-18, pruned before it is trained so that a small machine can, on some of the training images,
under the preset `pixel`; the networks are simulated with `--bits` of weights and activations (pixels too) and attacked
by PGD-20 through their own straight-through rounding and on the float network. Quantisation after training is tried
with the least and largest values that calibration images cause, and with the ranges of least squared error. A run that
is cut short goes on where it stopped: networks and figures are in `--work`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from toolkit.artifacts import ModelSpec, Normalized, Split, TorchModel
from toolkit.attacks.ensemble import compose
from toolkit.config import ExportConfig, HardenConfig, QuantizeConfig, TrainConfig, build
from toolkit.evaluators.environment import environment_record
from toolkit.evaluators.evaluation import Conditions
from toolkit.evaluators.fake_quantised import fake_quantise
from toolkit.evaluators.robustness import Robustness, evaluate_robustness
from toolkit.evaluators.saturation_emulation import twin_of_session
from toolkit.evaluators.surrogate import twin_model
from toolkit.exporters.onnx import export_onnx
from toolkit.exporters.quantize import Quantizer
from toolkit.exporters.ranges import Interval
from toolkit.exporters.session import OnnxPredictor
from toolkit.models.checkpoint import save_checkpoint
from toolkit.models.loading import assemble, read_model_file
from toolkit.models.registry import build_network
from toolkit.prepare import PreparedAttack, prepare_attack
from toolkit.pruning import prune
from toolkit.training.loop import train
from toolkit.training.qat import LearntRanges, Rounding, fit, graph_ranges, prepare, simulate, split_state

ARMS = ("ptq", "qat")


def percent(ratio: float) -> str:
    """For names of files, whose ending begins at their last dot."""
    return f"{100 * ratio:g}".replace(".", "_")


def tuned(
    student: TorchModel,
    prepared: PreparedAttack,
    images: Split,
    config: TrainConfig,
    rounding: Rounding | None,
    place: Path,
    seed: int,
) -> tuple[TorchModel, LearntRanges | None, float | None]:
    """The fine-tuned network, its learnt ranges and the seconds of its training; made once."""
    network, ranges = place.with_suffix(".pt"), place.with_suffix(".json")
    if not ranges.is_file():
        start = time.perf_counter()
        made = train(
            student,
            images,
            prepared.splits.validation,
            config,
            prepared.plan,
            seed=seed,
            label=place.name,
            checkpoint=place.with_suffix(".partial"),
            resume=True,
            rounding=rounding,
        )
        save_checkpoint(made.model, network)
        learnt = made.learnt and {name: list(ends) for name, ends in made.learnt.ends.items()}
        ranges.write_text(json.dumps({"seconds": time.perf_counter() - start, "ends": learnt}), encoding="utf-8")
    spec = student.spec
    model = assemble(
        read_model_file(network),
        arch=None,
        class_names=spec.class_names,
        input_shape=spec.input_shape,
        normalization=spec.normalization,
        dataset=spec.dataset,
    )
    kept = json.loads(ranges.read_text(encoding="utf-8"))
    if rounding is None:
        return model, None, kept["seconds"]
    ends: dict[str, tuple[Interval, ...]] = {
        name: tuple((low, high) for low, high in calls) for name, calls in kept["ends"].items()
    }
    return model, LearntRanges(rounding, ends), kept["seconds"]


def figures(found: Robustness, target: str) -> dict[str, Any]:
    """Clean and robust accuracy of one graph."""
    return {
        "clean": found.clean[target].as_dict(),
        "pgd": {cell.surrogate: cell.robust.as_dict() for cell in found.transfers if cell.target == target},
        "worst_case": found.worst_case[target].as_dict(),
    }


def prepared_for(arguments: argparse.Namespace, threat: str) -> PreparedAttack:
    """Data and threat model; the model is the shipped network."""
    values = {
        "model": {"path": "shipped:cnn8"},
        "data": {"source": "fashion-mnist"},
        "threat": {"preset": threat},
        "seed": arguments.seed,
        "threads": arguments.threads,
    }
    return prepare_attack(build(HardenConfig, values))


def int8(arguments: argparse.Namespace) -> dict[str, Any]:
    """The integer graphs of both arms."""
    prepared = prepared_for(arguments, "paper")
    splits, plan = prepared.splits, prepared.plan
    config = HardenConfig.model_validate({"model": {"path": "x"}, "prune": {"ratio": arguments.ratio}}).prune
    student = prune(prepared.model, config).model
    normalization = student.spec.normalization
    margin, training = plan.threat.margin(normalization), TrainConfig(epochs=arguments.epochs)
    rows: dict[str, Any] = {"threat": plan.record(), "steps": plan.steps, "images": len(splits.train)}
    for arm in ARMS:
        rounding = Rounding(margin=margin) if arm == "qat" else None
        place = arguments.work / f"int8-{arm}-{percent(arguments.ratio)}-{arguments.epochs}-{arguments.seed}"
        model, learnt, seconds = tuned(student, prepared, splits.train, training, rounding, place, arguments.seed)
        fp32 = export_onnx(model, place.with_suffix(".fp32.onnx"), ExportConfig())
        ranges = graph_ranges(model, learnt, fp32.path, splits.calibration) if learnt else {}
        quantizer = Quantizer(fp32, splits.calibration, QuantizeConfig(int8=True), input_margin=margin, ranges=ranges)
        path = quantizer.write(place.with_suffix(".int8.onnx")).model.path
        found = evaluate_robustness(
            {"float": model, "twin": twin_model(twin_of_session(path), model.spec.class_names)},
            {"fp32": OnnxPredictor(fp32.path), "deployed": OnnxPredictor(path)},
            splits.evaluation.first(arguments.n),
            Conditions(plan, normalization, arguments.seed, compose(arguments.attacks, 10, plan.threat.norm)),
        )
        rows[arm] = {
            "seconds": seconds,
            "best_epoch": model.spec.training[-1]["best_epoch"],
            "learnt_ranges": len(ranges),
            **{target: figures(found, target) for target in ("fp32", "deployed")},
        }
    return rows


def least_squares(model: TorchModel, calibration: Split, rounding: Rounding) -> TorchModel:
    """`model` rounded after its training, with ranges of least squared error on calibration images."""
    copied = model.copy()
    switch, images = prepare(copied, rounding), next(calibration.batches(len(calibration))).images
    with torch.no_grad():
        fit(copied.network, switch, lambda: copied.module(images))
    return simulate(model, split_state(copied.network.state_dict(), rounding)[1])


def simulated(arguments: argparse.Namespace) -> dict[str, Any]:
    """The simulated networks of both arms, and the float network of the first."""
    bits = arguments.bits
    prepared = prepared_for(arguments, "pixel")
    splits, plan, spec = prepared.splits, prepared.plan, prepared.model.spec
    torch.manual_seed(arguments.seed)
    network = build_network("resnet18", len(spec.class_names), spec.input_shape)
    fresh = ModelSpec("resnet18", spec.class_names, spec.input_shape, spec.normalization, spec.dataset)
    config = HardenConfig.model_validate({"model": {"path": "x"}, "prune": {"ratio": arguments.ratio}}).prune
    pruned = prune(TorchModel(Normalized(network, spec.normalization).eval(), fresh), config)
    images, rounding = splits.train.first(arguments.images), Rounding(weight_bits=bits, activation_bits=bits)
    training = TrainConfig(epochs=arguments.epochs, ema=0.99)
    rows: dict[str, Any] = {
        "threat": plan.record(),
        "steps": plan.steps,
        "images": len(images),
        "parameters": pruned.parameters_after,
    }
    judged: dict[str, tuple[TorchModel, TorchModel]] = {}
    for arm in ARMS:
        kind = bits if arm == "qat" else "float"  # before it is rounded, the same for any number of bits
        setting = f"{kind}-{percent(arguments.ratio)}-{arguments.images}-{arguments.epochs}-{arguments.seed}"
        place = arguments.work / f"simulated-{setting}"
        how = rounding if arm == "qat" else None
        model, learnt, seconds = tuned(pruned.model, prepared, images, training, how, place, arguments.seed)
        rows[arm] = {"seconds": seconds, "best_epoch": model.spec.training[-1]["best_epoch"]}
        if learnt is not None:
            judged["qat"] = (model, simulate(model, learnt))
            continue
        judged["float"] = (model, model)
        judged["ptq, least and largest value"] = (
            model,
            fake_quantise(model, splits.calibration, weight_bits=bits, activation_bits=bits),
        )
        judged["ptq, least squared error"] = (model, least_squares(model, splits.calibration, rounding))
    for name, (model, rounded) in judged.items():
        found = evaluate_robustness(
            {"float": model} if rounded is model else {"float": model, "fake_quantised": rounded},
            {"torch": rounded},
            splits.evaluation.first(arguments.n),
            Conditions(plan, spec.normalization, arguments.seed),
        )
        rows[name] = {**rows.get(name, {}), **figures(found, "torch")}
    return rows


def show(rows: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| network | clean | PGD on the float network | PGD on its own form | worst case |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        graphs = {"": row, **row} if isinstance(row, dict) else {}
        for graph, part in graphs.items():
            if not isinstance(part, dict) or "worst_case" not in part:
                continue
            own = next((part["pgd"][key] for key in ("twin", "fake_quantised") if key in part["pgd"]), None)
            cells = [part["clean"], part["pgd"]["float"], own, part["worst_case"]]
            words = ["" if cell is None else f"{cell['value']:.2%}" for cell in cells]
            lines.append(f"| {' '.join((name, graph)).strip()} | {' | '.join(words)} |")
    return "\n".join(lines)


def main() -> None:
    """Train, judge, and write the figures into `--work`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("int8", "simulated"))
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--ratio", type=float, help="of filters to prune")
    parser.add_argument("--bits", type=int, default=4, help="of simulated: weights and activations")
    parser.add_argument("--images", type=int, default=8000, help="of simulated: training images")
    parser.add_argument("--n", type=int, help="evaluation images")
    parser.add_argument("--attacks", default="apgd-ce", help="of int8: beside PGD")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="one, where other work keeps the other cores busy")
    parser.add_argument("--work", type=Path, required=True, help="a folder for networks, checkpoints and results")
    arguments = parser.parse_args()
    defaults = {"int8": (4, 0.5, 10_000), "simulated": (6, 0.875, 1000)}[arguments.what]
    for name, value in zip(("epochs", "ratio", "n"), defaults, strict=True):
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = {"int8": int8, "simulated": simulated}[arguments.what](arguments)
    kept = {key: value for key, value in vars(arguments).items() if key != "work"}
    record = {"arguments": kept, **rows, "environment": environment_record(arguments.threads)}
    name = arguments.what if arguments.what == "int8" else f"simulated-{arguments.bits}"
    (arguments.work / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(show(rows))


if __name__ == "__main__":
    main()
