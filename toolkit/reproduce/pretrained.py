"""A standard network that the user brings, in place of one that is trained."""

from __future__ import annotations

from pathlib import Path

from toolkit.artifacts import Splits, TorchModel
from toolkit.data.sources import check_fits
from toolkit.data.splits import JUDGING, check_trained_on
from toolkit.errors import ToolkitError
from toolkit.models.loading import assemble, read_model_file, resolve_path
from toolkit.reproduce.world import World


def read_pretrained(path: Path, network: str, world: World, splits: Splits) -> TorchModel:
    """The network in the user's checkpoint.

    Args:
        path: the checkpoint, or `shipped:NAME`.
        network: the architecture that tables are filled with.
        world: the data set, which it must take.
        splits: of one seed; no image that judges may have trained it.

    Raises:
        ToolkitError: the file is unusable, holds another architecture, does not fit the data set, or saw test images.
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
    judging = JUDGING if world.protocol.holds_out else ("evaluation",)
    check_trained_on(splits, model.training_hashes, "pretrained network", judging)
    return model
