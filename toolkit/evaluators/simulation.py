"""Other precisions than int8, SIMULATED: the torch network rounded to so many bits and computed in floats.

No integer kernel runs and no file is written; what a real graph of the same bits does is another question, which
`toolkit quantize` answers where ONNX Runtime has such types. It is what papers sweep: 16, 8, 4, 2 and 1 bit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from toolkit.artifacts import Batch, Proportion, Split, TorchModel
from toolkit.attacks.forms import Precision
from toolkit.attacks.planned import PlannedAttack
from toolkit.attacks.surrogate import resolve_precision
from toolkit.attacks.threat import PgdPlan
from toolkit.config import PrecisionChoice
from toolkit.errors import ToolkitError
from toolkit.evaluators.accuracy import correct
from toolkit.evaluators.fake_quantised import MAX_BITS, fake_quantise
from toolkit.progress import task
from toolkit.statistics import Mcnemar, mcnemar

FLOAT_BITS = 32


@dataclass(frozen=True, slots=True)
class Bits:
    """How many bits a weight and an activation have; 32: they stay float."""

    weights: int
    activations: int

    @property
    def label(self) -> str:
        """As the command line writes it, weights first."""
        return f"{self.weights}/{self.activations}"

    @property
    def floating(self) -> bool:
        """Nothing is rounded."""
        return self.weights == self.activations == FLOAT_BITS


def parse_bits(text: str) -> Bits:
    """`8`: weights and activations of 8 bits; `4/8`: weights of 4; `4/32`: weights alone, activations stay float.

    Raises:
        ToolkitError: no such number of bits.
    """
    found = re.fullmatch(r"(\d+)(?:/(\d+))?", text.strip())
    numbers = [int(part) for part in found.groups(default=found[1])] if found else []
    if not numbers or any(not (1 <= number <= MAX_BITS or number == FLOAT_BITS) for number in numbers):
        raise ToolkitError(
            "--bits names a precision that cannot be simulated",
            found=f"'{text}'",
            fix=f"give 1 to {MAX_BITS} bits, or {FLOAT_BITS} for float, as in --bits 16,8,4,2,1 or, for weights and "
            f"activations apart, --bits 4/8,8/{FLOAT_BITS}",
        )
    return Bits(*numbers)


@dataclass(frozen=True)
class SimulatedPrecision:
    """What the network is worth when its weights and activations are rounded to so many bits."""

    bits: Bits
    clean: Proportion
    robust: Proportion
    """Right when clean and under PGD made on this network and on the float network (the worse of both, per image)."""
    robust_own: Proportion
    """Right when clean and under PGD made on this network alone, straight through the rounding."""
    robust_transfer: Proportion
    """Right when clean and under PGD made on the float network alone."""
    clean_test: Mcnemar
    """First: the float network; second: this one."""
    robust_test: Mcnemar

    def as_dict(self) -> dict[str, Any]:
        """Plain data; it says of itself that it is simulated."""
        shares = ("clean", "robust", "robust_own", "robust_transfer")
        return {
            "bits": self.bits.label,
            "simulated": not self.bits.floating,
            **{name: getattr(self, name).as_dict() for name in shares},
            "clean_test": self.clean_test.as_dict(),
            "robust_test": self.robust_test.as_dict(),
        }


def simulate(
    model: TorchModel,
    calibration: Split,
    evaluation: Split,
    wanted: Sequence[Bits],
    plan: PgdPlan,
    *,
    per_channel: bool = True,
    seed: int = 0,
    precision: PrecisionChoice = "auto",
) -> tuple[SimulatedPrecision, ...]:
    """Clean and robust accuracy of the float network and of its fake-quantised forms, all on the same images.

    Every form has the plan's PGD made on itself, and that made on the float network: coarse rounding masks gradients,
    and the attack on the form alone would then flatter it. Rounded once, never trained again.

    Args:
        model: a float network, pruned and tuned as it may be.
        calibration: images that set the activations' ranges.
        evaluation: images, all of which are attacked with all steps; streamed.
        wanted: the precisions; the float network is put in front of them.
        plan: threat model and schedule.
        per_channel: weights have a scale per output channel.
        seed: of random starts.
        precision: of the gradients; every score is taken in float32.

    Raises:
        ToolkitError: a network without layers to round, or whose activations are not finite.
    """
    plain = Bits(FLOAT_BITS, FLOAT_BITS)
    margin = plan.threat.margin(model.spec.normalization)
    order = list(dict.fromkeys((plain, *wanted)))
    forms = [_form(model, calibration, bits, per_channel, margin) for bits in order]
    how = resolve_precision(precision)
    rounding: Precision = "autocast" if how == "bfloat16" else how
    attack = PlannedAttack(model, plan, seed=seed, precision=how)
    rows = [
        _Row(form, None if bits.floating else PlannedAttack(form, plan, seed=seed, precision=rounding))
        for bits, form in zip(order, forms, strict=True)
    ]
    with task(f"pgd-{plan.steps} on {len(rows)} precisions", len(evaluation) * len(rows)) as bar:
        for number, batch in enumerate(evaluation.batches()):
            transferred = [attack.attack(batch, number, restart) for restart in range(plan.restarts)]
            for row in rows:
                row.score(batch, transferred, number)
                bar.advance(len(batch))
    return tuple(row.result(bits, rows[0]) for bits, row in zip(order, rows, strict=True))


def _form(model: TorchModel, calibration: Split, bits: Bits, per_channel: bool, margin: float) -> TorchModel:
    if bits.floating:
        return model
    weights, activations = (None if count == FLOAT_BITS else count for count in (bits.weights, bits.activations))
    return fake_quantise(
        model, calibration, weight_bits=weights, activation_bits=activations, per_channel=per_channel, margin=margin
    )


@dataclass
class _Row:
    """One precision while it is scored."""

    form: TorchModel
    attack: PlannedAttack | None
    """Of its own; None: that of the float network is its own."""
    flags: dict[str, list[Tensor]] = field(default_factory=dict)

    def score(self, batch: Batch, transferred: list[Tensor], number: int) -> None:
        own = (
            transferred
            if self.attack is None
            else [self.attack.attack(batch, number, restart) for restart in range(len(transferred))]
        )
        clean = correct(self.form, batch.images, batch.labels)
        found = {"clean": clean}
        for name, attacked in (("robust_own", own), ("robust_transfer", transferred)):
            found[name] = clean.clone()
            for images in attacked:
                found[name] &= correct(self.form, images, batch.labels)
        found["robust"] = found["robust_own"] & found["robust_transfer"]
        for name, flags in found.items():
            self.flags.setdefault(name, []).append(flags)

    def all(self, name: str) -> Tensor:
        return torch.cat(self.flags[name])

    def result(self, bits: Bits, reference: _Row) -> SimulatedPrecision:
        shares = {name: Proportion.of(self.all(name)) for name in self.flags}
        tests = {f"{name}_test": mcnemar(reference.all(name), self.all(name)) for name in ("clean", "robust")}
        return SimulatedPrecision(bits, **shares, **tests)  # type: ignore[arg-type]  # names are the fields'
