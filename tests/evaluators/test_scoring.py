from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.evaluators.greys import EPS, PLAIN, SIDE, above, flat_images, noise_images, random_model, threshold
from toolkit.artifacts import Predictor, Proportion, Split, TorchModel
from toolkit.attacks.threat import ThreatModel
from toolkit.evaluators import scoring
from toolkit.evaluators.image_files import Gallery, decode
from toolkit.evaluators.scoring import (
    FILE,
    HEIGHTS,
    MARGIN,
    POINTS,
    ROWS,
    Judges,
    Ledger,
    TargetName,
    clean_flags,
    primary_of,
)

THREAT = ThreatModel("linf", EPS, "pixels", clip=True)
pytestmark = pytest.mark.usefixtures("quiet")


def judges(targets: dict[TargetName, Predictor], gallery: Path | None = None) -> Judges:
    return Judges(targets, THREAT, PLAIN, Gallery(gallery))


def greys(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, SIDE, SIDE).clone()


def score(found: Judges, attacked: Tensor, split: Split, *, every: bool = True) -> dict[str, list[bool]]:
    batch = split.take(np.arange(len(split)))
    flags = found.score(attacked, batch.images, batch.labels, indices=np.arange(len(split)), every=every)
    return {name: values.tolist() for name, values in flags.items() if not name.startswith(MARGIN)}


@pytest.mark.parametrize(
    ("names", "primary", "compared"),
    [
        (("torch", "fp32", "deployed", "deployed_unoptimised"), "deployed", ("fp32", "deployed")),
        (("deployed", "deployed_unoptimised"), "deployed", ("deployed",)),
        (("torch",), "torch", ("torch",)),
        (("torch", "fp32"), "torch", ("torch", "fp32")),
        (("fp32", "torch"), "fp32", ("fp32",)),
    ],
)
def test_the_graph_that_counts_is_the_deployed_one_and_always_compared(
    names: tuple[TargetName, ...], primary: TargetName, compared: tuple[TargetName, ...]
) -> None:
    targets: dict[TargetName, Predictor] = {name: above(0.5) for name in names}
    found = judges(targets)
    assert found.primary == primary == primary_of(targets)
    assert found.compared == compared


def test_attacked_images_are_scored_on_all_targets_or_on_those_compared() -> None:
    targets: dict[TargetName, Predictor] = {"torch": above(0.4), "fp32": above(0.5), "deployed": above(0.6)}
    split = flat_images([140, 140, 140])  # bright, 0.549
    attacked = greys(0.45, 0.55, 0.64)
    assert score(judges(targets), attacked, split) == {
        "torch": [True, True, True],
        "fp32": [False, True, True],
        "deployed": [False, False, True],
        FILE: [False, False, True],
    }
    assert set(score(judges(targets), attacked, split, every=False)) == {"fp32", "deployed", FILE}


def test_a_file_fools_only_if_it_does_after_rounding(tmp_path: Path) -> None:
    """From level 140 the attack ends between two levels: 126.6 rounds to 127, which is still bright above 126.8."""
    split = flat_images([140, 140, 140])
    attacked = greys(126.6 / 255, 126.4 / 255, 130.4 / 255)
    found = judges({"deployed": above(126.8 / 255)}, tmp_path)
    assert score(found, attacked, split) == {"deployed": [False, False, True], FILE: [True, False, True]}
    (kept,) = tmp_path.iterdir()
    assert kept.name == "000001-class1.png"
    assert torch.equal(decode(kept.read_bytes()), greys(126 / 255)[0])


def test_the_gallery_holds_what_the_file_judge_calls_fooled_and_each_of_it_fools(tmp_path: Path) -> None:
    model = random_model()
    split = noise_images(40, model)
    batch = split.take(np.arange(40))
    noise = EPS * torch.randn(batch.images.shape, generator=torch.Generator().manual_seed(0)).sign()
    attacked = (batch.images + noise).clamp(0, 1)
    chosen = np.arange(40)[::-1].copy()
    rows = torch.from_numpy(chosen)
    flags = judges({"deployed": model}, tmp_path).score(
        attacked[rows], batch.images[rows], batch.labels[rows], indices=chosen, every=True
    )
    fooled = {int(chosen[row]) for row in (~flags[FILE]).nonzero()[:, 0].tolist()}
    kept = {int(path.name[:6]): path for path in tmp_path.iterdir()}
    assert kept.keys() == fooled and 0 < len(fooled) < 40
    for index, path in kept.items():
        image, label = decode(path.read_bytes()), int(batch.labels[index])
        assert path.name.endswith(f"-class{label}.png")
        assert model.predict(image[None]).argmax() != label
        assert (image - batch.images[index]).abs().max() <= EPS


