"""How much of a classifier's margin the rounding of an integer graph moves, with channels equalised and without.

    python benchmarks/rounding_noise.py CHECKPOINT... --data SOURCE [--eps EPS] [--keep-float LAYER,...] [--json FILE]

Around every attacked image (PGD of the preset `paper` on the float network) some points are drawn, within a tenth of
the radius. By how much the margin (logit of the true class over the best other one) of the integer graph differs from
the float graph's varies over these points: that part an attacker can choose, by trying. The mean over them he cannot:
it is what rounded weights, and ranges, change for good. Images whose float margin is within 2 of the boundary count.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.artifacts import OnnxModel
from toolkit.attacks.planned import PlannedAttack
from toolkit.config import (
    CalibrationName,
    DataConfig,
    ExportConfig,
    ModelConfig,
    ModelRunConfig,
    QuantizeConfig,
    ThreatConfig,
)
from toolkit.evaluators.environment import environment_record
from toolkit.exporters.onnx import export_onnx
from toolkit.exporters.quantize import Quantizer
from toolkit.exporters.session import OnnxPredictor
from toolkit.paths import public_name
from toolkit.prepare import PreparedAttack, prepare_attack

POINTS, SHARE, NEAR, DEVIATIONS = 8, 0.1, 2.0, 3.0
METHODS: tuple[CalibrationName, ...] = ("minmax", "moving-average", "entropy", "mse")


class Neighbourhoods:
    """Points around attacked images, and the margins of the float graph there."""

    def __init__(self, prepared: PreparedAttack, fp32: Path) -> None:
        attack = PlannedAttack(prepared.model, prepared.plan, seed=0, precision="float32")
        batches = list(prepared.splits.evaluation.batches())
        self._labels = torch.cat([batch.labels for batch in batches])
        self._clean = torch.cat([batch.images for batch in batches])
        attacked = torch.cat([attack.attack(batch, number) for number, batch in enumerate(batches)])
        threat, generator = prepared.plan.threat, torch.Generator().manual_seed(1)
        radius = SHARE * threat.eps * threat.pixel_scale(prepared.model.spec.normalization).cpu()
        low, high = (0.0, 1.0) if threat.clip else (-torch.inf, torch.inf)
        self._points = [
            (attacked + radius * (2 * torch.rand(attacked.shape, generator=generator) - 1)).clamp(low, high)
            for _ in range(POINTS)
        ]
        self._float = self._margins(fp32)
        self._near = self._float.mean(0).abs() < NEAR

    def measure(self, path: Path) -> dict[str, float]:
        """What the graph in a file does here."""
        moved = self._margins(path) - self._float
        varies = moved.std(0)
        standing = self._float.mean(0)
        clean = OnnxPredictor(path).predict(self._clean).argmax(1) == self._labels
        return {
            "accuracy": float(clean.float().mean()),
            "varying": float(moved.var(0)[self._near].mean().sqrt()),
            "fixed": float(moved.mean(0)[self._near].std()),
            "within_three_deviations": float(((standing > 0) & (standing < DEVIATIONS * varies)).float().mean()),
        }

    def _margins(self, path: Path) -> Tensor:
        """Float32 [`POINTS`, n]."""
        predictor = OnnxPredictor(path)
        found = []
        for points in self._points:
            logits = torch.cat([predictor.predict(part) for part in torch.split(points, 500)])
            true = logits.gather(1, self._labels[:, None])
            found.append((true - logits.scatter(1, self._labels[:, None], -torch.inf).amax(1, keepdim=True)).squeeze(1))
        return torch.stack(found)


def graphs(
    prepared: PreparedAttack, fp32: OnnxModel, keep: tuple[str, ...], folder: Path
) -> Iterator[tuple[str, Path]]:
    """Integer graphs by name, of all that is compared."""
    margin = prepared.plan.threat.margin(prepared.model.spec.normalization)
    settings: list[tuple[str, dict[str, Any]]] = [
        (f"{method}{', equalised' if equalize else ''}", {"calibrate": method, "equalize": equalize})
        for equalize in (False, True)
        for method in METHODS
    ]
    for name, how in [*settings, ("16-bit activations", {"activation_bits": 16, "equalize": False})]:
        config = QuantizeConfig.model_validate({**how, "int8": True, "keep_float": keep})
        path = folder / f"{name}.onnx"
        Quantizer(fp32, prepared.splits.calibration, config, input_margin=margin).write(path)
        yield name, path


def main() -> None:
    """Run all, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--eps", type=float)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--keep-float", default="")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    keep = tuple(filter(None, arguments.keep_float.split(",")))
    print("| network | graph | accuracy | margin varies by | fixed | standing images within 3 deviations |")
    print("| --- | --- | --- | --- | --- | --- |")
    for checkpoint in arguments.checkpoints:
        config = ModelRunConfig(
            model=ModelConfig(path=checkpoint),
            data=DataConfig(source=arguments.data, evaluation=arguments.n),
            threat=ThreatConfig(preset="paper", eps=arguments.eps),
            threads=1,
        )
        prepared = prepare_attack(config)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            fp32 = export_onnx(prepared.model, folder / "fp32.onnx", ExportConfig())
            around = Neighbourhoods(prepared, fp32.path)
            for graph, path in graphs(prepared, fp32, keep, folder):
                found = around.measure(path)
                rows.append({"network": public_name(str(checkpoint)), "graph": graph, "n": arguments.n, **found})
                print(
                    f"| {rows[-1]['network']} | {graph} | {found['accuracy']:.2%} | {found['varying']:.4f} | "
                    f"{found['fixed']:.4f} | {found['within_three_deviations']:.2%} |",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, "environment": environment_record(1)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
