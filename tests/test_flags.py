from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from toolkit.cli import app, flags
from toolkit.cli.attack import ATTACK_FLAGS
from toolkit.cli.benchmark import BENCHMARK_FLAGS
from toolkit.cli.export import EXPORT_FLAGS
from toolkit.cli.flags import Flag
from toolkit.cli.harden import HARDEN_FLAGS
from toolkit.cli.prune import PRUNE_FLAGS
from toolkit.cli.quantize import QUANTIZE_FLAGS
from toolkit.cli.simulate import SIMULATE_FLAGS
from toolkit.cli.train import TRAIN_FLAGS
from toolkit.config import (
    AttackRunConfig,
    BenchmarkConfig,
    HardenConfig,
    SimulateRunConfig,
    StageConfig,
    TrainRunConfig,
    build,
)

COMMANDS: dict[str, tuple[Sequence[Flag], type[StageConfig]]] = {
    "harden": (HARDEN_FLAGS, HardenConfig),
    "train": (TRAIN_FLAGS, TrainRunConfig),
    "prune": (PRUNE_FLAGS, HardenConfig),
    "export": (EXPORT_FLAGS, HardenConfig),
    "quantize": (QUANTIZE_FLAGS, HardenConfig),
    "simulate": (SIMULATE_FLAGS, SimulateRunConfig),
    "attack": (ATTACK_FLAGS, AttackRunConfig),
    "benchmark": (BENCHMARK_FLAGS, HardenConfig),
}
REQUIRED: dict[type[StageConfig], dict[str, Any]] = {
    HardenConfig: {"model": {"path": "model.pt"}},
    AttackRunConfig: {"model": {"path": "model.pt"}},
    SimulateRunConfig: {"model": {"path": "model.pt"}},
    TrainRunConfig: {"arch": "cnn8"},
}
EVERY_FLAG = [pytest.param(name, flag, id=f"{name} {flag.name}") for name, (own, _) in COMMANDS.items() for flag in own]


def field_at(kind: type[BaseModel], path: str) -> Any:
    *parts, last = path.split(".")
    for part in parts:
        inner = kind.model_fields[part].annotation
        assert isinstance(inner, type) and issubclass(inner, BaseModel)
        kind = inner
    return kind.model_fields[last]


def value_at(config: BaseModel, path: str) -> object:
    value: object = config
    for part in path.split("."):
        value = getattr(value, part)
    return value


def options(command: str) -> dict[str, Any]:
    group: Any = typer.main.get_command(app.app)
    return {name: option for option in group.commands[command].params for name in option.opts}


@pytest.mark.parametrize(("command", "flag"), EVERY_FLAG)
def test_a_flag_sets_a_field_that_exists_and_shows_its_default(command: str, flag: Flag) -> None:
    kind = COMMANDS[command][1]
    assert field_at(kind, flag.path)
    default = value_at(build(kind, REQUIRED[kind]), flag.path)
    shown = options(command)[flag.name.split("/")[0]].show_default
    if default is None or default == () or isinstance(default, bool):
        assert not shown
    else:
        assert shown == (",".join(map(str, default)) if isinstance(default, tuple) else str(default))


@pytest.mark.parametrize(("command", "flag"), EVERY_FLAG)
def test_giving_a_flag_its_default_changes_no_other_setting(command: str, flag: Flag) -> None:
    kind = COMMANDS[command][1]
    plain = build(kind, REQUIRED[kind])
    default = value_at(plain, flag.path)
    if default is None:
        return
    text = ",".join(map(str, default)) if isinstance(default, tuple) else default
    required = flags.nested({flag.path: text})
    for name, value in REQUIRED[kind].items():
        required[name] = {**value, **required.get(name, {})} if isinstance(value, dict) else value
    assert build(kind, required) == plain


@pytest.mark.parametrize("command", COMMANDS)
def test_no_two_options_of_a_command_share_a_name(command: str) -> None:
    group: Any = typer.main.get_command(app.app)
    names = [name for option in group.commands[command].params for name in (*option.opts, *option.secondary_opts)]
    assert len(names) == len(set(names))


def test_every_option_has_a_help_text() -> None:
    group: Any = typer.main.get_command(app.app)
    for name, command in group.commands.items():
        assert command.help, name
        assert all(option.help for option in command.params), name


def test_lists_are_split_at_commas() -> None:
    values = flags.nested({"benchmark.batches": "1, 8,64", "data.source": "folder:a,b"})
    assert values["data"]["source"] == "folder:a,b"
    assert build(BenchmarkConfig, values["benchmark"]).batches == (1, 8, 64)


def test_a_flag_with_two_names_is_quoted_by_its_first() -> None:
    assert flags.names_by_path(flags.EXPORT)["export.end_to_end"] == "--end-to-end"


def test_an_unknown_field_is_a_defect() -> None:
    with pytest.raises(KeyError):
        flags.with_flags([Flag("--nothing", "nothing.at.all", "")], HardenConfig)(lambda settings: None)  # noqa: ARG005
