from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.exporters.small import pictures, tiny, wrap
from toolkit.artifacts import OnnxModel, Split
from toolkit.config import ExportConfig, QuantizeConfig
from toolkit.exporters import calibration_cache, quantize
from toolkit.exporters.calibration_cache import kept_or_observed, key
from toolkit.exporters.observer import BINS, Observed, observe
from toolkit.exporters.onnx import export_onnx
from toolkit.exporters.quantize import Quantizer

FOUND = {
    "image": Observed(0.0, 1.0, 0.01, 0.99, None),
    "node/made": Observed(-1.5, 2.5, -1.0, 2.0, np.arange(BINS, dtype=np.int64), 7, 3),
}


def never() -> Mapping[str, Observed]:
    pytest.fail("it was observed again")


def same(one: Mapping[str, Observed], other: Mapping[str, Observed]) -> bool:
    def plain(found: Observed) -> tuple[Any, ...]:
        ends = (found.low, found.high, found.mean_low, found.mean_high, found.zeros, found.constant_channels)
        return (*ends, None if found.counts is None else found.counts.tolist())

    return {name: plain(found) for name, found in one.items()} == {name: plain(found) for name, found in other.items()}


def test_what_was_found_is_kept(tmp_path: Path) -> None:
    assert kept_or_observed("a", lambda: FOUND, tmp_path) is FOUND
    again = kept_or_observed("a", never, tmp_path)
    assert same(again, FOUND) and list(again) == list(FOUND)
    assert kept_or_observed("b", dict, tmp_path) == {}, "another name"


def test_a_damaged_or_forbidden_cache_is_none(tmp_path: Path) -> None:
    kept_or_observed("a", lambda: FOUND, tmp_path)
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
    assert kept_or_observed("a", lambda: FOUND, tmp_path) is FOUND
    assert same(kept_or_observed("a", never, tmp_path), FOUND), "it was mended"
    file = tmp_path / "file"
    file.touch()
    assert kept_or_observed("a", lambda: FOUND, file) is FOUND


def test_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_cache, "KEPT", 2)
    for name in "abc":
        kept_or_observed(name, lambda: FOUND, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 and (tmp_path / "c.npz").is_file()


def a_twin(folder: Path, filters: int = 4) -> OnnxModel:
    return export_onnx(wrap(tiny(filters=filters), (1, 8, 8)), folder / f"{filters}.onnx", ExportConfig())


def test_the_same_graph_on_the_same_images_is_observed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    runs = []

    def counted(*parts: Any, **more: Any) -> Mapping[str, Observed]:
        runs.append(more)
        return observe(*parts, **more)

    monkeypatch.setattr(quantize, "observe", counted)
    twin, split = a_twin(tmp_path), pictures(40, (1, 8, 8), seed=5)

    def written(model: OnnxModel, images: Split, margin: float = 0.0, **how: Any) -> bytes:
        config = QuantizeConfig.model_validate(how)
        return Quantizer(model, images, config, input_margin=margin).write(tmp_path / "q.onnx").model.path.read_bytes()

    first = written(twin, split)
    assert written(twin, split) == first and len(runs) == 1
    written(twin, split, calibrate="moving-average")
    assert len(runs) == 1, "of the same statistics"
    others: list[tuple[OnnxModel, Split, float, dict[str, Any]]] = [
        (a_twin(tmp_path, 6), split, 0.0, {}),
        (twin, pictures(40, (1, 8, 8), seed=6), 0.0, {}),
        (twin, split.first(39), 0.0, {}),
        (twin, split, 0.1, {}),
        (twin, split, 0.0, {"calibrate": "entropy"}),
        (twin, split, 0.0, {"equalize": False}),
    ]
    for number, (model, images, margin, how) in enumerate(others):
        written(model, images, margin, **how)
        assert len(runs) == number + 2, how


def test_keys_hold_the_whole_graph_and_every_fact(tmp_path: Path) -> None:
    model = onnx.load(a_twin(tmp_path).path)
    other = onnx.load(a_twin(tmp_path, 6).path)
    assert len({key(model, margin=0.0), key(model, margin=0.1), key(other, margin=0.0)}) == 3
    assert key(model, margin=0.0) == key(model, margin=0.0)
