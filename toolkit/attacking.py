"""`toolkit attack`: the evidence of robustness of a checkpoint, a bundle, or anybody's ONNX file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from toolkit import bundle
from toolkit.artifacts import ModelSpec, Normalization, Splits, TorchModel
from toolkit.attacks.ensemble import compose
from toolkit.attacks.threat import PgdPlan, resolve_plan
from toolkit.config import AttackRunConfig, HardenConfig, PrecisionChoice, ThreatConfig, override_threat
from toolkit.data.pixels import PixelStatistics, differences, statistics_in
from toolkit.data.sources import DataSource, check_fits, load_source
from toolkit.data.splits import make_splits
from toolkit.errors import ToolkitError
from toolkit.evaluators.environment import environment_record
from toolkit.evaluators.evaluation import Clock, Conditions
from toolkit.evaluators.image_files import Gallery
from toolkit.evaluators.journal import default_folder
from toolkit.exporters.interface import FIX, GraphInterface, read_interface
from toolkit.exporters.onnx import own_metadata, read_metadata
from toolkit.exporters.precision import float_weights
from toolkit.exporters.session import OnnxPredictor
from toolkit.file_threat import normalization_inside, threat_of_file
from toolkit.input_form import refuse_wrong_input
from toolkit.lineup import Lineup
from toolkit.metadata import data_set_of, metadata_value
from toolkit.prepare import channel_values, prepare, set_threads
from toolkit.progress import warn
from toolkit.reports.evidence import robust_accuracy, robustness_parts
from toolkit.reports.schema import AttackReport, Share, Threat

ATTACKED = (bundle.CHECKPOINT, bundle.FLOAT_TWIN, bundle.DEPLOYED)
"""The files of a bundle that an attack loads."""


@dataclass(frozen=True)
class _Scene:
    """Everything that an attack needs to know of what it attacks."""

    lineup: Lineup
    splits: Splits
    source: DataSource
    plan: PgdPlan
    normalization: Normalization
    precision: PrecisionChoice
    threads: int


def attack(
    config: AttackRunConfig,
    target: Path | None = None,
    *,
    resume: bool = False,
    gallery: Path | None = None,
    journals: Path | None = None,
    probes: bool = True,
) -> AttackReport:
    """Attack a network or a graph, and say what is left of its accuracy.

    Args:
        config: `config.model.path` is a checkpoint, a bundle, or an ONNX file. Of a bundle, model.pt, its
            fake-quantised form and the deployed graph's twin are attacked, and all its graphs judge; of a file, its
            twin.
        target: an ONNX file made from the checkpoint, to be scored as `deployed`.
        resume: go on from what an interrupted run with the same settings kept; without one, start anew with a warning.
        gallery: a folder for attacked images that fool the graph that counts, as PNG files.
        journals: a folder for what is done so far; None: the user's cache.
        probes: whether the steps and radii of attacks are varied too.

    Raises:
        ToolkitError: bad input.
    """
    start = time.monotonic()
    clock = Clock(config.budget)
    given = config.threat.norm if "norm" in config.threat.model_fields_set else None  # else the bundle or file says it
    compose(config.attack.attacks, classes=2, norm=given)
    kept = Gallery(gallery, fresh=not resume)
    if resume and gallery is not None:
        warn("--resume: attacked images of parts that are kept from before are not written again")
    model = config.model.path
    if model.is_dir():
        config, scene = _of_bundle(config, target)
    elif model.suffix.lower() == ".onnx":
        scene = _of_file(config, target)
    else:
        scene = _of_checkpoint(config, target)
    evaluation = scene.splits.evaluation
    refuse_wrong_input(scene.lineup.targets, evaluation)
    conditions = Conditions(
        scene.plan,
        scene.normalization,
        config.seed,
        passes=compose(config.attack.attacks, len(scene.source.train.class_names), scene.plan.threat.norm),
        precision=scene.precision,
        probes=probes,
    )
    folder = journals or default_folder()
    if resume and not scene.lineup.journal(evaluation, conditions, folder).is_file():
        warn("--resume: nothing is kept of a run with these settings, files and images, so it starts anew")
    found = scene.lineup.examine(evaluation, conditions, journals=folder, resume=resume, clock=clock, gallery=kept)
    plan, robustness = scene.plan, found.robustness
    return AttackReport(
        target=model.name,
        data=scene.source.name,
        images=len(evaluation),
        threat=Threat(**plan.record()),
        steps=plan.steps,
        step_size=plan.step_size,
        restarts=plan.restarts,
        random_start=plan.random_start,
        seed=config.seed,
        budget=config.budget,
        seconds=time.monotonic() - start,
        accuracy={name: Share.of(share) for name, share in robustness.clean.items()},
        robust_accuracy=robust_accuracy(found),
        clipped_share=robustness.clipped_share,
        environment=environment_record(scene.threads),
        **robustness_parts(found, plan, config.attack.attacks),
    )


def _of_checkpoint(config: AttackRunConfig, target: Path | None) -> _Scene:
    prepared = prepare(config)
    model = prepared.model
    lineup = Lineup().with_network("float", model).with_target("torch", model)
    if target is not None:
        lineup = lineup.with_deployed(target, model.spec.class_names, input_shape=model.spec.input_shape)
        _check_same(cast("OnnxPredictor", lineup.targets["deployed"]), model, target)
    plan = resolve_plan(config.threat, prepared.source.threat_key)
    return _Scene(lineup, prepared.splits, prepared.source, plan, model.spec.normalization, "auto", prepared.threads)


def _of_bundle(config: AttackRunConfig, target: Path | None) -> tuple[AttackRunConfig, _Scene]:
    folder = config.model.path
    if target is not None:
        raise ToolkitError(
            "a bundle brings its own targets",
            found=f"{folder} and --target {target}",
            fix=f"name {folder / bundle.CHECKPOINT} as the model, or leave --target away",
        )
    report = bundle.read_report(folder)
    saved = bundle.read_config(folder)
    changed = [found.file for found in bundle.verify_files(folder) if not found.passed and found.file in ATTACKED]
    if changed:
        warn(
            f"{', '.join(changed)} of {folder} differs from the bundle's manifest: the report's claims are of another "
            "file (`toolkit verify` checks them)"
        )
    config = with_bundle_settings(config, folder, saved)
    prepared = prepare(config)
    model, names = prepared.model, prepared.model.spec.class_names
    plan = resolve_plan(config.threat, prepared.source.threat_key)
    integer = report.quantization.engine != "none"
    lineup = Lineup().with_network("float", model).with_target("torch", model)
    lineup = lineup.with_float_twin(folder / bundle.FLOAT_TWIN)
    lineup = lineup.with_deployed(folder / bundle.DEPLOYED, names, twin=integer)
    if integer:
        lineup = lineup.with_fake_quantised(
            model,
            prepared.splits.calibration,
            per_channel=saved.quantize.per_channel,
            activation_bits=saved.quantize.activation_bits,
            weight_bits=saved.quantize.int8_bits,
            margin=plan.threat.margin(model.spec.normalization),
            float_weights=float_weights(folder / bundle.FLOAT_TWIN, folder / bundle.DEPLOYED),
        )
    precision = saved.finetune.precision
    scene = _Scene(
        lineup, prepared.splits, prepared.source, plan, model.spec.normalization, precision, prepared.threads
    )
    return config, scene


def _of_file(config: AttackRunConfig, target: Path | None) -> _Scene:
    path = config.model.path
    if target is not None:
        raise ToolkitError(
            "an ONNX file is its own target",
            found=f"{path} and --target {target}",
            fix=f"leave --target away, or name the checkpoint that {target} was made from as the model",
        )
    threads = set_threads(config.threads)
    metadata = own_metadata(read_metadata(path))
    wanted = config.data.source or data_set_of(metadata)
    if wanted is None:
        raise ToolkitError(
            "the file does not say what data set it is for",
            found=str(path),
            fix="name it with --data: sample, fashion-mnist, cifar10, folder:DIR or npz:FILE",
        )
    interface = read_interface(path, normalization=_outside_normalization(config, metadata))
    size = config.data.size or (interface.input_shape[1] if wanted.startswith("folder:") else None)
    source = load_source(config.data.model_copy(update={"source": wanted, "size": size}))
    spec = _spec_of_file(path, interface, source, metadata)
    check_fits(source, spec)
    names = source.train.class_names
    lineup = Lineup().with_deployed(path, names, interface=interface, input_shape=source.train.shape)
    plan = resolve_plan(threat_of_file(config.threat, metadata), source.threat_key)
    splits = make_splits(source, config.data, config.seed)
    trained_on = statistics_in(metadata)
    unlike = differences(PixelStatistics.of(splits.train), trained_on) if trained_on else ()
    if config.data.source is None and unlike:
        warn(f"{wanted} does not look like the images that the file was made for: {'; '.join(unlike)}")
    return _Scene(lineup, splits, source, plan, spec.normalization, "auto", threads)


def _outside_normalization(config: AttackRunConfig, metadata: Mapping[str, str]) -> Normalization | None:
    """What the user says is to be done to pixels before the graph gets them."""
    mean, std = config.model.mean, config.model.std
    if mean is None and std is None:
        return None
    if "normalization" in metadata:
        warn("the file says that its normalisation is inside it, so --mean and --std are ignored")
        return None
    channels = max(len(mean or ()), len(std or ()))
    return Normalization(
        channel_values("mean", mean or (0.0,), channels), channel_values("std", std or (1.0,), channels)
    )


def _spec_of_file(path: Path, interface: GraphInterface, source: DataSource, metadata: Mapping[str, str]) -> ModelSpec:
    """What the file takes and gives, with the data's words where the file has none."""
    names = source.train.class_names
    if "class_names" in metadata:
        names = metadata_value(metadata, "class_names", lambda own: tuple(map(str, own)))
    fits = all(size in (None, given) for size, given in zip(interface.input_shape, source.train.shape, strict=True))
    classes = _try_out(path, interface, source) if fits else interface.classes or len(names)
    if len(names) != classes:  # no names, or names of something else: numbers, so that the counts are compared
        names = tuple(f"class {number}" for number in range(classes))
    normalization = normalization_inside(metadata) or interface.normalization or source.normalization_hint
    channels, height, width = (
        wanted or found for wanted, found in zip(interface.input_shape, source.train.shape, strict=True)
    )
    return ModelSpec("onnx", names, (channels, height, width), normalization, source.name)


