"""The command line: one thin command a verb. Heavy imports live inside the commands, so that --help is quick."""

from __future__ import annotations

import json
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from toolkit import __version__, flags, progress
from toolkit.config import (
    AttackRunConfig,
    BenchmarkConfig,
    DataConfig,
    ExportConfig,
    HardenConfig,
    MachineConfig,
    ModelRunConfig,
    PruneConfig,
    QuantizeConfig,
    ReproduceConfig,
    SearchRunConfig,
    SimulateRunConfig,
    TrainRunConfig,
    build,
    merge,
    override_threat,
    read_settings,
)
from toolkit.errors import ToolkitError

if TYPE_CHECKING:
    from toolkit.evaluators.debugger import Explanation
    from toolkit.planning import PlannedStep
    from toolkit.reports.schema import Portability, Report

DONE, DEFECT, BAD_INPUT, GATE_UNMET, INTERRUPTED = 0, 1, 2, 3, 130

app = typer.Typer(
    help="Prune, fine-tune adversarially, quantise to integer ONNX, and prove what ships.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Settings = dict[str, Any]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notices.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the traceback of an error.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan with an estimate; write nothing.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint, state dict, or shipped:cnn8.")]

_verbose = False
_arguments: Sequence[str] = ()
_on_interrupt: Callable[[], str] | None = None


def _start(quiet: bool, verbose: bool) -> None:
    global _verbose
    _verbose = verbose
    progress.set_quiet(quiet)


HARDEN_FLAGS = (
    *(flags.Flag("--finetune", "finetune.objective", "adversarial, fgsm, trades, distill, standard or none."),),
    *flags.PRUNE,
    flags.Flag("--int8", "quantize.int8", "Quantise to int8; without it --allow-float is needed.", bool),
    *flags.under("finetune", flags.TRAINING),
    flags.Flag("--qat", "finetune.qat", "Round weights and activations in the last part of the fine-tuning.", bool),
    *flags.MODEL,
    *flags.DATA,
    *flags.EVALUATION,
    *flags.THREAT,
    *flags.ATTACKS,
    *flags.EXPORT,
    *flags.PRECISION,
    *flags.QUANTIZE,
    *flags.BENCHMARK,
    *flags.GATES,
    flags.Flag(
        "--allow-float",
        "allow_float",
        "Ship a float model.onnx where --int8 is not given, or where integers do not pay on this machine.",
        bool,
    ),
    *flags.MACHINE,
)


