"""`toolkit harden --dry-run`: what would be done, and for about how long."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from toolkit import bundle
from toolkit.artifacts import TorchModel
from toolkit.attacks.ensemble import compose
from toolkit.attacks.surrogate import Surrogate, resolve_precision
from toolkit.config import HardenConfig, QuantizeConfig
from toolkit.evaluators.judge import images_of
from toolkit.evaluators.portability import IMAGES
from toolkit.evaluators.probes import PROBED_IMAGES, RADII, STEPS
from toolkit.exporters.engine import float_layers
from toolkit.exporters.onnx import export_onnx, load_onnx
from toolkit.exporters.session import check_provider
from toolkit.graphs import with_rounding
from toolkit.paths import refuse_inputs
from toolkit.pipeline import BASELINE_IMAGES, check_settings, resolve
from toolkit.prepare import PreparedAttack, inputs_of, load_teacher, prepare_attack, warn_of_unused
from toolkit.pruning import prune
from toolkit.training.losses import cost_per_image
from toolkit.training.sites import find_sites

QUERY_COST = 0.3
"""Of a query in gradients."""
NEAR_SHARE = 0.03
"""Of the images, about, that short attacks bring near the boundary, so that long ones follow: 1 % to 4 % of 10,000."""
SEARCH_S = 60.0
"""Of the widths that are fastest, or the layers, about."""
PROBES = sum(STEPS) + len(RADII) + 1
"""Attacks with the plan's number of steps that the probes amount to."""


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """What a stage would do, and for about how long."""

    text: str
    seconds: float


def dry_run(config: HardenConfig, output: Path, *, force: bool = False, resume: bool = False) -> list[PlannedStep]:
    """What `harden` would do; loads and checks everything that `harden` does, writes nothing."""
    check_settings(config)
    check_provider(config.benchmark.provider)
    if force:
        refuse_inputs(output, inputs_of(config))
    warn_of_unused(config.finetune)
    bundle.check_output(output, force=force, resume=resume)
    prepared = prepare_attack(config)
    load_teacher(config.finetune, prepared.model.spec, prepared.splits, config.model)
    config = resolve(config, prepared)
    pruned = prune(prepared.model, with_rounding(config.prune, None))
    if config.finetune.qat:
        find_sites(pruned.model)
    if config.quantize.int8 and (config.quantize.keep_float or config.quantize.keep_float_here):
        with tempfile.TemporaryDirectory() as folder:
            path = export_onnx(prepared.model, Path(folder) / "float.onnx", config.export).path
            float_layers(load_onnx(path), config.quantize, path)
    gradient, forward = (seconds_per_image(model, config) for model in (prepared.model, pruned.model))
    tuning, evaluated = config.finetune, len(prepared.splits.evaluation)
    images = tuning.epochs * len(prepared.splits.train)
    baseline = prepared.plan.steps * prepared.plan.restarts * min(BASELINE_IMAGES, evaluated)
    estimates = {
        f"prune      {config.prune.ratio:g} of the filters per {config.prune.scope}: "
        f"{pruned.parameters_before:,} -> {pruned.parameters_after:,} parameters": SEARCH_S
        if config.prune.round_to == "auto"
        else 1.0,
        f"fine-tune  {tuning.objective}, {tuning.epochs} epoch(s) of {len(prepared.splits.train):,} images"
        f"{', quantisation-aware' if tuning.qat else ''}": images * cost_per_image(tuning) * forward,
        f"export     opset {config.export.opset}, parity, end-to-end graph": 5.0,
        f"quantise   {_calibration_text(config.quantize)}": _quantising(config, prepared, forward),
        f"evaluate   PGD-{prepared.plan.steps} on all surrogates, {config.attack.attacks}; {evaluated:,} images": (
            gradients(config, prepared, evaluated) * forward + baseline * gradient
        ),
        f"elsewhere  labels without VNNI, optimisation, under other opsets; {min(IMAGES, evaluated)} images": (
            5.0 + prepared.plan.steps * min(IMAGES, evaluated) * forward
        ),
        f"benchmark  {config.benchmark.provider}, batches {', '.join(map(str, config.benchmark.batches))}": 15.0,
    }
    return [PlannedStep(text, seconds) for text, seconds in estimates.items()]


def _quantising(config: HardenConfig, prepared: PreparedAttack, forward: float) -> float:
    """Seconds: a search of layers or methods attacks validation images first."""
    how, plan = config.quantize, prepared.plan
    if not how.int8 or not (how.searches or how.calibrate == "auto"):
        return 2.0
    return SEARCH_S + images_of(prepared.splits.validation) * plan.steps * plan.restarts * forward


def gradients(config: HardenConfig, prepared: PreparedAttack, images: int) -> float:
    """How many gradients of the float network the evaluation costs, about: the matrix, further attacks, the probes."""
    plan = prepared.plan
    int8 = config.quantize.int8
    surrogates, chosen, graphs = (6, 3, 2) if int8 else (2, 1, 1)  # those that round cost twice as much
    passes = compose(config.attack.attacks, len(prepared.model.spec.class_names), plan.threat.norm)
    further = 0.0
    for how in passes:
        if how.where_masked:
            continue
        share = NEAR_SHARE if how.near else 1.0
        made_on = QUERY_COST * graphs if how.by_queries else surrogates if how.everywhere else chosen
        further += how.steps * how.copies * share * made_on
    probes = PROBES * plan.steps * min(PROBED_IMAGES, images)
    return images * (surrogates * plan.steps * plan.restarts + further) + probes


def _calibration_text(config: QuantizeConfig) -> str:
    further = f"; files for {', '.join(config.targets)}" if config.targets else ""
    if not config.int8:
        return f"not asked for{further}"
    attacked = f", {config.calibrate_adversarial:.0%} of the images attacked" if config.calibrate_adversarial else ""
    engine = "" if config.engine == "ort" else f" by {config.engine}"
    wide = f", activations of {config.activation_bits} bits" if config.activation_bits != 8 else ""
    narrow = f", linear layers' weights of {config.weight_bits} bits" if config.weight_bits != 8 else ""
    return f"int8{engine}{wide}{narrow}, {config.calibrate}{attacked}{further}"


def seconds_per_image(model: TorchModel, config: HardenConfig) -> float:
    """Measured: one gradient with respect to the image, per image."""
    spec, precision = model.spec, resolve_precision(config.finetune.precision)
    surrogate = Surrogate(model.module, spec.normalization, precision, input_shape=spec.input_shape)
    images = torch.rand(64, *model.spec.input_shape)
    labels = torch.zeros(64, dtype=torch.int64)
    surrogate.gradient(images, labels)
    start = time.perf_counter()
    surrogate.gradient(images, labels)
    surrogate.gradient(images, labels)
    return (time.perf_counter() - start) / 128
