"""report.md: the report in words that a manager can read, numbers with their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable

from toolkit.evaluators.timing import BUSY
from toolkit.reports.portability import portability_section
from toolkit.reports.robustness import JUDGES, marked, robust_text, robustness_section
from toolkit.reports.schema import (
    Assignment,
    CalibrationComparison,
    Latency,
    Model,
    Quantization,
    Report,
    RobustAccuracy,
    Share,
)
from toolkit.reports.targets import coverage_text, targets_section
from toolkit.reports.words import percent, table, threat_text


def render_markdown(report: Report) -> str:
    """The whole report as Markdown."""
    sections = [
        _headline(report),
        _alarms(report),
        _accuracy(report),
        robustness_section(report, {"fp32": report.robust_accuracy.fp32, **_deployed(report)}),
        _size(report),
        _roundings(report.model),
        _speed(report),
        _integers(report),
        targets_section(report.targets),
        _methods(report.quantization),
        _assignment(report.quantization, report.robust_accuracy),
        _calibrations(report.quantization.calibration_comparison),
        portability_section(report.quantization.elsewhere),
        _parity(report),
        _training(report),
        _gates(report),
        _origin(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _headline(report: Report) -> str:
    before, after = report.baseline, report
    size = report.model.bytes
    fastest = [row for row in report.latency if row.file == "deployed"]
    rows = [
        ("accuracy on clean images", percent(before.accuracy), percent(after.accuracy.deployed)),
        (
            "accuracy under attack",
            f"{percent(before.robust_accuracy)} under PGD alone",
            marked(robust_text(after.robust_accuracy.deployed, report), report),
        ),
        ("parameters", f"{report.model.params.before:,}", f"{report.model.params.after:,}"),
        ("multiply-accumulates per image", f"{report.model.macs.before:,}", f"{report.model.macs.after:,}"),
        ("file size", f"{size.before / 1e6:.2f} MB", f"{size.after / 1e6:.2f} MB"),
        *(_latency_row(report, row) for row in fastest),
    ]
    return (
        f"# {report.model.architecture}, hardened\n\n"
        f"What ships (`model.onnx`) beside the network that came in.\n\n"
        f"{table(('', 'before', 'deployed'), rows)}\n\n"
        f"Attack: {threat_text(report.threat)}; worst case per image over `{report.worst_case.attacks}`. "
        "Intervals are 95 % Wilson intervals. "
        f"The verdict on integers: {report.quantization.verdict}"
    )


def _latency_row(report: Report, row: Latency) -> tuple[str, str, str]:
    original = next((r for r in report.latency if r.file == "original" and r.batch == row.batch), None)
    before = f"{original.p50:.3f} ms" if original else "not measured"
    doubt = " (not to be trusted: see Speed)" if row.foreign_load > BUSY else ""
    return (f"time for {row.batch} image{'s' if row.batch > 1 else ''} (median)", before, f"{row.p50:.3f} ms{doubt}")


def _alarms(report: Report) -> str:
    return "\n".join(f"> **ALARM {alarm.name}**: {alarm.message}" for alarm in report.soundness)


def _accuracy(report: Report) -> str:
    clean = report.accuracy
    shares = {"torch": clean.torch, "fp32": clean.fp32, "deployed": clean.deployed}
    rows = [(JUDGES[name], percent(share)) for name, share in shares.items()]
    return f"## Accuracy and robustness\n\n{table(('graph', 'accuracy on clean images'), rows)}"


def _deployed(report: Report) -> dict[str, Share]:
    robust = report.robust_accuracy
    from_file = {} if robust.deployed_from_file is None else {"deployed_from_file": robust.deployed_from_file}
    return {"deployed": robust.deployed, **from_file}


def _size(report: Report) -> str:
    model = report.model
    rows = [
        (
            layer.name,
            f"{layer.filters.before} → {layer.filters.after}",
            f"{layer.parameters.before:,} → {layer.parameters.after:,}",
            f"{layer.macs.before:,} → {layer.macs.after:,}",
        )
        for layer in model.layers
    ]
    rounding = f"widths rounded to multiples of {model.round_to}" if model.round_to > 1 else "widths not rounded"
    return (
        f"## What was removed\n\nPruned by {model.prune_ratio:g} of the filters per {model.prune_scope} "
        f"(importance: {model.prune_importance}; {rounding}, so a layer's share can differ).\n\n"
        f"{table(('layer', 'filters', 'parameters', 'multiply-accumulates'), rows)}"
    )


def _roundings(model: Model) -> str:
    if not model.roundings:
        return ""
    rows = [
        (
            f"**{row.round_to}**" if row.chosen else row.round_to,
            f"{row.macs:,}",
            f"{row.ratio:.2f} [{row.ratio_low:.2f}, {row.ratio_high:.2f}]",
            f"{row.float_ratio:.2f}",
            f"{row.per_mac:.2f}",
            row.graph,
            "yes" if row.admitted else "no",
        )
        for row in model.roundings
    ]
    header = (
        "multiple",
        "multiply-accumulates",
        "time",
        "float time",
        "time per multiply-accumulate",
        "graph",
        "counts",
    )
    return (
        f"## Widths\n\n{_doubt(model.roundings_foreign_load)}Pruned by the same ratio, with widths rounded to these "
        "multiples, networks were timed side by side on this machine; the one in bold was taken. "
        "Time: over that of widths not rounded, geometric mean over the batch sizes; per multiply-accumulate: "
        "over that of the best of those that count, which keep the "
        f"multiply-accumulates asked for, or are wider in no more time.\n\n{table(header, rows)}"
    )


LATENCY_HEADER = ("file", "batch", "p50", "p90", "p99", "images/s", "ratio")


def latency_cells(rows: Iterable[Latency]) -> list[tuple[object, ...]]:
    """The cells of a latency table under `LATENCY_HEADER`; milliseconds per call."""
    return [
        (
            row.file,
            row.batch,
            f"{row.p50:.3f}",
            f"{row.p90:.3f}",
            f"{row.p99:.3f}",
            f"{row.throughput:,.0f}",
            f"{row.ratio:.3f} [{row.ratio_low:.3f}, {row.ratio_high:.3f}]",
        )
        for row in rows
    ]


def _speed(report: Report) -> str:
    if not report.latency:
        return ""
    first, load = report.latency[0], max(row.foreign_load for row in report.latency)
    return (
        f"## Speed\n\n{_doubt(load)}ONNX Runtime, {first.provider}, {first.threads} thread(s), "
        "files interleaved; milliseconds per call; ratio = time / time of the float twin, below 1 is faster.\n\n"
        f"{table(LATENCY_HEADER, latency_cells(report.latency))}"
    )


def _doubt(load: float | None) -> str:
    """Of times that were taken while others used the CPU."""
    if load is None or load <= BUSY:
        return ""
    return f"> **TIMES ARE NOT TO BE TRUSTED**: other processes took {load:.0%} of the CPU time meanwhile.\n\n"


def _integers(report: Report) -> str:
    found = report.quantization
    times = found.kernel_time.microseconds
    rows = [
        (
            row.layer,
            row.kernel,
            f"{row.macs:,}",
            f"{times[row.layer]:.1f}" if row.layer in times else "-",
            "yes" if row.integer else "no",
        )
        for row in found.layers
    ]
    islands = ", ".join(f"{i.count} {i.operator} ({i.time_share:.1%})" for i in found.kernel_time.float_islands)
    left = ", ".join(f"{count} {name}" for name, count in found.leftovers.items() if count) or "none"
    clipped = (
        "" if found.clipped_share is None else f" Attacked pixels outside the input range: {found.clipped_share:.2%}."
    )
    input_text = (
        ""
        if found.input_range is None
        else f" The input quantiser represents {found.input_range[0]:.3f} to {found.input_range[1]:.3f}.{clipped}"
    )
    learnt = f" but for {found.learnt_ranges} tensors, whose ranges fine-tuning learnt" if found.learnt_ranges else ""
    learnt += f"; channels equalised between {found.equalized} pairs of layers" if found.equalized else ""
    constant = sum(found.constant_channels.values())
    dead = ", ".join(f"{count} read by `{name}`" for name, count in found.constant_channels.items())
    input_text += f" Channels that are constant on the calibration images: {constant} ({dead})." if constant else ""
    return (
        f"## Integer arithmetic\n\nEngine {found.engine}; weights {found.weights}; activations {found.activations}; "
        f"calibration {found.calibration or 'none'} on {found.calibration_images} images{learnt}.{input_text}\n\n"
        f"In the graph after ONNX Runtime's optimisation ({found.provider}): **{found.integer_coverage:.2%}** of the "
        f"multiply-accumulates and {found.kernel_time.integer_share:.1%} of the kernel time run in integers. "
        f"Float islands: {islands or 'none'}. Conversions left: {left}. {coverage_text(found)}".rstrip()
        + "\n\n"
        f"{table(('layer', 'kernel', 'multiply-accumulates', 'microseconds', 'integer'), rows)}"
    )


CALIBRATION_VERDICTS = {
    "helps": "They help: keep the flag.",
    "hurts": "They hurt: leave `--calibrate-adversarial` away.",
    "trades": "They help in one and hurt in the other: choose by what counts more.",
    "no_difference": "No difference can be told: `--calibrate-adversarial` is not worth its time here.",
}


def _methods(found: Quantization) -> str:
    if not found.calibration_methods:
        return ""
    rows = [
        (
            f"**{row.method}**" if row.method == found.calibration else row.method,
            f"{100 * row.accuracy_drop:+.2f}",
            "not measured" if row.robust_drop is None else f"{100 * row.robust_drop:+.2f}",
            f"{row.logit_error:.2e}",
        )
        for row in found.calibration_methods
    ]
    header = ("method", "points of accuracy lost", "of robust accuracy", "mean squared logit error")
    images = found.calibration_methods[0].images
    return (
        f"## Calibration methods\n\nAll layers integer, {images} validation images; the one "
        f"in bold was taken.\n\n{table(header, rows)}"
    )


def _assignment(quantization: Quantization, robust: RobustAccuracy) -> str:
    found = quantization.assignment
    if found is None:
        return ""
    rows = [
        (
            name,
            f"{side.ratio:.2f} [{side.ratio_low:.2f}, {side.ratio_high:.2f}]",
            f"{100 * side.accuracy_drop:+.2f}",
            "not measured" if side.robust_drop is None else f"{100 * side.robust_drop:+.2f}",
        )
        for name, side in (("all", found.all_integer), ("those chosen", found.shipped))
    ]
    header = ("integer layers", "time over float twin", "points of accuracy lost", "of robust accuracy")
    faster = [name for name in found.keep_float if name not in found.for_accuracy]
    kept = [
        f"left float, {why}: {', '.join(f'`{name}`' for name in names)}"
        for why, names in (("because that is faster", faster), ("for accuracy", found.for_accuracy))
        if names
    ]
    return (
        f"## Which layers are integer\n\n{_doubt(found.foreign_load)}{found.tried} choices were written, and timed or "
        f"judged on this machine; {'; '.join(kept) or 'none is faster with a layer left float'}. "
        f"Time: geometric mean over the batch sizes; accuracy: {found.images} validation images, allowed to lose "
        f"{100 * found.max_drop:g} points, robust accuracy in the worst case over PGD on the float network and short "
        "attacks from there on, made for each graph.\n\n"
        f"{table(header, rows)}\n\n{_price_of_accuracy(found)}{_worst_case_lost(found.max_drop, robust)}"
        f"{_sensitivity(found, {row.layer for row in quantization.layers if row.integer})}"
    )


def _sensitivity(found: Assignment, integer: set[str]) -> str:
    """The layers, the most sensitive first; `integer`: those that run in integers."""
    if not found.sensitivity:
        return ""
    rows = [
        (
            row.layer,
            f"{row.relief:.0%}",
            *(
                "not measured" if lost is None else f"{100 * lost:+.2f}"
                for lost in (row.accuracy_drop, row.robust_drop)
            ),
            "integers" if row.layer in integer else "float",
        )
        for row in sorted(found.sensitivity, key=lambda row: -row.relief)
    ]
    header = ("layer", "error gone", "points of accuracy lost", "of robust accuracy", "runs in")
    error = f"the margins of {found.margin_images} attacked images next to the boundary"
    return (
        "\n\n### What the rounding of each layer costs\n\nError: mean square, of "
        f"{error if found.margin_images else 'the clean logits'}, gone with this layer alone in float. Accuracy: "
        f"lost with this layer alone in integers, as above; as far as the time went.\n\n{table(header, rows)}"
    )


def _price_of_accuracy(found: Assignment) -> str:
    """What to type for the graph that accuracy forbade."""
    if not found.for_accuracy:
        return ""
    lost = max(found.all_integer.accuracy_drop, found.all_integer.robust_drop or 0.0)
    return f"`--max-drop {math.ceil(1000 * lost) / 1000:g}` allows what all layers in integers lose here.\n\n"


def _worst_case_lost(allowed: float, robust: RobustAccuracy) -> str:
    """What the search can only estimate, on fewer images and by shorter attacks."""
    images = robust.deployed.total
    lost = (robust.fp32.correct - robust.deployed.correct) / images  # of shares, just as much as allowed would be more
    text = (
        f"In the worst case, on {images} evaluation images, the deployed graph {'loses' if lost >= 0 else 'gains'} "
        f"{100 * abs(lost):.2f} points of robust accuracy against the float twin."
    )
    if lost <= allowed:
        return text
    return (
        f"**{text}** That is more than was allowed: longer attacks make more of how activations are rounded. A smaller "
        "`--max-drop` leaves more layers float."
    )


def _calibrations(found: CalibrationComparison | None) -> str:
    if found is None:
        return ""
    rows = [
        (
            name,
            percent(side.accuracy),
            percent(side.robust_accuracy),
            "not counted" if side.clipped_clean is None else f"{side.clipped_clean:.3%}",
            "not counted" if side.clipped_attacked is None else f"{side.clipped_attacked:.3%}",
        )
        for name, side in (("with (ships)", found.adversarial), ("without", found.plain))
    ]
    tests = [
        f"{name} {test.only_first} images right only with and {test.only_second} only without (p = {test.p_value:.2g})"
        for name, test in (("clean", found.accuracy_test), ("worst case", found.robust_test))
    ]
    header = ("attacked calibration images", "clean", "worst case", "activations clipped, clean", "attacked")
    return (
        f"## Attacked images in calibration\n\n{found.adversarial_images} calibration images ({found.share:.0%}) were "
        f"attacked first. On validation images, {found.attack} made on the float network:\n\n{table(header, rows)}\n\n"
        f"McNemar's exact test: {'; '.join(tests)}. **{CALIBRATION_VERDICTS[found.verdict]}**"
    )


def _parity(report: Report) -> str:
    rows = [
        (row.graph, row.batch_size, f"{row.max_difference:.2e}", f"{row.relative:.2e}", percent(row.agreement))
        for row in report.parity
    ]
    header = ("graph", "batch", "largest logit difference", "relative to spread", "same label")
    text = f"## Agreement with the torch network\n\n{table(header, rows)}"
    if report.end_to_end is not None:
        found = report.end_to_end
        text += (
            f"\n\n`model.e2e.onnx` against torchvision's preprocessing on {found.files} encoded images: largest "
            f"difference of a probability {found.max_difference:.2e}, same label {percent(found.agreement)}; with "
            f"the pixels handed over without loss {found.lossless_difference:.2e} and "
            f"{percent(found.lossless_agreement)}."
        )
    return text


def _training(report: Report) -> str:
    tuning = report.finetuning
    if not tuning.epochs:
        return "## Fine-tuning\n\nNone."
    rows = [
        (e.epoch, f"{e.loss:.4f}", percent(e.accuracy), percent(e.robust) if e.robust else "not measured")
        for e in tuning.epochs
    ]
    rounded = (
        f" Quantisation-aware: {_rounded_part(tuning.qat_from)}, on weights and activations rounded as in `model.onnx`."
        if tuning.qat
        else ""
    )
    return (
        f"## Fine-tuning\n\nObjective {tuning.objective}, {tuning.precision}; epoch {tuning.best_epoch} was kept "
        f"(the last that is not clearly worse than the best on the validation images).{rounded}\n\n"
        f"{table(('epoch', 'loss', 'validation, clean', 'validation, attacked'), rows)}"
    )


def _rounded_part(begins: float | None) -> str:
    """Which part of the fine-tuning rounded; None: a report of before it could be set."""
    if begins == 0:
        return "all of it computed, and was attacked"
    part = "its last part" if begins is None else f"its last {1 - begins:.0%}"
    return f"{part} (epochs before that are not kept) computed, and was attacked"


def _gates(report: Report) -> str:
    if not report.gates:
        return ""
    rows = [(g.name, f"{g.limit:.4f}", f"{g.value:.4f}", "met" if g.met else "**not met**") for g in report.gates]
    return f"## Limits set by the user\n\n{table(('limit', 'at least', 'measured', ''), rows)}"


def _origin(report: Report) -> str:
    data, machine = report.data, report.environment
    came = (
        "The network that came in was trained on none of the calibration, validation and evaluation images."
        if data.incoming_training == "known"
        else "What the network that came in was trained on is unknown: its file does not say."
    )
    parts = ("train", "calibration", "validation", "evaluation")
    rows = [(name, getattr(data, name).images, f"`{getattr(data, name).sha256[:16]}`") for name in parts]
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.timings.items())
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    return (
        f"## Where this comes from\n\nData set `{data.source}`; evaluation images: {data.evaluation_choice}. Parts are "
        f"disjoint by image hash; {data.dropped_duplicates} duplicate(s) dropped. {came}\n\n"
        f"{table(('part', 'images', 'SHA-256 of the set'), rows)}\n\n"
        f"Machine: {machine.get('cpu', 'unknown')}, {machine.get('threads', '?')} thread(s). "
        f"Seed {report.seed}. Versions: {versions}. Stages: {stages}."
    )
