"""Cheap evidence for one trial: its network is pruned and tuned, its graph written, scored on few images and timed.

It is made by the pipeline's own stages, on validation images: evaluation images are for the front alone, whose figures
would flatter it had they chosen it. Trials that differ in the graph only share one fine-tuning, kept on disk; a
fine-tuning that was cut short goes on from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from toolkit import bundle
from toolkit.artifacts import OnnxModel, Predictor, Proportion, TorchModel, weights_digest
from toolkit.attacks.ensemble import compose
from toolkit.config import BenchmarkConfig, HardenConfig
from toolkit.errors import ToolkitError
from toolkit.evaluators.evaluation import Conditions
from toolkit.evaluators.latency import LatencyRow, benchmark
from toolkit.evaluators.robustness import evaluate_robustness
from toolkit.evaluators.scoring import TargetName
from toolkit.evaluators.timing import Interval
from toolkit.exporters.onnx import export_onnx
from toolkit.graphs import Graphs, settled, some_pixels, timed, write_graphs
from toolkit.lineup import Lineup
from toolkit.locks import locked, stopwatch_lock
from toolkit.models.registry import code_digest
from toolkit.paths import public_name
from toolkit.pipeline import check_settings, resolve, rounding_of
from toolkit.prepare import PreparedAttack, load_teacher, prepare_attack
from toolkit.pruning import prune
from toolkit.search.problems import Problem, problem_of
from toolkit.training.loop import TrainingResult, train
from toolkit.watch import Stopwatch

QUICK_ROUNDS = 10
"""Rounds in which a trial's graph is timed."""
TUNED = "tuned"
"""Folder, within that of the search, of the fine-tunings."""


@dataclass(frozen=True)
class Measurement:
    """What a trial came to under one seed; all figures are those of the deployed graph."""

    clean: Proportion
    robust: Proportion
    milliseconds: float
    """Per call at the first batch size, median."""
    ratio: Interval
    """Time over that of the original network's float graph, in the same rounds."""
    trusted: bool
    """Whether this machine was left alone while it was timed."""
    bytes: int
    quantize: dict[str, Any]
    """Settings with what was searched for the graph filled in."""
    seconds: dict[str, float]

    def record(self) -> dict[str, Any]:
        """As plain JSON data; `of` is the inverse."""
        return asdict(self)

    @classmethod
    def of(cls, record: dict[str, Any]) -> Measurement:
        """The measurement that `record` gave."""
        shares = {name: Proportion(**record[name]) for name in ("clean", "robust")}
        return cls(**{**record, **shares, "ratio": Interval(**record["ratio"])})


@dataclass(frozen=True)
class Job:
    """One trial under one seed."""

    trial: int
    config: HardenConfig


@dataclass(frozen=True)
class Outcome:
    """What became of a job: exactly one of measurement and problem is there."""

    job: Job
    measurement: Measurement | None = None
    problem: Problem | None = None


