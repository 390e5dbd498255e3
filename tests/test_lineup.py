from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.evaluators.defects import of_mean, threshold_file
from tests.evaluators.greys import SIDE, Countdown, a_plan, conditions, flat_images, threshold
from tests.exporters.small import onnx_file
from toolkit import progress
from toolkit.artifacts import Normalization, Split
from toolkit.attacks.ensemble import Pass
from toolkit.evaluators import worst_case
from toolkit.evaluators.evaluation import Conditions
from toolkit.exporters.interface import read_interface
from toolkit.exporters.onnx import digest_with_weights
from toolkit.lineup import Lineup

NAMES = ("dark", "bright")
FLOAT, BOOL = TensorProto.FLOAT, TensorProto.BOOL
SPLIT = flat_images([10, 120, 135, 150, 230])
HOW = conditions(a_plan(), Pass("apgd-ce", 3), Pass("square", 4))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    progress.set_quiet(True)
    yield
    progress.set_quiet(False)


@pytest.fixture
def integer(tmp_path: Path) -> Path:
    return threshold_file(tmp_path / "model.onnx", quantised=True)


def test_a_deployed_file_judges_in_two_forms_and_is_attacked_by_its_twin(integer: Path) -> None:
    found = Lineup().with_deployed(integer, NAMES)
    assert list(found.targets) == ["deployed", "deployed_unoptimised"] and list(found.surrogates) == ["twin"]
    assert found.twin is not None and found.surrogates["twin"].spec.class_names == NAMES
    assert found.input_range == pytest.approx((0.0, 0.8)) and found.files == (integer,)
    batch = SPLIT.take(np.arange(5))
    for judge in (*found.targets.values(), found.surrogates["twin"]):
        assert judge.predict(batch.images).argmax(dim=1).tolist() == batch.labels.tolist()
    assert Lineup() == Lineup(), "nothing is added to the one that was there before"


def test_a_float_file_has_no_input_range_and_a_bundle_all_columns(integer: Path, tmp_path: Path) -> None:
    path = threshold_file(tmp_path / "float.onnx")
    assert Lineup().with_deployed(path, NAMES, twin=False).input_range is None
    model = threshold()
    found = Lineup().with_network("float", model).with_target("torch", model).with_float_twin(path)
    found = found.with_deployed(integer, NAMES, twin=False)
    assert list(found.targets) == ["torch", "fp32", "deployed", "deployed_unoptimised"]
    assert list(found.surrogates) == ["float"] and found.twin is None and found.files == (path, integer)