@app.command()
@flags.with_flags(HARDEN_FLAGS, HardenConfig)
def harden(
    settings: Settings,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Checkpoint, or shipped:cnn8.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle.")] = Path("out"),
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A config.yaml; flags win over it.")] = None,
    force: Force = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """The whole pipeline: prune, fine-tune, export, quantise, attack, benchmark, bundle."""
    _start(quiet, verbose)
    resolved = build(HardenConfig, _merged(settings, model, config), flags.names_by_path(HARDEN_FLAGS))
    from toolkit import bundle, pipeline
    from toolkit.training.distributed import follows

    if dry_run:
        from toolkit import planning

        steps = planning.dry_run(resolved, output, force=force, resume=resume)
        _print_plan(steps, f"the bundle would be written to {output}", as_json)
        return
    if follows():
        progress.set_quiet(True)
        pipeline.assist(resolved, resume=resume)
        return
    _resume_hint(lambda: bundle.workspace_of(output).resumable, str(output))
    result = pipeline.harden(resolved, output, force=force, resume=resume)
    _print_report(result.report, output, as_json)
    if not result.gates_met:
        raise typer.Exit(GATE_UNMET)


SEARCH_FLAGS = (*flags.GATES[:2], *flags.SEARCH, *(flag for flag in HARDEN_FLAGS if flag not in flags.GATES))


@app.command()
@flags.with_flags(SEARCH_FLAGS, SearchRunConfig)
def search(
    settings: Settings,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Checkpoint, or shipped:cnn8.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the search.")] = Path("search-out"),
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A config.yaml; flags win over it.")] = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """The best compression under your limits: trials, the front as bundles, which to ship and why."""
    _start(quiet, verbose)
    resolved = build(SearchRunConfig, _merged(settings, model, config), flags.names_by_path(SEARCH_FLAGS))
    if dry_run:
        from toolkit.search import planned

        _print_plan(planned.dry_run(resolved, output), f"the front would be written to {output}", as_json)
        return
    from toolkit.search import report
    from toolkit.search.search import search as run_search

    _say_on_interrupt(lambda: f"trials are kept; continue with: toolkit {shlex.join(_without_force())}")
    found = run_search(resolved, output, force=force)
    print(json.dumps(report.record(found)) if as_json else report.render(found))
    if not found.limits_kept:
        raise typer.Exit(GATE_UNMET)


TRAIN_FLAGS = (
    flags.Flag("--objective", "training.objective", "standard, adversarial, fgsm, trades or distill."),
    *flags.under("training", flags.TRAINING),
    *flags.DATA,
    *flags.THREAT,
    *flags.MACHINE,
)


@app.command()
@flags.with_flags(TRAIN_FLAGS, TrainRunConfig)
def train(
    settings: Settings,
    arch: Annotated[str, typer.Argument(metavar="ARCH", help="cnn8, resnet18, torchvision:NAME or file.py:callable.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The checkpoint to write.")] = Path("model.pt"),
    force: Force = False,
    resume: Resume = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a reference network, standard or adversarially."""
    _start(quiet, verbose)
    values = flags.nested(settings | {"arch": arch})
    config = build(TrainRunConfig, values, flags.names_by_path(TRAIN_FLAGS))
    from toolkit import stages
    from toolkit.training.distributed import follows

    if follows():
        progress.set_quiet(True)
        stages.train_network(config, output, force=force, resume=resume)
        return
    _resume_hint(lambda: stages.training_checkpoint(output).is_file(), str(output))
    result = stages.train_network(config, output, force=force, resume=resume)
    best = next((epoch for epoch in result.epochs if epoch.epoch == result.best_epoch), None)
    if as_json:
        record = dict(result.model.spec.training[-1]) if result.model.spec.training else {}
        print(json.dumps({"output": str(output), **record}))
        return
    if best is not None:
        robust = f"; attacked {best.robust}" if best.robust else ""
        print(f"epoch {best.epoch} kept; validation: clean {best.accuracy}{robust}")
    print(f"\nwritten: {output}\nnext:    toolkit harden {output} --prune 0.5 --int8")


PRUNE_FLAGS = (*flags.PRUNE, *flags.MODEL, *flags.DATA)


@app.command()
@flags.with_flags(PRUNE_FLAGS, HardenConfig)
def prune(
    settings: Settings,
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The checkpoint to write.")] = Path("pruned.pt"),
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Remove filters, without fine-tuning."""
    _start(quiet, verbose)
    values = flags.nested(settings | {"model.path": model})
    how = build(PruneConfig, values.pop("prune", {}), _tails(flags.PRUNE))
    config = _model_run(values, PRUNE_FLAGS)
    from toolkit import stages

    result = stages.prune_file(config, how, output, force=force)
    layers = [{"name": row.name, "before": row.before, "after": row.after} for row in result.layers]
    if as_json:
        sizes = {"before": result.parameters_before, "after": result.parameters_after}
        print(json.dumps({"output": str(output), "parameters": sizes, "layers": layers}))
        return
    _table(("layer", "filters before", "after"), [tuple(row.values()) for row in layers])
    print(f"parameters: {result.parameters_before:,} -> {result.parameters_after:,}")
    print(f"\nwritten: {output}\nnext:    toolkit harden {output} --prune 0 --int8")


EXPORT_FLAGS = (flags.EXPORT[0], *flags.MODEL, *flags.DATA)


@app.command()
@flags.with_flags(EXPORT_FLAGS, HardenConfig)
def export(
    settings: Settings,
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")] = Path("model.fp32.onnx"),
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Export a float ONNX file, checked against torch on real images."""
    _start(quiet, verbose)
    values = flags.nested(settings | {"model.path": model})
    how = build(ExportConfig, values.pop("export", {}), _tails(flags.EXPORT))
    config = _model_run(values, EXPORT_FLAGS)
    from toolkit import stages

    parity = stages.export_file(config, how, output, force=force)
    if as_json:
        print(json.dumps({"output": str(output), "parity": parity.as_dict()}))
        return
    _table(
        ("batch", "largest logit difference", "same label"),
        [(row.batch_size, f"{row.max_difference:.2e}", str(row.agreement)) for row in parity.batches],
    )
    print(f"\nwritten: {output}\nnext:    toolkit quantize {output}")


QUANTIZE_FLAGS = (*flags.QUANTIZE, *flags.DATA, *flags.MACHINE)


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
    """Quantise an ONNX file to int8, and prove that integers run."""
    _start(quiet, verbose)
    values = flags.nested(settings)
    how = build(QuantizeConfig, values.pop("quantize", {}), _tails(flags.QUANTIZE))
    data = build(DataConfig, values.pop("data", {}), _tails(flags.DATA))
    machine = build(MachineConfig, values, flags.names_by_path(flags.MACHINE))
    from toolkit import stages
    from toolkit.reports.targets import HEADER, target_cells, untested_words
    from toolkit.targets import target_record

    made = stages.quantize_file(
        file,
        data,
        how,
        output,
        seed=machine.seed,
        threads=machine.threads,
        force=force,
        explained=explained,
        risks=risks,
    )
    from toolkit.reports.portability import portability_record

    elsewhere = portability_record(made.portability)
    coverage, targets = made.coverage, [target_record(target) for target in made.targets]
    if as_json:
        layers = [{"layer": row.layer, "kernel": row.kernel, "macs": row.macs} for row in coverage.layers]
        islands = [{"operator": i.operator, "count": i.count, "time_share": i.time_share} for i in coverage.islands]
        found = {
            "integer_coverage": coverage.share,
            "layers": layers,
            "float_islands": islands,
            "equalized": made.quantized.equalized,
            "constant_channels": dict(made.quantized.constant_channels),
            "parity": made.parity.as_dict(),
            "accuracy": {name: share.as_dict() for name, share in made.accuracy.items()},
            "bytes": dict(made.bytes),
            "weights": made.quantized.weights,
            "activations": f"uint{made.quantized.activation_bits} asymmetric",
        }
        if made.explanation:
            found["explanation"] = made.explanation.as_dict()
        if targets:
            found["targets"] = [target.model_dump() for target in targets]
        if elsewhere:
            found["elsewhere"] = elsewhere.model_dump()
        how_made = {"engine": made.quantized.engine, "calibration": made.quantized.calibration}
        print(json.dumps({"output": str(output), **how_made, **found}))
        return
    rows = [(row.layer, row.kernel, f"{row.macs:,}", "yes" if row.integer else "no") for row in coverage.layers]
    _table(("layer", "kernel after optimisation", "MACs", "integer"), rows)
    print(f"integer coverage {coverage.share:.2%} of MACs, {coverage.kernel_time_share_integer:.1%} of kernel time")
    for island in coverage.islands:
        print(f"no integer kernel: {island.count} {island.operator}, {island.time_share:.1%} of kernel time")
    quantized = made.quantized
    print(f"calibration: {quantized.calibration} by {quantized.engine}, {quantized.calibration_images} images")
    print(f"weights: {quantized.weights}; activations: uint{quantized.activation_bits} asymmetric")
    if quantized.equalized:
        print(f"channels equalised between {quantized.equalized} pairs of layers")
    print(f"same label as the float file: {made.parity.agreement}")
    print(f"accuracy: {made.accuracy['deployed']}; of the float file {made.accuracy['fp32']}")
    print(f"size: {made.bytes['deployed']:,} bytes; of the float file {made.bytes['fp32']:,}")
    if made.explanation:
        _print_explanation(made.explanation)
    if elsewhere:
        _print_risks(elsewhere)
    if targets:
        print()
        _table(HEADER, target_cells(targets))
        print("\n".join(filter(None, map(untested_words, targets))))
    measured = f"{file} {output}" if file.suffix == ".onnx" else output
    print(f"\nwritten: {output}\nnext:    toolkit benchmark {measured}")


def _print_explanation(found: Explanation) -> None:
    print(
        f"\nerror of the logits: {found.logit_error:.2e} of their variance, {found.images} images; what is gone of it"
    )
    print("with one layer left float, and noise of what it reads (signal to noise, dB: so far, its own rounding):\n")
    rows = []
    for blame in found.layers:
        noise = blame.source
        numbers = (f"{noise.snr:.1f}", f"{noise.own_snr:.1f}", f"{noise.clipped:.2%}") if noise else ("", "", "")
        rows.append((blame.layer, f"{blame.relief:.0%}", *numbers, blame.advice))
    _table(("layer", "error gone", "so far", "own", "clipped", "try"), rows)
    if not any(blame.advice for blame in found.layers):
        print("no layer's part in the error is worth a remedy")


def _print_risks(found: Portability) -> None:
    from toolkit.reports.portability import HEADER, OVERFLOW_HEADER, elsewhere_rows, overflow_rows, warnings

    print(f"\nelsewhere, on {found.images} clean evaluation images against this machine's answers:\n")
    _table(HEADER, elsewhere_rows(found))
    if found.layers or found.spared:
        print("\nsums of two products in 16 bits, on x86 without VNNI:\n")
        _table(OVERFLOW_HEADER, overflow_rows(found))
    for line in warnings(found):
        print(f"WARNING  {line}")


SIMULATE_FLAGS = (*flags.SIMULATE, *flags.MODEL, *flags.DATA, *flags.EVALUATION, *flags.THREAT, *flags.MACHINE)


@app.command()
@flags.with_flags(SIMULATE_FLAGS, SimulateRunConfig)
def simulate(
    settings: Settings,
    model: Model,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """SIMULATED int16, int8, int4, int2 and binary: accuracy of the rounded torch network, no graph is written."""
    _start(quiet, verbose)
    config = build(
        SimulateRunConfig, flags.nested(settings | {"model.path": model}), flags.names_by_path(SIMULATE_FLAGS)
    )
    from toolkit import simulating

    found = simulating.run_simulation(config)
    if as_json:
        print(json.dumps(found.as_dict()))
        return
    print(f"{found.caption}\n")
    _table(simulating.HEADER, found.cells)


ATTACK_FLAGS = (
    *flags.ATTACKS,
    flags.Flag("--budget", "budget", "Seconds that the attacks may take; the cheap ones come first.", float),
    *flags.MODEL,
    *flags.DATA,
    *flags.EVALUATION,
    *flags.THREAT,
    *flags.MACHINE,
)


@app.command()
@flags.with_flags(ATTACK_FLAGS, AttackRunConfig)
def attack(
    settings: Settings,
    model: Annotated[str, typer.Argument(metavar="MODEL|FILE.onnx|BUNDLE", help="What is attacked.")],
    target: Annotated[Path | None, typer.Option("--target", help="An ONNX file made from the checkpoint.")] = None,
    save_adversarial: Annotated[
        Path | None,
        typer.Option("--save-adversarial", help="Folder for PNG files of images that fool the graph."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted or unfinished attack.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Robust accuracy of a network or of any ONNX classifier: attacks, transfer, alarms."""
    _start(quiet, verbose)
    values = flags.nested(settings | {"model.path": model})
    config = build(AttackRunConfig, values, flags.names_by_path(ATTACK_FLAGS))
    from toolkit import attacking
    from toolkit.reports.summary import render_attack

    _say_on_interrupt(lambda: _continue_with("what was attacked so far is kept"))
    found = attacking.attack(config, target, resume=resume, gallery=save_adversarial)
    print(found.model_dump_json() if as_json else render_attack(found, save_adversarial))


BENCHMARK_FLAGS = (*flags.BENCHMARK, *flags.MACHINE)


@app.command()
@flags.with_flags(BENCHMARK_FLAGS, HardenConfig)
def benchmark(
    settings: Settings,
    files: Annotated[list[Path], typer.Argument(metavar="BUNDLE|FILE.onnx...", help="Bundles or ONNX files.")],
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Latency and throughput, side by side and interleaved."""
    _start(quiet, verbose)
    values = flags.nested(settings)
    how = dict(values.pop("benchmark", {}))
    if "threads" in values:
        how["threads"] = values["threads"]
    config = build(BenchmarkConfig, how, _tails(flags.BENCHMARK) | {"threads": "--threads"})
    from toolkit import stages
    from toolkit.reports.markdown import LATENCY_HEADER, latency_cells
    from toolkit.reports.schema import Latency

    rows = stages.benchmark_files(files, config, int(values.get("seed", 0)))
    if as_json:
        print(json.dumps([row.as_dict() for row in rows]))
        return
    print(f"{rows[0].provider}, {rows[0].threads} thread(s), milliseconds per call; ratio = time / {rows[0].baseline}")
    if not all(row.trusted for row in rows):
        load = max(row.foreign_load for row in rows)
        print(f"NOT TO BE TRUSTED: other processes took {load:.0%} of the CPU time meanwhile")
    _table(LATENCY_HEADER, latency_cells([Latency(**row.as_dict()) for row in rows]))


Folder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that harden wrote.")]


@app.command()
def report(folder: Folder, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Write report.md again from report.json, and print the summary."""
    _start(quiet, verbose)
    from toolkit import bundle
    from toolkit.reports.markdown import render_markdown

    found = bundle.read_report(folder)
    bundle.replace_summary(folder, render_markdown(found))
    _print_report(found, folder, as_json)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Two or more bundles.")],
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Several bundles side by side."""
    _start(quiet, verbose)
    from toolkit import bundle
    from toolkit.reports.summary import comparison

    reports = {str(folder): bundle.read_report(folder) for folder in folders}
    header, rows = comparison(reports)
    if as_json:
        print(json.dumps([dict(zip(header, row, strict=True)) for row in rows]))
        return
    _table(header, rows)


@app.command()
def verify(folder: Folder, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Check a bundle's files against its manifest, and its report against the schema."""
    _start(quiet, verbose)
    from toolkit import bundle

    findings = bundle.verify_files(folder)
    if all(finding.passed for finding in findings):
        bundle.read_report(folder)
    if as_json:
        print(json.dumps([{"file": f.file, "passed": f.passed, "detail": f.detail} for f in findings]))
    else:
        _table(("file", "", ""), [(f.file, "ok" if f.passed else "FAILED", f.detail) for f in findings])
    failed = [finding for finding in findings if not finding.passed]
    if failed:
        raise ToolkitError(
            "the bundle is not what was written",
            found="; ".join(f"{finding.file}: {finding.detail}" for finding in failed[:5]),
            fix="copy the bundle again, or harden again",
        )


REPRODUCE_FLAGS = (*flags.REPRODUCE, *flags.DATA[:3], *flags.EVALUATION)


@app.command()
@flags.with_flags(REPRODUCE_FLAGS, ReproduceConfig)
def reproduce(
    settings: Settings,
    target: Annotated[str, typer.Argument(metavar="TABLE", help="table2 ... table6, figure1 ... figure4, or all.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for Markdown, JSON and plots; by default in --work.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be run, with estimates.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """The paper's tables and figures (Thorsteinsson et al. 2024), ours beside theirs; filled over several sittings.

    table2: baselines. table3: Fashion-MNIST, compressed. table4: CIFAR-10, compressed; table5: the same beside the
    appendix's numbers. table6: time. figure1: over compression, fine-tuned; figure3: not fine-tuned; figure2: t-SNE;
    figure4: quantisation-aware training. The paper may number its tables otherwise.
    """
    _start(quiet, verbose)
    config = build(ReproduceConfig, flags.nested(settings | {"target": target}), flags.names_by_path(REPRODUCE_FLAGS))
    from toolkit.reproduce import command

    runner = command.Runner(config)
    _say_on_interrupt(lambda: f"what is done is kept in {runner.store.root}; the same command goes on")
    print(command.plan(runner, as_json) if dry_run else command.fill(runner, output, as_json))


@app.command()
def doctor(as_json: Json = False) -> None:
    """What is wrong with this machine's set-up, and the fix."""
    from toolkit.doctor import diagnose, render

    findings = diagnose()
    if as_json:
        keys = ("level", "topic", "found", "fix")
        print(json.dumps([{key: getattr(finding, key) for key in keys} for finding in findings]))
    else:
        print(render(findings))
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(BAD_INPUT)


def _version(show: bool) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    _show: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _model_run(values: Mapping[str, Any], known: Sequence[flags.Flag]) -> ModelRunConfig:
    return build(ModelRunConfig, dict(values), flags.names_by_path(known))


def _merged(settings: Settings, model: str | None, config: Path | None) -> dict[str, Any]:
    """The settings of a config file with what the command line says in their place."""
    given = flags.nested(settings | ({"model.path": model} if model else {}))
    saved = read_settings(config) if config else {}
    if "threat" in given and isinstance(saved.get("threat"), dict):
        saved["threat"] = override_threat(saved["threat"], given["threat"])
    values = merge(saved, given)
    if "model" not in values:
        raise ToolkitError(
            "no model is named", found="neither MODEL nor --config", fix="toolkit harden model.pt --prune 0.5 --int8"
        )
    return values


def _tails(group: Sequence[flags.Flag]) -> dict[str, str]:
    """Flags by the last part of their path, for a configuration that is built on its own."""
    return {flag.path.split(".")[-1]: flag.name.split("/")[0] for flag in group}


def _print_plan(steps: Sequence[PlannedStep], where: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps([{"step": step.text, "seconds": step.seconds} for step in steps]))
        return
    for step in steps:
        print(f"{step.text}   about {step.seconds:.0f} s" if step.seconds else step.text)
    print(f"in all about {sum(step.seconds for step in steps) / 60:.1f} minutes; {where}")


def _print_report(found: Report, folder: Path, as_json: bool) -> None:
    if as_json:
        print(found.model_dump_json())
        return
    from toolkit.reports.summary import render_summary

    print(render_summary(found, folder))


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    from toolkit.reports.summary import text_table

    print(text_table(header, rows))


def _resume_hint(resumable: Callable[[], bool], output: str) -> None:
    """What to say if this command is interrupted, which writes `output` at its end."""
    nothing = f"nothing was written to {output}"
    again = f"{nothing}; start again with the same command"
    _say_on_interrupt(lambda: _continue_with(nothing) if resumable() else again)


def _say_on_interrupt(hint: Callable[[], str]) -> None:
    global _on_interrupt
    _on_interrupt = hint


def _continue_with(state: str) -> str:
    arguments = [argument for argument in _arguments if argument != "--resume"]
    return f"{state}; continue with: toolkit {shlex.join([*arguments, '--resume'])}"


def _without_force() -> list[str]:
    return [argument for argument in _arguments if argument != "--force"]


def main() -> None:
    """Entry point: runs a command and turns every outcome into its exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    global _arguments, _on_interrupt
    _arguments, _on_interrupt = tuple(arguments), None
    try:
        outcome = app(args=list(arguments), prog_name="toolkit", standalone_mode=False)
    except ToolkitError as error:
        _panel(error)
        return BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except TyperException as error:
        show = getattr(error, "show", None)  # usage errors show themselves
        if show is not None:
            show()
        else:
            print(error, file=sys.stderr)
        return BAD_INPUT
    except Exception as error:  # anything else is a defect of ours, and says so
        if _verbose:
            traceback.print_exc()
        print(f"toolkit: a defect of the toolkit: {type(error).__name__}: {error}", file=sys.stderr)
        print("         run the command again with --verbose and report what it prints", file=sys.stderr)
        return DEFECT
    if outcome == INTERRUPTED:  # typer turns Ctrl-C into this code
        return _interrupted()
    return outcome if isinstance(outcome, int) else DONE


def _interrupted() -> int:
    hint = _on_interrupt() if _on_interrupt else "nothing was written"
    print(f"\ninterrupted: {hint}", file=sys.stderr)
    return INTERRUPTED


def _panel(error: ToolkitError) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    if _verbose:
        traceback.print_exc()
    body = Text.assemble((error.problem, "bold"), "\n\nfound: ", error.found, "\nfix:   ", error.fix)
    for note in getattr(error, "__notes__", ()):
        body.append(f"\nnote:  {note}")
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
    console.print(Panel(body, title="error", title_align="left", border_style="red"))


if __name__ == "__main__":
    main()
