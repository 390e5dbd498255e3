"""Bundles that are there, read again: report, compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.app import Folder, Json, Quiet, Verbose, app, start
from toolkit.cli.printing import print_report, table


@app.command()
def report(folder: Folder, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Write report.md again from report.json, and print the summary."""
    start(quiet, verbose)
    from toolkit import bundle
    from toolkit.reports.markdown import render_markdown

    found = bundle.read_report(folder)
    bundle.replace_summary(folder, render_markdown(found))
    print_report(found, folder, as_json)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Two or more bundles.")],
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Several bundles side by side."""
    start(quiet, verbose)
    from toolkit import bundle
    from toolkit.reports.summary import comparison

    reports = {str(folder): bundle.read_report(folder) for folder in folders}
    header, rows = comparison(reports)
    if as_json:
        print(json.dumps([dict(zip(header, row, strict=True)) for row in rows]))
        return
    table(header, rows)
