"""The machine a figure was measured on: CPU, what of it this process may use, memory, versions.

Nothing here names the machine, its user or its folders. `root` stands before every system path, for tests.
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError
from toolkit.progress import notice

ROOT = Path("/")
FEATURES = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
)
"""Instruction sets that decide how fast and how exactly integers and bfloat16 run, in Linux's words."""
MAC_FEATURES = {"asimddp": "FEAT_DotProd", "i8mm": "FEAT_I8MM", "bf16": "FEAT_BF16"}
RUNTIMES = ("onnxruntime-gpu", "onnxruntime", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-qnn")
"""Distributions that all write the folder `onnxruntime`: one alone may be installed."""
LIBRARIES = (
    "torch",
    "torchvision",
    "torch-pruning",
    "numpy",
    "onnx",
    "onnxscript",
    *RUNTIMES,
    "onnxruntime-extensions",
    "neural-compressor",
    "torchao",
    "pillow",
)
UNLIMITED_V1 = 2**60
"""cgroup v1 writes a number near 2**63 where there is no memory limit."""


def cpu_model(*, root: Path = ROOT) -> str:
    """The CPU's name as the system gives it, with family and model where that names several generations (AMD EPYC).

    The architecture where the system gives no name.
    """
    info = _cpuinfo(root)
    for key in ("model name", "cpu model", "hardware"):
        found = info.get(key)
        if found:
            kin = [
                f"{word} {info[entry]}"
                for word, entry in (("family", "cpu family"), ("model", "model"))
                if entry in info
            ]
            told = any(letter.isdigit() for letter in found) or not kin
            return found if told else f"{found} ({', '.join(kin)})"
    if sys.platform == "darwin":
        named = _sysctl("machdep.cpu.brand_string")
        if named:
            return named
    return platform.processor() or platform.machine() or "unknown"


def cpu_features(*, root: Path = ROOT) -> tuple[str, ...]:
    """Those of `FEATURES` that the CPU has; empty where the system does not tell (Windows)."""
    info = _cpuinfo(root)
    present = set((info.get("flags") or info.get("features") or "").lower().split())
    if not info and sys.platform == "darwin":
        intel = (_sysctl("machdep.cpu.features") + " " + _sysctl("machdep.cpu.leaf7_features")).lower()
        present = set(intel.replace("avx512vnni", "avx512_vnni").split())
        present |= {ours for ours, name in MAC_FEATURES.items() if _sysctl(f"hw.optional.arm.{name}") == "1"}
    return tuple(feature for feature in FEATURES if feature in present)


def cpu_quota(*, root: Path = ROOT) -> float | None:
    """CPUs' worth of time that the control groups (v1 or v2) grant this process; None: no limit."""
    limits = []
    for folder in _cgroup_folders("cpu", root):
        words = _read(folder / "cpu.max").split()
        if len(words) == 2 and words[0].isdigit():
            limits.append(int(words[0]) / int(words[1]))
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():  # -1, no limit, is no digit
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def allowed_cpus(*, root: Path = ROOT) -> int:
    """CPUs that this process can keep busy: its affinity and its control groups' quota, at least 1.

    A quota of 1.5 CPUs counts as 1: a second thread would be stopped for part of every period, and the slowest calls
    would pay for it.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root=root)
    return affinity if quota is None else max(1, min(affinity, math.floor(quota)))


def usable_threads(requested: int | None, *, root: Path = ROOT) -> int:
    """The number of threads to run: as many as asked for, and never more than this process may use.

    Raises:
        ToolkitError: fewer than 1.
    """
    allowed = allowed_cpus(root=root)
    if requested is None:
        return allowed
    if requested < 1:
        raise ToolkitError("--threads has no usable value", found=str(requested), fix="give --threads 1 or more")
    if requested > allowed:
        notice(f"--threads {requested}: this process may use {allowed} CPUs, so {allowed} threads run")
    return min(requested, allowed)


def allowed_memory(*, root: Path = ROOT) -> int:
    """Bytes of memory that this process may use: the machine's, or its control groups' limit if that is less."""
    import psutil

    limits = [int(psutil.virtual_memory().total)]
    for folder in _cgroup_folders("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name)
            if text.isdigit() and int(text) < UNLIMITED_V1:
                limits.append(int(text))
    return min(limits)


def governor(*, root: Path = ROOT) -> str | None:
    """The CPU frequency governor (`performance`, `powersave`, ...); None where it cannot be read."""
    return _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None


def versions() -> dict[str, str]:
    """Versions of the toolkit, of Python and of the libraries that figures depend on, by distribution name."""
    import toolkit

    found = {"toolkit": toolkit.__version__, "python": platform.python_version()}
    return found | {name: version for name in LIBRARIES if (version := installed(name)) is not None}


def installed(distribution: str) -> str | None:
    """The installed version of a distribution; None if it is not there."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def gpu_names() -> tuple[str, ...]:
    """The names of the GPUs that torch can use."""
    import torch

    return tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def environment_record(threads: int) -> dict[str, Any]:
    """What report.json says of the machine, as plain JSON data.

    Args:
        threads: the number of CPU threads that the measurements ran with.
    """
    return {
        "cpu": cpu_model(),
        "cpu_features": list(cpu_features()),
        "cpus_present": os.cpu_count() or 1,
        "cpus_allowed": allowed_cpus(),
        "threads": threads,
        "governor": governor(),
        "memory_bytes": allowed_memory(),
        "os": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "gpus": list(gpu_names()),
        "versions": versions(),
    }


def _cpuinfo(root: Path) -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo, keys in lower case; empty where there is no such file."""
    entries: dict[str, str] = {}
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            entries.setdefault(key.strip().lower(), value.strip())
    return entries


def _cgroup_folders(controller: str, root: Path) -> Iterator[Path]:
    """The folders whose limits bind this process for `controller`: its own control group and all above it."""
    base = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines() or ["0::/"]:
        hierarchy, controllers, path = (*line.split(":", 2), "", "")[:3]
        if hierarchy == "0" and not controllers:
            mount = base
        elif controller in controllers.split(","):
            mount = next((base / name for name in (controllers, controller) if (base / name).is_dir()), base)
        else:
            continue
        # Inside a container the path is often the host's: what does not exist here is passed over.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield mount.joinpath(*parts[:depth])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _sysctl(name: str) -> str:
    """A value of macOS's sysctl; empty if it has none."""
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
