"""What changes elsewhere, as a part of the report and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from toolkit.evaluators.portability import LIMIT, Elsewhere, Portability
from toolkit.reports import schema
from toolkit.reports.schema import ElsewhereRow, Share
from toolkit.reports.words import table

HEADER = ("where", "labels that change", "attacked", "largest logit difference", "accuracy", "attacked", "what else")
SETTINGS: Mapping[str, str] = {
    "unoptimised": "here, without graph optimisation",
    "without_vnni": "x86 without VNNI (emulated)",
    "with_vnni": "x86 with VNNI (emulated)",
    "opset": "opset",
    "reduce_range": "written anew: weights of 7 bits (--reduce-range)",
    "reduce_range_without_vnni": "the same on x86 without VNNI (emulated)",
    "s8s8": "written anew: symmetric int8 activations (TensorRT, ARM)",
    "float_bias": "written anew: float biases",
}


def portability_record(found: Portability | None) -> schema.Portability | None:
    """The part of the report."""
    if found is None:
        return None
    return schema.Portability(
        images=found.images,
        attacked=found.attacked,
        accuracy=Share.of(found.accuracy),
        robust_accuracy=None if found.robust_accuracy is None else Share.of(found.robust_accuracy),
        rows=[_row(row) for row in found.rows],
        layers=[
            schema.LayerOverflow(
                layer=row.layer, operator=row.operator, pairs=row.pairs, overflows=row.overflows, share=row.share
            )
            for row in found.layers
        ],
        spared=[schema.SparedLayer(layer=row.layer, reason=row.reason) for row in found.spared],
        twin_agreement=None if found.twin_agreement is None else Share.of(found.twin_agreement),
        saturates_here=found.saturates_here,
    )


def _row(row: Elsewhere) -> ElsewhereRow:
    names = ("changed", "changed_attacked", "accuracy", "robust_accuracy")
    shares = {name: None if (share := getattr(row, name)) is None else Share.of(share) for name in names}
    return ElsewhereRow(
        setting=row.setting,
        opset=row.opset,
        max_difference=row.max_difference,
        integer_coverage=row.integer_coverage,
        overflows=row.overflows,
        warning=row.warns,
        note=row.note,
        **shares,
    )


def elsewhere_rows(found: schema.Portability) -> list[tuple[str, ...]]:
    """Cells under `HEADER`; opsets that change nothing share a row."""
    same = [row for row in found.rows if row.setting == "opset" and row.changed and _unchanged(row)]
    rows = []
    for row in found.rows:
        if row in same[1:]:
            continue
        name = SETTINGS[row.setting]
        if row in same:
            name = f"opset {_span([one.opset or 0 for one in same])}"
        elif row.setting == "opset":
            name = f"opset {row.opset}"
        rows.append((name, *_cells(row)))
    return rows


def _unchanged(row: ElsewhereRow) -> bool:
    shares = [share for share in (row.changed, row.changed_attacked) if share is not None]
    return all(share.correct == 0 for share in shares) and row.max_difference == 0


def _span(opsets: Sequence[int]) -> str:
    whole = opsets == list(range(opsets[0], opsets[-1] + 1)) and len(opsets) > 2
    return f"{opsets[0]} to {opsets[-1]}" if whole else ", ".join(map(str, opsets))


def _cells(row: ElsewhereRow) -> tuple[str, ...]:
    if row.changed is None:
        return ("not measured", "", "", "", "", row.note)
    more = []
    if row.overflows is not None:
        more.append(f"{row.overflows:,} overflows")
    if row.integer_coverage is not None:
        more.append(f"integer coverage {row.integer_coverage:.2%}")
    return (
        _count(row.changed),
        _count(row.changed_attacked),
        f"{row.max_difference:.2e}",
        _value(row.accuracy),
        _value(row.robust_accuracy),
        ", ".join(more),
    )


def _count(share: Share | None) -> str:
    return "not measured" if share is None else f"{share.correct} ({share.value:.2%}, at most {share.high:.2%})"


def _value(share: Share | None) -> str:
    return "not measured" if share is None else f"{share.value:.2%}"


def overflow_rows(found: schema.Portability) -> list[tuple[str, ...]]:
    """Cells: layer, sums of pairs, overflows, share; the layers whose kernels do not saturate with the reason."""
    counted = [(row.layer, f"{row.pairs:,}", f"{row.overflows:,}", f"{row.share:.2e}") for row in found.layers]
    return [*counted, *((row.layer, "none", "", row.reason) for row in found.spared)]


OVERFLOW_HEADER = ("layer", "sums of two products", "overflows", "share")


def warnings(found: schema.Portability | None) -> list[str]:
    """Lines on settings under which the very graph that ships answers otherwise."""
    if found is None:
        return []
    lines = []
    for row in found.rows:
        if row.warning and row.changed is not None:
            where = f"under opset {row.opset}" if row.setting == "opset" else SETTINGS[row.setting]
            attacked = "" if row.changed_attacked is None else f", attacked {_count(row.changed_attacked)}"
            cure = _cure(found) if row.setting in ("without_vnni", "with_vnni") else ""
            lines.append(
                f"{where}: {_count(row.changed)} of the labels change{attacked}; more than {LIMIT:.1%} are "
                f"too many{cure}"
            )
    return lines


def _cure(found: schema.Portability) -> str:
    """What weights of seven bits would do there."""
    there = next((row for row in found.rows if row.setting == "reduce_range_without_vnni"), None)
    if there is None or there.accuracy is None or there.overflows is None:
        return ""
    cost = 100 * (found.accuracy.value - there.accuracy.value)
    return (
        f"; for machines without VNNI --reduce-range leaves {there.overflows:,} overflows and costs {cost:+.2f} points "
        "of clean accuracy"
    )


def portability_section(found: schema.Portability | None) -> str:
    """The section of report.md; nothing where nothing was measured."""
    if found is None:
        return ""
    attacked = f" and {found.attacked} attacked" if found.attacked else ""
    doubts = "".join(f"> **WARNING**: {line}.\n\n" for line in warnings(found))
    text = (
        f"## Elsewhere\n\n{doubts}Labels against those of `model.onnx` on this machine's CPU, {found.images} clean"
        f"{attacked} evaluation images (PGD on the float network).\n\n{table(HEADER, elsewhere_rows(found))}"
    )
    if not found.layers and not found.spared:
        return text
    here = " **This machine is one of them.**" if found.saturates_here else ""
    faithful = found.twin_agreement
    sums = "It" if found.saturates_here else "With exact sums it"
    same = "" if faithful is None else f" {sums} gives {faithful.value:.2%} of the session's labels."
    return (
        f"{text}\n\nOn x86 without VNNI two neighbouring products are summed in 16 bits, with saturation.{here} The "
        f"emulation computes what such a machine does from the weights and the images' activations.{same}\n\n"
        f"{table(OVERFLOW_HEADER, overflow_rows(found))}"
    )
