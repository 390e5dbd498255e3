"""From nested settings and YAML files to configurations, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from toolkit import paths
from toolkit.config.base import StageConfig
from toolkit.errors import ToolkitError, unknown_name

Config = TypeVar("Config", bound=StageConfig)
SQLITE_FILE = re.compile(r"(sqlite(?:\+\w+)?:///)(?!:|file:)([^?]+)(.*)")
"""A storage that is a file: what comes before its path, the path, its options."""
TEACHER = "finetune.teacher"
"""Of a search's space."""


def build(kind: type[Config], values: dict[str, Any], flags: Mapping[str, str] = MappingProxyType({})) -> Config:
    """Validate `values` as a `kind`; what pydantic refuses becomes a `ToolkitError` that quotes the flag.

    Args:
        kind: the configuration's class.
        values: nested settings.
        flags: command-line flag by dotted path of the setting, e.g. `{"prune.ratio": "--prune"}`.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first, *others = error.errors()
        path = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
        name = flags.get(path, f"the setting '{path}'")
        problem = f"{name} is missing" if first["type"] == "missing" else f"{name} has no usable value"
        raise ToolkitError(
            problem,
            found=f"{path} = {first['input']!r}: {_in_words(first['msg'])}",
            fix=_fix(kind, first, name) + (f"; {len(others)} more setting(s) are wrong" if others else ""),
        ) from error


def _in_words(message: str) -> str:
    """What pydantic says, in the words of YAML."""
    return (message[0].lower() + message[1:]).replace("valid tuple", "list, as in [one, two]")


def _fix(kind: type[StageConfig], error: Any, name: str) -> str:
    """What to do about one error of pydantic's: for a name that is none, the nearest one and all others."""
    if error["type"] != "extra_forbidden":
        return f"correct {name}; `--help` shows what it takes"
    part: Any = kind
    *above, wrong = (str(one) for one in error["loc"])
    for step in above:
        part = part.model_fields[step].annotation if hasattr(part, "model_fields") else None
    known = getattr(part, "model_fields", None)
    return unknown_name("setting", wrong, known).fix if known else f"leave {name} away"


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Deep merge of two nested mappings; `over` wins, but not over what stands where settings should, to be refused."""
    merged = dict(base)
    for key, value in over.items():
        there = merged.get(key)
        if not isinstance(value, dict) or there is None:
            merged[key] = value
        elif isinstance(there, dict):
            merged[key] = merge(there, value)
    return merged


def override_threat(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Resolved threat settings with a user's own in their place.

    Another preset or norm takes nothing over from `base`; another radius or number of steps gets its own step size,
    and restarts start at random.
    """
    if any(over.get(name, base.get(name)) != base.get(name) for name in ("preset", "norm")):
        return dict(over)
    changed = any(over.get(name, base.get(name)) != base.get(name) for name in ("eps", "steps"))
    follows: dict[str, Any] = {"step_size": None} if changed else {}
    if (over.get("restarts") or 1) > 1:
        follows["random_start"] = None  # restarts from one point would all be the same
    return {**base, **follows, **over}


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a config file; relative paths in it start at its own folder, as `write_settings` writes them.

    Raises:
        ToolkitError: the file is missing, is not YAML, or holds no mapping.
    """
    return _map_paths(_read_yaml(path), lambda setting: paths.resolved(setting, path.absolute().parent))


def write_settings(config: StageConfig, path: Path, home: Path, title: str | None = None) -> None:
    """Write the resolved configuration to `path`, which will stand in the folder `home`, under a comment if given."""
    values = _map_paths(config.model_dump(mode="json"), lambda setting: paths.relative(setting, home.absolute()))
    comment = f"# {title}\n" if title else ""
    path.write_text(comment + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _map_paths(values: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """`values` with `change` applied to every setting that may hold a path."""

    def plain(path: str) -> str:
        return path if path.startswith("shipped:") else change(f"folder:{path}").removeprefix("folder:")

    def database(url: str) -> str:
        found = SQLITE_FILE.fullmatch(url)
        return f"{found[1]}{plain(found[2])}{found[3]}" if found else url

    places = {
        ("model", "path"): plain,
        ("model", "arch"): change,
        ("data", "source"): change,
        ("data", "data_dir"): plain,
        ("finetune", "teacher"): plain,
        ("search", "storage"): database,
    }
    mapped = {part: dict(inner) if isinstance(inner, dict) else inner for part, inner in values.items()}
    search = mapped.get("search")
    space = search.get("space") if isinstance(search, dict) else None
    if isinstance(space, dict) and isinstance(space.get(TEACHER), list):
        teachers = [plain(one) if isinstance(one, str) else one for one in space[TEACHER]]
        mapped["search"]["space"] = {**space, TEACHER: teachers}
    for (part, name), how in places.items():
        inner = mapped.get(part)
        if isinstance(inner, dict) and isinstance(inner.get(name), str):
            inner[name] = how(inner[name])
    return mapped


def _read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ToolkitError: the file is missing, is not YAML, or holds no mapping.
    """
    fix = "name a config.yaml as `toolkit harden` writes it into a bundle"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', '')}" if mark else ""
        raise ToolkitError(
            "the config file cannot be read", found=f"{path}: {type(error).__name__}{where}", fix=fix
        ) from error
    if not isinstance(values, dict):
        raise ToolkitError("the config file holds no settings", found=f"{path}: {type(values).__name__}", fix=fix)
    return values
