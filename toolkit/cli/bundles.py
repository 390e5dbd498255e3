"""What can be done with bundles that are there: report, compare, verify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.app import Json, Quiet, Verbose, app, start
from toolkit.cli.printing import print_report, table
from toolkit.errors import ToolkitError

Folder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that harden wrote.")]


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


@app.command()
def verify(folder: Folder, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Check a bundle's files against its manifest, and its report against the schema."""
    start(quiet, verbose)
    from toolkit import bundle

    findings = bundle.verify_files(folder)
    if all(finding.passed for finding in findings):
        bundle.read_report(folder)
    if as_json:
        print(json.dumps([{"file": f.file, "passed": f.passed, "detail": f.detail} for f in findings]))
    else:
        table(("file", "", ""), [(f.file, "ok" if f.passed else "FAILED", f.detail) for f in findings])
    failed = [finding for finding in findings if not finding.passed]
    if failed:
        raise ToolkitError(
            "the bundle is not what was written",
            found="; ".join(f"{finding.file}: {finding.detail}" for finding in failed[:5]),
            fix="copy the bundle again, or harden again",
        )