class Laboratory:
    """Everything that trials under one seed share.

    Args:
        config: a configuration of the search; what varies in it is of no account.
        folder: of the search; fine-tunings are kept there.
        images: number of validation images that judge.
        attacks: of the cheap evidence.

    Raises:
        ToolkitError: model or data are not there, or do not fit.
    """

    def __init__(self, config: HardenConfig, folder: Path, *, images: int, attacks: str) -> None:
        found = prepare_attack(config)
        judging = replace(found.splits, evaluation=found.splits.validation.first(images))
        self.prepared: PreparedAttack = replace(found, splits=judging)
        self.whole = found.splits
        """With the evaluation images of the front."""
        self.attacks, self.folder = attacks, folder
        self._export = config.export.model_copy(update={"end_to_end": False})
        self._resolved = resolve(config, found)
        compose(attacks, classes=2, norm=config.threat.norm)

    @contextlib.contextmanager
    def original(self) -> Iterator[OnnxModel]:
        """The network that came in, as the float graph that times refer to: a file, for the block alone, in a folder of
        its own. Whoever ends a worker of a cluster lets it clear up nothing that it would keep for longer.
        """
        with tempfile.TemporaryDirectory(prefix="toolkit-search-") as folder:
            path = Path(folder) / "original.onnx"
            path.write_bytes(self._original)
            yield OnnxModel(path, "fp32")

    @cached_property
    def _original(self) -> bytes:
        with tempfile.TemporaryDirectory(prefix="toolkit-search-") as folder:
            return export_onnx(self.prepared.model, Path(folder) / "original.onnx", self._export).path.read_bytes()

    @cached_property
    def alone_ms(self) -> float:
        """Milliseconds per call of `original` at the first batch size, on this machine, timed by itself.

        Trials are timed beside other workers' trainings, so that times of theirs say more as shares of the original's.
        """
        config, shape = self._resolved, self.prepared.model.spec.input_shape
        how, pixels = at_first_batch(timed(config)), some_pixels(config, self.prepared.splits.evaluation)
        with self.original() as original, locked(stopwatch_lock()):
            files = {"original": original.path}
            rows = benchmark(files, how, shape, baseline="original", seed=config.seed, images=pixels)
        return rows[0].p50

    @cached_property
    def weights(self) -> str:
        """Names the network that came in."""
        return model_digest(self.prepared.model)

    def tuned_file(self, config: HardenConfig) -> Path:
        """Where the fine-tuning of a resolved configuration is kept, in the folder of the search."""
        parts = {"prune", "finetune", "seed", "threads", "threat", "data"}
        facts = {**config.model_dump(mode="json", include=parts), "weights": self.weights}
        for part in ("evaluation", "download"):  # judges alone; the way the images come here
            del facts["data"][part]
        facts["images"] = [
            split.labelled_digest for split in (self.prepared.splits.train, self.prepared.splits.validation)
        ]
        teacher = self._teacher(config)  # what lies at a path may change
        facts["finetune"]["teacher"] = model_digest(teacher) if teacher else None
        if config.finetune.qat:
            facts["weight_bits"] = config.quantize.int8_bits
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / TUNED / f"{name}.pt"

    def measure(self, config: HardenConfig) -> Measurement:
        """Prune, tune, write and judge one configuration.

        Raises:
            ToolkitError: a stage that cannot handle it, such as a training that diverges.
        """
        check_settings(config)
        export = config.export.model_copy(update={"end_to_end": False})
        config = resolve(config, self.prepared).model_copy(update={"export": export})
        watch = Stopwatch()
        with watch.stage("tune"):
            tuned = self._tune(config)
        with self.original() as original:
            folder = original.path.parent
            workspace = bundle.Workspace(folder / "bundle", folder)
            workspace.files.mkdir()
            graphs = write_graphs(config, self.prepared, tuned.model, original, workspace, watch, learnt=tuned.learnt)
            with watch.stage("evaluate"):
                clean, robust = self._judge(config, tuned.model, graphs)
            with watch.stage("benchmark"):
                row = self._time(config, graphs, original)
            size = graphs.deployed.path.stat().st_size
            chosen = settled(config, graphs).quantize.model_dump(mode="json")
        ratio = Interval(row.ratio, row.ratio_low, row.ratio_high)
        return Measurement(clean, robust, row.p50, ratio, row.trusted, size, chosen, watch.seconds)

    def _tune(self, config: HardenConfig) -> TrainingResult:
        """The tuned network; once tuned it is read from disk, and whoever wants the same one meanwhile waits for it."""
        pruned = prune(self.prepared.model, config.prune).model
        splits = self.prepared.splits
        teacher = self._teacher(config)
        kept = self.tuned_file(config)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with locked(kept.with_suffix(".lock"), "the same fine-tuning is under way there"):
            return train(
                pruned,
                splits.train,
                splits.validation,
                config.finetune,
                self.prepared.plan,
                seed=config.seed,
                label="fine-tuning",
                checkpoint=kept,
                resume="or anew",
                teacher=teacher,
                rounding=rounding_of(config, self.prepared),
            )

    def _teacher(self, config: HardenConfig) -> TorchModel | None:
        return load_teacher(config.finetune, self.prepared.model.spec, self.prepared.splits, config.model)

    def _judge(self, config: HardenConfig, model: TorchModel, graphs: Graphs) -> tuple[Proportion, Proportion]:
        """Clean accuracy of the deployed graph, and what the attacks leave of it."""
        spec, provider = model.spec, config.benchmark.provider
        lineup = Lineup().with_network("float", model)
        lineup = lineup.with_deployed(
            graphs.deployed.path, spec.class_names, provider=provider, twin=graphs.quantized is not None
        )
        plan = self.prepared.plan
        conditions = Conditions(
            plan,
            spec.normalization,
            config.seed,
            passes=compose(self.attacks, len(spec.class_names), plan.threat.norm),
            precision=config.finetune.precision,
            input_range=lineup.input_range,
        )
        targets: dict[TargetName, Predictor] = {"deployed": lineup.targets["deployed"]}
        found = evaluate_robustness(lineup.surrogates, targets, self.prepared.splits.evaluation, conditions)
        return found.clean["deployed"], found.worst_case["deployed"]

    def _time(self, config: HardenConfig, graphs: Graphs, original: OnnxModel) -> LatencyRow:
        """At the first batch size, while no other search of this user on this machine is timing."""
        how = at_first_batch(timed(config))
        how = how.model_copy(update={"rounds": min(how.rounds, QUICK_ROUNDS)})
        files = {"deployed": graphs.deployed.path, "original": original.path}
        pixels = some_pixels(config, self.prepared.splits.evaluation)
        with locked(stopwatch_lock()):
            rows = benchmark(
                files, how, self.prepared.model.spec.input_shape, baseline="original", seed=config.seed, images=pixels
            )
        return next(row for row in rows if row.file == "deployed")


