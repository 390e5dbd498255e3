"""From a run's configuration to its model, images and threat model, all checked against each other."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from toolkit import __version__
from toolkit.artifacts import ModelSpec, Normalization, Splits, TorchModel
from toolkit.attacks.threat import PgdPlan, resolve_plan
from toolkit.config import (
    DataConfig,
    HardenConfig,
    ModelConfig,
    ModelRunConfig,
    QuantizeConfig,
    ThreatConfig,
    TrainConfig,
)
from toolkit.data.pixels import PixelStatistics, differences
from toolkit.data.sources import DataSource, check_fits, load_source
from toolkit.data.splits import check_trained_on, make_splits, without_seen
from toolkit.errors import ToolkitError
from toolkit.evaluators.environment import usable_threads
from toolkit.evaluators.saturating_layers import saturates_here
from toolkit.exporters.session import Provider
from toolkit.models.loading import ModelFile, assemble, read_model_file, resolve_path
from toolkit.paths import public_name
from toolkit.progress import notice, warn
from toolkit.training.distributed import processes_here
from toolkit.training.losses import unused
from toolkit.training.teacher import check_teacher


@dataclass(frozen=True)
class Prepared:
    """What every run on a network starts from."""

    model: TorchModel
    source: DataSource
    splits: Splits
    threads: int


@dataclass(frozen=True)
class PreparedAttack(Prepared):
    """What every run starts from that attacks."""

    plan: PgdPlan


def set_threads(requested: int | None) -> int:
    """Let torch compute with `requested` CPU threads, and say how many those are.

    None: all allowed, of which the processes of one training on this machine have equal shares.
    """
    threads = usable_threads(requested)
    if requested is None:
        threads = max(1, threads // processes_here())
    torch.set_num_threads(threads)
    return threads


def fix_seeds(seed: int) -> None:
    """Fix the generators that a network of the user's own may draw its first weights from."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global one is what such code uses
    random.seed(seed)


def prepare(config: ModelRunConfig) -> Prepared:
    """Load and check everything that `config` names; nothing is written.

    Raises:
        ToolkitError: any bad input: the model's file, its data set, or two that do not fit.
    """
    threads = set_threads(config.threads)
    fix_seeds(config.seed)
    file = read_model_file(
        resolve_path(config.model.path), trust_pickle=config.model.trust_pickle, arch=config.model.arch
    )
    wanted = config.data.source or (file.spec.dataset if file.spec else None)
    if wanted is None:
        raise ToolkitError(
            "the model's file does not say what data set it was trained on",
            found=str(config.model.path),
            fix="name it with --data: sample, fashion-mnist, cifar10, folder:DIR or npz:FILE",
        )
    source = load_source(
        config.data.model_copy(update={"source": wanted, "size": _size(config.data, wanted, file.spec)})
    )
    normalization = _normalization(config.model, source)
    if file.spec is not None:
        _warn_of_ignored(config.model)
    else:
        notice(f"normalisation: mean {normalization.mean}, std {normalization.std} (set it with --mean and --std)")
    model = assemble(
        file,
        arch=config.model.arch,
        class_names=source.train.class_names,
        input_shape=source.train.shape,
        normalization=normalization,
        dataset=wanted,
    )
    check_fits(source, model.spec)
    model = replace(model, spec=replace(model.spec, dataset=source.name))
    splits = without_seen(make_splits(source, config.data, config.seed), model.training_hashes)
    check_trained_on(splits, model.training_hashes)
    return Prepared(model, source, splits, threads)


def prepare_attack(config: ModelRunConfig) -> PreparedAttack:
    """The same with the threat model, for which a data set without presets needs a radius.

    Raises:
        ToolkitError: as `prepare`, or no threat model.
    """
    found = prepare(config)
    plan = resolve_plan(config.threat, found.source.threat_key)
    return PreparedAttack(found.model, found.source, found.splits, found.threads, plan)


def inputs_of(config: ModelRunConfig) -> tuple[str | Path | None, ...]:
    """What a run reads: files and folders, and settings that may hold one."""
    model, data = config.model, config.data
    teacher = config.finetune.teacher if isinstance(config, HardenConfig) else None
    return (model.path, model.arch, teacher, data.data_dir, data.source)


def load_teacher(
    training: TrainConfig, student: ModelSpec, splits: Splits, how: ModelConfig | None = None
) -> TorchModel | None:
    """The network whose soft labels the objective `distill` learns; None for other objectives.

    Args:
        training: objective and teacher.
        student: what the teacher has to fit.
        splits: the parts in use; none that judges the student may have trained the teacher.
        how: what a teacher that does not describe itself (a bare state dict) is read with, as the model itself is.

    Raises:
        ToolkitError: none is named, its file is unusable, it does not fit the student, or it saw images that judge it.
    """
    if training.objective != "distill":
        return None
    if training.teacher is None:
        raise ToolkitError(
            "distillation needs a teacher",
            found="the objective distill without --teacher",
            fix="name a robust checkpoint: --teacher FILE, made by `toolkit train ARCH --objective adversarial`",
        )
    how = (how or ModelConfig(path=training.teacher)).model_copy(update={"path": training.teacher})
    try:
        file = read_model_file(resolve_path(training.teacher), trust_pickle=how.trust_pickle, arch=how.arch)
        teacher = assemble(
            file,
            arch=_arch_of_teacher(file, how.arch),
            class_names=student.class_names,
            input_shape=student.input_shape,
            normalization=student.normalization,
            dataset=student.dataset,
        )
    except ToolkitError as error:
        error.add_note(f"the file is the one that --teacher names: {training.teacher}")
        raise
    check_teacher(teacher.spec, student)
    check_trained_on(splits, teacher.training_hashes, "teacher")
    return teacher


