"""The training loop: any objective, resumable to the same weights, the last good epoch on validation kept."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from toolkit.artifacts import Split, TorchModel, weights_digest
from toolkit.attacks.threat import PgdPlan
from toolkit.config import TrainConfig
from toolkit.errors import ToolkitError
from toolkit.progress import notice, task
from toolkit.training.crowd import CrowdWatch
from toolkit.training.distributed import ALONE, World
from toolkit.training.interrupt import deferred_interrupt
from toolkit.training.qat import Rounding
from toolkit.training.records import Observer, TrainingResult
from toolkit.training.resume import load_state, save_state
from toolkit.training.run import Run

__all__ = ["TrainingResult", "train"]

SAVE_EVERY_S = 30.0
"""Seconds between two checkpoints within an epoch."""


def train(
    model: TorchModel,
    train_split: Split,
    validation: Split,
    config: TrainConfig,
    plan: PgdPlan | None,
    *,
    seed: int,
    label: str = "training",
    checkpoint: Path | None = None,
    resume: bool | Literal["or anew"] = False,
    teacher: TorchModel | None = None,
    rounding: Rounding | None = None,
    world: World = ALONE,
    observer: Observer | None = None,
) -> TrainingResult:
    """Train a copy of `model` and return its last good epoch; 0 epochs or objective `none` return it unchanged.

    Args:
        model: start weights.
        train_split: images to learn from; validation: images that choose the epoch (`EpochRecord`).
        config: objective, epochs, rate and so on.
        plan: threat model of training and of the validation attack; the standard objective needs none.
        seed: fixes order, attack starts and dropout.
        checkpoint: file that is kept up to date and removed by nobody; with `resume` the run goes on from it. One of
            another run, or a damaged one, is refused, or with "or anew" given up.
        teacher: whose soft labels the objective `distill` learns; with the same classes and shape of images.
        rounding: to what the last part of the training rounds weights and activations (`training.qat`); None: nothing.
        world: the processes that train together; all call this with the same arguments, the first one writes.
        observer: sees the batches pass through the network while it learns.

    Raises:
        ToolkitError: the loss became NaN or diverged, the network cannot be trained, attacked or rounded, the batch is
            larger than the data, the checkpoint is of another run, or the processes do not train the same.
    """
    if config.objective == "none" or config.epochs == 0:
        return TrainingResult(model.copy(), (), 0, "none")
    run = Run(model, train_split, validation, config, plan, seed, teacher, rounding, world, observer)
    if world.size > 1:
        _check_alike(run, world)
    if resume:
        kept = checkpoint if world.leads and checkpoint is not None and checkpoint.is_file() else None
        state = world.lead(_known(kept, run.fingerprint, strict=resume is True) if kept else None)
        if state is not None:
            run.restore(state)
    steps = run.steps_per_epoch * config.epochs
    with task(label, steps) as bar, deferred_interrupt() as interrupted:
        bar.advance(run.step)
        last_saved = time.monotonic()
        crowd = CrowdWatch() if world.size == 1 else None  # the others of several are no foreign work
        while run.step < steps:
            run.advance()
            if crowd is not None:
                crowd.look()
            end_of_epoch = run.step % run.steps_per_epoch == 0
            if end_of_epoch:
                run.finish_epoch()
            stop = world.any(interrupted())
            due = end_of_epoch or stop or time.monotonic() - last_saved > SAVE_EVERY_S
            if checkpoint is not None and due and world.leads:
                save_state(run.state(), checkpoint)
                last_saved = time.monotonic()
            if stop:
                raise KeyboardInterrupt
            bar.advance(1, run.note)
    return run.result()


def _check_alike(run: Run, world: World) -> None:
    """Refuse processes that would add up gradients of different things."""
    mine = {
        "settings": run.config.model_dump(mode="json", exclude={"teacher"}) | {"seed": run.seed},
        "training images and their order": run.train_split.ordered_digest,
        "validation images": run.validation.labelled_digest,
        "start weights": weights_digest(run.original.network),
        "teacher": run.teacher and run.teacher.digest,
    }
    leaders = world.lead(mine)
    differing = [name for name in mine if world.any(mine[name] != leaders[name])]
    if differing:
        raise ToolkitError(
            "the processes of the training do not train the same",
            found=f"not the same in all of them: {', '.join(differing)}",
            fix="give all machines the same command, data and code; random weights of a network of your own must come "
            "from torch's generator, which --seed sets",
        )


def _known(checkpoint: Path, fingerprint: str, *, strict: bool) -> dict[str, Any] | None:
    try:
        return load_state(checkpoint, fingerprint)
    except ToolkitError as error:
        if strict:
            raise
        notice(f"{error.problem}: it begins anew ({error.found})")
        return None
