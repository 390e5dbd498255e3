"""The whole pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolkit import progress
from toolkit.cli import flags
from toolkit.cli.app import (
    GATE_UNMET,
    Config,
    DryRun,
    Force,
    Json,
    ModelIfNamed,
    Quiet,
    Resume,
    Settings,
    Verbose,
    app,
    resume_hint,
    start,
)
from toolkit.cli.printing import print_plan, print_report
from toolkit.cli.settings import merged
from toolkit.config import HardenConfig, build

HARDEN_FLAGS = (
    *(flags.Flag("--finetune", "finetune.objective", "adversarial, fgsm, trades, distill, standard or none."),),
    *flags.PRUNE,
    flags.Flag("--int8", "quantize.int8", "Quantise to int8; without it --allow-float is needed.", bool),
    *flags.under("finetune", flags.TRAINING),
    flags.Flag("--qat", "finetune.qat", "Round weights and activations in the last part of the fine-tuning.", bool),
    flags.Flag("--qat-from", "finetune.qat_from", "Share of the fine-tuning before --qat rounds, in [0, 1).", float),
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
        "Ship a float model.onnx where --int8 is not given, or where --precision auto finds that int8 does not pay or "
        "loses too much.",
        bool,
    ),
    *flags.MACHINE,
)


@app.command()
@flags.with_flags(HARDEN_FLAGS, HardenConfig)
def harden(
    settings: Settings,
    model: ModelIfNamed = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle.")] = Path("out"),
    config: Config = None,
    force: Force = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """The whole pipeline: prune, fine-tune, export, quantise, attack, benchmark, bundle."""
    start(quiet, verbose)
    resolved = build(HardenConfig, merged(settings, model, config), flags.names_by_path(HARDEN_FLAGS))
    from toolkit import bundle, pipeline
    from toolkit.training.distributed import follows

    if dry_run:
        from toolkit import planning

        steps = planning.dry_run(resolved, output, force=force, resume=resume)
        print_plan(steps, f"the bundle would be written to {output}", as_json)
        return
    if follows():
        progress.set_quiet(True)
        pipeline.assist(resolved, resume=resume)
        return
    resume_hint(lambda: bundle.workspace_of(output).resumable, str(output))
    result = pipeline.harden(resolved, output, force=force, resume=resume)
    print_report(result.report, output, as_json)
    if not result.gates_met:
        raise typer.Exit(GATE_UNMET)
