"""From an examination to the parts of a report that hold the evidence of robustness."""

from __future__ import annotations

from typing import Any

from toolkit.attacks.threat import PgdPlan
from toolkit.evaluators.examination import Examination
from toolkit.evaluators.probes import Point
from toolkit.reports import schema
from toolkit.reports.schema import Share


def robustness_parts(found: Examination, plan: PgdPlan, attacks: str, checks: tuple[Any, ...] = ()) -> dict[str, Any]:
    """The fields of `schema.Robustness`.

    Args:
        found: what was found.
        plan: of the transfer matrix.
        attacks: as the user asked for them.
        checks: further ones, beside those of the examination.
    """
    every = (*found.checks, *checks)
    probes = found.gradients
    return {
        "robustness": attack_rows(found, plan),
        "columns": [
            schema.ColumnTest(
                attack=column.attack,
                surrogate=column.surrogate,
                first=column.first,
                second=column.second,
                **column.test.as_dict(),
            )
            for column in found.robustness.columns
        ],
        "worst_case": _worst_case(found, attacks),
        "soundness": [
            schema.AlarmRecord(name=check.name, message=check.message, value=check.value, limit=check.limit)
            for check in every
            if check.alarming
        ],
        "soundness_checks": [
            schema.CheckRecord(name=check.name, value=check.value, limit=check.limit, alarm=check.alarming)
            for check in every
        ],
        "fidelity": None if found.fidelity is None else schema.FidelityRecord(**found.fidelity.as_dict()),
        "saturation": [
            schema.SaturationRecord(tensor=row.tensor, clean=row.clean, attacked=row.attacked)
            for row in found.saturation
        ],
        "security_curve": _points(probes.curve if probes else ()),
        "step_ladder": _points(probes.ladder if probes else ()),
    }


def attack_rows(found: Examination, plan: PgdPlan) -> list[schema.Attack]:
    """One row per attack, surrogate and target."""
    unfaithful = found.fidelity is not None and not found.fidelity.valid
    return [
        schema.Attack(
            attack=cell.attack,
            threat=schema.Threat(**plan.record()),
            steps=plan.steps,
            step_size=plan.step_size,
            restarts=plan.restarts,
            random_start=plan.random_start,
            surrogate=cell.surrogate,
            target=cell.target,
            **cell.robust.as_dict(),
            transfer_rate=cell.transfer_rate.value if cell.transfer_rate else None,
            transfer_n=cell.transfer_rate.total if cell.transfer_rate else 0,
            valid=not (unfaithful and cell.surrogate == "twin"),
        )
        for cell in found.robustness.transfers
    ]


def robust_accuracy(found: Examination) -> dict[str, Share]:
    """Worst case by graph, and by the file that the graph that counts reads."""
    shares = {name: Share.of(share) for name, share in found.robustness.worst_case.items()}
    if found.robustness.file is not None:
        shares["deployed_from_file"] = Share.of(found.robustness.file)
    return shares


def _worst_case(found: Examination, attacks: str) -> schema.WorstCase:
    return schema.WorstCase(
        attacks=attacks,
        passes=[
            schema.PassRecord(
                attack=how.attack,
                steps=how.steps,
                ranks=list(how.ranks),
                surrogate=how.surrogate,
                graphs=list(how.graphs),
                attempted=how.attempted,
                fooled=how.fooled,
                onward=how.onward,
                starts=how.starts,
            )
            for how in found.robustness.passes
        ],
        complete=not found.not_run,
        not_run=list(found.not_run),
    )


def _points(points: tuple[Point, ...]) -> list[schema.CurvePoint]:
    return [schema.CurvePoint(eps=point.eps, steps=point.steps, **point.robust.as_dict()) for point in points]
