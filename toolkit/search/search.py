"""`toolkit search`: the best trade-off under the user's limits, as bundles, a front and a recommendation."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from toolkit import bundle
from toolkit.attacks.ensemble import compose
from toolkit.config import HardenConfig, SearchRunConfig, build, write_settings
from toolkit.errors import ToolkitError
from toolkit.evaluators.environment import usable_threads
from toolkit.exporters.onnx import load_onnx
from toolkit.exporters.precision import named_layers
from toolkit.locks import locked
from toolkit.paths import refuse_inputs
from toolkit.pipeline import check_settings
from toolkit.prepare import inputs_of, load_teacher, warn_of_unused
from toolkit.progress import notice, warn
from toolkit.pruning import find_groups
from toolkit.search import cluster
from toolkit.search.database import check_url, failures, file_url, without_password
from toolkit.search.executors import Executor, InProcess
from toolkit.search.finals import BUNDLES, ORIGINS, full_evidence
from toolkit.search.front import Limits
from toolkit.search.objective import TUNED, Laboratory, Workbench, model_digest
from toolkit.search.plot import plot_front
from toolkit.search.presence import at_work
from toolkit.search.report import DATA, MARKDOWN, PICTURE, SearchResult, own_name, record, render_markdown
from toolkit.search.runner import TRACES, Plan, excess_of, run_trials
from toolkit.search.space import Anatomy, Space
from toolkit.search.storage import Study, forget
from toolkit.training.distributed import launched

SETTINGS = "search.yaml"
TITLE = "settings of a search, written by `toolkit search`"
"""First line of those that are ours."""
FRONT = (DATA, MARKDOWN, PICTURE)
STORAGE, FINALS_LOCK = "study.sqlite", ".finals.lock"


@dataclass(frozen=True)
class Search:
    """A search made ready: everything that it names is there and fits."""

    config: SearchRunConfig
    output: Path
    laboratory: Laboratory
    bench: Workbench
    space: Space
    teachers: tuple[str, ...]
    """Name the networks whose soft labels trials may learn."""
    threads: int | None
    """As the user gave them; workers of `config` have as many as this machine gives them."""


def search(config: SearchRunConfig, output: Path, *, force: bool = False) -> SearchResult:
    """Try configurations of `harden`, give the best ones full evidence, and say which to ship.

    The same call again goes on where an earlier one was cut short, or adds trials to those that are there; two at a
    time on one storage share the trials.

    Args:
        config: of every trial, of the space, and of the limits.
        output: folder of the search: its trials (unless `storage` says otherwise), fine-tunings, bundles and front.
        force: begin anew.

    Raises:
        ToolkitError: bad input, no storage, another study in it, or no trial that could be made.
    """
    _refuse_torchrun()
    if force:
        refuse_inputs(output, (*inputs_of(config), *map(str, config.search.space.get("finetune.teacher", ()))))
    ready = prepare_search(config, output)
    config, url = ready.config, config.search.storage or file_url(output / STORAGE)
    identity = _identity(ready)
    anew = partial(_begin_anew, ready, url, identity) if force else None
    _ = ready.laboratory.alone_ms  # timed now, before there are workers
    with bundle.disk_errors(output), contextlib.ExitStack() as workers:
        executor = workers.enter_context(_executor(ready))  # first: nothing is removed for want of a cluster
        with at_work(output, anew):
            with _open_study(ready, url, identity) as study, failures(url):
                _write_settings(ready, url)
                traces = output / own_name(config.search.study, TRACES)
                plan = Plan(config.search.trials, config.seeds, Limits.of(config), config.search.budget, traces)
                run_trials(study, ready.space, executor, plan)
                tried = study.tried()
            workers.close()
            with locked(output / FINALS_LOCK, "it writes the bundles of this search"):
                found = full_evidence(config, output, ready.laboratory, ready.space, tried, identity)
                write_front(found)
    return found


def _begin_anew(ready: Search, url: str, identity: Mapping[str, Any]) -> None:
    """Remove what an earlier search of this name left, here and in its storage."""
    config = ready.config
    _keep_others(config, ready.output)
    if config.search.storage is not None:
        forget(url, config.search.study, identity)
    _clear(ready.output, config.search.study)


def _write_settings(ready: Search, url: str) -> None:
    """Keep what the user asked for, free of the storage's password."""
    config, how = ready.config, ready.config.search
    kept = how.model_copy(update={"storage": how.storage and without_password(url)})
    written = ready.output / own_name(how.study, SETTINGS)
    asked = config.model_copy(update={"search": kept, "threads": ready.threads})
    write_settings(asked, written, home=ready.output, title=TITLE)


