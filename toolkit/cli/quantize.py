"""An integer ONNX file, and what there is to say of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit.cli import flags
from toolkit.cli.app import Force, Json, Quiet, Settings, Verbose, app, start
from toolkit.cli.printing import table
from toolkit.config import DataConfig, HardenConfig, MachineConfig, ModelConfig, QuantizeConfig, ThreatConfig, build

if TYPE_CHECKING:
    from toolkit.evaluators.debugger import Explanation
    from toolkit.reports.schema import Portability
    from toolkit.stages import QuantizedFile
    from toolkit.targets import TargetResult

THREAT = tuple(flag for flag in flags.THREAT if flag.name != "--restarts")
"""The threat model, under which accuracy is judged by one PGD and what goes on from there."""
QUANTIZE_FLAGS = (*flags.QUANTIZE, *flags.MODEL, *flags.DATA, *THREAT, *flags.MACHINE)


@app.command()
@flags.with_flags(QUANTIZE_FLAGS, HardenConfig)
def quantize(
    settings: Settings,
    file: Annotated[
        Path, typer.Argument(metavar="FILE.onnx|MODEL.pt", help="A float ONNX classifier, or a checkpoint.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")] = Path("model.onnx"),
    explained: Annotated[
        bool, typer.Option("--explain", help="Say which layers lose accuracy, and what to try.")
    ] = False,
    risks: Annotated[
        bool, typer.Option("--risks", help="Say what changes elsewhere: without VNNI, unoptimised, other opsets, S8S8.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Quantise an ONNX file to int8, and prove that integers run.

    With --explain and with --calibrate auto, accuracy is judged under attack as well. The threat model says how.
    """
    start(quiet, verbose)
    values = flags.nested(settings)
    how = build(QuantizeConfig, values.pop("quantize", {}), flags.tails(flags.QUANTIZE))
    data = build(DataConfig, values.pop("data", {}), flags.tails(flags.DATA))
    model = build(ModelConfig, {"path": file, **values.pop("model", {})}, flags.tails(flags.MODEL))
    threat = build(ThreatConfig, values.pop("threat", {}), flags.tails(THREAT))
    machine = build(MachineConfig, values, flags.names_by_path(flags.MACHINE))
    from toolkit import stages

    made = stages.quantize_file(
        model,
        data,
        how,
        output,
        threat=threat,
        seed=machine.seed,
        threads=machine.threads,
        force=force,
        explained=explained,
        risks=risks,
    )
    if as_json:
        print(json.dumps({"output": str(output), **_record(made)}))
        return
    _print(made)
    measured = shlex.join(map(str, (file, output) if file.suffix == ".onnx" else (output,)))
    print(f"\nwritten: {output}\nnext:    toolkit benchmark {measured}")


def _record(made: QuantizedFile) -> dict[str, Any]:
    from toolkit.reports.portability import portability_record
    from toolkit.targets import target_record

    coverage, quantized = made.coverage, made.quantized
    elsewhere = portability_record(made.portability)
    record = {
        "engine": quantized.engine,
        "calibration": quantized.calibration,
        "integer_coverage": coverage.share,
        "layers": [{"layer": row.layer, "kernel": row.kernel, "macs": row.macs} for row in coverage.layers],
        "float_islands": [
            {"operator": island.operator, "count": island.count, "time_share": island.time_share}
            for island in coverage.islands
        ],
        "equalized": quantized.equalized,
        "constant_channels": dict(quantized.constant_channels),
        "parity": made.parity.as_dict(),
        "accuracy": {name: share.as_dict() for name, share in made.accuracy.items()},
        "bytes": dict(made.bytes),
        "weights": quantized.weights(made.weight_bits),
        "activations": f"uint{quantized.activation_bits} asymmetric",
        "explanation": made.explanation.as_dict() if made.explanation else None,
        "targets": [target_record(target).model_dump() for target in made.targets],
        "elsewhere": elsewhere.model_dump() if elsewhere else None,
    }
    return {key: value for key, value in record.items() if value or key not in ("explanation", "targets", "elsewhere")}


