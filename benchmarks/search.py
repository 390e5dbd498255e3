"""What `toolkit search` finds against a grid, and how its trials scale over Ray workers.

    python benchmarks/search.py [--json FILE] grid [--minutes 30] [--epochs 3] [--n 3000] [--bundles 2] [--space SPACE]
                                                   [--keep FOLDER] [--grid BUNDLE...] [-- FLAGS...]
    python benchmarks/search.py [--json FILE] scaling [--trials 12] [--epochs 1] [--rounds 3]

`grid`: a search on Fashion-MNIST within the time given, all of it counted, against one run of `harden` for each point
of the published figure: pruned 0.1 ... 0.9 and float, and not pruned and int8, fine-tuned for as many epochs as the
trials, unless SPACE (as `toolkit search --space` takes it) says otherwise of these.
Bundles of a grid made elsewhere are taken with `--grid`. The graphs of both are timed side by side; robust accuracy is
that of their reports, the same attacks on the same images. Of every point of the grid it is said which bundles of the
search are better in latency or in robust accuracy without being worse in the other, and which bundles beat them all.

`scaling`: the same trials (all points of a space, every one with a fine-tuning of its own, on the embedded sample) in
one process with one thread, on one and on two Ray workers of one thread, and in one process with two threads, in a new
order every round. Times are from the first trial to the last; Ray's start, which a longer search does not feel, is told
apart; that a fresh worker first imports everything counts, once each. The overhead of the scheduler is by how much the
time on one worker exceeds that of the trials themselves.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolkit import bundle, progress
from toolkit.config import BenchmarkConfig, SearchRunConfig, build
from toolkit.evaluators.environment import environment_record, usable_threads
from toolkit.evaluators.latency import benchmark
from toolkit.search.cluster import Needs, RayCluster
from toolkit.search.executors import Executor, InProcess
from toolkit.search.front import Limits
from toolkit.search.runner import Plan, measurements, run_trials
from toolkit.search.search import prepare_search
from toolkit.search.storage import Study

MODEL = "shipped:cnn8"
RATIOS = tuple(round(0.1 * number, 1) for number in range(1, 10))
FINAL_SHARE = 0.4
"""Of the time of a search that its bundles are given, about."""


@dataclass(frozen=True)
class Setup:
    """One way to run the trials."""

    name: str
    threads: int
    workers: int | None
    """On Ray; None: in this process."""


SETUPS = (
    Setup("one process, 1 thread", 1, None),
    Setup("one Ray worker, 1 thread", 1, 1),
    Setup("two Ray workers, 1 thread each", 1, 2),
    Setup("one process, 2 threads", 2, None),
)


def sweep(setup: Setup, trials: int, epochs: int, folder: Path) -> dict[str, float]:
    """Seconds of one sweep: from the first trial to the last, of the trials themselves, and of Ray's start."""
    half = (trials + 1) // 2
    values = {
        "model": {"path": MODEL},
        "data": {"source": "sample"},
        "threads": setup.threads,
        "finetune": {"epochs": epochs},
        "quantize": {"int8": True, "precision": "int8"},
        "threat": {"steps": 5},
        "benchmark": {"rounds": 3, "batches": [1]},
        "search": {
            "space": {
                "prune.ratio": [round(0.2 + 0.6 * number / max(1, half - 1), 3) for number in range(half)],
                "prune.importance": ["l1", "l2"],
            },
            "trials": trials,
            "images": 128,
            "attacks": "pgd",
        },
    }
    config = build(SearchRunConfig, values)
    ready = prepare_search(config, folder / "out")
    start = time.perf_counter()
    executor: Executor
    if setup.workers is None:
        executor = InProcess(ready.bench)
    else:
        executor = RayCluster("local", ready.bench, Needs(setup.threads), setup.workers)
    started = time.perf_counter() - start
    study = Study(f"sqlite:///{folder / 'study.sqlite'}", "sweep", ready.space, {}, config.seed)
    try:
        start = time.perf_counter()
        run_trials(study, ready.space, executor, Plan(trials, (config.seed,), Limits()))
        seconds = time.perf_counter() - start
        tried = study.tried()
    finally:
        executor.close()
        study.close()
    own = sum(measured.seconds["all"] for one in tried for measured in measurements(one))
    return {"trials": len(tried), "seconds": seconds, "of the trials themselves": own, "start": started}