def _refuse_torchrun() -> None:
    """Several processes of one training would wait for each other where those of a search share trials."""
    if launched():
        raise ToolkitError(
            "a search shares its trials in another way than torchrun does",
            found="a search started by torchrun",
            fix="start it without torchrun; --address, or --storage with several processes, share the trials",
        )


def _keep_others(config: SearchRunConfig, output: Path) -> None:
    """Refuse to remove with the folder what other studies left in it.

    Raises:
        ToolkitError: another study's settings lie in `output`.
    """
    ours = own_name(config.search.study, SETTINGS)
    others = sorted(path.name for path in output.glob(f"*{SETTINGS}") if path.name != ours and _is_ours(path))
    if others:
        raise ToolkitError(
            "--force would remove other studies with this one",
            found=f"{', '.join(others)} in {output}",
            fix="name another folder with --output, or remove that folder if nothing in it is wanted any more",
        )


def prepare_search(config: SearchRunConfig, output: Path) -> Search:
    """Load and check everything that the trials need; nothing is written.

    Raises:
        ToolkitError: bad input.
    """
    _check_output(output, config.search.study)
    _check_flags(config)
    compose(config.attack.attacks, classes=2, norm=config.threat.norm)
    if config.prune.round_to == "auto" or "auto" in config.search.space.get("prune.round_to", ()):
        raise ToolkitError(
            "a search times its graphs itself, so --round-to auto would measure inside a measurement",
            found="--round-to auto",
            fix='name a multiple, or let the search vary it: --space "prune.round_to=4,8,16; prune.ratio=0.2:0.8:0.1"',
        )
    how, threads = config.search, config.threads
    if how.address is not None and threads is None:  # one number for all workers, and room for as many
        config = config.model_copy(update={"threads": max(1, usable_threads(None) // (how.workers or 1))})
    first = config.model_copy(update={"seed": config.seeds[0]})
    bench = Workbench(str(Path.cwd()), str(output.absolute()), how.images, how.attacks)
    base = build(HardenConfig, first.model_dump(mode="json", exclude={"search"}))
    laboratory = Laboratory(base, output.absolute(), images=how.images, attacks=how.attacks)
    with laboratory.original() as original:
        layers = named_layers(load_onnx(original.path), ["*"])
    groups = find_groups(laboratory.prepared.model) if how.per_group else ()
    space = Space(config, Anatomy(layers, groups), check_settings)
    check_settings(space.config(space.start()))
    warn_of_unused(
        *(
            config.finetune.model_copy(update={"objective": objective, "qat": qat})
            for objective in space.choices("finetune.objective")
            for qat in space.choices("finetune.qat")
        )
    )
    bench.adopt(laboratory, base)
    return Search(config, output, laboratory, bench, space, _teachers(config, space, laboratory), threads)


def _teachers(config: SearchRunConfig, space: Space, laboratory: Laboratory) -> tuple[str, ...]:
    """Digests of the networks that trials learn from.

    Raises:
        ToolkitError: there are to be such trials, and no usable teacher.
    """
    objectives, prepared = space.choices("finetune.objective"), laboratory.prepared
    tuning = config.finetune.model_copy(update={"objective": "distill"} if "distill" in objectives else {})
    found = []
    for path in space.choices("finetune.teacher"):
        tuning = tuning.model_copy(update={"teacher": path and Path(path)})
        teacher = load_teacher(tuning, prepared.model.spec, prepared.splits, config.model)
        found += [model_digest(teacher)] if teacher else []
    return tuple(found)


def _check_flags(config: SearchRunConfig) -> None:
    """Flags and settings that would do nothing, or name what cannot be.

    Raises:
        ToolkitError: no such storage; groups are to have ratios of their own, and no ratio varies; or a limit that a
            search has not.
    """
    how = config.search
    if how.storage is not None:
        check_url(how.storage)
    if how.address is None and (how.workers is not None or how.gpus):
        warn("--workers and --trial-gpus are for Ray: without --address they are ignored")
    if how.per_group and "prune.ratio" not in how.space:
        raise ToolkitError(
            "no ratio varies that every group could have one of its own of",
            found=f"--per-group, and --space varies {', '.join(how.space)}",
            fix='add one, such as "prune.ratio=0.2:0.8:0.1", or leave --per-group away',
        )
    if config.gates.min_integer_coverage is not None:
        raise ToolkitError(
            "a search has no limit on integer coverage",
            found=f"gates.min_integer_coverage {config.gates.min_integer_coverage:g} in the settings",
            fix="take it out; --space precision=int8 keeps all layers integer, and every bundle tells its coverage",
        )


@contextlib.contextmanager
def _open_study(ready: Search, url: str, identity: Mapping[str, Any]) -> Iterator[Study]:
    limits = Limits.of(ready.config)

    def excess(result: Any) -> Mapping[str, float]:
        return excess_of(limits, ready.laboratory.alone_ms, result)

    study = Study(url, ready.config.search.study, ready.space, identity, ready.config.seed, excess)
    try:
        yield study
    finally:
        study.close()


@contextlib.contextmanager
def _executor(ready: Search) -> Iterator[Executor]:
    """Ray workers where an address is given and Ray is there; else this process."""
    config = ready.config
    address = config.search.address
    if address is not None and not cluster.is_installed():
        notice("Ray is not installed (the extra `scale`): all trials run in this process")
        address = None
    executor: Executor
    if address is None:
        executor = InProcess(ready.bench)
    else:
        needs = cluster.Needs(config.threads or usable_threads(None), config.search.gpus)
        executor = cluster.RayCluster(address, ready.bench, needs, config.search.workers)
    try:
        yield executor
    finally:
        executor.close()


def write_front(found: SearchResult) -> None:
    """Write the front as data, as Markdown and as a picture."""
    best = found.recommendation
    found.file(DATA).write_text(json.dumps(record(found), indent=2) + "\n", encoding="utf-8")
    found.file(MARKDOWN).write_text(render_markdown(found), encoding="utf-8")
    points = [one.point for one in found.candidates]
    plot_front(found.file(PICTURE), found.cheap, points, found.limits, recommended=best.point.trial, batch=found.batch)


def _identity(ready: Search) -> dict[str, Any]:
    """What must be equal for results to be comparable; limits, and how the front is judged, may change."""
    config, prepared = ready.config, ready.laboratory.prepared
    values = config.model_dump(mode="json")
    for part in ("gates", "attack", "model"):
        del values[part]
    for part in ("evaluation", "download"):  # of no account, or only the way the images come here
        del values["data"][part]
    values["data"] = {**values["data"], "data_dir": None, "source": prepared.source.name.partition(":")[0]}
    values["finetune"].pop("teacher")
    values["benchmark"] = {name: values["benchmark"][name] for name in ("provider", "threads")}
    judged = {name: values["search"][name] for name in ("space", "per_group", "images", "attacks")}
    del values["search"]
    return {
        **values,
        **judged,
        "values that can be made": {  # which depends on the packages that are installed
            dimension.name: list(dimension.values) for dimension in ready.space.dimensions if dimension.step is None
        },
        "threads": ready.threads,
        "batch": config.benchmark.batches[0],
        "seeds": list(config.seeds),
        "weights": ready.laboratory.weights,
        "teachers": list(ready.teachers),
        "images of the data set": [
            split.labelled_digest for split in (prepared.splits.train, prepared.splits.validation)
        ],
    }


def _check_output(output: Path, study: str) -> None:
    """Refuse a folder of something else.

    Raises:
        ToolkitError: `output` is no search's folder, or holds a file of the user's where the settings go.
    """
    settings = output / own_name(study, SETTINGS)
    if settings.is_file() and not _is_ours(settings):
        raise ToolkitError(
            "a file that no search wrote lies where the settings of this one go",
            found=str(settings),
            fix="move it, or name another folder with --output",
        )
    begun = (output / STORAGE).is_file() or any(_is_ours(path) for path in output.glob(f"*{SETTINGS}"))
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not begun):
        raise ToolkitError(
            "the output is no folder of a search",
            found=str(output),
            fix="name another folder with --output; --force replaces searches only",
        )


def _is_ours(settings: Path) -> bool:
    """Whether a search wrote these settings."""
    with settings.open(encoding="utf-8", errors="replace") as file:
        return file.readline().rstrip("\n") == f"# {TITLE}"


def _clear(output: Path, study: str) -> None:
    """Remove what a search writes, and nothing else."""
    for folder in (TUNED, BUNDLES, ORIGINS, own_name(study, TRACES)):
        if (output / folder).is_dir():
            shutil.rmtree(output / folder)
    ours = [output / own_name(study, name) for name in (*FRONT, SETTINGS)]
    for file in (*output.glob(f"{STORAGE}*"), *ours, output / FINALS_LOCK):
        file.unlink(missing_ok=True)
