from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests.reproduce import small
from toolkit.reproduce import command, targets, world
from toolkit.reproduce.document import documents
from toolkit.reproduce.embedding import _lay_out
from toolkit.reproduce.recipes import Recipe
from toolkit.reproduce.runner import Runner
from toolkit.reproduce.work import Bench


@pytest.mark.usefixtures("small_world")
def test_real_integers_and_simulated_ones_under_every_attack(tmp_path: Path) -> None:
    """The recorded ranges are those of the fine-tuning; stronger attacks leave less."""
    found = Runner(small.settings(tmp_path, attack_images=8))
    simulated = small.fill(found, Recipe("standard", 0.8, "adversarial", "simulated"))
    real = small.fill(found, Recipe("standard", 0.8, "adversarial", "integer"))
    assert set(real["by_surrogate"]) == {"twin", "fake_quantised", "float"}
    assert real["worst_case"][0] <= min(share[0] for share in real["by_surrogate"].values())
    assert abs(real["clean"][0] - simulated["clean"][0]) <= 10
    strong = small.fill(found, small.TUNED, "autoattack-paper")
    weak = small.fill(found, small.TUNED, "deepfool-paper")
    assert strong["robust"][1] == weak["robust"][1] == 8
    assert strong["robust"][0] <= weak["clean"][0] and weak["robust"][0] <= weak["clean"][0] and strong["passes"]


@pytest.mark.usefixtures("small_world")
def test_the_integer_graph_after_quantisation_aware_training_has_the_ranges_that_it_learnt(tmp_path: Path) -> None:
    found = Runner(small.settings(tmp_path, attack_images=8))
    simulated, real = small.fill(found, small.ROUNDED), small.fill(found, replace(small.ROUNDED, form="integer"))
    assert set(real["by_surrogate"]) == {"twin", "fake_quantised", "float"} and real["clean"][0] > 50
    assert all(abs(real[share][0] - simulated[share][0]) <= 3 for share in ("clean", "robust"))
    panel = found.panels[0]
    assert panel.world is not None
    planner = panel.planners[0]
    bench = Bench(found.store, panel.world, planner.splits)
    step = planner.integer(replace(small.ROUNDED, form="integer"))
    trained, written = found.store.result(step.parents[0]), found.store.result(step)
    assert trained is not None and written is not None
    ends = {high - low for calls in trained["learnt"].values() for low, high in calls}
    constants = onnx.load(bench.graph(step)).graph.initializer
    arrays = [onnx.numpy_helper.to_array(item) for item in constants if item.name.endswith("scale")]
    scales = np.concatenate([array.ravel() for array in arrays])
    assert ends and all(np.isclose(scales, end / 255, rtol=1e-5).any() for end in ends)
    assert written["learnt_ranges"] == len(ends) + 1, "what is flattened is a tensor of its own"


@pytest.mark.usefixtures("small_world")
def test_the_two_readings_of_eps_are_two_figures(tmp_path: Path) -> None:
    found = Runner(small.settings(tmp_path))
    theirs, sound = (small.fill(found, small.TUNED, measure) for measure in ("pgd-paper", "pgd-pixel"))
    assert sound["robust"][0] <= theirs["robust"][0] and sound["clean"] == theirs["clean"]
    planner = found.panels[0].planners[0]
    assert planner.measure(small.TUNED, "pgd-paper") != planner.measure(small.TUNED, "pgd-pixel")


@pytest.mark.usefixtures("small_world")
def test_pruning_keeps_the_exact_share(tmp_path: Path) -> None:
    found = Runner(small.settings(tmp_path))
    small.fill(found, Recipe("standard", 0.8))
    (pruned,) = [json.loads(p.read_text()) for p in tmp_path.glob("*/result.json") if "widths" in p.read_text()]
    assert list(pruned["widths"].values()) == [[10, 2], [20, 4], [20, 4], [32, 32], [10, 10]]


@pytest.mark.usefixtures("small_world")
def test_the_paper_prunes_convolutions_alone_and_the_fast_protocol_hidden_layers_too(tmp_path: Path) -> None:
    found = Runner(small.settings(tmp_path, protocol="fast"))
    small.fill(found, Recipe("standard", 0.5))
    (pruned,) = [json.loads(p.read_text()) for p in tmp_path.glob("*/result.json") if "widths" in p.read_text()]
    assert list(pruned["widths"].values()) == [[10, 5], [20, 10], [20, 10], [32, 16], [10, 10]]
    (document,) = documents(found)
    assert any("hidden linear layers" in item for item in document["deviations"])


