"""A standard network that the user brings, and images that come from files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.reproduce import small
from toolkit.artifacts import Normalization, TorchModel
from toolkit.config import PruneConfig
from toolkit.data.images import ArrayImages
from toolkit.errors import ToolkitError
from toolkit.models.checkpoint import save_checkpoint
from toolkit.models.loading import assemble, read_model_file
from toolkit.pruning import prune
from toolkit.reproduce import protocol, world
from toolkit.reproduce.document import documents
from toolkit.reproduce.recipes import Recipe
from toolkit.reproduce.render import render
from toolkit.reproduce.runner import Runner
from toolkit.reproduce.steps import MODEL

pytestmark = pytest.mark.usefixtures("small_world")
DATA = {"source": "fashion-mnist"}


@pytest.fixture
def brought(tmp_path: Path) -> Path:
    """A network that was trained elsewhere, by the paper's protocol: on all training images."""
    found = Runner(small.settings(tmp_path / "before", "table2", seeds=(7,), data=DATA, max_runs=1))
    found.run()
    (path,) = (tmp_path / "before").glob(f"*/{MODEL}")
    return path.rename(tmp_path / "mine.pt")


def settings(work: Path, brought: Path, target: str = "table2", **changes: Any) -> Any:
    return small.settings(work, target, **{"data": DATA, "pretrained": brought, **changes})


def test_it_stands_in_place_of_the_one_that_would_be_trained(tmp_path: Path, brought: Path) -> None:
    found = Runner(settings(tmp_path / "work", brought, seeds=(0, 1)))
    plan = [step.text for step in found.plan()]
    assert sum(text.endswith(": standard network from mine.pt") for text in plan) == 1, "one file for all seeds"
    assert not any(text.endswith(": standard network") for text in plan)
    found.run()
    (document,) = documents(found)
    first = document["panels"][0]["cells"][0]
    planner = found.panels[0].planners[1]
    theirs = found.store.folder(planner.network_of(Recipe("standard"))) / MODEL
    states = [torch.load(path, weights_only=True)["state_dict"] for path in (brought, theirs)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert first["network"] == "standard" and first["means"]["test"]["value"] > 60 and len(first["runs"]) == 2
    assert document["pretrained"]["name"] == "mine.pt"
    assert f"`mine.pt`, SHA-256 {document['pretrained']['sha256'][:16]}" in render(document)


def test_another_file_is_another_network(tmp_path: Path, brought: Path) -> None:
    def digest(path: Path) -> str:
        planner = Runner(settings(tmp_path / "work", path)).panels[0].planners[0]
        return planner.measure(Recipe("standard", 0.5, "standard"), "pgd-paper").digest

    content = torch.load(brought, weights_only=True)
    other = tmp_path / "other.pt"
    torch.save({**content, "state_dict": {k: v * 1.01 for k, v in content["state_dict"].items()}}, other)
    before = digest(brought)
    assert digest(other) != before
    assert digest(brought.rename(tmp_path / "renamed.pt")) == before


def test_bare_weights_are_of_the_tables_network(tmp_path: Path, brought: Path) -> None:
    bare = tmp_path / "bare.pt"
    torch.save(torch.load(brought, weights_only=True)["state_dict"], bare)
    found = Runner(settings(tmp_path / "work", bare))
    found.run()
    assert documents(found)[0]["panels"][0]["cells"][0]["means"]["test"]["value"] > 60


def test_it_needs_the_name_of_its_data_set(tmp_path: Path, brought: Path) -> None:
    with pytest.raises(ToolkitError, match="is of one data set") as error:
        Runner(small.settings(tmp_path / "work", pretrained=brought))
    assert "--data" in error.value.fix and not (tmp_path / "work").exists()


def test_a_file_that_is_not_there_is_said_before_anything_is_run(tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match="the model file is not there") as error:
        Runner(settings(tmp_path / "work", tmp_path / "nothing.pt"))
    assert any("--pretrained" in note for note in error.value.__notes__)
    assert not (tmp_path / "work").exists()


def test_another_architecture_is_refused(tmp_path: Path, brought: Path) -> None:
    with pytest.raises(ToolkitError, match="holds another network") as error:
        Runner(settings(tmp_path / "work", brought, network="resnet18"))
    assert "cnn8" in error.value.found and "--arch cnn8" in error.value.fix


def test_one_that_saw_the_test_images_is_refused(tmp_path: Path, brought: Path) -> None:
    source = small.source(small.settings(tmp_path, data=DATA).data)
    model = replace(loaded(brought), training_hashes=np.unique(source.evaluation.hashes))
    save_checkpoint(model, tmp_path / "leaked.pt")
    with pytest.raises(ToolkitError, match="trained on images that are to judge it") as error:
        Runner(settings(tmp_path / "work", tmp_path / "leaked.pt"))
    assert error.value.found.startswith(f"{small.TEST} of {small.TEST} evaluation images")


def test_one_that_saw_what_is_held_out_is_refused_where_something_is(tmp_path: Path, brought: Path) -> None:
    Runner(settings(tmp_path / "paper", brought))  # all images train there
    with pytest.raises(ToolkitError, match="trained on images that are to judge it") as error:
        Runner(settings(tmp_path / "fast", brought, protocol="fast"))
    assert "validation" in error.value.found


def loaded(path: Path) -> TorchModel:
    source = small.source(small.settings(path, data=DATA).data)
    return assemble(
        read_model_file(path),
        arch=None,
        class_names=source.train.class_names,
        input_shape=source.train.shape,
        normalization=source.normalization_hint,
        dataset=source.name,
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"training": ({"objective": "standard"}, {"objective": "adversarial"})},
            "trained with the objective adversar",
        ),
        ({"training": ({"objective": "distill"},)}, "trained with the objective distill"),
        ({"normalization": Normalization((0.5,), (0.35,))}, "std (0.35,)"),
    ],
)
def test_one_that_is_no_standard_network_of_the_papers_pixels_is_refused(
    tmp_path: Path, brought: Path, change: dict[str, Any], said: str
) -> None:
    model = loaded(brought)
    save_checkpoint(replace(model, spec=replace(model.spec, **change)), tmp_path / "other.pt")
    with pytest.raises(ToolkitError, match="the pretrained network") as error:
        Runner(settings(tmp_path / "work", tmp_path / "other.pt"))
    assert said in error.value.found


