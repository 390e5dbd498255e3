"""The mutable state of one training: its steps, validations, checkpoints and result."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolkit.allocator import keep_freed_memory
from toolkit.artifacts import (
    Int64Array,
    Normalized,
    Proportion,
    Split,
    TorchModel,
    derive_seed,
    versioned,
    weights_digest,
)
from toolkit.attacks.forms import Precision
from toolkit.attacks.surrogate import Loss, compute_device, resolve_precision
from toolkit.attacks.threat import PgdPlan, ThreatModel
from toolkit.config import TrainConfig
from toolkit.errors import DivergedError, ToolkitError
from toolkit.models.checkpoint import spec_to_dict
from toolkit.progress import notice, warn
from toolkit.training import guard
from toolkit.training.adversary import Adversary, TrainingAttack, training_attack
from toolkit.training.averaging import WeightAverage
from toolkit.training.batches import augment, fitting_batch
from toolkit.training.distributed import ALONE, World, share_statistics
from toolkit.training.forward import check_single_images, find_form, finite_entries, forward
from toolkit.training.guard import OverfittingGuard
from toolkit.training.losses import ATTACKED, OBJECTIVES, attack_steps, cross_entropy_of
from toolkit.training.qat import Rounding, Schedule, prepare, split_state
from toolkit.training.records import EpochRecord, Observer, TrainingResult
from toolkit.training.schedules import SCHEDULES
from toolkit.training.teacher import Teacher
from toolkit.training.validation import measure

VALIDATION_IMAGES = 1024
"""At most so many validation images choose the epoch that is kept."""
VALIDATION_STEPS = 10
"""Steps of the attack on them."""


class Run:
    """The mutable state of one training."""

    def __init__(
        self,
        model: TorchModel,
        train_split: Split,
        validation: Split,
        config: TrainConfig,
        plan: PgdPlan | None,
        seed: int,
        teacher: TorchModel | None = None,
        rounding: Rounding | None = None,
        world: World = ALONE,
        observer: Observer | None = None,
    ) -> None:
        self.original, self.train_split, self.config, self.seed = model, train_split, config, seed
        self.world = world
        if rounding is not None and world.size > 1:
            raise ToolkitError(
                "--qat trains in one process: what it learns of activations is not shared",
                found=f"{world.size} processes",
                fix="start it without torchrun, or leave --qat away",
            )
        self.batch_size = fitting_batch(config, len(train_split))
        self.parts = world.parts(self.batch_size, config.accumulate)
        self.validation = validation.first(VALIDATION_IMAGES)
        self.device = compute_device()
        if self.device.type == "cpu":
            keep_freed_memory()
        precision = resolve_precision(config.precision)
        self.module: Normalized = copy.deepcopy(model.module).to(self.device).requires_grad_(True)
        self.finite = finite_entries(self.module)
        self.rounding = rounding
        switch = prepare(replace(model, module=self.module), rounding) if rounding else None
        if switch is not None and precision == "bfloat16":
            precision = "autocast"  # what rounds keeps float32 weights
        self.form = find_form(self.module, model.spec.input_shape, precision, self.device)
        self.form.cast(self.module.network)
        if world.size == 1 and any(part.stop - part.start == 1 for part in self.parts):
            check_single_images(self.module, self.form, model.spec.input_shape, self.device)
        self.precision: Precision = "bfloat16" if self.form.precision == "autocast" else "float32"
        self.plan = plan if config.objective in ATTACKED else None
        self._arm(precision)
        self.teacher = self._hire(teacher, precision)
        self.average = WeightAverage(self.module, config.ema) if config.ema else None
        share_statistics(self.module, world)
        self.optimizer = torch.optim.SGD(
            self.module.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        # a last batch of one image would break batch norm, so incomplete batches are dropped where there are others
        self.steps_per_epoch = max(1, len(train_split) // self.batch_size)
        self.steps = self.steps_per_epoch * config.epochs
        self.schedule = Schedule(switch, self.steps, config.qat_from) if switch else None
        self.guard = OverfittingGuard(copy.deepcopy(self._weights())) if config.objective == "fgsm" else None
        self.step = 0
        self.order = np.empty(0, dtype=np.int64)
        self.order_epoch = -1
        self.losses: list[float] = []
        self.epochs: list[EpochRecord] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch = 0
        self.note = ""
        self.fingerprint = self._fingerprint()
        self.observer = observer
        if observer is not None:  # last: copies of the module made above are not observed
            observer.attach(self.module.network)

    def _arm(self, precision: Precision) -> None:
        """Set up the attack of the objective, and that of the validation."""
        self.adversary: Adversary | None = None
        self.attacks: tuple[TrainingAttack, ...] = ()
        if self.config.objective not in ATTACKED:
            return
        if self.plan is None:
            raise ValueError(f"the objective {self.config.objective} needs a threat model")
        self.adversary = Adversary(self.module, self.original.spec, precision)
        self.attacks = (TrainingAttack.multi_step(self.plan.threat, VALIDATION_STEPS),)
        self.attack = self._attack_in_training(self.plan)

    def _attack_in_training(self, plan: PgdPlan) -> TrainingAttack:
        objective, threat = self.config.objective, self._threat_in_training()
        if self.config.attack_schedule == "crossing":
            return training_attack(objective, threat, attack_steps(self.config))
        if objective in ("fgsm", "trades"):
            raise ToolkitError(
                f"the objective {objective} has an attack of its own",
                found=f"--attack-schedule {self.config.attack_schedule}",
                fix="leave --attack-schedule away, or train with the objective adversarial or distill",
            )
        return TrainingAttack.as_measured(replace(plan, threat=threat), self.config.attack_steps)

    def _threat_in_training(self) -> ThreatModel:
        assert self.plan is not None
        return replace(self.plan.threat, eps=self.config.radius * self.plan.threat.eps)

    def _hire(self, model: TorchModel | None, precision: Precision) -> Teacher | None:
        if self.config.objective != "distill":
            return None
        if model is None:
            raise ValueError("distillation needs a teacher")
        teacher = Teacher(model, precision)
        if not self.config.augment:
            teacher.keep_labels(self.train_split)
        return teacher

    def _fingerprint(self) -> str:
        facts = {
            "config": self.config.model_dump(mode="json", exclude={"teacher"}),
            "teacher": self.teacher and self.teacher.digest,
            "plan": self.plan and [self.plan.record(), self.plan.steps, self.plan.step_size],
            "attack": self.attack.record() if self.attacks else None,
            "seed": self.seed,
            "train": self.train_split.ordered_digest,
            "validation": self.validation.labelled_digest,
            "spec": spec_to_dict(self.original.spec),
            "rounding": self.rounding and self.rounding.record(),
            "weights": weights_digest(self.original.network),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def advance(self) -> None:
        """One optimiser step."""
        epoch, position = divmod(self.step, self.steps_per_epoch)
        if position == 0:
            self.losses = []
        rate = SCHEDULES[self.config.schedule](self.step, self.steps, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * rate
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for batch in self._batch(epoch, position):
            self._begin_part(batch)
            loss = OBJECTIVES[self.config.objective](batch, self.config) * batch.share
            torch.autograd.backward(loss)
            total += float(loss.detach())
        self.world.sum_gradients(self.module.parameters())
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.leave()
        self.losses.append(self.world.total(total))
        self._check_loss(epoch)
        self.step += 1
        if self.average is not None:
            self.average.update(self.module, self.step)
        self._watch()
        self.note = f"loss {np.mean(self.losses[-50:]):.3f}"

    def _begin_part(self, batch: _Batch) -> None:
        """Bring the network into training mode, and its fake quantisers into that of this step."""
        schedule = self.schedule
        if schedule is not None and self.step == schedule.first and batch.rows.start == 0:
            attacked = [batch.attack(cross_entropy_of(batch.labels))] if self.adversary is not None else []
            average = [self.average.module] if self.average is not None else []
            schedule.begin(self.module, torch.cat([batch.images, *attacked]), average)
            if self.guard is not None:  # what it kept has no ranges
                self.guard.good = copy.deepcopy(self._weights())
        self.module.train()
        if schedule is not None:
            schedule.enter(self.step, self.module)

    def _batch(self, epoch: int, position: int) -> Iterator[_Batch]:
        """The parts of a step's batch that this process learns from, one after the other."""
        if self.order_epoch != epoch:
            self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.train_split))
            self.order_epoch = epoch
        positions = self.order[position * self.batch_size : (position + 1) * self.batch_size]
        mine = np.concatenate([np.arange(rows.start, rows.stop) for rows in self.parts])
        batch = self.train_split.take(positions[mine])  # files of the other processes' images are not read
        # every step has its own seeds, so that a resumed run needs no generator's state
        step_seed = derive_seed(self.seed, epoch, position)
        generator = torch.Generator().manual_seed(step_seed)
        torch.manual_seed(step_seed)
        count = len(positions)
        images = augment(batch.images, generator, share=mine, of=count) if self.config.augment else batch.images
        drawn = generator.get_state()
        stop = 0
        for rows in self.parts:
            generator.set_state(drawn)  # every part draws for the whole batch, so that how it is parted changes nothing
            here = slice(stop, stop := stop + rows.stop - rows.start)
            part = images[here].to(self.device), batch.labels[here].to(self.device), positions[rows]
            yield _Batch(self, *part, generator, rows, count)

    def _watch(self) -> None:
        """At intervals, see whether single-step training has collapsed; if so, go back and train by PGD."""
        if self.guard is None or self.guard.collapse or self.step % min(guard.INTERVAL, self.steps_per_epoch):
            return
        assert self.plan is not None  # `_arm` has seen to it
        pair = (self.attack, TrainingAttack.multi_step(self._threat_in_training(), guard.STEPS))
        images = self.validation.first(guard.IMAGES)
        _, fgsm, pgd = measure(self.module, images, self.adversary, pair, derive_seed(self.seed, self.step))
        fgsm, pgd = self.world.lead((fgsm, pgd))  # or a network that differs in one process alone would part them
        if self.guard.check(self.step, self.step / self.steps, fgsm, pgd, self._weights()):
            self._set_weights(self.guard.good)
            self._fall_back()
            notice(
                f"step {self.step}: single-step training collapsed (FGSM {fgsm.value:.0%}, PGD {pgd.value:.0%}); "
                f"back to the last good weights, and on with PGD-{self.attack.steps}"
            )

    def _fall_back(self) -> None:
        """Attack by PGD from now on."""
        assert self.plan is not None  # as above
        self.attack = TrainingAttack.multi_step(self._threat_in_training(), attack_steps(self.config))

    def _weights(self) -> dict[str, Any]:
        return {
            "network": self.module.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average and self.average.state(),
        }

    def _set_weights(self, weights: dict[str, Any]) -> None:
        self.module.network.load_state_dict(weights["network"])
        # the optimiser would keep the tensors that it is given, and change the good state with its next step
        self.optimizer.load_state_dict(copy.deepcopy(weights["optimizer"]))
        if self.average is not None:
            self.average.restore(weights["average"])

    def _check_loss(self, epoch: int) -> None:
        last = self.losses[-1]
        window = float(np.mean(self.losses[-50:]))
        chance = math.log(len(self.original.spec.class_names))
        diverged = len(self.losses) > 100 and window > 3 * chance and window > 2 * float(np.mean(self.losses[:50]))
        if not math.isfinite(last) or diverged:
            raise self._diverged(epoch + 1)

    def _diverged(self, epoch: int) -> ToolkitError:
        return DivergedError(
            "the training diverged",
            found=f"loss {self.losses[-1]:.3g} in epoch {epoch}, step {len(self.losses)}",
            fix=f"lower --learning-rate (now {self.config.learning_rate:g}), or pass --train-precision float32",
        )

    @property
    def shipped(self) -> Normalized:
        """What is validated and returned: the averaged weights if they are averaged."""
        return self.module if self.average is None else self.average.module

    def finish_epoch(self) -> None:
        """Measure on the validation part and keep the weights unless earlier ones are clearly better."""
        if not self.finite <= finite_entries(self.module):
            raise self._diverged(self.step // self.steps_per_epoch)
        clean, robust = self._validate()
        epoch = self.step // self.steps_per_epoch
        record = EpochRecord(epoch, float(np.mean(self.losses)), clean, robust)
        earlier = [one for one in self.epochs if self._counts(one)]
        if self.config.keep == "last" or (self._counts(record) and record.is_kept_after(earlier)):
            self.best = {key: value.detach().cpu().clone() for key, value in self.shipped.network.state_dict().items()}
            self.best_epoch = epoch
        self.epochs.append(record)
        robust_text = f", robust {robust.value:.1%}" if robust else ""
        self.note = f"epoch {epoch}: validation clean {clean.value:.1%}{robust_text}"

    def _counts(self, record: EpochRecord) -> bool:
        """Whether the weights of an epoch may be kept: those that are to be rounded have learnt it."""
        return self.schedule is None or self.schedule.counts(record.epoch * self.steps_per_epoch)

    def _validate(self) -> tuple[Proportion, Proportion | None]:
        clean, *robust = measure(self.shipped, self.validation, self.adversary, self.attacks, self.seed)
        return clean, robust[0] if robust else None

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, as plain data and tensors."""
        return {
            "fingerprint": self.fingerprint,
            "threads": torch.get_num_threads(),
            "arithmetic": self._arithmetic,
            "step": self.step,
            "losses": self.losses,
            "epochs": [record.to_list() for record in self.epochs],
            "best": self.best,
            "best_epoch": self.best_epoch,
            "weights": self._weights(),
            "guard": self.guard and self.guard.state(),
            "observed": self.observer and self.observer.state(),
        }

    @property
    def _arithmetic(self) -> str:
        return f"{self.precision} on {self.device.type}"

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        if state.get("arithmetic", self._arithmetic) != self._arithmetic:
            warn(
                f"the training began in {state['arithmetic']} and goes on in {self._arithmetic}: "
                "the result will differ from an uninterrupted run"
            )
        self.step, self.losses = state["step"], list(state["losses"])
        self.epochs = [EpochRecord.from_list(values) for values in state["epochs"]]
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        self._set_weights(state["weights"])
        if self.observer is not None:
            self.observer.restore(state["observed"])
        if self.guard is not None:
            self.guard.restore(state["guard"])
            if self.guard.collapse:
                self._fall_back()

    def result(self) -> TrainingResult:
        """The kept epoch's network in float32, with this training in its record."""
        trained = self.original.copy()
        weights, learnt = self.best, None
        if self.rounding is not None:
            weights, learnt = split_state(self.best, self.rounding)
        trained.network.load_state_dict(versioned(weights, trained.network))
        config = self.config
        record = {
            "objective": config.objective,
            "epochs": config.epochs,
            "best_epoch": self.best_epoch,
            "seed": self.seed,
            "precision": self.precision,
            "threat": self.plan and self.plan.record(),
            "attack": self.attack.record() if self.attacks else None,
            "images": len(self.train_split),
            "images_sha256": self.train_split.digest,
            "validation": [epoch.to_list() for epoch in self.epochs],
            "ema": config.ema,
            "teacher_sha256": self.teacher and self.teacher.digest,
            "collapse": self.guard and self.guard.collapse,
            "rounding": self.rounding and self.rounding.record(),
            "settings": config.model_dump(mode="json", exclude={"teacher"}),
        }
        seen = [self.original.training_hashes, self.train_split.hashes]
        hashes = np.unique(np.concatenate([*seen, *([self.teacher.training_hashes] if self.teacher else [])]))
        spec = replace(trained.spec, training=(*trained.spec.training, record))
        trained.module.eval()
        model = replace(trained, spec=spec, training_hashes=hashes)
        return TrainingResult(model, tuple(self.epochs), self.best_epoch, self.precision, learnt)


@dataclass(frozen=True)
class _Batch:
    """A batch in training, or one of its parts, as objectives see it (`losses.Step`)."""

    run: Run
    images: Tensor
    labels: Tensor
    positions: Int64Array
    """Of the images, in the training part."""
    generator: torch.Generator
    rows: slice
    """Of the step's whole batch, which has `of` images."""
    of: int

    @property
    def share(self) -> float:
        """Of the whole batch."""
        return len(self.images) / self.of

    def forward(self, images: Tensor) -> Tensor:
        return forward(self.run.module, self.run.form, images)

    def attack(self, loss: Loss) -> Tensor:
        assert self.run.adversary is not None  # only objectives in ATTACKED attack
        run = self.run
        return self.run.adversary.attack(
            run.module, self.images, loss, run.attack, self.generator, rows=self.rows, of=self.of
        )

    def frozen_logits(self) -> Tensor:
        assert self.run.adversary is not None  # as above
        return self.run.adversary.logits(self.run.module, self.images)

    def teacher_logits(self) -> Tensor:
        assert self.run.teacher is not None  # only distillation asks for it
        kept = self.run.teacher.kept(self.positions)
        return self.run.teacher.logits(self.images) if kept is None else kept.to(self.images.device)
