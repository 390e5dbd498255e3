"""The paper's tables and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli import flags
from toolkit.cli.app import BAD_INPUT, Json, Quiet, Settings, Verbose, app, say_on_interrupt, start
from toolkit.config import ReproduceConfig, build

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
    """The paper's tables and figures, ours beside theirs.

    Of Thorsteinsson and others (2024); filled over several sittings.

    table2: baselines. table3: Fashion-MNIST, compressed. table4: CIFAR-10, compressed; table5: the same beside the
    appendix's numbers. table6: time. figure1: over compression, fine-tuned; figure3: not fine-tuned; figure2: t-SNE;
    figure4: quantisation-aware training. The paper may number its tables otherwise.
    """
    start(quiet, verbose)
    config = build(ReproduceConfig, flags.nested(settings | {"target": target}), flags.names_by_path(REPRODUCE_FLAGS))
    from toolkit.reproduce import command

    runner = command.Runner(config)
    say_on_interrupt(lambda: f"what is done is kept in {runner.store.root}; the same command goes on")
    print(command.plan(runner, as_json) if dry_run else command.fill(runner, output, as_json))
    if runner.failed:
        raise typer.Exit(BAD_INPUT)
