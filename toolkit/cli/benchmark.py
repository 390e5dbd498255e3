"""Latency alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli import flags
from toolkit.cli.app import Json, Quiet, Settings, Verbose, app, start
from toolkit.cli.printing import table
from toolkit.config import BenchmarkConfig, HardenConfig, MachineConfig, build

BENCHMARK_FLAGS = (*flags.BENCHMARK, *flags.MACHINE)


@app.command()
@flags.with_flags(BENCHMARK_FLAGS, HardenConfig)
def benchmark(
    settings: Settings,
    files: Annotated[list[Path], typer.Argument(metavar="BUNDLE|FILE.onnx...", help="Bundles or ONNX files.")],
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Latency and throughput, side by side and interleaved."""
    start(quiet, verbose)
    values = flags.nested(settings)
    how = dict(values.pop("benchmark", {}))
    machine = build(MachineConfig, values, flags.names_by_path(flags.MACHINE))
    if machine.threads is not None:
        how["threads"] = machine.threads
    config = build(BenchmarkConfig, how, flags.tails(flags.BENCHMARK))
    from toolkit import stages
    from toolkit.reports.markdown import LATENCY_HEADER, latency_cells
    from toolkit.reports.schema import Latency

    rows = stages.benchmark_files(files, config, machine.seed)
    if as_json:
        print(json.dumps([row.as_dict() for row in rows]))
        return
    print(f"{rows[0].provider}, {rows[0].threads} thread(s), milliseconds per call; ratio = time / {rows[0].baseline}")
    if not all(row.trusted for row in rows):
        load = max(row.foreign_load for row in rows)
        print(f"NOT TO BE TRUSTED: other processes took {load:.0%} of the CPU time meanwhile")
    table(LATENCY_HEADER, latency_cells([Latency(**row.as_dict()) for row in rows]))
