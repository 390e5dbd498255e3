from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from toolkit.allocator import keep_freed_memory

FAULTS = """
import resource, sys, torch
from toolkit.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def work():
    torch.ones(12_000_000)  # 48 MB: beyond the 32 MB below which glibc may adapt by itself
for _ in range(25):  # aligned buffers find their places within a few rounds
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    faults = {
        mode: int(subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, check=True).stdout)
        for mode in ("keep", "return")
    }
    assert faults["keep"] < faults["return"] / 4, faults


def test_elsewhere_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory.__wrapped__()
