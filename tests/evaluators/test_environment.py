from __future__ import annotations

import getpass
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import pytest

import toolkit
from toolkit.errors import ToolkitError
from toolkit.evaluators import environment
from toolkit.evaluators.environment import (
    allowed_cpus,
    allowed_memory,
    cpu_features,
    cpu_model,
    cpu_quota,
    environment_record,
    governor,
    usable_threads,
    versions,
)

XEON = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8480+
flags\t\t: fpu sse2 avx2 avx512f avx_vnni avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8

processor\t: 1
model name\t: Intel(R) Xeon(R) Platinum 8480+
flags\t\t: fpu
"""
HASWELL = "model name\t: Intel(R) Core(TM) i7-4770 CPU @ 3.40GHz\nflags\t\t: fpu sse2 avx2\n"
GRAVITON = "processor\t: 0\nFeatures\t: fp asimd atomics asimddp sve i8mm bf16\nCPU part\t: 0xd40\n"


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)


def test_an_x86_cpu_tells_its_model_and_features(tmp_path: Path) -> None:
    root = plant(tmp_path, {"proc/cpuinfo": XEON})
    assert cpu_model(root=root) == "Intel(R) Xeon(R) Platinum 8480+"
    assert cpu_features(root=root) == (
        "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    )  # fmt: skip


def test_a_name_of_several_generations_is_told_with_family_and_model(tmp_path: Path) -> None:
    info = "processor : 0\ncpu family : 25\nmodel : 17\nmodel name : AMD EPYC\nflags : avx2\n"
    assert cpu_model(root=plant(tmp_path, {"proc/cpuinfo": info})) == "AMD EPYC (family 25, model 17)"
    assert cpu_model(root=plant(tmp_path, {"proc/cpuinfo": "model name : AMD EPYC\n"})) == "AMD EPYC"


def test_an_old_x86_cpu_has_no_vnni(tmp_path: Path) -> None:
    assert cpu_features(root=plant(tmp_path, {"proc/cpuinfo": HASWELL})) == ("avx2",)


def test_an_arm_cpu_tells_its_features(tmp_path: Path) -> None:
    root = plant(tmp_path, {"proc/cpuinfo": GRAVITON})
    assert cpu_features(root=root) == ("asimddp", "i8mm", "bf16")
    assert cpu_model(root=root) == (platform.processor() or platform.machine())


def test_a_mac_tells_its_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"machdep.cpu.brand_string": "Apple M2", "hw.optional.arm.FEAT_I8MM": "1"}
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(environment, "_sysctl", lambda name: answers.get(name, ""))
    assert cpu_model(root=tmp_path) == "Apple M2"
    assert cpu_features(root=tmp_path) == ("i8mm",)


def test_a_system_without_sysctl_says_nothing() -> None:
    assert environment._sysctl("no.such.value") == ""


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize(
    ("text", "quota", "cpus"),
    [
        ("max 100000", None, 8),
        ("150000 100000", 1.5, 1),
        ("250000 100000", 2.5, 2),
        ("30000 100000", 0.3, 1),
        ("9000000 100000", 90.0, 8),
    ],
)
def test_quota_of_control_groups_v2(tmp_path: Path, text: str, quota: float | None, cpus: int) -> None:
    root = plant(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": text})
    assert cpu_quota(root=root) == quota
    assert allowed_cpus(root=root) == cpus


@pytest.mark.usefixtures("eight_cpus")
def test_the_tightest_group_above_the_process_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/slice/pod/container",
        "sys/fs/cgroup/slice/cpu.max": "300000 100000",
        "sys/fs/cgroup/slice/pod/container/cpu.max": "400000 100000",
        "sys/fs/cgroup/other/cpu.max": "100000 100000",
    }
    assert allowed_cpus(root=plant(tmp_path, files)) == 3


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize(("quota", "cpus"), [("-1", 8), ("200000", 2), ("150000", 1)])
@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_quota_of_control_groups_v1(tmp_path: Path, mount: str, quota: str, cpus: int) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/docker/a\n3:cpu,cpuacct:/docker/a\n0::/\n",
        f"sys/fs/cgroup/{mount}/cpu.cfs_quota_us": quota,
        f"sys/fs/cgroup/{mount}/cpu.cfs_period_us": "100000",
    }
    assert allowed_cpus(root=plant(tmp_path, files)) == cpus


@pytest.mark.usefixtures("eight_cpus")
def test_a_system_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(root=tmp_path) is None
    assert allowed_cpus(root=tmp_path) == 8


def test_affinity_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {1, 5, 6}, raising=False)
    assert allowed_cpus(root=tmp_path) == 3


def test_a_system_without_affinity_counts_its_cpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert allowed_cpus(root=tmp_path) == os.cpu_count()


@pytest.mark.usefixtures("eight_cpus")
def test_threads_are_those_asked_for_within_what_is_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = plant(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "400000 100000"})
    assert [usable_threads(asked, root=root) for asked in (None, 1, 4)] == [4, 1, 4]
    assert capsys.readouterr().err == ""
    assert usable_threads(6, root=root) == 4
    assert "--threads 6" in capsys.readouterr().err


def test_no_threads_are_refused() -> None:
    with pytest.raises(ToolkitError, match="--threads") as caught:
        usable_threads(0)
    assert caught.value.found == "0"


def test_memory_is_the_least_of_all_limits(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:memory:/a\n0::/b\n",
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/b/memory.max": "1048576",
    }
    assert allowed_memory(root=tmp_path) > 2**20
    assert allowed_memory(root=plant(tmp_path, files)) == 2**20


def test_the_governor_is_read_where_there_is_one(tmp_path: Path) -> None:
    assert governor(root=tmp_path) is None
    planted = plant(tmp_path, {"sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n"})
    assert governor(root=planted) == "powersave"


def test_versions_are_those_installed() -> None:
    found = versions()
    assert found["toolkit"] == toolkit.__version__
    assert found["python"] == platform.python_version()
    assert found["torch-pruning"] == metadata.version("torch-pruning")
    assert any(name in found for name in environment.RUNTIMES)


def test_the_record_is_plain_data_and_names_nobody() -> None:
    record = environment_record(2)
    text = json.dumps(record, allow_nan=False)
    assert json.loads(text) == record
    assert record["threads"] == 2 and 1 <= record["cpus_allowed"] <= record["cpus_present"]
    for secret in (platform.node(), str(Path.home()) + "/", str(Path.cwd())):
        assert not secret or secret not in text
    assert f'"{getpass.getuser()}"' not in text
