"""`toolkit verify`: are a bundle's files what was written, and do its claims hold on this machine?

What is measured again is judged by the side on which a claim would do harm: a graph that is more accurate, more robust
or faster than claimed has kept its promise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toolkit import bundle
from toolkit.artifacts import Proportion
from toolkit.attacking import attack, with_bundle_settings
from toolkit.attacks.ensemble import compose
from toolkit.config import AttackRunConfig, HardenConfig, ModelConfig, ModelRunConfig
from toolkit.errors import ToolkitError
from toolkit.evaluators.accuracy import measure_accuracy
from toolkit.evaluators.cost import integer_coverage
from toolkit.exporters.session import OnnxPredictor
from toolkit.models.loading import CodeNeededError, read_model_file
from toolkit.prepare import prepare
from toolkit.reports.schema import Report, Share
from toolkit.stages import benchmark_files

ATTACKED = 512
"""Images that are attacked where the user does not say how many."""
FILES_TO_RUN = (bundle.DEPLOYED, bundle.FLOAT_TWIN, bundle.CHECKPOINT)
ALLOWED = 0.005
"""By how much accuracy on the very same images may stay behind its claim: kernels of other machines round otherwise."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim of a bundle, checked."""

    file: str
    claim: str
    passed: bool | None
    """None: it could not be measured here."""
    detail: str

    @property
    def verdict(self) -> str:
        return {True: "ok", False: "FAILED", None: "NOT MEASURED"}[self.passed]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(config: AttackRunConfig, *, files_only: bool = False) -> Iterator[Claim]:
    """Check a bundle, claim by claim, the quick ones first.

    Args:
        config: `config.model.path` is the bundle. What is set of data, seed, threads, attacks and number of images is
            taken in place of the bundle's own; where none is set, at most `ATTACKED` images are attacked.
        files_only: hashes and schema alone.

    Raises:
        ToolkitError: no bundle, no such attacks, or images that the user named and that are not there.
    """
    folder = config.model.path
    compose(config.attack.attacks, classes=2, norm=None)
    findings = bundle.verify_files(folder)
    yield from (Claim(found.file, "unchanged", found.passed, found.detail) for found in findings)
    if not all(found.passed for found in findings):
        return  # claims of other files are nobody's
    report = bundle.read_report(folder)
    yield Claim(bundle.REPORT, "schema", True, f"version {report.schema_version}")
    if files_only:
        return
    saved = bundle.read_config(folder)
    unusable = [claim for claim in (_loads(folder / name, config.model) for name in FILES_TO_RUN) if claim is not None]
    yield from unusable
    if any(claim.passed is False for claim in unusable):
        return
    yield from _measured(bundle.DEPLOYED, "integer layers", lambda: _coverage(folder, report, saved))
    named = config.data.source is not None
    yield from _measured(bundle.DEPLOYED, "accuracy", lambda: _accuracy(config, folder, report, saved), strict=named)
    yield from _measured(bundle.DEPLOYED, "time", lambda: _latency(config, folder, report, saved))
    yield from _measured(bundle.DEPLOYED, "robust accuracy", lambda: _robustness(config, report, saved))


def _loads(path: Path, how: ModelConfig) -> Claim | None:
    """What keeps a file of the bundle from running here; None: nothing."""
    try:
        if path.name == bundle.CHECKPOINT:
            read_model_file(path, trust_pickle=how.trust_pickle, arch=how.arch)
        else:
            OnnxPredictor(path)
    except CodeNeededError as error:
        return Claim(path.name, "runs here", None, f"{error.problem}: {error.found}; {error.fix}")
    except ToolkitError as error:
        return Claim(path.name, "runs here", False, f"{error.problem}: {error.found}")
    return None


def _measured(file: str, claim: str, measure: Callable[[], list[Claim]], *, strict: bool = False) -> list[Claim]:
    """What `measure` finds; what is missing here is no fault of the bundle, unless the user named it (`strict`)."""
    try:
        return measure()
    except ToolkitError as error:
        if strict:
            raise
        return [Claim(file, claim, None, f"{error.problem}: {error.found}; {error.fix}")]


