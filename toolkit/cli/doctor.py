"""This machine's set-up."""

from __future__ import annotations

import json

import typer

from toolkit.cli.app import BAD_INPUT, Json, app


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