def test_a_file_that_has_no_twin_is_attacked_by_queries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Random operators have no twin; the user is told which they are, and Square runs."""
    weight = np.stack([-np.ones(SIDE * SIDE), np.ones(SIDE * SIDE)]).astype(np.float32) / SIDE**2
    nodes = [
        helper.make_node("Bernoulli", ["image"], ["noise"]),
        helper.make_node("Mul", ["noise", "none"], ["nothing"]),
        helper.make_node("Add", ["image", "nothing"], ["same"]),
        helper.make_node("Flatten", ["same"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight", "bias"], ["logits"], transB=1),
    ]
    constants = {"weight": weight, "bias": np.array([0.5, -0.5], np.float32), "none": np.float32(0)}
    path = onnx_file(tmp_path / "model.onnx", nodes, ["N", 1, SIDE, SIDE], **constants)
    found = Lineup().with_deployed(path, NAMES)
    assert found.twin is None and not found.surrogates
    message = capsys.readouterr().err
    assert "Bernoulli" in message and "without its twin" in message
    result = found.examine(SPLIT, conditions(a_plan(), Pass("apgd-ce", 3), Pass("square", 60)))
    assert [record.attack for record in result.robustness.passes] == ["square"]
    assert result.robustness.worst_case["deployed"].correct < 5


def test_a_network_without_layers_has_no_fake_quantised_form(capsys: pytest.CaptureFixture[str]) -> None:
    found = Lineup().with_fake_quantised(of_mean(lambda mean: mean), SPLIT, per_channel=True, margin=0.0)
    assert not found.surrogates and "without the fake-quantised network" in capsys.readouterr().err
    found = Lineup().with_fake_quantised(threshold(), SPLIT, per_channel=True, margin=0.0)
    assert list(found.surrogates) == ["fake_quantised"]


def relabelled() -> Split:
    return flat_images([10, 120, 135, 150, 230], labels=[0, 0, 1, 1, 0])


def reordered() -> Split:
    return Split(SPLIT.images, SPLIT.indices[::-1].copy())


@pytest.mark.parametrize("split", [relabelled, reordered, lambda: SPLIT.first(4), lambda: flat_images([10, 11])])
def test_an_evaluation_of_other_images_has_another_name(integer: Path, split: Callable[[], Split]) -> None:
    found = Lineup().with_deployed(integer, NAMES)
    assert found.fingerprint(split(), HOW) != found.fingerprint(SPLIT, HOW)


@pytest.mark.parametrize(
    "how",
    [
        replace(HOW, seed=4),
        replace(HOW, passes=()),
        replace(HOW, precision="bfloat16"),
        replace(HOW, plan=a_plan(6)),
        replace(HOW, plan=a_plan(eps=0.11)),
        replace(HOW, plan=a_plan(restarts=2)),
    ],
)
def test_an_evaluation_under_other_conditions_has_another_name(integer: Path, how: Conditions) -> None:
    found = Lineup().with_deployed(integer, NAMES)
    assert found.fingerprint(SPLIT, how) != found.fingerprint(SPLIT, HOW)


def test_an_evaluation_of_other_graphs_has_another_name(integer: Path, tmp_path: Path) -> None:
    """The same file under another path has the same; names, weights and files each count."""
    same = Path(tmp_path / "copy.onnx")
    same.write_bytes(integer.read_bytes())
    model = threshold()
    line = Lineup().with_deployed(integer, NAMES)
    assert line.fingerprint(SPLIT, HOW) == Lineup().with_deployed(same, NAMES).fingerprint(SPLIT, HOW)
    others = [
        Lineup().with_deployed(threshold_file(tmp_path / "other.onnx", 0.6, quantised=True), NAMES),
        Lineup().with_deployed(integer, NAMES, twin=False),
        line.with_target("torch", model),
        line.with_network("float", model),
        line.with_network("original", model),
        line.with_network("float", threshold(slope=1.5)),
        line.with_float_twin(integer),
    ]
    calibrated = [
        line.with_fake_quantised(model, calibration, per_channel=True, margin=margin)
        for calibration, margin in ((SPLIT, 0.0), (SPLIT.first(3), 0.0), (SPLIT, 0.1))
    ]
    assert all("fake_quantised" in found.surrogates for found in calibrated)
    names = {found.fingerprint(SPLIT, HOW) for found in (line, *others, *calibrated)}
    assert len(names) == len(others) + len(calibrated) + 1


def test_the_range_of_the_input_is_told_in_pixels_where_others_normalise(integer: Path) -> None:
    inside = Lineup().with_deployed(integer, NAMES).input_range
    outside = read_interface(integer, normalization=Normalization((0.5,), (0.5,)))
    found = Lineup().with_deployed(integer, NAMES, interface=outside).input_range
    assert inside == pytest.approx((0.0, 0.8)) and found == pytest.approx((0.5, 0.9))


def test_weights_in_a_file_of_their_own_count(tmp_path: Path) -> None:
    names = []
    for slope in (1.0, 1.5):
        path = threshold_file(tmp_path / "apart.onnx", 0.5)
        made = onnx.load(path)
        for tensor in made.graph.initializer:
            tensor.CopyFrom(numpy_helper.from_array(slope * numpy_helper.to_array(tensor), tensor.name))
        onnx.save(made, path, save_as_external_data=True, location="apart.data", size_threshold=0)
        names.append((path.read_bytes(), Lineup().with_deployed(path, NAMES).fingerprint(SPLIT, HOW)))
        (tmp_path / "apart.data").unlink()
    assert names[0][0] == names[1][0] and names[0][1] != names[1][1]


def chosen(value: float, kind: str) -> ModelProto:
    """A graph whose one weight lies in a branch, or in a constant of a branch."""
    weight = numpy_helper.from_array(np.full(4, value, np.float32), "weight")
    held = [helper.make_node("Constant", [], ["weight"], value=weight)] if kind == "constant" else []
    branch = helper.make_graph(
        [*held, helper.make_node("Identity", ["weight"], ["y"])],
        "branch",
        [],
        [helper.make_tensor_value_info("y", FLOAT, [4])],
        [weight] if kind == "initializer" else [],
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["yes"], ["out"], then_branch=branch, else_branch=branch)],
        "chosen",
        [helper.make_tensor_value_info("yes", BOOL, [])],
        [helper.make_tensor_value_info("out", FLOAT, [4])],
    )
    return helper.make_model(graph)


@pytest.mark.parametrize("kind", ["initializer", "constant"])
def test_weights_of_branches_in_a_file_of_their_own_count(kind: str, tmp_path: Path) -> None:
    path, found = tmp_path / "apart.onnx", []
    for value in (1.0, 1.5, 1.0):
        onnx.save(
            *(chosen(value, kind), path),
            save_as_external_data=True,
            location="apart.data",
            size_threshold=0,
            convert_attribute=True,
        )
        found.append((path.read_bytes(), digest_with_weights(path)))
        (tmp_path / "apart.data").unlink()
    files, digests = zip(*found, strict=True)
    assert files[0] == files[1] and digests[0] == digests[2] != digests[1]


def toy() -> Lineup:
    return Lineup().with_network("float", threshold()).with_target("deployed", threshold(0.45))


def test_a_finished_evaluation_leaves_no_journal(tmp_path: Path) -> None:
    found = toy().examine(SPLIT, HOW, journals=tmp_path)
    assert found.not_run == () and not list(tmp_path.iterdir())


def test_an_evaluation_within_a_budget_is_kept_and_resumed(tmp_path: Path) -> None:
    whole = toy().examine(SPLIT, HOW)
    part = toy().examine(SPLIT, HOW, journals=tmp_path, clock=Countdown(1))
    assert part.not_run and [path.suffix for path in tmp_path.iterdir()] == [".sqlite"]
    found = toy().examine(SPLIT, HOW, journals=tmp_path, resume=True)
    assert found.robustness == whole.robustness and not list(tmp_path.iterdir())


def test_an_evaluation_that_was_cut_is_kept_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interruption comes in the search by queries: what was done before is not done again."""
    whole = toy().examine(SPLIT, HOW)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(worst_case, "square", interrupted)
        with pytest.raises(KeyboardInterrupt):
            toy().examine(SPLIT, HOW, journals=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    calls: list[str] = []
    monkeypatch.setattr(Pass, "run", lambda *_: calls.append("run"))
    found = toy().examine(SPLIT, HOW, journals=tmp_path, resume=True)
    assert found.robustness == whole.robustness and not calls


def test_without_resume_an_evaluation_starts_anew(tmp_path: Path) -> None:
    toy().examine(SPLIT, HOW, journals=tmp_path, clock=Countdown(1))
    part = toy().examine(SPLIT, HOW, journals=tmp_path, clock=Countdown(0))
    assert part.robustness.transfers == ()


def test_the_range_of_the_input_quantiser_reaches_the_figures(integer: Path) -> None:
    """Flat grey 230 and 220 (0.90, 0.86) are moved down to 0.80 and 0.76: beyond 0.8 is one of two."""
    split = flat_images([230, 220])
    line = Lineup().with_network("float", threshold()).with_deployed(integer, NAMES, twin=False)
    assert line.examine(split, conditions()).robustness.clipped_share == pytest.approx(0.5)
