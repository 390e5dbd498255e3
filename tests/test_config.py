from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from toolkit.config import (
    HardenConfig,
    PruneConfig,
    SearchRunConfig,
    StageConfig,
    ThreatConfig,
    TrainConfig,
    TrainRunConfig,
    build,
    merge,
    override_threat,
    parse_fraction,
    read_settings,
    write_settings,
)
from toolkit.errors import ToolkitError

HARDEN: dict[str, Any] = {"model": {"path": "model.pt"}}
FLAGS = {"prune.ratio": "--prune", "prune.round_to": "--round-to", "threat.eps": "--eps", "model.path": "MODEL"}

nested = st.recursive(st.integers() | st.text(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner))
mappings = st.dictionaries(st.sampled_from("abc"), nested)


def stages(kind: type[StageConfig]) -> list[type[StageConfig]]:
    return [kind, *(deeper for below in kind.__subclasses__() for deeper in stages(below))]


@pytest.mark.parametrize("kind", stages(StageConfig))
def test_configurations_are_immutable_and_know_their_keys(kind: type[StageConfig]) -> None:
    assert kind.model_config.get("frozen") and kind.model_config.get("extra") == "forbid"


def test_a_setting_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        PruneConfig().ratio = 0.3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "problem", "found"),
    [
        ({"prune": {"ratio": 1}}, "--prune has no usable value", "prune.ratio = 1: "),
        ({"prune": {"ratio": -0.1}}, "--prune has no usable value", "prune.ratio = -0.1: "),
        ({"prune": {"ratio": "half"}}, "--prune has no usable value", "prune.ratio = 'half': "),
        ({"prune": {"round_to": 0}}, "--round-to has no usable value", "prune.round_to = 0: a whole number"),
        ({"prune": {"round_to": "even"}}, "--round-to has no usable value", "prune.round_to = 'even': a whole number"),
        ({"prune": {"round_to": 1.5}}, "--round-to has no usable value", "prune.round_to = 1.5: a whole number"),
        ({"threat": {"eps": "8/0"}}, "--eps has no usable value", "threat.eps = '8/0': "),
        ({"seed": -1}, "the setting 'seed' has no usable value", "seed = -1: "),
        ({"prune": {"rate": 0.5}}, "the setting 'prune.rate' has no usable value", "extra inputs"),
        ({"model": {}}, "MODEL is missing", "model.path"),
    ],
)
def test_a_value_that_does_not_fit_is_an_error_that_quotes_the_flag(
    values: dict[str, Any], problem: str, found: str
) -> None:
    with pytest.raises(ToolkitError) as caught:
        build(HardenConfig, {**HARDEN, **values}, FLAGS)
    assert caught.value.problem == problem
    assert found in caught.value.found
    wanted = "did you mean 'ratio'? choose one of: importance, ratio" if "prune.rate" in problem else "correct"
    assert wanted in caught.value.fix


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_fractions(top: int, bottom: int) -> None:
    assert parse_fraction(f"{top}/{bottom}") == top / bottom
    assert ThreatConfig.model_validate({"eps": f"{top} / {bottom}"}).eps == top / bottom


@pytest.mark.parametrize("value", ["a/b", "1/0", "1/2/3", "0.5", 0.5, None])
def test_what_is_no_fraction_is_left_to_pydantic(value: object) -> None:
    assert parse_fraction(value) is value


def test_a_multiple_that_is_to_be_found_is_no_number_yet() -> None:
    assert PruneConfig.model_validate({"round_to": "16"}).multiple == PruneConfig(round_to=16).multiple == 16
    with pytest.raises(ValueError, match="no multiple is chosen"):
        _ = PruneConfig(round_to="auto").multiple


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(mappings, mappings)
def test_merging_is_right_biased_and_keeps_the_rest(base: dict[str, Any], over: dict[str, Any]) -> None:
    merged = merge(base, over)
    assert set(merged) == {*base, *over}
    assert merge(merged, over) == merged and merge(base, {}) == base and merge({}, over) == over
    for key, value in over.items():
        if not isinstance(value, dict) or base.get(key) is None:
            assert merged[key] == value
        elif not isinstance(base[key], dict):
            assert merged[key] == base[key], "what stands where settings should is not dropped, but refused"


