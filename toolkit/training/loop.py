"""The training loop: any objective, resumable to the same weights, the last good epoch on validation kept."""

from __future__ import annotations

import time
from pathlib import Path

from toolkit.artifacts import Split, TorchModel
from toolkit.attacks.threat import PgdPlan
from toolkit.config import TrainConfig
from toolkit.progress import task
from toolkit.training.interrupt import deferred_interrupt
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
    resume: bool = False,
    teacher: TorchModel | None = None,
    observer: Observer | None = None,
) -> TrainingResult:
    """Train a copy of `model` and return its last good epoch; 0 epochs or objective `none` return it unchanged.

    Args:
        model: start weights.
        train_split: images to learn from; validation: images that choose the epoch (`EpochRecord`).
        config: objective, epochs, rate and so on.
        plan: threat model of training and of the validation attack; the standard objective needs none.
        seed: fixes order, attack starts and dropout.
        checkpoint: file that is kept up to date and removed by nobody; with `resume` the run goes on from it.
        teacher: whose soft labels the objective `distill` learns; with the same classes and shape of images.
        observer: sees the batches pass through the network while it learns.

    Raises:
        ToolkitError: the loss became NaN or diverged, the network cannot be trained or attacked, the batch is larger
            than the data, or the checkpoint is of another run.
    """
    if config.objective == "none" or config.epochs == 0:
        return TrainingResult(model.copy(), (), 0, "none")
    run = Run(model, train_split, validation, config, plan, seed, teacher, observer)
    if resume and checkpoint is not None and checkpoint.is_file():
        run.restore(load_state(checkpoint, run.fingerprint))
    steps = run.steps_per_epoch * config.epochs
    with task(label, steps) as bar, deferred_interrupt() as interrupted:
        bar.advance(run.step)
        last_saved = time.monotonic()
        while run.step < steps:
            run.advance()
            end_of_epoch = run.step % run.steps_per_epoch == 0
            if end_of_epoch:
                run.finish_epoch()
            due = end_of_epoch or interrupted() or time.monotonic() - last_saved > SAVE_EVERY_S
            if checkpoint is not None and due:
                save_state(run.state(), checkpoint)
                last_saved = time.monotonic()
            if interrupted():
                raise KeyboardInterrupt
            bar.advance(1, run.note)
    return run.result()
