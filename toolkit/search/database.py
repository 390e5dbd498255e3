"""The data base behind a search: opened, and what goes wrong with it in words."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import optuna
import sqlalchemy
from optuna.trial import FrozenTrial

from toolkit.errors import ToolkitError


def forget(url: str, name: str) -> None:
    """Remove a study from its storage, if it is there.

    Raises:
        ToolkitError: the storage cannot be used.
    """
    with storage_errors(url), contextlib.suppress(KeyError):
        optuna.delete_study(study_name=name, storage=url)


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
    engine = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
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
    except (
        sqlalchemy.exc.SQLAlchemyError,
        optuna.exceptions.OptunaError,
        ImportError,
        ValueError,
        RuntimeError,
    ) as error:
        raise ToolkitError(
            "the storage cannot be used",
            found=f"{_without_password(url)}: {type(error).__name__}: {str(error).splitlines()[0]}",
            fix="give --storage sqlite:///FILE, or the URL of a data base that runs and whose driver is installed",
        ) from error


def _without_password(url: str) -> str:
    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return url.rpartition("@")[2]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Optuna calls heartbeats experimental, and does not know that ours beats."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", "Heartbeat of storage")
        yield