def test_two_channels_make_no_file() -> None:
    model = random_model(channels=2)
    found = Judges({"deployed": model}, THREAT, model.spec.normalization)
    images, labels = torch.rand(5, 2, SIDE, SIDE), torch.zeros(5, dtype=torch.int64)
    flags = found.score(images, images, labels, indices=np.arange(5), every=True)
    assert set(flags) == {"deployed", MARGIN + "deployed"}


@pytest.mark.parametrize("wrong", [2 * EPS, -1.01 * EPS, float("nan"), float("inf")])
def test_images_outside_the_threat_model_are_a_defect(wrong: float) -> None:
    found, split = judges({"deployed": above(0.5)}), flat_images([140, 140])
    clean = greys(140 / 255, 140 / 255)
    score(found, clean + EPS, split)
    moved = clean.clone()
    moved[1, 0, 2, 3] += wrong
    with pytest.raises(RuntimeError, match="left its threat model"):
        score(found, moved, split)


def test_images_outside_the_pixel_range_are_a_defect() -> None:
    with pytest.raises(RuntimeError, match="left its threat model"):
        score(judges({"deployed": above(0.5)}), greys(1.01), flat_images([255]))


def test_logits_that_are_not_finite_are_wrong() -> None:
    class Broken:
        def predict(self, images: Tensor) -> Tensor:
            return torch.tensor([0.0, float("inf")]).expand(len(images), 2)

    assert score(judges({"deployed": Broken()}), greys(0.9), flat_images([230]))["deployed"] == [False]