def _try_out(path: Path, interface: GraphInterface, source: DataSource) -> int:
    """The number of logits that the file gives for an image of the data's size.

    Raises:
        ToolkitError: it cannot be run on such an image, or what it gives is not [n, classes].
    """
    predictor = OnnxPredictor(path, interface=interface)
    shape = source.train.shape
    try:
        logits = predictor.predict(torch.zeros(2, *shape))
    except ToolkitError:
        raise
    except Exception as error:  # ONNX Runtime's exception classes share no base of their own
        raise ToolkitError(
            "the ONNX file cannot be run on the images",
            found=f"{path} on images {list(shape)} of {source.name}: {str(error).splitlines()[0][:200]}",
            fix="name the data that it is for with --data, and the size of a folder's images with --size",
        ) from error
    if logits.ndim != 2 or len(logits) != 2:
        raise ToolkitError(
            "the ONNX file is no classifier",
            found=f"{path}: output '{interface.output_name}' of two images is {list(logits.shape)}",
            fix=FIX,
        )
    return logits.shape[1]


def with_bundle_settings(config: AttackRunConfig, folder: Path, saved: HardenConfig) -> AttackRunConfig:
    """The bundle's own images, seed and threat model, where the user set none."""
    given = {name: getattr(config.threat, name) for name in config.threat.model_fields_set}
    changes: dict[str, object] = {
        "model": config.model.model_copy(update={"path": folder / bundle.CHECKPOINT}),
        "threat": ThreatConfig(**override_threat(saved.threat.model_dump(), given)),
    }
    if config.data.source is None:
        own = {name: getattr(config.data, name) for name in config.data.model_fields_set}
        changes["data"] = saved.data.model_copy(update=own)
    if "seed" not in config.model_fields_set:
        changes["seed"] = saved.seed  # it chose the evaluation images
    return config.model_copy(update=changes)


def _check_same(predictor: OnnxPredictor, model: TorchModel, path: Path) -> None:
    shape, classes = predictor.input_shape, predictor.interface.classes
    fits = all(size in (None, wanted) for size, wanted in zip(shape, model.spec.input_shape, strict=True))
    if not fits or classes != len(model.spec.class_names):
        raise ToolkitError(
            "the target is no form of the model",
            found=f"{path}: images {list(shape)}, {classes} classes; the model: {list(model.spec.input_shape)}, "
            f"{len(model.spec.class_names)} classes",
            fix="name an ONNX file that was made from this model with --target",
        )
