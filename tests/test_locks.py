from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest

from toolkit import locks
from toolkit.locks import give_back, locked, take
from toolkit.reproduce.protocol import PROTOCOLS
from toolkit.reproduce.steps import Step
from toolkit.reproduce.store import Store
from toolkit.search.presence import at_work


def refuse(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(_descriptor: int, _operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "_told", set())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_a_disk_without_locks_is_told_once_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    refuse(number, monkeypatch)
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert take(tmp_path / "file") is None and take(tmp_path) is None
    with Store(tmp_path, PROTOCOLS["paper"]).claim(Step("train", "a training", {})) as ours:
        assert ours
    with at_work(tmp_path), locked(tmp_path / "file"):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before, "nothing stays open"
    assert capsys.readouterr().err.count("knows no locks") == 1


def test_other_errors_of_a_disk_are_no_want_of_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(errno.EIO, monkeypatch)
    with pytest.raises(OSError, match="Input/output error"):
        take(tmp_path / "file")


def test_users_of_a_shared_folder_hold_each_others_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may open everything, so what another user is refused is refused here by hand."""
    kept = os.umask(0o002)
    try:
        give_back(take(tmp_path / "file"))
    finally:
        os.umask(kept)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o664
    real = os.open

    def not_to_write(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", not_to_write)
    mine = take(tmp_path / "file")
    with pytest.raises(BlockingIOError):
        take(tmp_path / "file")
    give_back(mine)
