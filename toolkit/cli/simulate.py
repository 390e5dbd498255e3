"""Simulated precisions."""

from __future__ import annotations

import json

from toolkit.cli import flags
from toolkit.cli.app import Json, Model, Quiet, Settings, Verbose, app, start
from toolkit.cli.printing import table
from toolkit.config import SimulateRunConfig, build

SIMULATE_FLAGS = (*flags.SIMULATE, *flags.MODEL, *flags.DATA, *flags.EVALUATION, *flags.THREAT, *flags.MACHINE)


@app.command()
@flags.with_flags(SIMULATE_FLAGS, SimulateRunConfig)
def simulate(
    settings: Settings,
    model: Model,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """SIMULATED int16, int8, int4, int2 and binary: accuracy of the rounded torch network, no graph is written."""
    start(quiet, verbose)
    config = build(
        SimulateRunConfig, flags.nested(settings | {"model.path": model}), flags.names_by_path(SIMULATE_FLAGS)
    )
    from toolkit import simulating

    found = simulating.run_simulation(config)
    if as_json:
        print(json.dumps(found.as_dict()))
        return
    print(f"{found.caption}\n")
    table(simulating.HEADER, found.cells)
