from __future__ import annotations

from itertools import product

import pytest
from pydantic import ValidationError

from tests.search.fakes import ANATOMY, a_space, config
from toolkit.config import HardenConfig, QuantizeConfig, RangeConfig, SearchConfig, SearchRunConfig, build
from toolkit.errors import ToolkitError
from toolkit.search.space import Parameters, Space, digest


def test_a_point_is_a_configuration_of_harden() -> None:
    found = a_space(
        "prune.ratio=0.2:0.8:0.2; prune.importance=l1,l2; quantize.calibrate=mse; precision=ends-float"
    ).config(
        {
            "prune.ratio": 0.6000000000000001,
            "prune.importance": "l2",
            "quantize.calibrate": "mse",
            "precision": "ends-float",
        }
    )
    assert (found.prune.ratio, found.prune.importance) == (0.6, "l2")
    assert found.quantize.int8 and found.quantize.precision == "int8" and found.quantize.calibrate == "mse"
    assert found.quantize.keep_float == ("first", "last")


def test_the_precisions_are_what_they_say() -> None:
    space = a_space("precision=int8,first-float,ends-float,auto,float")
    found = {name: space.config({"precision": name}) for name in space.dimensions[0].values if isinstance(name, str)}
    kept = {name: one.quantize.keep_float for name, one in found.items()}
    assert kept == {
        "int8": (), "first-float": ("first",), "ends-float": ("first", "last"), "auto": (), "float": (),
    }  # fmt: skip
    assert [name for name, one in found.items() if not one.quantize.int8] == ["float"] and found["float"].allow_float
    assert [name for name, one in found.items() if one.quantize.precision == "auto" and one.quantize.int8] == ["auto"]


def test_every_group_has_a_ratio_of_its_own() -> None:
    space = Space(config("prune.ratio=0.2:0.8:0.2", per_group=True), ANATOMY)
    assert [one.name for one in space.dimensions] == ["prune.ratios.0", "prune.ratios.2.conv"]
    found = space.config({"prune.ratios.0": 0.2, "prune.ratios.2.conv": 0.8})
    assert found.prune.ratios == {"0": 0.2, "2.conv": 0.8}
    assert space.start() == {"prune.ratios.0": 0.4, "prune.ratios.2.conv": 0.4}


def test_the_search_starts_at_what_the_user_gave() -> None:
    given = config("prune.ratio=0.1:0.9:0.1; finetune.radius=1.5,1.0; quantize.calibrate=minmax,mse")
    given = given.model_copy(update={"prune": given.prune.model_copy(update={"ratio": 0.72})})
    assert Space(given, ANATOMY).start() == {
        "prune.ratio": 0.7, "finetune.radius": "1.0", "quantize.calibrate": "minmax",
    }  # fmt: skip


def test_settings_that_mean_nothing_make_no_other_point() -> None:
    space = a_space(
        "precision=float,int8; quantize.calibrate=minmax,mse; prune.ratio=0:0.5:0.5; prune.importance=l1,l2"
    )
    point: Parameters = {
        "precision": "float",
        "quantize.calibrate": "minmax",
        "prune.ratio": 0.0,
        "prune.importance": "l1",
    }
    other: Parameters = {**point, "quantize.calibrate": "mse", "prune.importance": "l2"}
    assert digest(space.config(point)) == digest(space.config(other))
    assert digest(space.config({**point, "precision": "int8"})) != digest(space.config({**other, "precision": "int8"}))


@pytest.mark.parametrize(
    ("space", "graphs"),
    [
        ("quantize.calibrate=minmax,mse; quantize.percentile=99.9,99.99", 2),
        ("quantize.calibrate=percentile,auto; quantize.percentile=99.9,99.99", 4),
        ("quantize.precision=int8; quantize.max_drop=0.005,0.01", 1),
        ("quantize.precision=auto; quantize.max_drop=0.005,0.01", 2),
        ("finetune.qat=true,false; finetune.qat_from=0.2,0.5", 3),
    ],
)
def test_points_of_one_graph_have_one_name(space: str, graphs: int) -> None:
    found = Space(config(space).model_copy(update={"quantize": QuantizeConfig(int8=True)}), ANATOMY)
    names = [dimension.name for dimension in found.dimensions]
    points = [dict(zip(names, values, strict=True)) for values in product(*(one.values for one in found.dimensions))]
    assert len({digest(found.config(point)) for point in points}) == graphs


def test_a_range_of_a_setting_that_is_resolved_later_begins_at_its_first_value() -> None:
    assert a_space("finetune.attack_steps=1:7:2").start() == {"finetune.attack_steps": 1.0}


