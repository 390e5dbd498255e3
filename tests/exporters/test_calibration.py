from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.toys import halves, linear_model, small_network, wrap
from toolkit.artifacts import Batch, TorchModel
from toolkit.attacks.planned import PlannedAttack
from toolkit.attacks.threat import PgdPlan, ThreatModel
from toolkit.config import ExportConfig, QuantizeConfig
from toolkit.errors import ToolkitError
from toolkit.exporters.calibration import AdversarialShare, CalibrationReader
from toolkit.exporters.onnx import export_onnx
from toolkit.exporters.quantize import quantize_int8

from .small import pictures
from .test_quantize import constants_of, tiny_twin

PLAN = PgdPlan("pixel", ThreatModel("linf", 0.25, "pixels", clip=True), 5, 0.1, random_start=False)


def share(value: float, model: TorchModel | None = None) -> AdversarialShare:
    weight = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    return AdversarialShare(
        PlannedAttack(model or linear_model(weight, (1, 8, 8)), PLAN, seed=0, precision="float32"), value
    )


def feeds(reader: CalibrationReader) -> list[Any]:
    return [feed["image"] for feed in iter(reader.get_next, None)]


@given(value=st.floats(0, 1), batch=st.integers(1, 40))
def test_the_share_is_met_over_all_batches_and_evenly_spread(value: float, batch: int) -> None:
    chosen = AdversarialShare(None, value)  # type: ignore[arg-type]  # nothing is attacked here
    found = [start + row for start in range(0, 200, batch) for row in chosen.chosen(start, min(batch, 200 - start))]
    assert found == [*chosen.chosen(0, 200)]
    assert len(found) == int(value * 200 + 1e-9)
    if len(found) > 2:
        gaps = np.diff(found)
        assert gaps.max() - gaps.min() <= 1


def test_that_share_of_every_batch_comes_attacked_and_the_rest_as_it_was() -> None:
    split, some = halves(100), share(0.2)
    plain, mixed = (CalibrationReader(split, "image", batch_size=50, adversarial=how) for how in (None, some))
    assert (plain.adversarial_images, mixed.adversarial_images, mixed.images) == (0, 20, 100)
    for number, (clean, found) in enumerate(zip(feeds(plain), feeds(mixed), strict=True)):
        changed = np.abs(found - clean).reshape(len(clean), -1).max(1)
        rows = np.flatnonzero(changed)
        assert list(rows) == list(range(4, len(clean), 5))
        assert np.allclose(changed[rows], 0.25, atol=1e-5)
        batch = split.take(np.arange(len(clean), dtype=np.int64) + number * len(clean))
        wanted = some.attack.attack(Batch(batch.images[rows], batch.labels[rows]), number * len(clean))
        assert np.array_equal(found[rows], wanted.numpy())


def test_stretched_batches_are_of_clean_images() -> None:
    split = halves(20)
    reader = CalibrationReader(split, "image", margin=0.1, adversarial=share(1.0))
    attacked, stretched = feeds(reader)
    clean = split.take(np.arange(20, dtype=np.int64)).images.numpy()
    assert np.allclose(stretched, clean * 1.2 - 0.1)
    assert (np.abs(attacked - clean).reshape(20, -1).max(1) > 0.2).all()


def test_attacked_images_widen_the_ranges_that_they_reach(tmp_path: Path) -> None:
    """The convolution's outputs under attack set the range where all calibration images come attacked."""
    torch.manual_seed(0)
    model, split = wrap(small_network(), classes=2, shape=(1, 8, 8)), halves(60)
    twin = export_onnx(model, tmp_path / "float.onnx", ExportConfig())
    scales = {}
    for value in (0.0, 1.0):
        config = QuantizeConfig(calibrate_adversarial=value)
        given = share(value, model) if value else None
        found = quantize_int8(twin, tmp_path / "q.onnx", split, config, adversarial=given)
        assert found.adversarial_images == 60 * value
        (name,) = [
            key for key in constants_of(tmp_path / "q.onnx") if key.startswith("relu") and key.endswith("_scale")
        ]
        scales[value] = float(constants_of(tmp_path / "q.onnx")[name])
    batch = split.take(split.indices)
    attacked = share(1.0, model).attack.attack(batch, 0)
    with torch.no_grad():
        convolution = model.network.get_submodule("0")
        peaks = [float(convolution((images - 0.5) / 0.5).max()) for images in (batch.images, attacked)]
    assert peaks[0] != pytest.approx(peaks[1], rel=0.01)
    assert scales[0.0] == pytest.approx(peaks[0] / 255, rel=1e-4)
    assert scales[1.0] == pytest.approx(peaks[1] / 255, rel=1e-4)


def test_a_share_without_a_network_is_refused(tmp_path: Path) -> None:
    config = QuantizeConfig(calibrate_adversarial=0.2)
    with pytest.raises(ToolkitError, match="--calibrate-adversarial needs the torch network") as caught:
        quantize_int8(tiny_twin(tmp_path), tmp_path / "q.onnx", pictures(8, (1, 8, 8)), config)
    assert "toolkit harden" in caught.value.fix and "float.onnx" in caught.value.found
    assert not (tmp_path / "q.onnx").exists()
