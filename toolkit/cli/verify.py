"""A bundle against its manifest, its schema, and this machine."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from toolkit.cli import flags
from toolkit.cli.app import Folder, Json, Quiet, Settings, Verbose, app, start
from toolkit.cli.printing import table
from toolkit.config import AttackRunConfig, build
from toolkit.errors import ToolkitError
from toolkit.progress import warn

VERIFY_FLAGS = (*flags.ATTACKS, *flags.MODEL[:2], *flags.DATA[:4], *flags.EVALUATION, *flags.MACHINE)


@app.command()
@flags.with_flags(VERIFY_FLAGS, None)
def verify(
    settings: Settings,
    folder: Folder,
    files_only: Annotated[
        bool, typer.Option("--files-only", help="Hashes and schema alone; nothing is measured.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check a bundle's files and schema, then measure its claims again on this machine.

    Integer layers, accuracy on all evaluation images, time beside the float twin, and robust accuracy on 512 images
    (or --n) by the bundle's own attacks. Its settings hold where no flag says otherwise.
    """
    start(quiet, verbose)
    config = build(
        AttackRunConfig, flags.nested(settings | {"model.path": str(folder)}), flags.names_by_path(VERIFY_FLAGS)
    )
    from toolkit import verification

    claims = list(verification.verify(config, files_only=files_only))
    if as_json:
        print(json.dumps([claim.as_dict() for claim in claims]))
    else:
        table(("file", "claim", "", ""), [(one.file, one.claim, one.verdict, one.detail) for one in claims])
    missing = sum(one.passed is None for one in claims)
    if missing:
        warn(f"{missing} claim(s) could not be measured here, so nothing is known of them")
    failed = [one for one in claims if one.passed is False]
    if any(one.claim == "unchanged" for one in failed):
        raise ToolkitError(
            "the bundle is not what was written",
            found="; ".join(f"{one.file}: {one.detail}" for one in failed[:5]),
            fix="copy the bundle again, or harden again",
        )
    if failed:
        raise ToolkitError(
            "claims of the bundle do not hold on this machine",
            found="; ".join(f"{one.file}: {one.claim}: {one.detail}" for one in failed[:5]),
            fix="harden on this machine, or on one like it, and ship that bundle to it",
        )
