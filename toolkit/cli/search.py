"""The search for the best compression."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli import flags
from toolkit.cli.app import (
    GATE_UNMET,
    Config,
    DryRun,
    Force,
    Json,
    ModelIfNamed,
    Quiet,
    Settings,
    Verbose,
    app,
    go_on_with,
    say_on_interrupt,
    start,
)
from toolkit.cli.harden import HARDEN_FLAGS
from toolkit.cli.printing import print_plan
from toolkit.cli.settings import merged
from toolkit.config import SearchRunConfig, build

SEARCH_FLAGS = (*flags.GATES[:2], *flags.SEARCH, *(flag for flag in HARDEN_FLAGS if flag not in flags.GATES))


@app.command()
@flags.with_flags(SEARCH_FLAGS, SearchRunConfig)
def search(
    settings: Settings,
    model: ModelIfNamed = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the search.")] = Path("search-out"),
    config: Config = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """The best compression under your limits: trials, the front as bundles, which to ship and why.

    Settings that --space varies win over flags of the same name, which only say where the search starts. --int8 and
    --precision follow the space's `precision` where it has one; --round-to auto is refused here.
    """
    start(quiet, verbose)
    resolved = build(SearchRunConfig, merged(settings, model, config), flags.names_by_path(SEARCH_FLAGS))
    if dry_run:
        from toolkit.search import planned

        print_plan(planned.dry_run(resolved, output), f"the front would be written to {output}", as_json)
        return
    from toolkit.search import report
    from toolkit.search.search import search as run_search

    say_on_interrupt(lambda: go_on_with("trials are kept"))
    found = run_search(resolved, output, force=force)
    print(json.dumps(report.record(found)) if as_json else report.render(found))
    if not found.limits_kept:
        raise typer.Exit(GATE_UNMET)