def _arch_of_teacher(file: ModelFile, arch: str | None) -> str | None:
    """The network's name that the student has; a teacher that tells its own, and no file of code, keeps that."""
    tells = file.spec is not None and ".py:" not in file.spec.architecture
    return None if tells else arch


def _size(config: DataConfig, source: str, spec: ModelSpec | None) -> int | None:
    """The side to which a folder's images are resized: the user's, or the one that the checkpoint was trained on."""
    if config.size is not None or spec is None or not source.startswith("folder:"):
        return config.size
    _, height, width = spec.input_shape
    return height if height == width else None


def _warn_of_ignored(config: ModelConfig) -> None:
    """A checkpoint of ours describes itself; only where the network's code lies now can be told."""
    given = {"--mean": config.mean, "--std": config.std, "--arch": config.arch}
    ignored = [flag for flag, value in given.items() if value is not None and ".py:" not in str(value)]
    if ignored:
        warn(f"the checkpoint describes itself, so {', '.join(ignored)} is ignored")


def warn_of_unused(*trainings: TrainConfig) -> None:
    """Name the settings that none of the trainings, which differ in objective or rounding, will look at."""
    first = trainings[0]
    flags = [f"--{name.replace('_', '-')}" for name in unused(first) if all(name in unused(one) for one in trainings)]
    if flags:
        objectives = " or ".join(dict.fromkeys(one.objective for one in trainings))
        warn(f"the objective {objectives} makes no use of {', '.join(flags)}")
    if first.qat_from != TrainConfig.model_fields["qat_from"].default and not any(one.qat for one in trainings):
        warn("without --qat nothing rounds in training, so --qat-from is ignored")


def resolved_data(config: DataConfig, source: DataSource) -> DataConfig:
    """`config` with the data set's name filled in."""
    return config.model_copy(update={"source": source.name})


def resolved_threat(config: ThreatConfig, plan: PgdPlan) -> ThreatConfig:
    """`config` with everything that the preset gave filled in."""
    return config.model_copy(
        update={
            "eps": plan.threat.eps,
            "steps": plan.steps,
            "step_size": plan.step_size,
            "random_start": plan.random_start,
        }
    )


def resolved_quantize(config: QuantizeConfig, provider: Provider = "cpu") -> QuantizeConfig:
    """`config` with seven bits for weights where the integer kernels of this machine saturate, unless it says.

    Where layers are to be searched, it is without those that an earlier search left float for the speed of its machine.
    """
    if config.searches:
        config = config.model_copy(update={"keep_float_here": ()})
    if config.reduce_range is not None:
        return config
    needed = config.activation_bits == 8 and provider == "cpu" and saturates_here()
    return config.model_copy(update={"reduce_range": needed})


def tell_reduced(asked: QuantizeConfig, resolved: QuantizeConfig) -> None:
    """Say so where the machine, and not the user, decided for weights of seven bits."""
    if asked.reduce_range is None and resolved.reduce_range:
        notice("this machine has no VNNI, and sums of 8-bit weights can saturate: weights get 7 bits (--full-range: 8)")


def _normalization(config: ModelConfig, source: DataSource) -> Normalization:
    channels, hint = source.train.shape[0], source.normalization_hint
    mean = hint.mean if config.mean is None else channel_values("mean", config.mean, channels)
    std = hint.std if config.std is None else channel_values("std", config.std, channels)
    return Normalization(mean, std)


def channel_values(name: str, given: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """What the user gave with `--name`, one value per channel; a single one is that of all.

    Raises:
        ToolkitError: another number of values than there are channels.
    """
    found = given * channels if len(given) == 1 else given
    if len(found) != channels:
        raise ToolkitError(
            f"--{name} does not fit the images",
            found=f"{len(found)} values for {channels} channel(s)",
            fix=f"give one value, or one per channel: --{name} {','.join(['0.5'] * channels)}",
        )
    return found


def warn_of_other_images(calibration: PixelStatistics, trained_on: PixelStatistics) -> None:
    """Say in what the calibration images do not look like those that the network was trained on."""
    found = differences(calibration, trained_on)
    if found:
        warn(
            f"the calibration images do not look like the training images ({'; '.join(found)}): the ranges of the "
            "activations will not fit; name the data that the network was trained on (--data)"
        )


def describe(model: TorchModel, plan: PgdPlan | None = None) -> dict[str, str]:
    """What the ONNX files say of themselves; nothing of the machine that made them."""
    spec = model.spec
    threat = {} if plan is None else {"threat_model": json.dumps(plan.record())}
    dataset = {} if spec.dataset is None else {"dataset": public_name(spec.dataset)}
    return {
        "toolkit_version": __version__,
        "architecture": public_name(spec.architecture),
        "class_names": json.dumps(list(spec.class_names)),
        "normalization": json.dumps({"mean": spec.normalization.mean, "std": spec.normalization.std, "inside": True}),
        **dataset,
        **threat,
    }
