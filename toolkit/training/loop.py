"""The training loop: standard or adversarial, resumable to the same weights, best on validation kept."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from toolkit.allocator import keep_freed_memory
from toolkit.artifacts import Normalized, Proportion, Split, TorchModel, derive_seed
from toolkit.attacks.forms import Precision
from toolkit.attacks.surrogate import compute_device, resolve_precision
from toolkit.attacks.threat import PgdPlan
from toolkit.config import TrainConfig
from toolkit.errors import ToolkitError
from toolkit.models.checkpoint import spec_to_dict
from toolkit.progress import notice, task
from toolkit.training.adversary import Adversary, training_plan
from toolkit.training.forward import find_form, forward
from toolkit.training.interrupt import deferred_interrupt
from toolkit.training.losses import OBJECTIVES
from toolkit.training.resume import load_state, save_state
from toolkit.training.schedules import SCHEDULES

VALIDATION_IMAGES = 1024
"""At most so many validation images choose the best epoch."""
VALIDATION_STEPS = 10
"""Steps of the attack on them."""
SAVE_EVERY_S = 30.0
"""Seconds between two checkpoints within an epoch."""


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """What one epoch came to on the validation part."""

    epoch: int
    loss: float
    accuracy: Proportion
    robust: Proportion | None


@dataclass(frozen=True)
class TrainingResult:
    """The network of the best epoch, and how every epoch went."""

    model: TorchModel
    epochs: tuple[EpochRecord, ...]
    best_epoch: int
    precision: str


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
) -> TrainingResult:
    """Train a copy of `model` and return its best epoch; 0 epochs or objective `none` return it unchanged.

    Args:
        model: start weights.
        train_split: images to learn from; validation: images that choose the best epoch.
        config: objective, epochs, rate and so on.
        plan: threat model of adversarial training and of the validation attack; other objectives need none.
        seed: fixes order, attack starts and dropout.
        checkpoint: file that is kept up to date and removed by nobody; with `resume` the run goes on from it.

    Raises:
        ToolkitError: the loss became NaN or diverged, the network cannot be trained or attacked, the batch is larger
            than the data, or the checkpoint is of another run.
    """
    if config.objective == "none" or config.epochs == 0:
        return TrainingResult(model.copy(), (), 0, "none")
    run = _Run(model, train_split, validation, config, plan, seed)
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


def fitting_batch(config: TrainConfig, images: int) -> int:
    """The batch size that `images` training images allow.

    Raises:
        ToolkitError: more was asked for than there are images, and than the default.
    """
    if config.batch_size <= images:
        return config.batch_size
    if config.batch_size > TrainConfig().batch_size:
        raise ToolkitError(
            "the batch is larger than the training data",
            found=f"--batch-size {config.batch_size}, {images} training images",
            fix=f"pass --batch-size {min(images, TrainConfig().batch_size)}",
        )
    notice(f"all {images} training images make one batch: fewer than --batch-size {config.batch_size}")
    return images


class _Run:
    """The mutable state of one training."""

    def __init__(
        self,
        model: TorchModel,
        train_split: Split,
        validation: Split,
        config: TrainConfig,
        plan: PgdPlan | None,
        seed: int,
    ) -> None:
        self.original, self.train_split, self.config, self.seed = model, train_split, config, seed
        self.batch_size = fitting_batch(config, len(train_split))
        self.validation = validation.first(VALIDATION_IMAGES)
        self.device = compute_device()
        if self.device.type == "cpu":
            keep_freed_memory()
        precision = resolve_precision(config.precision)
        self.module: Normalized = copy.deepcopy(model.module).to(self.device).requires_grad_(True)
        self.form = find_form(self.module, model.spec.input_shape, precision, self.device)
        self.form.cast(self.module.network)
        self.precision: Precision = "bfloat16" if self.form.precision == "autocast" else "float32"
        self.plan, self.adversary = None, None
        if config.objective == "adversarial":
            if plan is None:
                raise ValueError("adversarial training needs a threat model")
            self.plan = plan
            self.adversary = Adversary(self.module, model.spec, training_plan(plan, config.attack_steps), precision)
        self.optimizer = torch.optim.SGD(
            self.module.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        # a last batch of one image would break batch norm, so incomplete batches are dropped where there are others
        self.steps_per_epoch = max(1, len(train_split) // self.batch_size)
        self.step = 0
        self.order = np.empty(0, dtype=np.int64)
        self.order_epoch = -1
        self.losses: list[float] = []
        self.epochs: list[EpochRecord] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch = 0
        self.note = ""
        self.fingerprint = self._fingerprint()

    def _fingerprint(self) -> str:
        facts = {
            "config": self.config.model_dump(mode="json"),
            "plan": self.plan and [self.plan.record(), self.plan.steps, self.plan.step_size],
            "seed": self.seed,
            "train": self.train_split.digest,
            "validation": self.validation.digest,
            "spec": spec_to_dict(self.original.spec),
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for value in self.original.network.state_dict().values():
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def advance(self) -> None:
        """One optimiser step."""
        epoch, position = divmod(self.step, self.steps_per_epoch)
        if position == 0:
            self.losses = []
        if self.order_epoch != epoch:
            self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.train_split))
            self.order_epoch = epoch
        size = self.batch_size
        batch = self.train_split.take(self.order[position * size : (position + 1) * size])
        # every step has its own seeds, so that a resumed run needs no generator's state
        step_seed = derive_seed(self.seed, epoch, position)
        generator = torch.Generator().manual_seed(step_seed)
        torch.manual_seed(step_seed)
        images = augment(batch.images, generator) if self.config.augment else batch.images
        images = images.to(self.device)
        labels = batch.labels.to(self.device)
        rate = SCHEDULES[self.config.schedule](
            self.step, self.config.epochs * self.steps_per_epoch, self.steps_per_epoch
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * rate
        self.module.train()
        loss = OBJECTIVES[self.config.objective](self._forward, images, labels, self._attack(generator))
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.losses.append(float(loss.detach()))
        self._check_loss(epoch)
        self.step += 1
        self.note = f"loss {np.mean(self.losses[-50:]):.3f}"

    def _forward(self, images: Tensor) -> Tensor:
        return forward(self.module, self.form, images)

    def _attack(self, generator: torch.Generator) -> Callable[[Tensor, Tensor], Tensor]:
        def attack(images: Tensor, labels: Tensor) -> Tensor:
            assert self.adversary is not None  # only the adversarial objective attacks
            return self.adversary.attack(images, labels, generator)

        return attack

    def _check_loss(self, epoch: int) -> None:
        last = self.losses[-1]
        window = float(np.mean(self.losses[-50:]))
        chance = math.log(len(self.original.spec.class_names))
        diverged = len(self.losses) > 100 and window > 3 * chance and window > 2 * float(np.mean(self.losses[:50]))
        if not math.isfinite(last) or diverged:
            raise self._diverged(epoch + 1)

    def _diverged(self, epoch: int) -> ToolkitError:
        return ToolkitError(
            "the training diverged",
            found=f"loss {self.losses[-1]:.3g} in epoch {epoch}, step {len(self.losses)}",
            fix=f"lower --learning-rate (now {self.config.learning_rate:g}), or pass --precision float32",
        )

    def finish_epoch(self) -> None:
        """Measure on the validation part and keep the weights if they are the best so far."""
        if not all(bool(value.isfinite().all()) for value in self.module.state_dict().values()):
            raise self._diverged(self.step // self.steps_per_epoch)
        clean, robust = self._validate()
        epoch = self.step // self.steps_per_epoch
        self.epochs.append(EpochRecord(epoch, float(np.mean(self.losses)), clean, robust))
        best = max(self.epochs, key=lambda record: (_score(record), record.epoch))
        if best.epoch == epoch:
            self.best = {key: value.detach().cpu().clone() for key, value in self.module.network.state_dict().items()}
            self.best_epoch = epoch
        robust_text = f", robust {robust.value:.1%}" if robust else ""
        self.note = f"epoch {epoch}: validation clean {clean.value:.1%}{robust_text}"

    def _validate(self) -> tuple[Proportion, Proportion | None]:
        self.module.eval()
        generator = torch.Generator().manual_seed(self.seed)
        clean: list[Tensor] = []
        robust: list[Tensor] = []
        for batch in self.validation.batches():
            images, labels = batch.images.to(self.device), batch.labels.to(self.device)
            clean.append(self._correct(images, labels))
            if self.adversary is not None:
                attacked = self.adversary.attack(images, labels, generator, VALIDATION_STEPS)
                robust.append(self._correct(attacked, labels))
        return Proportion.of(torch.cat(clean)), Proportion.of(torch.cat(robust)) if robust else None

    def _correct(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.module(images)
        return logits.argmax(dim=1).eq(labels).cpu()

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, as plain data and tensors."""
        return {
            "fingerprint": self.fingerprint,
            "threads": torch.get_num_threads(),
            "step": self.step,
            "losses": self.losses,
            "epochs": [_epoch_to_list(record) for record in self.epochs],
            "best": self.best,
            "best_epoch": self.best_epoch,
            "network": self.module.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.step, self.losses = state["step"], list(state["losses"])
        self.epochs = [_epoch_from_list(values) for values in state["epochs"]]
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        self.module.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])

    def result(self) -> TrainingResult:
        """The best epoch's network in float32, with this training in its record."""
        trained = self.original.copy()
        trained.network.load_state_dict(self.best)
        record = {
            "objective": self.config.objective,
            "epochs": self.config.epochs,
            "best_epoch": self.best_epoch,
            "seed": self.seed,
            "precision": self.precision,
            "threat": self.plan and self.plan.record(),
            "images": len(self.train_split),
            "images_sha256": self.train_split.digest,
            "validation": [_epoch_to_list(epoch) for epoch in self.epochs],
        }
        hashes = np.union1d(self.original.training_hashes, self.train_split.hashes)
        spec = replace(trained.spec, training=(*trained.spec.training, record))
        trained.module.eval()
        model = replace(trained, spec=spec, training_hashes=hashes)
        return TrainingResult(model, tuple(self.epochs), self.best_epoch, self.precision)


def _score(record: EpochRecord) -> float:
    return record.accuracy.value + (record.robust.value if record.robust else 0.0)


def _epoch_to_list(record: EpochRecord) -> list[Any]:
    robust = [record.robust.correct, record.robust.total] if record.robust else None
    return [record.epoch, record.loss, [record.accuracy.correct, record.accuracy.total], robust]


def _epoch_from_list(values: list[Any]) -> EpochRecord:
    epoch, loss, clean, robust = values
    return EpochRecord(epoch, loss, Proportion(*clean), Proportion(*robust) if robust else None)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random horizontal flips and shifts by up to an eighth of the side (zero padding), one draw per image."""
    count, _, height, width = images.shape
    reach = max(1, height // 8)
    padded = functional.pad(images, (reach, reach, reach, reach))
    top = torch.randint(0, 2 * reach + 1, (count, 1), generator=generator)
    left = torch.randint(0, 2 * reach + 1, (count, 1), generator=generator)
    flip = torch.rand((count, 1), generator=generator) < 0.5
    rows = top + torch.arange(height)
    columns = left + torch.where(flip, torch.arange(width - 1, -1, -1), torch.arange(width))
    picked = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()