def _print(made: QuantizedFile) -> None:
    from toolkit.reports.portability import portability_record

    coverage, quantized, elsewhere = made.coverage, made.quantized, portability_record(made.portability)
    rows = [(row.layer, row.kernel, f"{row.macs:,}", "yes" if row.integer else "no") for row in coverage.layers]
    table(("layer", "kernel after optimisation", "MACs", "integer"), rows)
    print(f"integer coverage {coverage.share:.2%} of MACs, {coverage.kernel_time_share_integer:.1%} of kernel time")
    for island in coverage.islands:
        print(f"no integer kernel: {island.count} {island.operator}, {island.time_share:.1%} of kernel time")
    print(f"calibration: {quantized.calibration} by {quantized.engine}, {quantized.calibration_images} images")
    print(f"weights: {quantized.weights(made.weight_bits)}; activations: uint{quantized.activation_bits} asymmetric")
    if quantized.equalized:
        print(f"channels equalised between {quantized.equalized} pairs of layers")
    print(f"same label as the float file: {made.parity.agreement}")
    print(f"accuracy: {made.accuracy['deployed']}; of the float file {made.accuracy['fp32']}")
    print(f"size: {made.bytes['deployed']:,} bytes; of the float file {made.bytes['fp32']:,}")
    if made.explanation:
        _print_explanation(made.explanation)
    if elsewhere:
        _print_risks(elsewhere)
    if made.targets:
        _print_targets(made.targets)


def _print_targets(made: Sequence[TargetResult]) -> None:
    from toolkit.reports.targets import HEADER, target_cells, untested_words
    from toolkit.targets import target_record

    targets = [target_record(target) for target in made]
    print()
    table(HEADER, target_cells(targets))
    print("\n".join(filter(None, map(untested_words, targets))))


def _print_explanation(found: Explanation) -> None:
    lost, attacked = found.drop, found.drop.robust is not None
    robust = "" if lost.robust is None else f", {100 * lost.robust:+.2f} of robust accuracy"
    margins = f", and of the margins of {found.margin_images} attacked images next to the boundary," if attacked else ""
    print(
        f"\nerror of the logits: {found.logit_error:.2e} of their variance; "
        f"{100 * lost.clean:+.2f} points of accuracy lost{robust} ({found.images} validation images).\n"
        f"Of every layer: error of the logits{margins} that is gone with it alone in\nfloat; points lost with it alone "
        f"in integers; noise of what it reads ({found.tensor_images} images; signal to noise, dB: so far,\n"
        "its own rounding):\n"
    )
    columns = {"layer": True, "logits": True, "margins": attacked, "accuracy": True, "robust": attacked}
    columns |= dict.fromkeys(("so far", "own", "clipped", "try"), True)
    rows = []
    for blame in found.layers:
        noise, known = blame.source, blame.sensitivity
        drop = known.drop if known else None
        cells = {
            "layer": blame.layer,
            "logits": f"{blame.relief:.0%}",
            "margins": f"{known.relief:.0%}" if known else "",
            "accuracy": f"{100 * drop.clean:+.2f}" if drop else "",
            "robust": f"{100 * drop.robust:+.2f}" if drop and drop.robust is not None else "",
            "so far": f"{noise.snr:.1f}" if noise else "",
            "own": f"{noise.own_snr:.1f}" if noise else "",
            "clipped": f"{noise.clipped:.2%}" if noise else "",
            "try": blame.advice,
        }
        rows.append(tuple(cells[name] for name, shown in columns.items() if shown))
    table(tuple(name for name, shown in columns.items() if shown), rows)
    if not any(blame.advice for blame in found.layers):
        print("no layer's part in the error is worth a remedy")


def _print_risks(found: Portability) -> None:
    from toolkit.reports.portability import HEADER, OVERFLOW_HEADER, elsewhere_rows, overflow_rows, warnings

    print(f"\nelsewhere, on {found.images} clean evaluation images against this machine's answers:\n")
    table(HEADER, elsewhere_rows(found))
    if found.layers or found.spared:
        print("\nsums of two products in 16 bits, on x86 without VNNI:\n")
        table(OVERFLOW_HEADER, overflow_rows(found))
    for line in warnings(found):
        print(f"WARNING  {line}")
