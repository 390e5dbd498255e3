from __future__ import annotations

import os
import sys
import types
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from toolkit import doctor
from toolkit.doctor import Finding, diagnose, healthy, render
from toolkit.errors import ToolkitError
from toolkit.evaluators import environment


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def plant_versions(monkeypatch: pytest.MonkeyPatch, changed: dict[str, str | None]) -> None:
    """Pretend that distributions have other versions; None: not installed."""
    real = metadata.version

    def version(name: str) -> str:
        found = changed[name] if name in changed else real(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)


def of(findings: tuple[Finding, ...] | list[Finding], topic: str) -> Finding:
    return next(finding for finding in findings if finding.topic == topic)


def test_this_machine_is_healthy_and_every_topic_is_there() -> None:
    findings = diagnose()
    assert healthy(findings), render(findings)
    topics = {finding.topic for finding in findings}
    assert topics >= {
        "Python and libraries", "ONNX Runtime", "torch and torchvision", "providers", "GPU", "CPU", "bfloat16",
        "threads", "memory", "data set sample", "data set fashion-mnist", "data set cifar10",
    }  # fmt: skip
    assert all(finding.fix for finding in findings if finding.level != "ok")


def test_two_runtime_wheels_at_once_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_versions(monkeypatch, {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"})
    (finding,) = doctor.check_runtime()
    assert finding.level == "problem"
    assert "onnxruntime-gpu 1.31.1, onnxruntime 1.32.0 at once" in finding.found
    assert "pip uninstall -y onnxruntime-gpu onnxruntime" in finding.fix


def test_no_runtime_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_versions(monkeypatch, dict.fromkeys(environment.RUNTIMES))
    (finding,) = doctor.check_runtime()
    assert (finding.level, finding.found) == ("problem", "not installed")


def test_one_runtime_wheel_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_versions(monkeypatch, {**dict.fromkeys(environment.RUNTIMES), "onnxruntime": "1.32.0"})
    assert doctor.check_runtime() == [Finding("ok", "ONNX Runtime", "onnxruntime 1.32.0")]


def test_a_library_outside_its_range_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_versions(monkeypatch, {"numpy": "1.26.4", "onnx": None})
    findings = doctor.check_versions()
    numpy = of(findings, "numpy")
    assert numpy.level == "problem" and "1.26.4, supported >=2" in numpy.found and "pip install 'numpy>=2'" in numpy.fix
    assert of(findings, "onnx").found == "not installed"


def test_an_old_python_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.9.1")
    assert of(doctor.check_versions(), "Python").found == "3.9.1, supported >=3.11"


def test_a_package_that_is_not_installed_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", missing)
    (finding,) = doctor.check_versions()
    assert finding.level == "warning" and "is not installed" in finding.found


def test_torchvision_without_its_operators_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch, "ops", types.SimpleNamespace(torchvision=types.SimpleNamespace()))
    (finding,) = doctor.check_torchvision()
    assert finding.level == "problem" and "torchvision::nms does not exist" in finding.found


def test_torchvision_that_cannot_be_imported_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    (finding,) = doctor.check_torchvision()
    assert finding.level == "problem" and "constraints.txt" in finding.fix


def refuse(*providers: str) -> Any:
    def attempt(provider: str) -> None:
        if provider in providers:
            raise ToolkitError("no session", found=f"no {provider} library", fix="none")

    return attempt


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize(("refused", "level"), [((), "ok"), (("cuda",), "ok"), (("cuda", "cpu"), "problem")])
def test_providers_are_those_that_sessions_get(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, refused: tuple[str, ...], level: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr(environment, "gpu_names", lambda: ("NVIDIA T4",))
    monkeypatch.setattr(doctor, "_try_provider", refuse(*refused))
    findings = doctor.check_providers()
    providers = of(findings, "providers")
    assert providers.level == level
    assert f"sessions run on: {', '.join(p for p in ('cpu', 'cuda') if p not in refused) or 'none'}" in providers.found
    if level == "ok":
        device = of(findings, "GPU")
        assert device.level == ("warning" if gpu and refused else "ok")
        assert ("ONNX Runtime not: no cuda library" in device.found) == (gpu and bool(refused))


def test_a_cpu_without_vnni_is_a_warning(tmp_path: Path) -> None:
    root = plant(tmp_path, {"proc/cpuinfo": "model name : Old One\nflags : fpu avx2\n"})
    cpu, bfloat = doctor.check_cpu(root=root)
    assert cpu.level == "warning" and "Old One has no VNNI" in cpu.found and "saturate" in cpu.found
    assert bfloat.level == "ok" and "float32" in bfloat.found


def test_a_cpu_with_vnni_and_bfloat16_is_well(tmp_path: Path) -> None:
    root = plant(tmp_path, {"proc/cpuinfo": "model name : New One\nflags : avx2 avx512_vnni avx512_bf16\n"})
    cpu, bfloat = doctor.check_cpu(root=root)
    assert cpu.level == "ok" and "avx512_vnni" in cpu.found
    assert bfloat.found == "by avx512_bf16"


def test_an_unknown_cpu_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    (finding,) = doctor.check_cpu(root=tmp_path)
    assert finding.level == "warning" and "unknown" in finding.found


def test_more_threads_than_the_quota_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    root = plant(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"})
    (finding,) = doctor.check_threads(root=root)
    assert finding.level == "warning"
    assert finding.found == "1 of 8 CPUs may be used, control group's quota 1.5; torch starts 8 threads"
    assert "OMP_NUM_THREADS=1" in finding.fix
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    assert doctor.check_threads(root=root)[0].level == "ok"


def test_little_memory_is_a_warning(tmp_path: Path) -> None:
    root = plant(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": str(2**30)})
    (finding,) = doctor.check_memory(root=root)
    assert (finding.level, finding.found) == ("warning", "1.0 GiB may be used")


def test_data_sets_are_found_or_the_fix_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit.data import standard

    monkeypatch.setattr(standard, "DEBIAN_FASHION_MNIST", tmp_path / "nowhere")
    monkeypatch.setattr(standard, "cache_dir", lambda: tmp_path / "cache")
    (tmp_path / "data" / "cifar-10-batches-py").mkdir(parents=True)
    findings = doctor.check_data(tmp_path / "data")
    assert of(findings, "data set sample").level == "ok"
    assert of(findings, "data set cifar10").found == str(tmp_path / "data")
    missing = of(findings, "data set fashion-mnist")
    assert missing.level == "warning" and "apt-get install dataset-fashion-mnist" in missing.fix


def test_a_missing_sample_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.data.sources.SAMPLE", tmp_path / "none.npz")
    assert of(doctor.check_data(), "data set sample").level == "problem"


def test_a_check_that_fails_is_itself_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Finding]:
        raise OSError("libcudart.so.13: cannot open shared object file\nand more")

    monkeypatch.setattr(doctor, "check_providers", broken)
    findings = diagnose()
    assert not healthy(findings)
    finding = of(findings, "providers")
    assert finding.level == "problem"
    assert finding.found == "OSError: libcudart.so.13: cannot open shared object file"


def test_text_shows_levels_fixes_and_a_count() -> None:
    findings = (
        Finding("ok", "CPU", "fine"),
        Finding("warning", "memory", "little", "add some"),
        Finding("problem", "GPU", "gone", "find it"),
        Finding("problem", "disk", "full", "empty it"),
    )
    lines = render(findings).splitlines()
    assert lines[0] == "ok       CPU: fine"
    assert lines[2].strip() == "fix: add some"
    assert lines[-1] == "2 problems, 1 warning"
    assert render(findings[:1]).splitlines()[-1] == "nothing wrong"
    assert healthy(findings[:2]) and not healthy(findings)
