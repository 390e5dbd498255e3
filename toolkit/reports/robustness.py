"""The evidence of robustness in words: transfer matrix, worst case, security curve, twin, saturation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from toolkit.reports import schema
from toolkit.reports.schema import Attack, Robustness, Share
from toolkit.reports.words import percent, table

JUDGES = {
    "torch": "torch",
    "fp32": "float twin",
    "deployed": "deployed",
    "deployed_unoptimised": "deployed, unoptimised",
    "deployed_from_file": "deployed, from 8-bit PNG files",
}
SATURATED = 1e-4
"""Share of clipped values below which a tensor is not listed."""
Rows = list[tuple[str, ...]]


def marked(figure: str, found: Robustness) -> str:
    """A robustness figure with the alarms that doubt it right beside it."""
    return figure + "".join(f" **ALARM {alarm.name}**" for alarm in found.soundness)


def robustness_section(found: Robustness, robust: Mapping[str, Share]) -> str:
    """The evidence as Markdown.

    Args:
        found: the evidence.
        robust: worst case by judge.
    """
    parts = [
        _headline(found, robust),
        _matrix(found),
        _worst_case(found),
        _curve(found),
        _twin(found),
        _saturation(found),
        _checks(found),
    ]
    return "\n\n".join(part for part in parts if part)


def _headline(found: Robustness, robust: Mapping[str, Share]) -> str:
    rows = [(JUDGES[name], marked(percent(share), found)) for name, share in robust.items()]
    unfinished = (
        ""
        if found.worst_case.complete
        else "\n\n> The time that was set did not suffice for: " + "; ".join(found.worst_case.not_run)
    )
    return (
        "### Robust accuracy\n\nShare of all images that a graph classifies rightly, clean and under every attack: the "
        f"worst case per image over all surrogates and attacks (`{found.worst_case.attacks}`).\n\n"
        f"{table(('graph', 'robust accuracy'), rows)}{unfinished}"
    )


def matrix_rows(found: Robustness) -> tuple[tuple[str, ...], Rows]:
    """Header and rows of the transfer matrix: one row a surrogate, one column a target."""
    targets = list(dict.fromkeys(cell.target for cell in found.robustness))
    surrogates = list(dict.fromkeys(cell.surrogate for cell in found.robustness))
    cells = {(cell.surrogate, cell.target): cell for cell in found.robustness}
    rows = [
        (surrogate, *(_cell(cells[surrogate, target]) for target in targets if (surrogate, target) in cells))
        for surrogate in surrogates
    ]
    return ("made on", *(JUDGES[target] for target in targets)), rows


def _cell(cell: Attack) -> str:
    rate = "" if cell.transfer_rate is None else f", {cell.transfer_rate:.1%} of {cell.transfer_n} transfer"
    return f"{cell.value:.2%} [{cell.low:.2%}, {cell.high:.2%}]{rate}{'' if cell.valid else ' **INVALID**'}"


def _matrix(found: Robustness) -> str:
    if not found.robustness:
        return ""
    first = found.robustness[0]
    header, rows = matrix_rows(found)
    tests = [
        (
            column.surrogate,
            f"{JUDGES[column.first]} : {JUDGES[column.second]}",
            f"{column.only_first} : {column.only_second}",
            f"{column.p_value:.3g}",
        )
        for column in found.columns
    ]
    return (
        f"### Transfer matrix\n\n{first.attack}, {first.steps} steps of {first.step_size:.4g}, {first.restarts} "
        f"start(s), all steps on all {first.total} images; accuracy that is left, and how many of the images that "
        f"fooled the surrogate fool the graph.\n\n{table(header, rows)}\n\n"
        "McNemar's exact test between neighbouring columns: images on which only one of the two is right.\n\n"
        f"{table(('made on', 'graphs', 'only first : only second right', 'p'), tests)}"
    )


def pass_rows(found: Robustness) -> Rows:
    """What every attack of the worst case came to; targeted ones in one row."""
    rows: dict[tuple[str, str], list[schema.PassRecord]] = {}
    for record in found.worst_case.passes:
        where = record.surrogate or "the deployed graph's answers"
        rows.setdefault((f"{record.attack}-{record.steps}", where), []).append(record)
    return [
        (
            attack,
            where,
            str(len(records)) if records[0].rank else "-",
            str(records[0].attempted),
            str(sum(record.fooled for record in records)),
        )
        for (attack, where), records in rows.items()
    ]


PASS_HEADER = ("attack", "made on", "target classes", "images left", "fooled anew")


def _worst_case(found: Robustness) -> str:
    if not found.worst_case.passes:
        return ""
    return (
        "### Beyond the matrix\n\nOn the images that some graph still classified rightly, cheap attacks first; an "
        f"image is dropped only once the deployed graph itself is fooled.\n\n{table(PASS_HEADER, pass_rows(found))}"
    )


def curve_rows(points: Sequence[schema.CurvePoint]) -> Rows:
    """Radius, steps and accuracy of every point."""
    return [
        (f"{point.eps:.4g}", str(point.steps), f"{point.value:.2%} [{point.low:.2%}, {point.high:.2%}]")
        for point in points
    ]


def _curve(found: Robustness) -> str:
    if not found.security_curve:
        return ""
    header = ("eps", "steps", f"deployed (n={found.security_curve[0].total})")
    return (
        f"### Over the radius and the number of steps\n\n{table(header, curve_rows(found.security_curve))}\n\n"
        f"{table(header, curve_rows(found.step_ladder))}"
    )


def twin_text(found: Robustness) -> str:
    """How faithful the twin is, in a sentence."""
    twin = found.fidelity
    if twin is None:
        return ""
    attacked = "" if twin.agreement_attacked is None else f", under attack {percent(twin.agreement_attacked)}"
    validity = "" if twin.valid else " Figures of attacks made on it are INVALID."
    return (
        f"the twin of the deployed graph gives the same label on {percent(twin.agreement_clean)} of the clean images"
        f"{attacked}; largest logit difference {twin.max_difference:.2e}, {twin.relative:.2e} of their "
        f"spread.{validity}"
    )


def _twin(found: Robustness) -> str:
    text = twin_text(found)
    return f"### Fidelity\n\n{text[0].upper()}{text[1:]}" if text else ""


def _saturation(found: Robustness) -> str:
    if not found.saturation:
        return ""
    listed = [row for row in found.saturation if max(row.clean, row.attacked) > SATURATED]
    rows = [(f"`{row.tensor}`", f"{row.clean:.3%}", f"{row.attacked:.3%}") for row in listed]
    shown = table(("tensor", "clean", "attacked"), rows) if rows else f"None above {SATURATED:.2%}."
    return f"### Saturation\n\nShare of values that a quantiser clips, of {len(found.saturation)}.\n\n{shown}"


def _checks(found: Robustness) -> str:
    rows = [
        (check.name, f"{check.value:.4g}", f"{check.limit:.4g}", "**ALARM**" if check.alarm else "passed")
        for check in found.soundness_checks
    ]
    return f"### Checks\n\n{table(('check', 'value', 'at most', ''), rows)}" if rows else ""