def test_rounding_in_training_means_nothing_for_a_float_graph() -> None:
    base = config("precision=float,int8")
    given = base.model_copy(update={"finetune": base.finetune.model_copy(update={"qat": True})})
    space = Space(given, ANATOMY)
    assert [space.config({"precision": name}).finetune.qat for name in ("float", "int8")] == [False, True]


def test_what_is_written_beside_is_written_beside_a_float_graph_too() -> None:
    base = config("precision=float,int8")
    given = base.model_copy(update={"quantize": base.quantize.model_copy(update={"targets": ("cuda",)})})
    space = Space(given, ANATOMY)
    assert [space.config({"precision": name}).quantize.targets for name in ("float", "int8")] == [("cuda",)] * 2


def test_what_cannot_be_made_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(config: HardenConfig) -> None:
        if config.quantize.calibrate in ("mse", "percentile"):
            raise ToolkitError("no such method", found="", fix="")

    given = config("quantize.calibrate=minmax,mse,entropy,percentile; prune.ratio=0.2:0.6:0.2; precision=int8")
    space = Space(given, ANATOMY, refuse)
    assert [dimension.values for dimension in space.dimensions[:2]] == [("minmax", "entropy"), (0.2, 0.4, 0.6)]
    assert "not tried for quantize.calibrate: mse (no such method)" in capsys.readouterr().err


def test_a_seed_changes_how_a_point_is_made_and_not_which_it_is() -> None:
    point: Parameters = {"prune.ratio": 0.5, "precision": "int8"}
    one, other = (a_space().config(point, seed) for seed in (1, 2))
    assert (one.seed, other.seed) == (1, 2) and digest(one) == digest(other)


def test_ranges_hold_both_ends() -> None:
    assert RangeConfig(low=0.2, high=0.8, step=0.1).values == (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    assert RangeConfig(low=0, high=1, step=0.4).values == (0.0, 0.4, 0.8)


@pytest.mark.parametrize(
    ("space", "problem", "found"),
    [
        ("seed=1,2", "cannot vary seed", "'seed'"),
        ("data.source=sample,cifar10", "cannot vary data.source", "data.source"),
        ("prune=1", "cannot vary prune", "'prune'"),
        ("precision=0:1:0.5", "cannot vary precision", "range"),
        ("precision=int8,int4", "unknown precision assignment", "int4"),
        ("prune.ratio=0.5:1.5:0.5", "'prune.ratio'", "less than 1"),
        ("prune.rato=0.5,0.6", "unknown setting", "'prune.rato'"),
        ("quantize.calibrate=minmax,guess", "'quantize.calibrate'", "guess"),
    ],
)
def test_what_cannot_vary_is_refused(space: str, problem: str, found: str) -> None:
    with pytest.raises(ToolkitError) as caught:
        a_space(space)
    assert problem in caught.value.problem and found in caught.value.found


@pytest.mark.parametrize(
    ("space", "found"),
    [
        ("finetune.epochs=1:7", "'finetune.epochs=1:7' is no NAME=LOW:HIGH:STEP"),
        ("finetune.epochs=1,1:30", "is no NAME=LOW:HIGH:STEP"),
        ("prune.ratio=0.2:0.8:0.1:2", "is no NAME=LOW:HIGH:STEP"),
        ("prune.ratio=0.2:inf:0.1", "finite number"),
        ("prune.ratio=nan:0.5:0.1", "finite number"),
        ("prune.ratio=0.2:0.8:1e-9", "6e+08 values, and at most 1,000 are tried"),
        ("prune.ratio=-1e308:1e308:1e-300", "inf values"),
        ("prune.importance=l1,[l2", "'[l2' is neither a number nor a name"),
    ],
)
def test_what_is_neither_a_range_nor_a_list_of_options_is_refused(space: str, found: str) -> None:
    with pytest.raises(ToolkitError) as caught:
        build(SearchRunConfig, {"model": {"path": "model.pt"}, "search": {"space": space}})
    assert found in caught.value.found


@pytest.mark.parametrize(
    ("text", "size"),
    [("300000", 300_000), ("500k", 500_000), ("500KB", 500_000), ("1.5M", 1_500_000), (" 2 GB ", 2_000_000_000)],
)
def test_sizes_may_have_units(text: str, size: int) -> None:
    assert SearchConfig.model_validate({"max_size": text}).max_size == size


@pytest.mark.parametrize("text", ["little", "infk", "nanM", "-5k", "1.5e6", "k", "0", "", "9" * 400, "9" * 310 + "k"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValidationError, match=r"no number of bytes|greater than 0|more bytes than there are"):
        SearchConfig.model_validate({"max_size": text})