def _coverage(folder: Path, report: Report, saved: HardenConfig) -> list[Claim]:
    claimed = report.quantization.integer_coverage
    found = integer_coverage(folder / bundle.DEPLOYED, provider=saved.benchmark.provider).share
    detail = f"{found:.2%} of the multiply-accumulates in integer kernels; claimed {claimed:.2%}"
    return [Claim(bundle.DEPLOYED, "integer layers", found >= claimed - 1e-4, detail)]


def _accuracy(config: AttackRunConfig, folder: Path, report: Report, saved: HardenConfig) -> list[Claim]:
    """Of both graphs on the images of the report."""
    own = with_bundle_settings(config, folder, saved)
    data = own.data.model_copy(update={"evaluation": saved.data.evaluation})
    # the seed that chose them, whatever seed the user gives to other choices
    prepared = prepare(ModelRunConfig(model=own.model, data=data, seed=saved.seed, threads=config.threads))
    split, claimed = prepared.splits.evaluation, report.data.evaluation
    if split.digest != claimed.sha256:
        detail = f"other images: {len(split)} of {prepared.source.name}; the report is of {claimed.images}"
        return [Claim(bundle.DEPLOYED, "accuracy", False, detail)]
    claims = ((bundle.FLOAT_TWIN, report.accuracy.fp32), (bundle.DEPLOYED, report.accuracy.deployed))
    return [
        _not_below(file, "accuracy", measure_accuracy(OnnxPredictor(folder / file), split), share)
        for file, share in claims
    ]


def _not_below(file: str, claim: str, found: Proportion, claimed: Share) -> Claim:
    passed = found.value >= claimed.value - ALLOWED
    return Claim(file, claim, passed, f"{found}; claimed {claimed.value:.2%}, the same images")


def _latency(config: AttackRunConfig, folder: Path, report: Report, saved: HardenConfig) -> list[Claim]:
    """That the graph is faster than its float twin, where that is claimed."""
    threads = config.threads or saved.threads
    how = saved.benchmark.model_copy(update={"threads": threads or saved.benchmark.threads})
    rows = {row.batch: row for row in benchmark_files([folder], how, config.seed) if row.file == "deployed"}
    claims = []
    for claimed in report.latency:
        row = rows.get(claimed.batch)
        if claimed.file != "deployed" or row is None:
            continue
        name = f"time, batch {claimed.batch}"
        detail = (
            f"{row.ratio:.2f} [{row.ratio_low:.2f}, {row.ratio_high:.2f}] of its float twin's; claimed "
            f"{claimed.ratio:.2f} [{claimed.ratio_low:.2f}, {claimed.ratio_high:.2f}]"
        )
        passed = None if not row.trusted else not (claimed.ratio_high < 1 < row.ratio_low)
        busy = "" if row.trusted else f"; other processes took {row.foreign_load:.0%} of the CPU time"
        claims.append(Claim(bundle.DEPLOYED, name, passed, detail + busy))
    return claims


def _robustness(config: AttackRunConfig, report: Report, saved: HardenConfig) -> list[Claim]:
    """The worst case on some of the images, by the attacks of the report unless others are named."""
    claimed = report.robust_accuracy.deployed
    images = config.data.evaluation if "evaluation" in config.data.model_fields_set else None
    count = images or min(ATTACKED, report.data.evaluation.images)
    how = config.attack if "attack" in config.model_fields_set else saved.attack
    data = config.data.model_copy(update={"evaluation": count})
    wanted = config.model_copy(update={"data": data, "attack": how})
    found = attack(wanted, probes=False).robust_accuracy["deployed"]
    detail = (
        f"{found.value:.2%} [{found.low:.2%}, {found.high:.2%}] of {found.total} images under {how.attacks}; claimed "
        f"{claimed.value:.2%} of {claimed.total}"
    )
    return [Claim(bundle.DEPLOYED, "robust accuracy", found.high >= claimed.value, detail)]