@pytest.mark.usefixtures("small_world")
def test_a_table_is_named_after_the_data_that_fill_it(tmp_path: Path) -> None:
    def titles(target: str) -> dict[str, str]:
        found = Runner(small.settings(tmp_path, target, data={"source": "fashion-mnist"}, max_runs=0))
        return {document["target"]: document["title"] for document in documents(found)}

    assert titles("table4") == {"table4": "Fashion-MNIST, compressed"}
    everything = titles("all")
    assert "table4" not in everything, "it would be table3 once more"
    assert everything["table3"] == "Fashion-MNIST, compressed"
    assert everything["table5"] == "Fashion-MNIST, compressed, as in the appendix"


@pytest.mark.usefixtures("small_world")
def test_how_the_standard_network_of_cifar_10_differs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "load_source", lambda config: replace(small.source(config), threat_key="cifar10"))

    def said(protocol: str, **changes: Any) -> list[str]:
        changes |= {"data": {"source": "cifar10"}, "protocol": protocol, "max_runs": 0}
        (document,) = documents(Runner(small.settings(tmp_path / protocol, "table2", **changes)))
        return [item for item in document["deviations"] if "public checkpoint" in item]

    assert "for 300 epochs" in said("paper")[0] and "for 20 epochs" in said("fast")[0]
    assert said("paper", network="cnn8") == []


@pytest.mark.usefixtures("small_world")
def test_all_training_images_train_under_the_papers_protocol_alone(tmp_path: Path) -> None:
    for protocol, count in (("paper", small.TRAIN), ("fast", small.TRAIN - 100)):
        found = Runner(small.settings(tmp_path / protocol, protocol=protocol))
        assert len(found.panels[0].planners[0].splits.train) == count


@pytest.mark.usefixtures("small_world")
def test_another_network_or_fewer_images_are_not_compared_with_the_paper(tmp_path: Path) -> None:
    for changes in ({"network": "resnet18"}, {"data": {"source": "fashion-mnist", "evaluation": 50}}):
        found = Runner(small.settings(tmp_path, max_runs=0, **changes))
        (panel,) = documents(found)[0]["panels"]
        assert all(cell["paper"] is None for cell in panel["cells"])
        assert panel["attack_images"] == 20
    few = Runner(small.settings(tmp_path, max_runs=0, data={"evaluation": 15}))
    assert documents(few)[0]["panels"][0]["attack_images"] == 15
    assert all(cell["paper"] for cell in documents(Runner(small.settings(tmp_path, "table2")))[0]["panels"][0]["cells"])


@pytest.mark.parametrize("noise", [0.0, 1e-8])
def test_a_layer_that_gives_the_same_for_every_image_is_one_point(noise: float) -> None:
    values = 0.5 + noise * torch.rand(100, 7)  # scikit-learn ends the process on such values
    assert (_lay_out(values, 30, 0) == 0).all()
    assert np.ptp(_lay_out(values + torch.eye(100)[:, :7], 30, 0), axis=0).min() > 1


@pytest.mark.usefixtures("small_world")
def test_layouts_are_of_the_class_and_of_clean_and_attacked_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"a": Recipe("standard"), "b": Recipe("standard", form="simulated")}
    monkeypatch.setattr(targets, "embedded", lambda _experiment: few)
    found = Runner(small.settings(tmp_path, "figure2"))
    text = command.fill(found, tmp_path / "out", as_json=False)
    assert "10 test images of the class Bag" in text and "| a | standard | " in text
    assert (tmp_path / "out" / "figure2.png").is_file()
    written = (tmp_path / "out" / "figure2.json").read_text()
    assert str(tmp_path) not in written and '"layer 5"' in written


def test_the_class_must_exist(tmp_path: Path, small_world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    del small_world
    monkeypatch.setattr(targets, "EMBEDDED_CLASS", "Rucksack")
    found = Runner(small.settings(tmp_path, "figure2"))
    assert found.plan() == [], "nothing is trained for it"
    assert found.impossible() == ["the data set has no class Rucksack"]
    assert documents(found)[0]["panels"][0]["embedding"]["missing"] == "the data set has no class Rucksack"


@pytest.mark.usefixtures("small_world")
def test_too_few_images_of_the_class_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "embedded", lambda _experiment: {"a": Recipe("standard")})
    found = Runner(small.settings(tmp_path, "figure2", data={"source": "fashion-mnist", "evaluation": 20}))
    assert found.plan() == [], "nothing is trained for it"
    why = "2 evaluation images of the class Bag, and a layout wants 4: raise --n or leave it away"
    assert found.impossible() == [why]
    assert documents(found)[0]["panels"][0]["embedding"]["missing"] == why
