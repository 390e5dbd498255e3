"""A standard network that the user brings, in place of one that is trained."""

from __future__ import annotations

from pathlib import Path

from toolkit.artifacts import ModelSpec, Normalization, Splits, TorchModel
from toolkit.data.sources import check_fits
from toolkit.data.splits import JUDGING, check_trained_on
from toolkit.errors import ToolkitError
from toolkit.models.loading import assemble, read_model_file, resolve_path
from toolkit.progress import notice
from toolkit.reproduce.world import World


def read_pretrained(path: Path, network: str, world: World, splits: Splits) -> TorchModel:
    """The network in the user's checkpoint.

    Args:
        path: the checkpoint, or `shipped:NAME`.
        network: the architecture that tables are filled with.
        world: the data set, which it must take.
        splits: of one seed; no image that judges may have trained it.

    Raises:
        ToolkitError: the file is unusable, holds another architecture, a network that was pruned or trained to be
            robust or that wants other pixels than the paper's, does not fit the data set, or saw test images.
    """
    try:
        file = read_model_file(resolve_path(path))
        if file.spec is not None and file.spec.architecture != network:
            raise ToolkitError(
                "the checkpoint holds another network than the one that the tables are filled with",
                found=f"{file.spec.architecture} in {path}, and {network}",
                fix=f"name its network with --arch {file.spec.architecture}, or another checkpoint",
            )
        model = assemble(
            file,
            arch=network,
            class_names=world.class_names,
            input_shape=world.source.train.shape,
            normalization=world.source.normalization_hint,
            dataset=world.source.name,
        )
    except ToolkitError as error:
        error.add_note(f"the file is the one that --pretrained names: {path}")
        raise
    check_fits(world.source, model.spec)
    _check_standard(path, model.spec)
    _check_normalization(path, model.spec, world.source.normalization_hint)
    if file.spec is None:
        notice(f"{path} holds weights alone: pixels are normalised as in the paper, mean 0.5 and deviation 0.5")
    judging = JUDGING if world.protocol.holds_out else ("evaluation",)
    check_trained_on(splits, model.training_hashes, "pretrained network", judging)
    return model


def _check_standard(path: Path, spec: ModelSpec) -> None:
    """Tables begin with the standard network, whole."""
    objectives = [str(entry.get("objective", "standard")) for entry in spec.training]
    found = ["pruned"] if spec.pruning else []
    found += [f"trained with the objective {name}" for name in dict.fromkeys(objectives) if name != "standard"]
    if found:
        raise ToolkitError(
            "the pretrained network is no standard one",
            found=f"{path}: {', '.join(found)}",
            fix="name a whole network that was trained with --objective standard",
        )


def _check_normalization(path: Path, spec: ModelSpec, wanted: Normalization) -> None:
    """The paper's radius lies behind its normalisation: behind another it would be another in pixels."""
    if spec.normalization != wanted:
        raise ToolkitError(
            "the pretrained network normalises pixels in another way than the paper's",
            found=f"{path}: mean {spec.normalization.mean}, std {spec.normalization.std}",
            fix=f"train one with mean {wanted.mean} and std {wanted.std}",
        )
