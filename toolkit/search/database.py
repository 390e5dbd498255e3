"""The data base behind a search: opened, and what goes wrong with it in words."""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import optuna
import sqlalchemy
from optuna.trial import FrozenTrial

from toolkit.errors import ToolkitError
from toolkit.locks import users_lock
from toolkit.progress import notice

FAILURES = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)
"""What a data base that is there may answer for a while: busy, restarting, made by another process at this moment."""
PAUSE_S = 0.2
"""Before the second attempt; every further pause is twice as long."""
MASK = "***"
SECRET = re.compile("pass|pwd|secret|token", re.IGNORECASE)
"""In the names of a URL's arguments."""
ASSIGNED = re.compile(r"(password|pwd)\s*=", re.IGNORECASE)
"""In the values of those that hold further arguments, as ODBC's do."""
Result = TypeVar("Result")


def patiently(attempt: Callable[[], Result], *, seconds: float) -> Result:
    """What `attempt` gives, tried again for about so long where the data base fails."""
    end, pause = time.monotonic() + seconds, PAUSE_S
    while True:
        try:
            return attempt()
        except (*FAILURES, optuna.exceptions.DuplicatedStudyError) as error:
            if time.monotonic() + pause > end:
                raise
            if pause > PAUSE_S:
                notice(f"the storage fails, and is tried again: {type(error).__name__}")
        time.sleep(pause)  # the data base is busy, or starting again
        pause *= 2


def check_url(url: str) -> None:
    """Refuse what names no data base, or one whose driver is not installed; nothing is opened.

    Raises:
        ToolkitError: it does.
    """
    with storage_errors(url):
        sqlalchemy.make_url(url).get_dialect().import_dbapi()


def open_storage(
    url: str, gone: Callable[[optuna.Study, FrozenTrial], None], *, heartbeat_s: int, grace_s: int
) -> optuna.storages.RDBStorage:
    """The data base at `url`, made if it is a file that is not there.

    Args:
        url: in SQLAlchemy's words.
        gone: is told of every trial whose heart stopped.
        heartbeat_s: seconds between two beats.
        grace_s: seconds after the last beat in which its process may still live.
    """
    engine = {"connect_args": {"timeout": 60}} if is_sqlite(url) else {"pool_pre_ping": True}
    with quiet():
        return optuna.storages.RDBStorage(
            url,
            engine_kwargs=engine,
            heartbeat_interval=heartbeat_s,
            grace_period=grace_s,
            heartbeat_stale_trial_callback=gone,
        )


@contextlib.contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn what goes wrong on opening a data base into a `ToolkitError`."""
    try:
        yield
    except (*FAILURES, optuna.exceptions.OptunaError, ImportError, ValueError, RuntimeError) as error:
        raise ToolkitError(
            "the storage cannot be used",
            found=f"{without_password(url)}: {type(error).__name__}: {str(error).splitlines()[0]}",
            fix="give --storage sqlite:///FILE, or the URL of a data base that runs and whose driver is installed",
        ) from error


@contextlib.contextmanager
def failures(url: str) -> Iterator[None]:
    """Turn the failure of a data base in the middle of a search into a `ToolkitError`."""
    try:
        yield
    except FAILURES as error:
        raise ToolkitError(
            "the storage failed during the search",
            found=f"{without_password(url)}: {type(error).__name__}: {str(error).splitlines()[0]}",
            fix="see to the data base; the same command then goes on with the trials that are in it",
        ) from error


def without_password(url: str) -> str:
    """The URL as it may be shown and kept."""
    try:
        found = sqlalchemy.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):  # no URL; a port that is no number
        return url.rpartition("@")[2].partition("?")[0]
    secret = {name: MASK for name, value in found.query.items() if SECRET.search(name) or ASSIGNED.search(str(value))}
    shown = found.update_query_dict(secret).render_as_string(hide_password=True)
    return shown.replace(urllib.parse.quote_plus(MASK), MASK)


def file_url(path: Path) -> str:
    """The URL of a file of SQLite, whatever characters its name has."""
    return sqlalchemy.URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)


def is_sqlite(url: str) -> bool:
    """Whether the data base is a file of SQLite."""
    return url.startswith("sqlite")


def storage_lock(url: str) -> Path:
    """The same for all ways to name one file of SQLite, and for equal URLs of other data bases."""
    name = url
    if is_sqlite(url):
        with contextlib.suppress(sqlalchemy.exc.ArgumentError, ValueError):
            name = f"sqlite {Path(sqlalchemy.make_url(url).database or '').resolve()}"
    return users_lock(f"storage-{hashlib.sha256(name.encode()).hexdigest()[:16]}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Optuna calls heartbeats experimental, and does not know that ours beats."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", "Heartbeat of storage")
        yield
