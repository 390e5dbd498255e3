from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.evaluators.greys import PLAIN, SIDE, a_plan, flat_images, threshold
from tests.toys import wrap
from toolkit.attacks.ensemble import Pass
from toolkit.attacks.planned import PlannedAttack
from toolkit.config import ExportConfig
from toolkit.evaluators import judge as judging
from toolkit.evaluators.judge import Drop, Judge
from toolkit.evaluators.surrogate import UnconvertibleGraph
from toolkit.exporters.onnx import export_onnx

PIXELS = SIDE * SIDE
NEAR_AND_FAR = flat_images([160, 95, 250, 10])
"""Attacked by 0.1, the first two come near the middle."""


def an_attack(eps: float = 0.1) -> PlannedAttack:
    return PlannedAttack(threshold(0.5), a_plan(eps=eps), seed=0, precision="float32")


def a_threshold(folder: Path) -> Path:
    return export_onnx(threshold(0.5), folder / "fp32.onnx", ExportConfig()).path


def uneven_is_dark(folder: Path) -> Path:
    """As the threshold on every flat image, which is all that PGD on the threshold makes; uneven ones are darker."""
    halves = torch.ones(SIDE, SIDE)
    halves[:, SIDE // 2 :] = -1
    first, second = nn.Linear(PIXELS, 3), nn.Linear(3, 2)
    difference = 2 * halves.flatten() / PIXELS
    with torch.no_grad():
        first.weight.copy_(torch.stack([torch.ones(PIXELS) / PIXELS, difference, -difference]))
        first.bias.zero_()
        second.weight.copy_(torch.tensor([[-1.0, 1.0, 1.0], [1.0, -1.0, -1.0]]))
        second.bias.copy_(torch.tensor([0.5, -0.5]))
    layers = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second)
    network = wrap(layers, classes=2, shape=(1, SIDE, SIDE), normalization=PLAIN)
    return export_onnx(network, folder / "uneven.onnx", ExportConfig()).path


def test_the_worst_drop_is_of_clean_and_attacked_images() -> None:
    assert Drop(0.02, None).worst == Drop(0.02, 0.01).worst == Drop(-0.1, 0.02).worst == 0.02


def test_a_judge_compares_right_answers_on_the_same_images(tmp_path: Path) -> None:
    """Thresholds on the mean pixel: of greys above one and below the other, the stricter file loses those."""
    split = flat_images([40, 110, 140, 150, 160, 200, 250, 90])
    files = {at: export_onnx(threshold(at), tmp_path / f"{at}.onnx", ExportConfig()).path for at in (0.5, 0.6)}
    judge = Judge(files[0.5], split, None)
    assert judge.images == 8 and judge.drop(files[0.5]) == Drop(0.0, None)
    assert judge.drop(files[0.6]) == Drop(2 / 8, None), "140 and 150 lie below 0.6"
    assert judge.disturbance(files[0.5]) == 0
    assert judge.disturbance(files[0.6]) == pytest.approx(0.01, rel=1e-4)
    attack = an_attack(0.05)
    both = Judge(files[0.5], split, attack).drop(files[0.6])
    assert both.robust == pytest.approx(2 / 8), "150 and 160: attacked, 140 falls for both"
    assert both.clean == 2 / 8 and Judge(files[0.5], split, attack).drop(files[0.5]) == Drop(0.0, 0.0)


def test_a_weakness_that_only_the_graph_itself_shows_is_found(tmp_path: Path) -> None:
    """Of four images the grey that came near the middle falls to an uneven image; PGD on the float network is even."""
    judge = Judge(a_threshold(tmp_path), NEAR_AND_FAR, an_attack())
    path = uneven_is_dark(tmp_path)
    assert judge.drop(path) == Drop(0.0, 0.25)
    assert judge.exceeds(path, 0.2) and not judge.exceeds(path, 0.25)
    blind = Judge(a_threshold(tmp_path), flat_images([250, 10]), an_attack())
    assert blind.drop(path) == Drop(0.0, 0.0), "PGD brought nothing near"


