"""`toolkit simulate`: what other precisions would cost in accuracy and robustness, without a graph that has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from toolkit.attacks.threat import PgdPlan
from toolkit.config import SimulateRunConfig
from toolkit.errors import ToolkitError
from toolkit.evaluators.environment import environment_record
from toolkit.evaluators.simulation import SimulatedPrecision, parse_bits, simulate
from toolkit.paths import public_name
from toolkit.prepare import prepare_attack
from toolkit.reports.schema import Threat
from toolkit.reports.words import threat_text

HEADER = ("SIMULATED bits", "clean", "under attack", "made on it", "made on float")
WORDS = "SIMULATED: the torch network rounded and computed in floats; no integer kernel ran and no file was written"


@dataclass(frozen=True)
class Simulation:
    """All precisions of one network, on the same images."""

    model: str
    data: str
    plan: PgdPlan
    per_channel: bool
    rows: tuple[SimulatedPrecision, ...]
    environment: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for --json."""
        plan = self.plan
        return {
            "simulated": True,
            "what": WORDS,
            "model": self.model,
            "data": self.data,
            "images": self.rows[0].clean.total,
            "threat": plan.record(),
            "attack": {
                "name": f"pgd-{plan.steps}",
                "step_size": plan.step_size,
                "restarts": plan.restarts,
                "random_start": plan.random_start,
            },
            "weights": "symmetric per channel" if self.per_channel else "symmetric per tensor",
            "rows": [row.as_dict() for row in self.rows],
            "environment": self.environment,
        }

    @property
    def cells(self) -> list[tuple[str, ...]]:
        """The cells of a table under `HEADER`; bits are those of weights and activations."""
        return [
            (
                "float" if row.bits.floating else row.bits.label,
                str(row.clean),
                str(row.robust),
                f"{row.robust_own.value:.2%}",
                f"{row.robust_transfer.value:.2%}",
            )
            for row in self.rows
        ]

    @property
    def caption(self) -> str:
        """What the table shows, in words."""
        weights = "one scale per channel" if self.per_channel else "one scale per tensor"
        return (
            f"{WORDS}\n{self.model} on {self.data}, {self.rows[0].clean.total} images; bits of weights/activations, "
            f"weights with {weights}\npgd-{self.plan.steps}, {threat_text(Threat(**self.plan.record()))}"
        )


def run_simulation(config: SimulateRunConfig) -> Simulation:
    """Simulate every precision that `config.bits` names.

    Raises:
        ToolkitError: bad input, as `prepare_attack`; no bits, or bits that cannot be simulated.
    """
    wanted = [parse_bits(text) for text in config.bits]
    if not wanted:
        raise ToolkitError("--bits names no precision", found="an empty list", fix="as in --bits 16,8,4,2,1")
    prepared = prepare_attack(config)
    rows = simulate(
        prepared.model,
        prepared.splits.calibration,
        prepared.splits.evaluation,
        wanted,
        prepared.plan,
        per_channel=config.per_channel,
        seed=config.seed,
    )
    return Simulation(
        config.model.path.name,
        public_name(prepared.source.name),
        prepared.plan,
        config.per_channel,
        rows,
        dict(environment_record(prepared.threads)),
    )
