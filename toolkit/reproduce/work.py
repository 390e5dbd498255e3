"""Doing a step: training, pruning, writing an integer graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolkit.artifacts import ModelSpec, Normalized, Splits, TorchModel, weights_digest
from toolkit.attacks.threat import PgdPlan, ThreatModel
from toolkit.bundle import sha256
from toolkit.config import ExportConfig, PruneConfig, QuantizeConfig, TrainConfig
from toolkit.errors import ToolkitError
from toolkit.evaluators.cost import integer_coverage
from toolkit.evaluators.fake_quantised import RangeRecorder, fake_quantise
from toolkit.exporters.onnx import export_onnx
from toolkit.exporters.quantize import quantize_int8
from toolkit.exporters.ranges import Interval
from toolkit.models.checkpoint import save_checkpoint
from toolkit.models.loading import assemble, read_model_file
from toolkit.models.registry import build_network
from toolkit.prepare import fix_seeds
from toolkit.pruning import prune
from toolkit.reproduce.pretrained import read_pretrained
from toolkit.reproduce.recipes import plan_of
from toolkit.reproduce.steps import FLOAT_GRAPH, INTEGER_GRAPH, MODEL, Step
from toolkit.reproduce.store import TRAINING, WEIGHTS, Store
from toolkit.reproduce.world import World
from toolkit.training.loop import train
from toolkit.training.qat import LearntRanges, Rounding, graph_ranges, simulate


@dataclass(frozen=True)
class Bench:
    """What every step works with."""

    store: Store
    world: World
    splits: Splits
    """Of the step's seed."""
    pretrained: Path | None = None
    """The standard network, where the user brings it."""

    def model(self, step: Step) -> TorchModel:
        """The network that came of a step.

        Raises:
            ToolkitError: the file is damaged, or of another training, as where folders filled apart are joined.
        """
        source = self.world.source
        model = assemble(
            read_model_file(self.store.folder(step) / MODEL),
            arch=None,
            class_names=source.train.class_names,
            input_shape=source.train.shape,
            normalization=source.normalization_hint,
            dataset=source.name,
        )
        self._check(step, MODEL, weights_digest(model.network))
        return model

    def graph(self, step: Step) -> Path:
        """The integer graph that came of a step.

        Raises:
            ToolkitError: the file is of another run.
        """
        path = self.file(step, INTEGER_GRAPH)
        self._check(step, INTEGER_GRAPH, sha256(path))
        return path

    def _check(self, step: Step, name: str, digest: str) -> None:
        known = self.store.weights(step)
        if known is not None and known != digest:
            raise ToolkitError(
                "a network in the work folder is not the one that its step's result tells of",
                found=f"{self.file(step, name)}, {step.label}",
                fix="remove this file; the network is then made again where it is needed",
            )

    def simulated(self, step: Step, rounding: Mapping[str, Any]) -> TorchModel:
        """The same with weights and activations rounded, all of a tensor in one grid, as the paper simulates integers.

        Args:
            step: the step.
            rounding: bits, and whether the ranges are those that the step's own training recorded.

        A network whose training rounded is rounded as it was at the end of that.
        """
        if step.kind == "qat":
            return simulate(self.model(step), self._learnt(step))
        ranges = None
        if rounding["recorded"]:
            recorded = (self.store.result(step) or {})["ranges"]
            ranges = {name: (float(low), float(high)) for name, (low, high) in recorded.items()}
        return fake_quantise(
            self.model(step),
            self.splits.calibration,
            weight_bits=rounding["bits"],
            activation_bits=rounding["bits"],
            per_channel=False,
            margin=self.margin,
            ranges=ranges,
        )

    def rounding(self, step: Step) -> Rounding:
        """To what the training of a step of the kind `qat` rounds."""
        bits = step.settings["bits"]
        grid = step.settings["per_channel"], step.settings.get("extremes", False)
        return Rounding(bits, bits, self.margin, *grid)

    def learnt_ranges(self, step: Step, model: TorchModel, fp32: Path) -> dict[str, Interval]:
        """What a training that rounded learnt, by the tensors of its network's float graph; of another, nothing.

        Args:
            step: the training.
            model: its network.
            fp32: that one's float graph.
        """
        if step.kind != "qat":
            return {}
        return graph_ranges(model, self._learnt(step), fp32, self.splits.calibration)

    def _learnt(self, step: Step) -> LearntRanges:
        ends = (self.store.result(step) or {})["learnt"]
        pairs = {name: tuple((float(low), float(high)) for low, high in calls) for name, calls in ends.items()}
        return LearntRanges(self.rounding(step), pairs)

    @property
    def margin(self) -> float:
        """By how much the paper's attacked pixels leave [0, 1]; quantisers of pixels represent them."""
        return plan_of("pgd-paper", self.world.experiment).threat.margin(self.world.source.normalization_hint)

    def file(self, step: Step, name: str) -> Path:
        """One of a step's files."""
        return self.store.folder(step) / name