def test_a_pruned_network_is_refused(tmp_path: Path, brought: Path) -> None:
    pruned = prune(loaded(brought), PruneConfig(ratio=0.5)).model
    save_checkpoint(pruned, tmp_path / "pruned.pt")
    with pytest.raises(ToolkitError, match="no standard one") as error:
        Runner(settings(tmp_path / "work", tmp_path / "pruned.pt"))
    assert "pruned" in error.value.found


def test_the_code_of_a_network_of_ones_own_is_part_of_it(tmp_path: Path, brought: Path) -> None:
    bare, code = tmp_path / "bare.pt", tmp_path / "mine.py"
    torch.save(torch.load(brought, weights_only=True)["state_dict"], bare)
    code.write_text(
        "from tests.reproduce.small import network\ndef build():\n    return network(10, (1, 8, 8))\n", encoding="utf-8"
    )

    def digest() -> str:
        planner = Runner(settings(tmp_path / "work", bare, network=f"{code}:build")).panels[0].planners[0]
        return planner.network_of(Recipe("standard")).digest

    before = digest()
    assert digest() == before
    code.write_text(f"{code.read_text()}# another text\n", encoding="utf-8")
    assert digest() != before


def test_seeds_that_share_the_network_have_no_spread(tmp_path: Path, brought: Path) -> None:
    found = Runner(settings(tmp_path / "work", brought, seeds=(0, 1), max_runs=99))
    found.run()
    rows = {cell["network"]: cell for cell in documents(found)[0]["panels"][0]["cells"]}
    assert len(rows["standard"]["runs"]) == 2 and rows["standard"]["means"]["test"]["error"] is None
    assert rows["standard"]["agreement"]["test"]["parts"].startswith("test images alone")
    assert rows["robust"]["means"]["test"]["error"] is not None


# Images from files


@pytest.mark.parametrize("counted", [True, False])
def test_the_data_set_in_a_folder_is_compared_if_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: bool
) -> None:
    monkeypatch.setattr(world, "load_source", lambda config: replace(small.source(config), threat_key="cifar10"))
    if counted:
        whole = replace(protocol.CIFAR10, images=(small.TRAIN, small.TEST))
        monkeypatch.setattr(world, "EXPERIMENTS", {"cifar10": whole})
    folder = {"source": "folder:/a/place/pictures"}
    (document,) = documents(Runner(small.settings(tmp_path, "table2", data=folder, max_runs=0)))
    text, (panel,) = render(document), document["panels"]
    assert panel["comparable"] is counted
    assert any(cell["paper"] is not None for cell in panel["cells"]) is counted
    assert ("The images come from files (folder:pictures)" in text) is counted and "/a/place" not in text
    assert panel["title"] == ("CIFAR-10 (from files)" if counted else "folder:pictures")


def test_a_label_that_changes_in_a_folder_makes_another_step_and_elsewhere_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digests(name: str, label: int) -> list[str]:
        def source(config: Any) -> Any:
            found = small.source(config)
            labels = found.train.labels.copy()
            labels[-1] = label
            train = ArrayImages("small", found.train.class_names, found.train.pixels(np.arange(len(labels))), labels)
            return replace(found, name=name, train=train)

        monkeypatch.setattr(world, "load_source", source)
        planner = Runner(small.settings(tmp_path / "work", data=DATA)).panels[0].planners[0]
        return [step.digest for step in planner.integer(Recipe("standard", 0.5)).walk()]

    assert digests("fashion-mnist", 0) == digests("fashion-mnist", 1)
    one, other = digests("folder:pictures", 0), digests("folder:pictures", 1)
    assert all(mine != yours for mine, yours in zip(one, other, strict=True))