def test_a_setting_in_the_place_of_a_part_is_refused_beside_flags_of_that_part(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("prune: 0.8\nfinetune: {epoch: 1, momentun: 0.5}\nquantize: {keep_float: node_conv2d}\n")
    found = merge(read_settings(path), {"prune": {"round_to": 4}, "model": {"path": "m.pt"}})
    with pytest.raises(ToolkitError) as caught:
        build(HardenConfig, found, {})
    assert "prune = 0.8" in caught.value.found and "3 more setting(s) are wrong" in caught.value.fix
    found["prune"] = {}
    with pytest.raises(ToolkitError) as caught:
        build(HardenConfig, found, {})
    said = str(caught.value)
    assert "list, as in [one, two]" in said or "did you mean 'epochs'?" in said
    del found["quantize"]
    with pytest.raises(ToolkitError, match=r"finetune\.epoch") as caught:
        build(HardenConfig, found, {})
    assert "did you mean 'epochs'? choose one of:" in caught.value.fix and "learning_rate" in caught.value.fix


def test_the_place_of_an_error_in_yaml_is_told(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("prune:\n  ratio: 0.5\n round_to: 4\n")
    with pytest.raises(ToolkitError, match="cannot be read") as caught:
        read_settings(path)
    assert "line 3, column 2" in caught.value.found


def test_merging_changes_neither() -> None:
    base, over = {"a": {"x": 1, "y": 2}}, {"a": {"y": 3}}
    assert merge(base, over) == {"a": {"x": 1, "y": 3}}
    assert base == {"a": {"x": 1, "y": 2}} and over == {"a": {"y": 3}}


def test_a_part_given_in_part_keeps_what_the_run_sets_for_it() -> None:
    run = build(TrainRunConfig, {"arch": "cnn8", "training": {"batch_size": 64}})
    assert (run.training.objective, run.training.epochs, run.training.batch_size) == ("standard", 8, 64)
    assert (TrainConfig().objective, TrainConfig().epochs, TrainConfig().ema) == ("adversarial", 24, 0.999)
    assert run.training.ema == 0


def test_another_threat_takes_nothing_over_that_belongs_to_the_first() -> None:
    resolved = {"preset": "pixel", "norm": "linf", "eps": 0.1, "steps": 20, "step_size": 0.0125}
    assert override_threat(resolved, {}) == resolved
    assert override_threat(resolved, {"preset": "paper"}) == {"preset": "paper"}
    assert override_threat(resolved, {"eps": 0.2}) == {**resolved, "eps": 0.2, "step_size": None}
    assert override_threat(resolved, {"eps": 0.2, "step_size": 0.05}) == {**resolved, "eps": 0.2, "step_size": 0.05}
    assert override_threat(resolved, {"preset": "pixel", "eps": 0.1}) == resolved


def test_the_resolved_configuration_comes_back_from_its_file(tmp_path: Path) -> None:
    config = build(
        HardenConfig,
        {**HARDEN, "threat": {"eps": "8/255"}, "prune": {"ratio": 0.3}, "benchmark": {"batches": [1, 7]}, "seed": 5},
    )
    write_settings(config, tmp_path / "config.yaml", tmp_path)
    assert build(HardenConfig, read_settings(tmp_path / "config.yaml")) == config


def test_a_teacher_is_named_relative_to_the_config_file(tmp_path: Path) -> None:
    teacher = {"objective": "distill", "teacher": tmp_path / "strong" / "model.pt"}
    config = build(HardenConfig, {**HARDEN, "finetune": teacher})
    home = tmp_path / "out"
    write_settings(config, tmp_path / "config.yaml", home)
    assert "teacher: ../strong/model.pt" in (tmp_path / "config.yaml").read_text()
    home.mkdir()
    (tmp_path / "config.yaml").rename(home / "config.yaml")
    assert build(HardenConfig, read_settings(home / "config.yaml")).finetune == config.finetune


@pytest.mark.parametrize(
    ("storage", "written"),
    [
        ("sqlite:///{}/shared/trials.sqlite", "sqlite:///../shared/trials.sqlite"),
        ("sqlite+pysqlite:///{}/trials.sqlite?timeout=9", "sqlite+pysqlite:///../trials.sqlite?timeout=9"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("postgresql://me@there/trials", "postgresql://me@there/trials"),
    ],
)
def test_a_search_names_its_storage_and_its_teachers_relative_to_its_file(
    storage: str, written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = {"finetune.teacher": [str(tmp_path / "strong" / "model.pt"), None], "prune.ratio": [0.2, 0.5]}
    search = {"storage": storage.format(tmp_path), "space": space}
    config = build(SearchRunConfig, {**HARDEN, "search": search})
    home = tmp_path / "out"
    home.mkdir()
    write_settings(config, home / "search.yaml", home)
    kept = yaml.safe_load((home / "search.yaml").read_text())["search"]
    assert (kept["storage"], kept["space"]["finetune.teacher"]) == (written, ["../strong/model.pt", None])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert build(SearchRunConfig, read_settings(home / "search.yaml")).search == config.search


@pytest.mark.parametrize("content", [b"a: [1", b"\xff\xfe\x00", None])
def test_a_config_file_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ToolkitError, match="config file cannot be read") as caught:
        read_settings(path)
    assert str(path) in caught.value.found and "config.yaml" in caught.value.fix


@pytest.mark.parametrize("content", ["", "- 1\n- 2\n", "5"])
def test_a_config_file_without_settings(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ToolkitError, match="holds no settings"):
        read_settings(tmp_path / "config.yaml")