def test_long_attacks_are_made_where_short_ones_find_too_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short ones are made on no image here; the grey next to the middle is then left to the long ones."""
    for name in ("CLIMB", "SEARCH"):
        monkeypatch.setattr(judging, name, replace(getattr(judging, name), near=2.0))
    judge = Judge(a_threshold(tmp_path), NEAR_AND_FAR, an_attack(0.12))
    path = uneven_is_dark(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Pass, "run", lambda *_: pytest.fail("an attack on no image"))
        assert judge.drop(path, short=True) == Drop(0.0, 0.0)
    assert judge.drop(path).robust == 0.25
    assert judge.exceeds(path, 0.2) and not judge.exceeds(path, 0.25)
    assert judge.drop(a_threshold(tmp_path)) == Drop(0.0, 0.0)


def test_of_a_graph_without_a_twin_the_weakness_is_found_by_queries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, **_: object) -> None:
        raise UnconvertibleGraph(path, ("Loop",))

    judge = Judge(a_threshold(tmp_path), NEAR_AND_FAR, an_attack())
    monkeypatch.setattr(judging, "twin_of_session", refused)
    assert judge.drop(uneven_is_dark(tmp_path)) == Drop(0.0, 0.25)


def test_what_is_found_for_an_integer_graph_is_held_against_the_float_twin_too(tmp_path: Path) -> None:
    """Both have the weakness; attacks for the float twin come of a network that has not."""
    weak = uneven_is_dark(tmp_path)
    assert Judge(weak, NEAR_AND_FAR, an_attack()).drop(weak) == Drop(0.0, 0.0)


def test_a_judge_says_the_same_again(tmp_path: Path) -> None:
    judge = Judge(a_threshold(tmp_path), NEAR_AND_FAR, an_attack(0.12))
    path = uneven_is_dark(tmp_path)
    assert judge.drop(path) == judge.drop(path)


def test_noise_is_of_the_margins_next_to_the_boundary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds that lie apart by 0.1: margins differ by 0.2 on all images; slopes differ by what lies between."""
    judge = Judge(a_threshold(tmp_path), NEAR_AND_FAR, an_attack())
    path = export_onnx(threshold(0.6), tmp_path / "other.onnx", ExportConfig()).path
    assert judge.noise(a_threshold(tmp_path)) == 0 and judge.noise(path) == pytest.approx(0.04, rel=1e-3)
    steep = export_onnx(threshold(0.5, slope=2.0), tmp_path / "steep.onnx", ExportConfig()).path
    attacked = torch.tensor([160 / 255 - 0.1, 95 / 255 + 0.1, 250 / 255 - 0.1, 10 / 255 + 0.1])
    heights = 2 * (attacked - 0.5).abs()  # of the margins; twice as steep, they are in error by as much
    assert judge.margin_images == 4 and judge.noise(steep) == pytest.approx(float(heights.square().mean()), rel=0.01)
    monkeypatch.setattr(judging, "EDGE", 2)
    nearest = Judge(a_threshold(tmp_path), NEAR_AND_FAR, an_attack())
    assert nearest.margin_images == 2
    assert nearest.noise(steep) == pytest.approx(float(heights[:2].square().mean()), rel=0.01)
    clean = Judge(a_threshold(tmp_path), NEAR_AND_FAR, None)
    assert clean.noise(steep) == clean.disturbance(steep) > 0 and clean.margin_images == 0


def test_noise_is_told_where_nothing_withstands_the_attack(tmp_path: Path) -> None:
    judge = Judge(a_threshold(tmp_path), flat_images([140, 110]), an_attack())
    path = export_onnx(threshold(0.6), tmp_path / "other.onnx", ExportConfig()).path
    assert judge.margin_images == 2 and judge.noise(path) == pytest.approx(0.04, rel=1e-3)


def test_large_images_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    split = flat_images([10, 20, 30, 200, 250])
    assert judging.images_of(split) == 5
    monkeypatch.setattr(judging, "MEMORY", 3 * 2 * 4 * PIXELS)
    assert judging.images_of(split) == 3
    monkeypatch.setattr(judging, "MEMORY", 1)
    assert judging.images_of(split) == 1
    monkeypatch.undo()
    monkeypatch.setattr(judging, "IMAGES", 2)
    assert judging.images_of(split) == 2