def test_torch_networks_are_scored_where_they_compute_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device `meta` stands for a GPU: the networks move there as copies, other graphs stay."""
    monkeypatch.setattr(scoring, "compute_device", lambda: torch.device("meta"))
    model, graph = threshold(), above(0.5)
    found = judges({"torch": model, "deployed": graph}).targets
    assert isinstance(found["torch"], TorchModel) and found["torch"].module.mean.device.type == "meta"
    assert found["deployed"] is graph
    assert model.module.mean.device.type == "cpu"


def test_clean_flags_are_those_of_every_target_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    split = flat_images([10, 120, 130, 250], labels=[0, 1, 1, 0])
    monkeypatch.setattr("toolkit.artifacts.evaluation_batch", lambda _shape: 3)
    advanced: list[int] = []
    flags = clean_flags(judges({"fp32": above(0.5), "deployed": above(0.4)}), split, advanced.append)
    assert flags["fp32"].tolist() == [True, False, True, False]
    assert flags["deployed"].tolist() == [True, True, True, False]
    assert advanced == [3, 1]


def test_margins_are_those_of_the_compared_graphs() -> None:
    """Logits of a threshold are the distance from it, with both signs: the margin is twice that."""
    found = judges({"torch": threshold(0.2), "deployed": threshold(0.5), "fp32": threshold(0.4)})
    split = flat_images([140, 115])
    batch = split.take(np.arange(2))
    attacked = greys(0.47, 0.47)
    flags = found.score(attacked, batch.images, batch.labels, indices=np.arange(2), every=True)
    assert flags[MARGIN + "deployed"].tolist() == pytest.approx([0.06, -0.06], abs=1e-6)
    assert flags[MARGIN + "fp32"].tolist() == pytest.approx([-0.14, 0.14], abs=1e-6)
    clean = clean_flags(found, split, lambda _: None)
    assert clean[MARGIN + "deployed"].tolist() == pytest.approx([-25 / 255, -25 / 255], abs=1e-6)
    assert {name for name in (*flags, *clean) if name.startswith(MARGIN)} == {MARGIN + "deployed", MARGIN + "fp32"}


def test_progress_is_the_share_of_the_clean_margin_that_attacks_took() -> None:
    split = flat_images([230, 180, 140, 100], labels=[1, 1, 1, 1])
    found = judges({"deployed": threshold(0.5)})
    ledger = Ledger(clean_flags(found, split, lambda _: None), found, files=False)
    progress, name = ledger.progress("deployed"), MARGIN + "deployed"
    assert progress[:3].tolist() == [0, 0, 0] and progress[3] >= 1, "wrong from the start"
    start = ledger.margins["deployed"].clone()
    flags = {"deployed": torch.tensor([True, True, False]), name: torch.tensor([0.25, 0.75, -0.1]) * start[:3]}
    ledger.update(flags, np.array([0, 1, 2]))
    ledger.update({"deployed": torch.tensor([True]), name: start[:1]}, np.array([0]))
    torch.testing.assert_close(ledger.progress("deployed")[:3], torch.tensor([0.75, 0.25, 1.1]))
    assert ledger.remaining(["deployed"]).tolist() == [0, 1]
    assert ledger.remaining(["deployed"], near=0.5).tolist() == [0]


def test_an_image_may_stand_more_than_once_in_an_update() -> None:
    """Copies that aim at different classes: one that fools is enough, wherever it stands, and the largest margin."""
    found = judges({"fp32": threshold(0.5), "deployed": threshold(0.5)})
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        ledger = Ledger(clean_flags(found, flat_images([200, 200]), lambda _: None), found, files=True)
        right, margins = torch.tensor([True, False, True])[order], torch.tensor([-0.05, 0.05, -0.1])[order]
        names = ("fp32", "deployed", FILE)
        flags = dict.fromkeys(names, right) | {MARGIN + name: margins for name in names[:2]}
        ledger.update(flags, np.array([1, 1, 1]))
        assert all(worst.tolist() == [True, False] for worst in ledger.worst.values())
        assert ledger.margins["fp32"][1] == pytest.approx(0.05)
        kept = ledger.state(np.array([1]))
        other = Ledger(clean_flags(found, flat_images([200, 200]), lambda _: None), found, files=True)
        other.restore(kept, np.array([1]))
        assert all(torch.equal(other.worst[name], worst) for name, worst in ledger.worst.items())
        assert all(torch.equal(other.margins[name], values) for name, values in ledger.margins.items())


def test_the_ledger_keeps_the_nearest_attacked_image_of_what_stands_near_a_boundary() -> None:
    """Graph by graph; of several copies the nearest; nothing that is far, and nothing of an image that has fallen."""
    found = judges({"fp32": threshold(0.5), "deployed": threshold(0.5)})
    split = flat_images([200, 200, 200])
    clean = clean_flags(found, split, lambda _: None)
    everything = np.arange(3)

    def a_ledger() -> Ledger:
        return Ledger(clean, found, files=False, keep_near=0.5)

    def greys(values: Tensor) -> Tensor:
        return values.view(-1, 1, 1, 1).expand(-1, 1, SIDE, SIDE)

    def tried(ledger: Ledger, shares: dict[str, list[float]], indices: list[int], values: list[float]) -> None:
        flags: dict[str, Tensor] = {}
        for name, taken in shares.items():
            margins = clean[MARGIN + name][indices] * (1 - torch.tensor(taken))
            flags |= {name: margins < 0, MARGIN + name: margins}
        ledger.update(flags, np.array(indices), greys(torch.tensor(values)))

    ledger = a_ledger()
    shares = {"fp32": [0.6, 0.9, 0.7, 0.4], "deployed": [0.6, 0.5, 0.7, 0.8]}
    tried(ledger, shares, [0, 0, 0, 1], [0.1, 0.2, 0.3, 0.4])
    tried(ledger, {"fp32": [0.55, 0.45], "deployed": [0.6, 0.9]}, [0, 2], [0.5, 0.6])
    otherwise = greys(torch.tensor([0.7, 0.8, 0.9]))
    other = a_ledger()
    other.restore(ledger.state(everything), everything)
    for kept in (ledger, other):
        fp32, deployed = (kept.nearest([name], everything, otherwise) for name in kept.graphs)
        assert fp32.mean(dim=(1, 2, 3)).tolist() == pytest.approx([0.2, 0.8, 0.9])
        assert deployed.mean(dim=(1, 2, 3)).tolist() == pytest.approx([0.3, 0.4, 0.6])
        either = kept.nearest(["fp32", "deployed"], everything, otherwise)
        assert either.mean(dim=(1, 2, 3)).tolist() == pytest.approx([0.2, 0.4, 0.6]), "of the first that has a point"
    before = ledger.state(everything)
    tried(ledger, {"fp32": [0.95, 1.5], "deployed": [1.5, 0.1]}, [0, 0], [0.15, 0.25])
    assert ledger.state(everything).keys() == {
        "fp32", "deployed", MARGIN + "fp32", MARGIN + "deployed",
        ROWS + "deployed", POINTS + "deployed", HEIGHTS + "deployed",
    }  # fmt: skip
    other.restore(before, everything)
    other.restore(ledger.state(everything), everything)
    assert other.state(everything).keys() == ledger.state(everything).keys(), "what has fallen since has no point"
    assert ledger.state(everything)[ROWS + "deployed"].tolist() == [1, 2]
    assert ROWS + "deployed" not in Ledger(clean, found, files=False).state(everything)

    ledger = a_ledger()  # the matrix brings margins without images: what comes less far later is kept all the same
    margins = {MARGIN + name: clean[MARGIN + name] * 0.05 for name in ("fp32", "deployed")}
    ledger.update(margins | dict.fromkeys(("fp32", "deployed"), torch.ones(3, dtype=torch.bool)), everything)
    tried(ledger, {"fp32": [0.9], "deployed": [0.9]}, [0], [0.1])
    assert ledger.nearest(["fp32"], everything[:1], otherwise[:1]).mean() == pytest.approx(0.1)


def test_images_without_a_margin_are_not_given_up() -> None:
    """Logits that are not finite: the graph is fooled, but its file, and another graph, may stand."""

    class Overflows:
        def predict(self, images: Tensor) -> Tensor:
            return torch.full((len(images), 2), float("inf"))

    found = judges({"fp32": above(0.5), "deployed": Overflows()})
    ledger = Ledger(clean_flags(found, flat_images([10, 200]), lambda _: None), found, files=True)
    assert ledger.remaining(["deployed"]).tolist() == []
    assert ledger.remaining(["fp32"]).tolist() == ledger.remaining(["deployed", "fp32"]).tolist() == [0, 1]

    found = judges({"deployed": above(0.5)})
    ledger = Ledger(clean_flags(found, flat_images([10, 200]), lambda _: None), found, files=True)
    fooled = {"deployed": torch.tensor([False]), FILE: torch.tensor([True])}
    ledger.update(fooled | {MARGIN + "deployed": torch.tensor([math.nan])}, np.array([1]))
    assert ledger.remaining(["deployed"], near=0.75).tolist() == [1]


FLAGS = st.integers(0, 63)
"""Six flags, as bits."""
ATTACK = st.tuples(st.integers(1, 63), FLAGS, FLAGS, FLAGS)
"""The images that it was made on, and what three judges said."""


def bits(number: int) -> list[bool]:
    return [bool(number >> place & 1) for place in range(6)]


@settings(max_examples=60, deadline=None)
@given(fp32=FLAGS, deployed=FLAGS, attacks=st.lists(ATTACK, max_size=5))
def test_the_ledger_keeps_the_minimum_over_all_attacks(
    fp32: int, deployed: int, attacks: list[tuple[int, int, int, int]]
) -> None:
    """Recounted image by image: right when clean and under every attack that was tried on it."""
    found = judges({"torch": above(2), "fp32": above(0.5), "deployed": above(0.5)})
    clean = {"torch": torch.zeros(6, dtype=torch.bool), "fp32": torch.tensor(bits(fp32))}
    clean |= {"deployed": torch.tensor(bits(deployed))}
    margins = {MARGIN + name: torch.full((6,), -1.0) for name in ("fp32", "deployed")}
    clean |= margins
    ledger = Ledger(clean, found, files=True)
    standing = {"fp32": bits(fp32), "deployed": bits(deployed), FILE: bits(deployed)}
    for tried, *results in attacks:
        indices = [index for index, made in enumerate(bits(tried)) if made]
        judged = dict(zip(standing, map(bits, results), strict=True))
        flags = {name: torch.tensor(right)[indices] for name, right in judged.items()}
        ledger.update(flags | {name: values[indices] / 2 for name, values in margins.items()}, np.array(indices))
        for name, right in judged.items():
            for index in indices:
                standing[name][index] = standing[name][index] and right[index]
    assert {name: right.tolist() for name, right in ledger.worst.items()} == standing
    answering: dict[TargetName, tuple[str, ...]] = {"fp32": ("fp32",), "deployed": ("deployed", FILE)}
    graphs: tuple[TargetName, ...]
    for graphs in (("fp32",), ("deployed",), ("deployed", "fp32")):
        names = [name for graph in graphs for name in answering[graph]]
        undecided = [index for index in range(6) if any(standing[name][index] for name in names)]
        assert ledger.remaining(graphs).tolist() == undecided, "and never because another graph is fooled"
        assert ledger.undecided(np.array([4, 1]), graphs).tolist() == [4 in undecided, 1 in undecided]
    assert ledger.proportions() == {name: Proportion(sum(right), 6) for name, right in standing.items()}
    assert ledger.clean["fp32"].tolist() == bits(fp32), "the clean flags are not overwritten"


class Rounding:
    """Takes whole numbers, as a graph with uint8 pixels does, and calls bright what is above 101."""

    interface = SimpleNamespace(dtype="uint8")

    def predict(self, images: Tensor) -> Tensor:
        level = (images * 255).round().mean(dim=(1, 2, 3)) - 101.5
        return torch.stack([-level, level], dim=1)


def test_a_graph_that_takes_whole_numbers_sees_none_outside_of_the_ball() -> None:
    """Half a level is within this ball, but there is no other level in it: fed as it is, it would be rounded to one."""
    split = flat_images([101, 101], labels=[0, 0])
    clean = split.take(np.arange(2)).images
    for eps, stands in ((0.5, True), (1.5, False)):
        found = Judges({"deployed": Rounding()}, ThreatModel("linf", eps / 255, "pixels", clip=True), PLAIN)
        flags = score(found, clean + eps / 255, split)
        assert flags["deployed"] == flags[FILE] == [stands] * 2
