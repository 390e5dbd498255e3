"""`toolkit doctor`: what is wrong with this machine's set-up, and the fix.

Every check is a function that returns findings; what is broken may raise anything, and that is then the finding.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from toolkit.errors import ToolkitError
from toolkit.evaluators import environment

Level = Literal["ok", "warning", "problem"]
DISTRIBUTION = "onnx-hardening-toolkit"
LEAST_MEMORY = 4 * 2**30
"""Bytes: torch's and CUDA's libraries, a small network's training and its data fit into this."""
REINSTALL = f"make a fresh environment and install with `pip install -c constraints.txt {DISTRIBUTION}`"
INTEGER_SETS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
BFLOAT_SETS = ("avx512_bf16", "amx_bf16", "bf16")
PROVIDERS: tuple[Literal["cpu"], Literal["cuda"]] = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: `ok`, a `warning` (works, with a drawback) or a `problem` (will fail)."""

    level: Level
    topic: str
    found: str
    fix: str = ""


def diagnose(*, root: Path = environment.ROOT, data_dir: Path | None = None) -> tuple[Finding, ...]:
    """Look at the whole set-up; takes seconds, for it imports the libraries and opens sessions.

    Args:
        root: stands before every system path.
        data_dir: where data sets are looked for besides the usual places.
    """
    checks: tuple[tuple[str, Callable[[], Iterable[Finding]]], ...] = (
        ("Python and libraries", check_versions),
        ("ONNX Runtime", check_runtime),
        ("torch and torchvision", check_torchvision),
        ("providers", check_providers),
        ("CPU", lambda: check_cpu(root=root)),
        ("threads", lambda: check_threads(root=root)),
        ("memory", lambda: check_memory(root=root)),
        ("data sets", lambda: check_data(data_dir)),
    )
    findings: list[Finding] = []
    for topic, check in checks:
        try:
            findings += check()
        except Exception as error:  # a broken library may raise anything, and the other checks still count
            findings.append(Finding("problem", topic, f"{type(error).__name__}: {_first_line(error)}", REINSTALL))
    return tuple(findings)


def healthy(findings: Iterable[Finding]) -> bool:
    """Whether nothing will fail."""
    return all(finding.level != "problem" for finding in findings)


def render(findings: Iterable[Finding]) -> str:
    """The findings as lines of text, each fix below its finding, and a summary."""
    listed = tuple(findings)
    lines = []
    for finding in listed:
        lines.append(f"{finding.level:<8} {finding.topic}: {finding.found}")
        if finding.fix:
            lines.append(f"{'':<8} fix: {finding.fix}")
    counts = {level: sum(finding.level == level for finding in listed) for level in ("problem", "warning")}
    said = [f"{count} {level}{'s' if count > 1 else ''}" for level, count in counts.items() if count]
    lines.append(", ".join(said) or "nothing wrong")
    return "\n".join(lines)


def check_versions() -> list[Finding]:
    """Python and every required library against the ranges that the installed distribution states."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        package = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        found = f"{DISTRIBUTION} is not installed, so the supported versions are unknown"
        return [Finding("warning", "Python and libraries", found, "install it: `pip install .` in the source folder")]
    findings = []
    python, wanted = platform.python_version(), package["Requires-Python"] or ""
    if not SpecifierSet(wanted).contains(python, prereleases=True):
        findings.append(Finding("problem", "Python", f"{python}, supported {wanted}", f"use Python {wanted}"))
    for requirement in map(Requirement, metadata.requires(DISTRIBUTION) or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if requirement.name in environment.RUNTIMES and _runtimes():
            continue  # any of them will do; check_runtime looks at them
        version = environment.installed(requirement.name)
        if version is None:
            findings.append(_outside(requirement.name, "not installed", str(requirement)))
        elif not requirement.specifier.contains(version, prereleases=True):
            findings.append(
                _outside(requirement.name, f"{version}, supported {requirement.specifier}", str(requirement))
            )
    versions = environment.versions()
    named = ", ".join(
        f"{name} {versions[name]}" for name in ("python", "torch", "torchvision", "onnx") if name in versions
    )
    return findings or [Finding("ok", "Python and libraries", f"{named}; all in the supported ranges")]


def check_runtime() -> list[Finding]:
    """Exactly one distribution of ONNX Runtime: they write the same folder and break each other."""
    topic, found = "ONNX Runtime", _runtimes()
    wanted = "onnxruntime" if platform.system() == "Darwin" else "onnxruntime-gpu"
    if not found:
        return [Finding("problem", topic, "not installed", f"pip install {wanted}")]
    named = ", ".join(f"{name} {environment.installed(name)}" for name in found)
    if len(found) > 1:
        fix = f"pip uninstall -y {' '.join(found)} && pip install {wanted}"
        return [Finding("problem", topic, f"{named} at once: they overwrite each other's files", fix)]
    return [Finding("ok", topic, named)]


def check_torchvision() -> list[Finding]:
    """torch and torchvision builds that fit together: torchvision's compiled operators load."""
    topic = "torch and torchvision"
    fix = "install both from one index: `pip install --force-reinstall -c constraints.txt torch torchvision`"
    try:
        import torch
        import torchvision

        fits = hasattr(torch.ops.torchvision, "nms")
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        return [Finding("problem", topic, f"{type(error).__name__}: {_first_line(error)}", fix)]
    named = f"{torch.__version__} and {torchvision.__version__}"
    if not fits:
        return [Finding("problem", topic, f"{named}: operator torchvision::nms does not exist", fix)]
    return [Finding("ok", topic, f"{named}, compiled operators load")]


def check_providers() -> list[Finding]:
    """The providers that a session really gets, not those that the wheel lists."""
    import onnxruntime
    import torch

    listed = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    reasons: dict[str, str] = {}
    for provider in PROVIDERS:
        try:
            _try_provider(provider)
        except ToolkitError as error:
            reasons[provider] = error.found
    works = [provider for provider in PROVIDERS if provider not in reasons]
    said = f"sessions run on: {', '.join(works) or 'none'} (the wheel lists {', '.join(listed)})"
    if "cpu" in reasons:
        return [Finding("problem", "providers", f"{said}; cpu: {reasons['cpu']}", REINSTALL)]
    findings = [Finding("ok", "providers", said)]
    if not torch.cuda.is_available():
        findings.append(Finding("ok", "GPU", "none that torch can use; everything runs on the CPU"))
    elif "cuda" in reasons:
        fix = "install onnxruntime-gpu for the CUDA version of torch, and no other onnxruntime"
        findings.append(Finding("warning", "GPU", f"torch has one, ONNX Runtime not: {reasons['cuda']}", fix))
    else:
        findings.append(Finding("ok", "GPU", ", ".join(environment.gpu_names())))
    return findings


def check_cpu(*, root: Path = environment.ROOT) -> list[Finding]:
    """Instructions that integer and bfloat16 arithmetic need to be fast, and integers to be exact."""
    model, features = environment.cpu_model(root=root), environment.cpu_features(root=root)
    if not features:
        return [
            Finding(
                "warning",
                "CPU",
                f"{model}, instruction sets unknown",
                "compare int8 and float with `toolkit benchmark`",
            )
        ]
    integer = [name for name in features if name in INTEGER_SETS]
    bfloat = [name for name in features if name in BFLOAT_SETS]
    if integer:
        findings = [Finding("ok", "CPU", f"{model}, integers by {', '.join(integer)}")]
    else:
        found = f"{model} has no VNNI: int8 is slower, and its sums can saturate at 16 bits and change answers"
        fix = (
            "quantise for it with --reduce-range, and trust only figures measured on the machine that will run the "
            "file (`toolkit verify`, `toolkit benchmark`)"
        )
        findings = [Finding("warning", "CPU", found, fix)]
    said = (
        f"by {', '.join(bfloat)}"
        if bfloat
        else "none: training and attacks run in float32, at less than half the speed"
    )
    return [*findings, Finding("ok", "bfloat16", said)]


def check_threads(*, root: Path = environment.ROOT) -> list[Finding]:
    """More threads than this process may keep busy get in each other's way."""
    import torch

    allowed, present, quota = environment.allowed_cpus(root=root), os.cpu_count() or 1, environment.cpu_quota(root=root)
    limit = "" if quota is None else f", control group's quota {quota:g}"
    found = f"{allowed} of {present} CPUs may be used{limit}"
    if torch.get_num_threads() > allowed:
        found += f"; torch starts {torch.get_num_threads()} threads"
        return [Finding("warning", "threads", found, f"set OMP_NUM_THREADS={allowed}, or give --threads {allowed}")]
    return [Finding("ok", "threads", found)]


def check_memory(*, root: Path = environment.ROOT) -> list[Finding]:
    """Memory of the machine or of the control group."""
    memory = environment.allowed_memory(root=root)
    found = f"{memory / 2**30:.1f} GiB may be used"
    if memory < LEAST_MEMORY:
        fix = f"allow at least {LEAST_MEMORY / 2**30:.0f} GiB, or take fewer images and smaller batches"
        return [Finding("warning", "memory", found, fix)]
    return [Finding("ok", "memory", found)]


def check_data(data_dir: Path | None = None) -> list[Finding]:
    """The data sets that can be named without a folder."""
    from toolkit.data.sources import SAMPLE
    from toolkit.data.standard import find_cifar10, find_fashion_mnist

    findings = [Finding("ok", "data set sample", "embedded")]
    if not SAMPLE.is_file():
        findings = [Finding("problem", "data set sample", "its file is missing from the installed package", REINSTALL)]
    fixes = {
        "fashion-mnist": "`apt-get install dataset-fashion-mnist` (Debian, Ubuntu), --data-dir DIR, or --download",
        "cifar10": "--data-dir DIR with torchvision's cifar-10-batches-py, or --download",
    }
    places = {"fashion-mnist": find_fashion_mnist(data_dir), "cifar10": find_cifar10(data_dir)}
    for name, place in places.items():
        missing = Finding("warning", f"data set {name}", "not found; needed only when a command names it", fixes[name])
        findings.append(missing if place is None else Finding("ok", f"data set {name}", str(place)))
    return findings


def _runtimes() -> list[str]:
    return [name for name in environment.RUNTIMES if environment.installed(name) is not None]


def _outside(name: str, found: str, requirement: str) -> Finding:
    return Finding("problem", name, found, f"pip install '{requirement.split(';')[0].strip()}'")


def _try_provider(provider: Literal["cpu", "cuda"]) -> None:
    """Open a session on a graph of one node and run it."""
    import numpy as np
    import onnx
    from onnx import parser

    from toolkit.exporters.session import make_session

    text = '<ir_version: 8, opset_import: ["": 18]> tiny (float[n] x) => (float[n] y) { y = Add (x, x) }'
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.onnx"
        onnx.save(parser.parse_model(text), path)
        session = make_session(path, provider=provider, threads=1)
        (twice,) = session.run(None, {"x": np.ones(3, dtype=np.float32)})
    if not (twice == 2).all():
        raise ToolkitError("ONNX Runtime computes wrongly", found=f"1 + 1 = {twice[0]}", fix=REINSTALL)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["no message"])[0][:200]
