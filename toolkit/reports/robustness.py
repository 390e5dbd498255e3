"""The evidence of robustness in words: transfer matrix, worst case, security curve, twin, saturation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from toolkit.reports import schema
from toolkit.reports.schema import Attack, Robustness, Share
from toolkit.reports.words import percent, table

SURROGATES = {
    "original": "network that came in",
    "float": "float network",
    "fake_quantised": "fake-quantised network",
    "twin": "twin of the deployed graph",
}
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


def robust_text(share: Share, found: Robustness) -> str:
    """Robust accuracy in words; where something was not run it is an upper bound, and says so."""
    return percent(share) + ("" if found.worst_case.complete else " UNFINISHED")


def _headline(found: Robustness, robust: Mapping[str, Share]) -> str:
    rows = [(JUDGES[name], marked(robust_text(share, found), found)) for name, share in robust.items()]
    unfinished = (
        ""
        if found.worst_case.complete
        else "\n\n> Not run, so that robust accuracy may be lower: " + "; ".join(found.worst_case.not_run)
    )
    return (
        "### Robust accuracy\n\nShare of all images that a graph classifies rightly, clean and under every attack: the "
        f"worst case per image over all surrogates and attacks (`{found.worst_case.attacks}`).\n\n"
        f"{table(('graph', 'robust accuracy'), rows)}{unfinished}"
    )


Matrix = tuple[tuple[str, ...], Rows]
"""Header and rows: one row a surrogate, one column a target."""


def matrix_rows(found: Robustness) -> Matrix:
    """Accuracy that the attack made on each surrogate leaves each target."""
    return _matrix_of(found, _left)


def transfer_rows(found: Robustness) -> Matrix:
    """Of the images that fooled each surrogate, the share that fools each target."""
    return _matrix_of(found, lambda cell: "-" if cell.transfer_rate is None else _rate(cell))


def _matrix_of(found: Robustness, text: Callable[[Attack], str]) -> Matrix:
    targets = list(dict.fromkeys(cell.target for cell in found.robustness))
    surrogates = list(dict.fromkeys(cell.surrogate for cell in found.robustness))
    cells = {(cell.surrogate, cell.target): cell for cell in found.robustness}
    rows = [
        (
            SURROGATES[surrogate],
            *(text(cells[surrogate, target]) if (surrogate, target) in cells else "-" for target in targets),
        )
        for surrogate in surrogates
    ]
    return ("made on", *(JUDGES[target] for target in targets)), rows


def _left(cell: Attack) -> str:
    interval = f"[{100 * cell.low:.1f}, {100 * cell.high:.1f}]"
    return f"{cell.value:.2%} {interval}{'' if cell.valid else ' INVALID'}"


def _rate(cell: Attack) -> str:
    return f"{cell.transfer_rate:.1%} of {cell.transfer_n}"


def plan_text(cell: Attack) -> str:
    """The attack of the transfer matrix in words."""
    start = "from the image itself"
    if cell.random_start:
        start = (
            "from one random start" if cell.restarts == 1 else f"from {cell.restarts} random starts, the worst counts"
        )
    steps = f"in steps of {cell.step_size:.4g}" if cell.steps > 1 else f"in one step of {cell.step_size:.4g}"
    return f"{cell.attack} {steps} {start}, all steps on all {cell.total} images"


def _matrix(found: Robustness) -> str:
    if not found.robustness:
        return ""
    text = (
        f"### Transfer matrix\n\nThe attack ({plan_text(found.robustness[0])}) was made on the network of each row and "
        "scored on the graph of each column.\n\nAccuracy that is left, with its 95 % interval in percent:\n\n"
        f"{table(*matrix_rows(found))}\n\nHow many of the images that fooled the attacked network fool the graph "
        f"too:\n\n{table(*transfer_rows(found))}"
    )
    if not found.columns:
        return text
    return (
        f"{text}\n\nImages that only the first or only the second of two neighbouring columns classifies rightly, and "
        f"the p-value of McNemar's exact test:\n\n{table(*_column_rows(found))}"
    )


def _column_rows(found: Robustness) -> Matrix:
    pairs = list(dict.fromkeys((column.first, column.second) for column in found.columns))
    cells = {(column.surrogate, column.first, column.second): column for column in found.columns}
    rows = [
        (
            SURROGATES[surrogate],
            *(
                f"{cell.only_first} : {cell.only_second} (p = {cell.p_value:.2g})"
                for cell in (cells[surrogate, *pair] for pair in pairs)
            ),
        )
        for surrogate in dict.fromkeys(column.surrogate for column in found.columns)
    ]
    return ("made on", *(f"{JUDGES[first]} : {JUDGES[second]}" for first, second in pairs)), rows


def pass_rows(found: Robustness) -> Rows:
    """What every attack of the worst case came to."""
    return [
        (
            f"{record.attack}-{record.steps}{f' x {record.starts}' if record.starts > 1 else ''}"
            f"{' onward' if record.onward else ''}",
            SURROGATES[record.surrogate] if record.surrogate else "the graph, by queries",
            ", ".join(JUDGES[graph] for graph in record.graphs),
            _classes(record.ranks),
            str(record.attempted),
            str(record.fooled),
        )
        for record in found.worst_case.passes
    ]


def _classes(ranks: Sequence[int]) -> str:
    """Ranks follow each other."""
    if not ranks:
        return "any"
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


PASS_HEADER = ("attack-steps", "made on", "to fool", "likeliest classes", "images tried", "newly fooled")


def _worst_case(found: Robustness) -> str:
    if not found.worst_case.passes:
        return ""
    return (
        "### Beyond the matrix\n\nFurther attacks, cheap ones first, each made for the graphs that it is `to fool` on "
        "the networks whose attacks fool them most, on the images that still stand; `newly fooled` counts those of the "
        "first graph named. Long attacks leave out images that short ones did not bring near the boundary; targeted "
        "ones aim at the image's so-many-th likeliest other classes; one `onward` begins around where those before "
        "it are stuck, `x 3` from three random points there.\n\n"
        f"{table(PASS_HEADER, pass_rows(found))}"
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
        "### Over the radius and the number of steps\n\nPGD alone, made on the network whose attacks transfer best; "
        "the last radius lets it do nearly anything.\n\n"
        f"{table(header, curve_rows(found.security_curve))}\n\n{table(header, curve_rows(found.step_ladder))}"
    )


def twin_text(found: Robustness) -> str:
    """How faithful the twin is, in a sentence."""
    twin = found.fidelity
    if twin is None:
        return ""
    attacked = "" if twin.agreement_attacked is None else f", under attack {percent(twin.agreement_attacked)}"
    validity = "" if twin.valid else " Figures of attacks made on it are INVALID."
    difference = "logits differ without bound"
    if twin.max_difference is not None and twin.relative is not None:
        difference = f"largest logit difference {twin.max_difference:.2g}, {twin.relative:.2g} of their spread"
    return (
        f"the twin of the deployed graph gives the same label on {percent(twin.agreement_clean)} of the clean images"
        f"{attacked}; {difference}.{validity}"
    )


def _twin(found: Robustness) -> str:
    text = twin_text(found)
    return f"### Fidelity\n\n{text[0].upper()}{text[1:]}" if text else ""


def _saturation(found: Robustness) -> str:
    if not found.saturation:
        return ""
    listed = [row for row in found.saturation if max(row.clean, row.attacked) > SATURATED]
    rows = [(f"`{row.tensor}`", f"{row.clean:.3%}", f"{row.attacked:.3%}") for row in listed]
    shown = (
        table(("tensor", "clean", "attacked"), rows) if rows else f"No tensor has more than {SATURATED:.2%} clipped."
    )
    return (
        f"### Saturation\n\nShare of values that a quantiser clips; {len(found.saturation)} tensors are "
        f"quantised.\n\n{shown}"
    )


def _checks(found: Robustness) -> str:
    rows = [
        (check.name, f"{check.value:.4g}", f"{check.limit:.4g}", "**ALARM**" if check.alarm else "passed")
        for check in found.soundness_checks
    ]
    note = "Shares of the images, but for `end_to_end_differs`, which is a probability."
    return f"### Checks\n\n{note}\n\n{table(('check', 'value', 'at most', ''), rows)}" if rows else ""