def read_plan(values: list[Any] | None) -> PgdPlan | None:
    """The plan in a step's settings."""
    if values is None:
        return None
    record, steps, step_size, random_start = values
    threat = ThreatModel(record["norm"], record["eps"], record["space"], record["clip"])
    return PgdPlan(record["preset"], threat, steps, step_size, random_start)


def do_training(step: Step, bench: Bench) -> dict[str, Any]:
    """Train from scratch, or go on with a parent's network.

    The ranges of its activations are recorded meanwhile; a quantisation-aware training learns its own.
    """
    settings = step.settings
    start = bench.model(step.parents[0]) if step.parents else _fresh(settings["network"], settings["seed"], bench)
    teacher = bench.model(step.parents[1]) if len(step.parents) > 1 else None
    rounding = bench.rounding(step) if step.kind == "qat" else None
    recorder = RangeRecorder(start) if rounding is None else None
    result = train(
        start,
        bench.splits.train,
        bench.splits.validation,
        TrainConfig.model_validate(settings["config"]),
        read_plan(settings["plan"]),
        seed=settings["seed"],
        label=step.label,
        checkpoint=bench.file(step, TRAINING),
        resume="or anew",
        teacher=teacher,
        rounding=rounding,
        observer=recorder,
    )
    return {
        **_kept(result.model, step, bench),
        **({"ranges": recorder.state()} if recorder else {}),
        **({"learnt": result.learnt.ends} if result.learnt else {}),
        "kept_epoch": result.best_epoch,
        "epochs": [record.to_list() for record in result.epochs],
        "precision": result.precision,
        "threads": torch.get_num_threads(),
        "images": len(bench.splits.train),
        "parameters": sum(parameter.numel() for parameter in result.model.network.parameters()),
    }


def _kept(model: TorchModel, step: Step, bench: Bench) -> dict[str, str]:
    """Write the step's network, which takes its place when the step is finished; the digest of its weights."""
    save_checkpoint(model, bench.store.unfinished(step, MODEL), home=bench.store.folder(step))
    return {WEIGHTS: weights_digest(model.network)}


def do_loading(step: Step, bench: Bench) -> dict[str, Any]:
    """Keep a copy of the network that the user brings."""
    assert bench.pretrained is not None  # without, no step is of this kind
    model = read_pretrained(bench.pretrained, step.settings["network"], bench.world, bench.splits)
    return {
        **_kept(model, step, bench),
        "parameters": sum(parameter.numel() for parameter in model.network.parameters()),
    }


def _fresh(architecture: str, seed: int, bench: Bench) -> TorchModel:
    source = bench.world.source
    fix_seeds(seed)
    network = build_network(architecture, len(source.train.class_names), source.train.shape)
    hint = source.normalization_hint
    spec = ModelSpec(architecture, source.train.class_names, source.train.shape, hint, source.name)
    return TorchModel(Normalized(network, hint).eval(), spec)


def do_pruning(step: Step, bench: Bench) -> dict[str, Any]:
    """Remove filters from the parent's network."""
    model, settings = bench.model(step.parents[0]), dict(step.settings)
    whole = {}
    if settings.pop("layers", "all") == "convolutions":
        whole = {name: 0.0 for name, layer in model.network.named_modules() if isinstance(layer, nn.Linear)}
    result = prune(model, PruneConfig.model_validate({**settings, "ratios": whole}))
    return {
        **_kept(result.model, step, bench),
        "parameters": [result.parameters_before, result.parameters_after],
        "widths": {layer.name: [layer.before, layer.after] for layer in result.layers},
    }


def do_integer(step: Step, bench: Bench) -> dict[str, Any]:
    """Write the parent's network as a float and as an integer ONNX graph, and prove that integers run."""
    model = bench.model(step.parents[0])
    fp32 = export_onnx(model, bench.file(step, FLOAT_GRAPH), ExportConfig())
    config = QuantizeConfig(int8=True, per_channel=step.settings["per_channel"], calibrate=step.settings["calibrate"])
    path = bench.store.unfinished(step, INTEGER_GRAPH)
    ranges = bench.learnt_ranges(step.parents[0], model, fp32.path)
    made = quantize_int8(fp32, path, bench.splits.calibration, config, input_margin=bench.margin, ranges=ranges)
    coverage = integer_coverage(path)
    return {
        WEIGHTS: sha256(path),
        **({"learnt_ranges": made.learnt_ranges} if ranges else {}),
        "integer_coverage": coverage.share,
        "kernel_time_share_integer": coverage.kernel_time_share_integer,
        "bytes": {FLOAT_GRAPH: fp32.path.stat().st_size, INTEGER_GRAPH: path.stat().st_size},
        "parameters": sum(parameter.numel() for parameter in model.network.parameters()),
    }
