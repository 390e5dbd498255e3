"""Evidence of robustness alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli import flags
from toolkit.cli.app import Json, Quiet, Settings, Verbose, app, continue_with, say_on_interrupt, start
from toolkit.config import AttackRunConfig, build

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
    """Robust accuracy of a network or of any ONNX classifier: attacks, transfer, alarms.

    A bundle is attacked on its own images, with its own seed and threat model, where no flag says otherwise.
    """
    start(quiet, verbose)
    values = flags.nested(settings | {"model.path": model})
    config = build(AttackRunConfig, values, flags.names_by_path(ATTACK_FLAGS))
    from toolkit import attacking
    from toolkit.reports.summary import render_attack

    say_on_interrupt(lambda: continue_with("what was attacked so far is kept"))
    found = attacking.attack(config, target, resume=resume, gallery=save_adversarial)
    print(found.model_dump_json() if as_json else render_attack(found, save_adversarial))
