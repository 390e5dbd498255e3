"""A float ONNX file."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli import flags
from toolkit.cli.app import Force, Json, Model, Quiet, Settings, Verbose, app, start
from toolkit.cli.printing import table
from toolkit.config import ExportConfig, HardenConfig, ModelRunConfig, build

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
    start(quiet, verbose)
    values = flags.nested(settings | {"model.path": model})
    how = build(ExportConfig, values.pop("export", {}), flags.tails(flags.EXPORT))
    config = build(ModelRunConfig, values, flags.names_by_path(EXPORT_FLAGS))
    from toolkit import stages

    parity = stages.export_file(config, how, output, force=force)
    if as_json:
        print(json.dumps({"output": str(output), "parity": parity.as_dict()}))
        return
    table(
        ("batch", "largest logit difference", "same label"),
        [(row.batch_size, f"{row.max_difference:.2e}", str(row.agreement)) for row in parity.batches],
    )
    print(f"\nwritten: {output}\nnext:    toolkit quantize {shlex.quote(str(output))}")
