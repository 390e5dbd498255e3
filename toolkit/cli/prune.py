"""Filters removed, nothing else."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli import flags
from toolkit.cli.app import Force, Json, Model, Quiet, Settings, Verbose, app, start
from toolkit.cli.printing import radius_of, table
from toolkit.config import HardenConfig, ModelRunConfig, PruneConfig, build

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
    start(quiet, verbose)
    values = flags.nested(settings | {"model.path": model})
    how = build(PruneConfig, values.pop("prune", {}), flags.tails(flags.PRUNE))
    config = build(ModelRunConfig, values, flags.names_by_path(PRUNE_FLAGS))
    from toolkit import stages

    result = stages.prune_file(config, how, output, force=force)
    layers = [{"name": row.name, "before": row.before, "after": row.after} for row in result.layers]
    if as_json:
        sizes = {"before": result.parameters_before, "after": result.parameters_after}
        print(json.dumps({"output": str(output), "parameters": sizes, "layers": layers}))
        return
    table(("layer", "filters before", "after"), [tuple(row.values()) for row in layers])
    print(f"parameters: {result.parameters_before:,} -> {result.parameters_after:,}")
    radius = radius_of(result.model)
    print(f"\nwritten: {output}\nnext:    toolkit harden {shlex.quote(str(output))} --prune 0 --int8{radius}")