def scaling(arguments: argparse.Namespace) -> dict[str, Any]:
    """All set-ups, in a new order every round, each sweep in a process of its own."""
    generator = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        for index in generator.permutation(len(SETUPS)):
            command = [sys.executable, __file__, "one", str(index), str(arguments.trials), str(arguments.epochs)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append({"round": number, "setup": SETUPS[index].name, **json.loads(done.stdout.splitlines()[-1])})
            print(json.dumps(rows[-1]), file=sys.stderr)
    seconds = {one.name: np.array([row["seconds"] for row in rows if row["setup"] == one.name]) for one in SETUPS}
    alone, worker, pair, threads = (seconds[one.name] for one in SETUPS)
    own = np.array([row["of the trials themselves"] for row in rows if row["setup"] == SETUPS[1].name])
    figures = {
        "two workers / one worker": pair / worker,
        "two workers / one process with two threads": pair / threads,
        "scheduler, one worker": worker / own - 1,
        "one worker / one process": worker / alone,
    }
    return {
        "rows": rows,
        "figures": {
            name: {"median": float(np.median(found)), "low": float(found.min()), "high": float(found.max())}
            for name, found in figures.items()
        },
        "rounds": arguments.rounds,
    }


def harden(output: Path, epochs: int, flags: Sequence[str]) -> Path:
    """One point of the grid."""
    if not output.exists():
        command = [sys.executable, "-m", "toolkit", "harden", MODEL, "--data", "fashion-mnist", "--epochs", str(epochs)]
        subprocess.run([*command, *flags, "--output", str(output), "--quiet"], check=True, stdout=subprocess.DEVNULL)
    return output


def make_grid(folder: Path, epochs: int, flags: Sequence[str]) -> list[Path]:
    """The points of the published figure that can be deployed: pruned and float, or not pruned and int8."""
    pruned = [
        harden(folder / f"pruned-{ratio}", epochs, ["--prune", str(ratio), "--allow-float", *flags]) for ratio in RATIOS
    ]
    int8 = harden(folder / "int8", epochs, ["--prune", "0", "--int8", "--precision", "int8", *flags])
    return [*pruned, int8]


def against_grid(arguments: argparse.Namespace) -> dict[str, Any]:
    """Search, make the grid, time all of it side by side, and compare point by point."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        output = folder / "search"
        if output.exists():
            raise SystemExit(f"{output} is there already: a search that goes on is timed from its second sitting alone")
        trials_s = 60 * arguments.minutes * (1 - FINAL_SHARE)
        command = [sys.executable, "-m", "toolkit", "search", MODEL, "--data", "fashion-mnist", "--json"]
        command += ["--epochs", str(arguments.epochs), "--trials", "1000", "--budget", f"{trials_s:.0f}"]
        command += ["--bundles", str(arguments.bundles), "--batch", "1"]
        command += ["--space", arguments.space] if arguments.space else []
        flags = ["--n", str(arguments.n), *arguments.flags]
        start = time.perf_counter()
        done = subprocess.run([*command, "--output", str(output), *flags], stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - start
        if done.returncode not in (0, 3):
            raise SystemExit(f"the search ended with {done.returncode}")
        found = json.loads(done.stdout)
        grid = arguments.grid or make_grid(folder / "grid", arguments.epochs, flags)
        ours = {f"search {one['trial']}": output / one["bundle"] for one in found["bundles"]}
        bundles = {**ours, **{f"grid {path.name}": path for path in grid}}
        points = _points(bundles)
    duels = {
        theirs: [name for name in ours if _beats(points[name], points[theirs])]
        for theirs in bundles
        if theirs not in ours
    }
    everywhere = [name for name in ours if all(name in winners for winners in duels.values())]
    return {
        "seconds": seconds,
        "within the time": seconds <= 60 * arguments.minutes,
        "trials": len(found["trials"]),
        "recommended": found["recommended"],
        "points": points,
        "beaten by": duels,
        "beats every point": everywhere,
    }


def _points(bundles: dict[str, Path]) -> dict[str, Any]:
    """Latency of all graphs in the same rounds, with the robust accuracy of their reports."""
    reports = {name: bundle.read_report(path) for name, path in bundles.items()}
    shapes = {tuple(report.model.input_shape) for report in reports.values()}
    images = {report.robust_accuracy.deployed.total for report in reports.values()}
    attacks = {report.worst_case.attacks for report in reports.values()}
    if len(shapes) > 1 or len(images) > 1 or len(attacks) > 1:
        raise SystemExit(f"the bundles cannot be compared: shapes {shapes}, images {images}, attacks {attacks}")
    ((channels, height, width),) = shapes
    files = {name: path / bundle.DEPLOYED for name, path in bundles.items()}
    how = BenchmarkConfig(batches=(1,))
    rows = benchmark(files, how, (channels, height, width), baseline=next(iter(files)))
    return {
        row.file: {
            "ms": row.p50,
            "latency": asdict(row),
            "robust": reports[row.file].robust_accuracy.deployed.model_dump(),
            "clean": reports[row.file].accuracy.deployed.model_dump(),
        }
        for row in rows
    }


def _beats(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Better in latency or robust accuracy, and not worse in the other."""
    quicker, tougher = ours["ms"] - theirs["ms"], theirs["robust"]["correct"] - ours["robust"]["correct"]
    return bool(quicker <= 0 and tougher <= 0 and (quicker < 0 or tougher < 0))


def main() -> None:
    """Run what was asked for, print the figures, and keep everything as JSON."""
    if sys.argv[1:2] == ["one"]:  # a sweep of `scaling`
        progress.set_quiet(True)
        index, trials, epochs = map(int, sys.argv[2:])
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(sweep(SETUPS[index], trials, epochs, Path(folder))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    kinds = parser.add_subparsers(dest="kind", required=True)
    grid = kinds.add_parser("grid")
    grid.add_argument("--minutes", type=float, default=30)
    grid.add_argument("--epochs", type=int, default=3)
    grid.add_argument("--n", type=int, default=3000)
    grid.add_argument("--bundles", type=int, default=2, help="of the search")
    grid.add_argument("--space", help="of the search; by default its own")
    grid.add_argument("--grid", type=Path, nargs="+")
    grid.add_argument("--keep", type=Path)
    grid.add_argument("flags", nargs="*", help="handed to search and harden alike, after --")
    scale = kinds.add_parser("scaling")
    scale.add_argument("--trials", type=int, default=12)
    scale.add_argument("--epochs", type=int, default=1)
    scale.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    found = scaling(arguments) if arguments.kind == "scaling" else against_grid(arguments)
    found["environment"] = environment_record(usable_threads(None))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, value in found.items():
        if name not in ("rows", "points", "environment"):
            print(f"{name}: {json.dumps(value)}")


if __name__ == "__main__":
    main()
