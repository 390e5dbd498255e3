"""One stage alone, as the commands beside `harden` run it."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from toolkit import bundle
from toolkit.artifacts import ModelSpec, Normalized, OnnxModel, Proportion, Split, Splits, TorchModel
from toolkit.attacks.threat import resolve_plan
from toolkit.config import (
    BenchmarkConfig,
    DataConfig,
    ExportConfig,
    HardenConfig,
    ModelConfig,
    ModelRunConfig,
    PruneConfig,
    QuantizeConfig,
    ThreatConfig,
    TrainRunConfig,
)
from toolkit.data.pixels import PixelStatistics, statistics_in
from toolkit.data.sources import DataSource, load_source
from toolkit.data.splits import make_splits
from toolkit.errors import DivergedError, OutputTakenError, ToolkitError
from toolkit.evaluators.accuracy import measure_accuracy
from toolkit.evaluators.calibration_choice import choose_calibration
from toolkit.evaluators.cost import IntegerCoverage, integer_coverage
from toolkit.evaluators.debugger import Explanation, explain
from toolkit.evaluators.judge import Judge
from toolkit.evaluators.latency import LatencyRow, benchmark
from toolkit.evaluators.portability import JudgedImages, Portability, measure_portability, writer_of
from toolkit.evaluators.timing import BUSY
from toolkit.exporters.admission import refuse_bits
from toolkit.exporters.engine import QuantizedModel, Writer
from toolkit.exporters.engines import make_writer
from toolkit.exporters.onnx import export_onnx, own_metadata, read_metadata, write_metadata
from toolkit.exporters.parity import Parity, check_parity, measure_parity
from toolkit.exporters.session import OnnxPredictor
from toolkit.exporters.target_kinds import chosen_targets, target_file
from toolkit.file_threat import attack_on_float, normalization_inside, plan_of_file
from toolkit.graphs import search_rounding, with_rounding
from toolkit.input_form import refuse_wrong_input
from toolkit.locks import alone, users_lock
from toolkit.metadata import data_set_of
from toolkit.models.checkpoint import save_checkpoint
from toolkit.models.loading import SHIPPED, check_outputs
from toolkit.models.registry import build_network
from toolkit.paths import refuse_inputs
from toolkit.prepare import (
    describe,
    fix_seeds,
    inputs_of,
    load_teacher,
    prepare,
    resolved_quantize,
    set_threads,
    tell_reduced,
    warn_of_other_images,
    warn_of_unused,
)
from toolkit.progress import notice, warn
from toolkit.pruning import PruningResult, prune
from toolkit.targets import TargetMaker, TargetResult, make_beside
from toolkit.training.distributed import follows, joined
from toolkit.training.loop import train
from toolkit.training.losses import ATTACKED
from toolkit.training.records import TrainingResult

EXPLAINED_IMAGES, JUDGED_IMAGES = 512, 2000
"""Validation images of `--explain`: for the noise of tensors, and for accuracy lost."""
CHECKPOINTS = (".pt", ".pth", ".safetensors", ".ckpt", ".bin", ".tar")
"""Suffixes of files that hold weights; whatever else is to be quantised is ONNX."""


def training_checkpoint(output: Path) -> Path:
    """Where `toolkit train` keeps the state of a training under way."""
    return output.parent / f".{output.name}.partial"


def training_lock(output: Path) -> Path:
    """What a training to `output` holds, on this machine."""
    return users_lock(f"train-{hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:16]}")


def train_network(config: TrainRunConfig, output: Path, *, force: bool, resume: bool) -> TrainingResult:
    """Train a reference network from scratch and write it as a checkpoint.

    Started by torchrun, all processes train it together, and the first one writes.

    Raises:
        ToolkitError: bad input, another training to the same output, or one that diverged; `output` is then as it was
            before.
    """
    busy = ToolkitError(
        "another training is writing to this output",
        found=str(output),
        fix="wait for it, or name another file with --output",
    )
    # of several processes the one that leads has the lock
    with contextlib.nullcontext() if follows() else alone(training_lock(output), busy):
        return _train_alone(config, output, force=force, resume=resume)


def _train_alone(config: TrainRunConfig, output: Path, *, force: bool, resume: bool) -> TrainingResult:
    checkpoint = training_checkpoint(output)
    if not follows():
        _check_output(output, checkpoint, force=force, resume=resume)
        refuse_inputs(output, (config.arch, config.training.teacher, config.data.data_dir, config.data.source))
    set_threads(config.threads)
    source = load_source(config.data)
    splits = make_splits(source, config.data, config.seed)
    plan = resolve_plan(config.threat, source.threat_key) if config.training.objective in ATTACKED else None
    fix_seeds(config.seed)
    shape, classes = source.train.shape, source.train.class_names
    network = build_network(config.arch, len(classes), shape)
    spec = ModelSpec(config.arch, classes, shape, source.normalization_hint, source.name)
    model = TorchModel(Normalized(network, source.normalization_hint).eval(), spec)
    check_outputs(model, config.arch)
    warn_of_unused(config.training)
    if config.training.objective == "none" or not config.training.epochs:
        warn("nothing is trained: the network that is written has its first, random weights")
    teacher = load_teacher(config.training, spec, splits)
    with bundle.disk_errors(output), bundle.folders_above(output), joined() as world:
        try:
            result = train(
                model,
                splits.train,
                splits.validation,
                config.training,
                plan,
                seed=config.seed,
                checkpoint=checkpoint,
                resume=resume,
                teacher=teacher,
                world=world,
            )
        except ToolkitError as error:
            if world.leads and isinstance(error, DivergedError) and not resume:
                checkpoint.unlink(missing_ok=True)
            elif world.leads and checkpoint.is_file():
                error.add_note(bundle.KEPT)
            raise
        if world.leads:
            try:
                _save(result.model, output, force=force)
            except OutputTakenError:  # it is finished all the same
                checkpoint.unlink(missing_ok=True)
                raise
            checkpoint.unlink(missing_ok=True)
    return result


def _check_output(output: Path, checkpoint: Path, *, force: bool, resume: bool) -> None:
    _refuse_existing(output, force=force)
    if checkpoint.is_file() and not (resume or force):
        raise ToolkitError(
            "an interrupted training to this output can be resumed",
            found=str(checkpoint),
            fix="continue it with --resume, or discard it with --force",
        )
    if resume and not checkpoint.is_file():
        raise ToolkitError(
            "there is nothing to resume", found=f"no interrupted training beside {output}", fix="start without --resume"
        )


def _refuse_existing(output: Path, *, force: bool) -> None:
    if output.is_dir():
        raise ToolkitError("the output is a folder", found=str(output), fix="name a file with --output")
    if output.exists() and not force:
        raise ToolkitError(
            "the output exists", found=str(output), fix="name another file with --output, or replace it with --force"
        )


def _save(model: TorchModel, output: Path, *, force: bool) -> None:
    """Write beside `output` first, so that it is whole or as it was."""
    with bundle.disk_errors(output), bundle.folders_above(output):
        partial = output.with_name(f".{output.name}.tmp")
        try:
            save_checkpoint(model, partial)
            bundle.put(partial, output, force=force)
        finally:
            partial.unlink(missing_ok=True)


def prune_file(config: ModelRunConfig, how: PruneConfig, output: Path, *, force: bool) -> PruningResult:
    """Prune a network and write it as a checkpoint; where widths are to be timed, with integer graphs."""
    refuse_inputs(output, inputs_of(config))
    _refuse_existing(output, force=force)
    prepared = prepare(config)
    run = HardenConfig(**dict(config), prune=how, quantize=QuantizeConfig(int8=True))
    found = search_rounding(run, prepared.model, prepared.splits)
    if found and found.foreign_load > BUSY:
        notice(f"--round-to auto: other processes took {found.foreign_load:.0%} of the CPU time; another may be faster")
    result = prune(prepared.model, with_rounding(how, found))
    _save(result.model, output, force=force)
    return result


def export_file(config: ModelRunConfig, how: ExportConfig, output: Path, *, force: bool) -> Parity:
    """Export a network as a float ONNX file and measure its parity with torch on evaluation images."""
    refuse_inputs(output, inputs_of(config))
    _refuse_existing(output, force=force)
    prepared = prepare(config)
    partial = output.with_name(f".{output.name}.tmp")
    with bundle.disk_errors(output), bundle.folders_above(output):
        try:
            metadata = describe(prepared.model) | PixelStatistics.of(prepared.splits.train).as_metadata()
            exported = export_onnx(prepared.model, partial, how, metadata=metadata)
            parity = measure_parity(prepared.model, OnnxPredictor(exported.path), prepared.splits.evaluation)
            check_parity(parity)
            bundle.put(partial, output, force=force)
        finally:
            partial.unlink(missing_ok=True)
    return parity


@dataclass(frozen=True)
class QuantizedFile:
    """An integer file with the proof that integers run."""

    quantized: QuantizedModel
    coverage: IntegerCoverage
    parity: Parity
    explanation: Explanation | None
    """Where it was asked for."""
    accuracy: Mapping[str, Proportion]
    """Of the float file (`fp32`) and of the integer one (`deployed`) on the evaluation images."""
    bytes: Mapping[str, int]
    """The sizes of both files."""
    targets: tuple[TargetResult, ...]
    """The files for other runtimes beside it."""
    portability: Portability | None = None
    """Where it was asked for; on clean images, for the file alone has no network to attack."""
    weight_bits: int = 8
    """Of int8 weights."""


def quantize_file(
    model: ModelConfig,
    data: DataConfig,
    how: QuantizeConfig,
    output: Path,
    *,
    threat: ThreatConfig,
    seed: int,
    threads: int | None,
    force: bool,
    explained: bool = False,
    risks: bool = False,
) -> QuantizedFile:
    """Quantise a float ONNX classifier, or the network of a checkpoint, with calibration images of `data`.

    Args:
        model: an ONNX file; or a checkpoint, whose network is exported first, as `export` does.
        data: where calibration images come from, and those on which the result is compared.
        how: to quantise it, and for which other runtimes files are written beside it.
        output: the file to write.
        threat: what images may leave [0, 1] by, and what robust accuracy is judged under, where it is looked at; what
            is not set, the file's metadata or the data set's preset says.
        seed: of the choice of images.
        threads: CPU threads.
        force: replace an existing file.
        explained: say where accuracy is lost.
        risks: say what changes on other machines and under other settings.
    """
    refuse_bits(how)
    asked, how = how, resolved_quantize(how)
    tell_reduced(asked, how)
    kinds = chosen_targets(how)
    beside = {kind.name: output.with_name(target_file(output.name, kind)) for kind in kinds}
    for file in (output, *beside.values()):
        refuse_inputs(file, (model.path, model.arch, data.data_dir, data.source))
        _refuse_existing(file, force=force)
    partial = output.with_name(f".{output.name}.tmp")
    with (
        tempfile.TemporaryDirectory(prefix="toolkit-quantize-") as scratch,
        bundle.disk_errors(output),
        bundle.folders_above(output),
    ):
        try:
            network, path, source, splits = _to_quantise(model, data, Path(scratch, "float.onnx"), seed, threads)
            reference, metadata = OnnxPredictor(path), read_metadata(path)
            ours = own_metadata(metadata)
            if network is None and not ours:
                _refuse_other_input(reference, path, splits.evaluation)
            trained_on = statistics_in(ours) or PixelStatistics.of(splits.train)
            warn_of_other_images(PixelStatistics.of(splits.calibration), trained_on)
            plan = plan_of_file(threat, ours, source)
            inside = network.spec.normalization if network else normalization_inside(ours) or source.normalization_hint
            margin = plan.threat.margin(inside) if plan else 0.0
            quantizer = make_writer(
                OnnxModel(path, "fp32"), splits.calibration, how, network=network, input_margin=margin
            )
            attack = None
            if how.calibrate == "auto" or explained:
                attack = attack_on_float(path, network, source, plan, inside, seed=seed)
            if how.calibrate == "auto":
                folder = Path(scratch, "calibration")
                folder.mkdir()
                methods = choose_calibration(quantizer, folder, Judge(path, splits.validation, attack))
                quantizer = quantizer.with_calibration(methods.chosen)
            quantized = quantizer.write(partial)
            explanation = None
            if explained:
                shown, judged = (splits.validation.first(count) for count in (EXPLAINED_IMAGES, JUDGED_IMAGES))
                explanation = explain(quantizer, partial, shown, Judge(path, judged, attack))
            write_metadata(partial, metadata)
            coverage = integer_coverage(partial, image=splits.evaluation.images.shape)
            files = {"fp32": path, "deployed": partial}
            sizes = {name: file.stat().st_size for name, file in files.items()}
            predictors = {name: OnnxPredictor(file) for name, file in files.items()}
            parity = measure_parity(reference, predictors["deployed"], splits.evaluation)
            accuracy = {name: measure_accuracy(predictor, splits.evaluation) for name, predictor in predictors.items()}
            portability = _risks(partial, quantizer, splits.evaluation) if risks else None
            maker = TargetMaker(OnnxModel(path, "fp32"), splits.calibration, splits.evaluation, how, margin)
            targets = make_beside(maker, kinds, output.parent, partial.name)
            for made in targets:
                bundle.put(partial.with_name(made.file), beside[made.kind.name], force=force)
            bundle.put(partial, output, force=force)
        finally:
            for file in (partial, *(partial.with_name(target_file(partial.name, kind)) for kind in kinds)):
                file.unlink(missing_ok=True)
    targets = tuple(replace(made, file=beside[made.kind.name].name) for made in targets)
    return QuantizedFile(quantized, coverage, parity, explanation, accuracy, sizes, targets, portability, how.int8_bits)


def _to_quantise(
    model: ModelConfig, data: DataConfig, exported: Path, seed: int, threads: int | None
) -> tuple[TorchModel | None, Path, DataSource, Splits]:
    """The network, if the file is a checkpoint, its float graph (written to `exported` then), and its data."""
    path = model.path
    if path.suffix in CHECKPOINTS or str(path).startswith(SHIPPED):
        prepared = prepare(ModelRunConfig(model=model, data=data, seed=seed, threads=threads))
        metadata = describe(prepared.model) | PixelStatistics.of(prepared.splits.train).as_metadata()
        export_onnx(prepared.model, exported, ExportConfig(), metadata=metadata)
        return prepared.model, exported, prepared.source, prepared.splits
    if model.model_fields_set - {"path"}:
        raise ToolkitError(
            "an ONNX file is quantised as it is",
            found=f"{path} with what only checkpoints need: --arch, --trust-pickle, --mean or --std",
            fix="leave these flags away; a graph that wants normalised pixels is to be exported with the normalisation "
            "inside",
        )
    set_threads(threads)
    reference = OnnxPredictor(path)
    if data.source is None:
        data = data.model_copy(update={"source": data_set_of(own_metadata(read_metadata(path)))})
    source = load_source(data)
    if reference.input_shape != source.train.shape and None not in reference.input_shape:
        raise ToolkitError(
            "the file and the data set disagree in the shape of images",
            found=f"{path} takes {list(reference.input_shape)}, {source.name} has {list(source.train.shape)}",
            fix="name the data set that the network was trained on with --data (and --size)",
        )
    return None, path, source, make_splits(source, data, seed)


def _refuse_other_input(reference: OnnxPredictor, path: Path, evaluation: Split) -> None:
    """An integer graph takes float32 pixels in [0, 1]: of a float graph that wants something else it would be wrong.

    Raises:
        ToolkitError: the file takes another type, or classifies pixels in another form much better.
    """
    if reference.interface.dtype != "float32":
        raise ToolkitError(
            "the file does not take float32 images",
            found=f"{path} takes {reference.interface.dtype}",
            fix="export the network with a float32 input",
        )
    refuse_wrong_input({"fp32": reference}, evaluation)


def _risks(path: Path, quantizer: Writer, evaluation: Split) -> Portability:
    with tempfile.TemporaryDirectory(prefix="toolkit-elsewhere-") as folder:
        return measure_portability(path, JudgedImages.of(evaluation), Path(folder), writer_of(quantizer))


def benchmark_files(paths: Sequence[Path], config: BenchmarkConfig, seed: int) -> tuple[LatencyRow, ...]:
    """Time ONNX files side by side; of a bundle its two graphs. Ratios refer to the first float twin, or file."""
    files: dict[str, Path] = {}
    for path in paths:
        if path.is_dir():
            bundle.read_report(path)
            prefix = f"{path}/" if len(paths) > 1 else ""
            files[f"{prefix}fp32"] = path / bundle.FLOAT_TWIN
            files[f"{prefix}deployed"] = path / bundle.DEPLOYED
        else:
            name = path.name if path.name not in files else str(path)
            files[name] = path
    set_threads(config.threads)
    shapes = {OnnxPredictor(path).input_shape for path in files.values()}
    shape = next(iter(shapes))
    if len(shapes) > 1 or None in shape:
        raise ToolkitError(
            "the files do not take the same images",
            found=", ".join(str(list(found)) for found in shapes),
            fix="compare files of one fixed input shape",
        )
    channels, height, width = (int(size or 0) for size in shape)
    return benchmark(files, config, (channels, height, width), baseline=next(iter(files)), seed=seed)
