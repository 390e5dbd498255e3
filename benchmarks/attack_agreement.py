"""Attacks against their reference implementations: on one network and the same images, who fools more, at what norm.

    make peers && .venv-peers/bin/python benchmarks/attack_agreement.py [--images N] [--threads N] [--json FILE]

Peers are pyautoattack (the authors' code of Auto-PGD, FAB and Square), Foolbox (FMN, DeepFool, Carlini-Wagner) and
torchattacks (FGSM, MIM, PGD). All attack `shipped:cnn8` in float32 with equal steps and restarts; everything is scored
on that network. Ours runs as in an evaluation: an image is left as soon as the scored network is fooled. The exit code
is 1 if one of ours is weaker than its peer by more than chance and seeds explain.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.artifacts import Batch, Normalization, TorchModel
from toolkit.attacks.apgd import LossName, apgd, apgd_targeted
from toolkit.attacks.carlini_wagner import carlini_wagner
from toolkit.attacks.deepfool import deepfool
from toolkit.attacks.fab import fab_targeted
from toolkit.attacks.fgsm import fgsm
from toolkit.attacks.fmn import fmn
from toolkit.attacks.mim import mim
from toolkit.attacks.minimum_norm import MinimumNorm
from toolkit.attacks.pgd import pgd
from toolkit.attacks.projections import NORM
from toolkit.attacks.square import square
from toolkit.attacks.surrogate import Surrogate
from toolkit.attacks.threat import PgdPlan, ThreatModel
from toolkit.config import DataConfig
from toolkit.data.sources import load_source
from toolkit.data.splits import make_splits
from toolkit.evaluators.environment import environment_record, usable_threads
from toolkit.models.loading import assemble, read_model_file, resolve_path

try:
    import foolbox
    import torchattacks
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from pyautoattack.fab_pt import FABAttack_PT
    from pyautoattack.square import SquareAttack
except ImportError as error:
    raise SystemExit(f"this benchmark needs its peers, see constraints-peers.txt: make peers ({error})") from error

RADII: Mapping[str, float] = {"linf": 0.02, "l2": 0.3, "l1": 2.0}
"""At which about half of the images fall."""
THEIR_NORM: Mapping[str, str] = {"linf": "Linf", "l2": "L2", "l1": "L1"}
STEPS, QUERIES, TARGETS = 50, 300, 3
FMN_STEP: Mapping[str, float] = {"linf": 10.0, "l2": 1.0, "l1": 1.0}
WEAKER, FURTHER = 0.03, 1.03
"""Ours fails if it leaves more than this share of the images more, or needs more than this times the median norm."""

Attacked = Callable[[], Tensor]
Searched = Callable[[], Tensor]


@dataclass(frozen=True)
class Task:
    """The network, the images, and the ball of one norm."""

    model: TorchModel
    batch: Batch
    norm: str

    @property
    def threat(self) -> ThreatModel:
        return ThreatModel(self.norm, RADII[self.norm], "pixels", clip=True)  # type: ignore[arg-type]

    def fooled(self, attacked: Tensor) -> Tensor:
        return self.model.predict(attacked).argmax(dim=1) != self.batch.labels

    def settle(self, attacked: Tensor, positions: Tensor) -> Tensor:
        return self.model.predict(attacked).argmax(dim=1) != self.batch.labels[positions]

    def norms(self, attacked: Tensor) -> Tensor:
        """Of the perturbations that fool the network; inf where none does."""
        return torch.where(self.fooled(attacked), NORM[self.norm](attacked - self.batch.images), torch.inf)


@dataclass(frozen=True)
class Within:
    """Images, of n, that withstand an attack within the ball."""

    attack: str
    norm: str
    peer: str
    ours: int
    theirs: int
    n: int
    seconds_ours: float
    seconds_theirs: float

    @property
    def agrees(self) -> bool:
        return self.ours <= self.theirs + WEAKER * self.n

    def __str__(self) -> str:
        return (
            f"{self.attack:<15}{self.norm:<6}{self.peer:<14}{self.ours:>5} {self.theirs:>5} of {self.n}"
            f"{self.seconds_ours:>9.1f} s {self.seconds_theirs:>7.1f} s{'' if self.agrees else '  WEAKER'}"
        )


@dataclass(frozen=True)
class Smallest:
    """Medians of the smallest perturbations found, how many images have one, and quantiles of ours over theirs."""

    attack: str
    norm: str
    peer: str
    found_ours: int
    found_theirs: int
    median_ours: float
    median_theirs: float
    ratio: tuple[float, float, float]
    """10 %, 50 % and 90 % quantiles over the images on which both found one."""
    seconds_ours: float
    seconds_theirs: float

    def record(self) -> dict[str, Any]:
        """As plain data; a median of which more than half is missing is null, since JSON has no infinity."""
        medians = {name: getattr(self, name) for name in ("median_ours", "median_theirs")}
        return {**asdict(self), **{name: None if math.isinf(value) else value for name, value in medians.items()}}

    @property
    def agrees(self) -> bool:
        return self.found_ours >= self.found_theirs and self.median_ours <= FURTHER * self.median_theirs

    def __str__(self) -> str:
        low, middle, high = self.ratio
        return (
            f"{self.attack:<15}{self.norm:<6}{self.peer:<14}{self.found_ours:>4} {self.found_theirs:>4}"
            f"{self.median_ours:>10.5f} {self.median_theirs:>9.5f}   {middle:.3f} [{low:.3f}, {high:.3f}]"
            f"{self.seconds_ours:>8.1f} s {self.seconds_theirs:>6.1f} s{'' if self.agrees else '  WEAKER'}"
        )


def seeded() -> torch.Generator:
    """The same start for every attack of ours."""
    return torch.Generator().manual_seed(0)


def timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What a call gives, and its seconds; of a shared process, so no measure of speed to quote."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def within_ball(task: Task) -> Iterator[tuple[str, str, Attacked, Attacked]]:
    """Attack, peer, and both as calls that give attacked images."""
    model, images, labels, threat = task.model, task.batch.images, task.batch.labels, task.threat
    surrogate = Surrogate(model.module, model.spec.normalization)
    common = (surrogate, images, labels, threat)
    their_norm, eps = THEIR_NORM[task.norm], threat.eps
    peer = model.copy().module
    plan = PgdPlan("pixel", threat, STEPS, 2.5 * eps / STEPS, random_start=False)
    if task.norm == "linf":
        yield "fgsm", "torchattacks", partial(fgsm, *common), partial(torchattacks.FGSM(peer, eps=eps), images, labels)
        theirs = torchattacks.MIFGSM(peer, eps=eps, alpha=eps / STEPS, steps=STEPS)
        yield "mim", "torchattacks", partial(mim, *common, steps=STEPS), partial(theirs, images, labels)
        theirs = torchattacks.PGD(peer, eps=eps, alpha=plan.step_size, steps=STEPS, random_start=False)
        yield "pgd", "torchattacks", partial(pgd, surrogate, images, labels, plan), partial(theirs, images, labels)
    if task.norm == "l2":
        theirs = torchattacks.PGDL2(peer, eps=eps, alpha=plan.step_size, steps=STEPS, random_start=False)
        yield "pgd", "torchattacks", partial(pgd, surrogate, images, labels, plan), partial(theirs, images, labels)
    options: dict[str, Any] = {"norm": their_norm, "eps": eps, "seed": 0, "device": "cpu"}
    large: dict[str, Any] = {"n_iter": STEPS, "use_largereps": task.norm == "l1", **options}
    losses: tuple[tuple[str, LossName], ...] = (("ce", "cross_entropy"), ("dlr", "dlr"))
    for name, loss in losses:
        ours = partial(apgd, *common, steps=STEPS, generator=seeded(), loss=loss, settle=task.settle)
        yield (
            f"apgd-{name}",
            "pyautoattack",
            ours,
            partial(APGDAttack(peer, loss=name, **large).perturb, images, labels),
        )
    targeted = APGDAttack_targeted(peer, n_target_classes=TARGETS, **large)
    yield "apgd-t", "pyautoattack", partial(_all_ranks, task, common), partial(targeted.perturb, images, labels)
    ours = partial(square, model, images, labels, threat, model.spec.normalization, queries=QUERIES, generator=seeded())
    yield (
        "square",
        "pyautoattack",
        ours,
        partial(SquareAttack(peer, n_queries=QUERIES, **options).perturb, images, labels),
    )


def _all_ranks(task: Task, common: tuple[Surrogate, Tensor, Tensor, ThreatModel]) -> Tensor:
    surrogate, images, labels, threat = common
    attacked = images.clone()
    for rank in range(1, TARGETS + 1):
        left = (~task.fooled(attacked)).nonzero()[:, 0]
        attacked[left] = apgd_targeted(
            surrogate,
            images[left],
            labels[left],
            threat,
            steps=STEPS,
            rank=rank,
            generator=seeded(),
            settle=lambda points, positions, left=left: task.settle(points, left[positions]),  # type: ignore[misc]
        ).cpu()
    return attacked


def minimum_norm(task: Task) -> Iterator[tuple[str, str, Searched, Searched]]:
    """Attack, peer, and both as calls that give the norms found."""
    model, images, labels, threat, norm = task.model, task.batch.images, task.batch.labels, task.threat, task.norm
    surrogate = Surrogate(model.module, model.spec.normalization)
    common = (surrogate, images, labels, threat)
    peer = model.copy().module
    bounded = foolbox.PyTorchModel(peer, bounds=(0, 1), device="cpu")

    def ours(attack: Callable[..., MinimumNorm], **options: Any) -> Searched:
        return lambda: task.norms(attack(*common, **options).closest.cpu())

    def theirs(attack: Any) -> Searched:
        return lambda: task.norms(attack.run(bounded, images, labels))

    yield "fab-t", "pyautoattack", partial(_fab, task, common), partial(_their_fab, task, peer)
    attacks = foolbox.attacks
    by_norm = {"linf": attacks.LInfFMNAttack, "l2": attacks.L2FMNAttack, "l1": attacks.L1FMNAttack}
    yield "fmn", "foolbox", ours(fmn, steps=STEPS), theirs(by_norm[norm](steps=STEPS, max_stepsize=FMN_STEP[norm]))
    if norm != "l1":
        deep = attacks.LinfDeepFoolAttack if norm == "linf" else attacks.L2DeepFoolAttack
        yield "deepfool", "foolbox", ours(deepfool), theirs(deep(steps=50, candidates=10))
    if norm == "l2":
        options = {"steps": STEPS, "binary_search_steps": 6}
        their_attack = attacks.L2CarliniWagnerAttack(stepsize=0.1, abort_early=False, **options)
        yield "carlini-wagner", "foolbox", ours(carlini_wagner, steps=STEPS, searches=6), theirs(their_attack)


def _fab(task: Task, common: tuple[Surrogate, Tensor, Tensor, ThreatModel]) -> Tensor:
    found = [
        task.norms(fab_targeted(*common, steps=STEPS, rank=rank, generator=seeded()).closest.cpu())
        for rank in range(1, TARGETS + 1)
    ]
    return torch.stack(found).amin(dim=0)


def _their_fab(task: Task, network: torch.nn.Module) -> Tensor:
    attack = FABAttack_PT(network, norm=THEIR_NORM[task.norm], n_iter=STEPS, eps=RADII[task.norm], device="cpu")
    found = []
    for rank in range(1, TARGETS + 1):
        attack.target_class = rank + 1
        attacked = attack.attack_single_run(task.batch.images, task.batch.labels, is_targeted=True)
        found.append(task.norms(attacked))
    return torch.stack(found).amin(dim=0)


def compare_within(task: Task) -> Iterator[Within]:
    """All attacks within the ball of one norm."""
    n = len(task.batch)
    for attack, peer, ours, theirs in within_ball(task):
        (mine, seconds), (other, their_seconds) = timed(ours), timed(theirs)
        left, their_left = (n - int(task.fooled(attacked.cpu()).sum()) for attacked in (mine, other))
        yield Within(attack, task.norm, peer, left, their_left, n, seconds, their_seconds)


def compare_smallest(task: Task) -> Iterator[Smallest]:
    """All minimum-norm attacks of one norm."""
    for attack, peer, ours, theirs in minimum_norm(task):
        (mine, seconds), (other, their_seconds) = timed(ours), timed(theirs)
        both = mine.isfinite() & other.isfinite()
        low, middle, high = (mine[both] / other[both]).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        yield Smallest(
            attack,
            task.norm,
            peer,
            found_ours=int(mine.isfinite().sum()),
            found_theirs=int(other.isfinite().sum()),
            median_ours=float(mine.median()),
            median_theirs=float(other.median()),
            ratio=(low, middle, high),
            seconds_ours=seconds,
            seconds_theirs=their_seconds,
        )


def shipped_network(count: int) -> tuple[TorchModel, Batch]:
    """`shipped:cnn8` and evaluation images of the embedded sample that it classifies rightly."""
    config = DataConfig(source="sample", evaluation=2 * count)
    split = make_splits(load_source(config), config, seed=0).evaluation
    model = assemble(
        read_model_file(resolve_path(Path("shipped:cnn8"))),
        arch="cnn8",
        class_names=split.images.class_names,
        input_shape=split.images.shape,
        normalization=Normalization((0.5,), (0.5,)),
        dataset="sample",
    )
    batch = next(iter(split.batches(2 * count)))
    right = (model.predict(batch.images).argmax(dim=1) == batch.labels).nonzero()[:count, 0]
    return model, Batch(batch.images[right], batch.labels[right])


def main() -> int:
    """Compare, print, and exit with 1 if one of ours is weaker."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None, help="write the results here")
    arguments = parser.parse_args()
    threads = usable_threads(arguments.threads)
    torch.set_num_threads(threads)
    # pyautoattack warns of zero gradients, which this network has on images that it is certain of
    warnings.simplefilter("ignore")
    model, batch = shipped_network(arguments.images)
    within: list[Within] = []
    smallest: list[Smallest] = []
    for task in (Task(model, batch, norm) for norm in RADII):
        for row in compare_within(task):
            within.append(row)
            print(row, flush=True)
        for found in compare_smallest(task):
            smallest.append(found)
            print(found, flush=True)
    if arguments.json:
        record = {
            "images": len(batch),
            "radii": dict(RADII),
            "steps": STEPS,
            "queries": QUERIES,
            "targets": TARGETS,
            "within_the_ball": [asdict(row) for row in within],
            "minimum_norm": [row.record() for row in smallest],
            "environment": environment_record(threads),
            "peers": {name: version(name) for name in ("foolbox", "pyautoattack", "torchattacks")},
        }
        arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return int(not (all(row.agrees for row in within) and all(found.agrees for found in smallest)))


if __name__ == "__main__":
    raise SystemExit(main())