def at_first_batch(config: BenchmarkConfig) -> BenchmarkConfig:
    """The batch size at which a search times its graphs."""
    return config.model_copy(update={"batches": config.batches[:1]})


def model_digest(model: TorchModel) -> str:
    """Of everything that makes a network what it is: its code, normalisation and pruning, and what it has learnt."""
    spec, learnt = model.spec, weights_digest(model.network)
    made = [public_name(spec.architecture), code_digest(spec.architecture), spec.input_shape, list(spec.pruning)]
    facts = [*made, asdict(spec.normalization), learnt]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=dict).encode()).hexdigest()


@dataclass(frozen=True)
class Workbench:
    """Does jobs, in any process: everything in it is plain data.

    A worker keeps the laboratory of each seed as long as it lives.
    """

    home: str
    """Folder that relative paths start at."""
    folder: str
    """Of the search."""
    images: int
    attacks: str

    def __call__(self, job: Job) -> Outcome:
        """Do `job`; an error becomes a problem.

        A defect in one trial is its own: it would end the search again and again, since trials given back come first.
        """
        start = time.perf_counter()
        try:
            laboratory = self.laboratory(job.config)
        except ToolkitError as error:
            return Outcome(job, problem=Problem(error.problem, error.found, error.fix, fatal=True))
        except OSError as error:
            fix = "run where the folder is shared"
            return Outcome(job, problem=Problem("a folder of the search is not there", str(error), fix, fatal=True))
        try:
            found = laboratory.measure(job.config)
        except Exception as error:
            return Outcome(job, problem=problem_of(error, Path(self.folder)))
        return Outcome(job, replace(found, seconds={**found.seconds, "all": time.perf_counter() - start}))

    def adopt(self, laboratory: Laboratory, config: HardenConfig) -> None:
        """Use a laboratory in this process that was made for `config`."""
        for key in [key for key in _laboratories if key[0] == self]:  # of an earlier search in this folder
            del _laboratories[key]
        _laboratories[self, config.seed, config.threads] = laboratory

    def laboratory(self, config: HardenConfig) -> Laboratory:
        """That of the configuration's seed.

        Raises:
            ToolkitError: see `Laboratory`.
        """
        key = (self, config.seed, config.threads)
        if key not in _laboratories:
            if Path.cwd() != Path(self.home):
                os.chdir(self.home)
            _laboratories[key] = Laboratory(config, Path(self.folder), images=self.images, attacks=self.attacks)
        return _laboratories[key]


_laboratories: dict[tuple[Workbench, int, int | None], Laboratory] = {}
