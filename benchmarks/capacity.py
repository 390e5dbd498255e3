"""Whether a network is limited by what it can fit: accuracy on training images beside that on test images.

    python benchmarks/capacity.py MODEL.pt... [--threat paper] [--images 10000] [--json FILE]

Clean, and under the preset's PGD with all steps, of the float networks, on the first training images of Fashion-MNIST
and on as many test images. Some training images were held out from the training (one in twelve); they count too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolkit.artifacts import ImageSet, Proportion, Split, TorchModel
from toolkit.attacks.pgd import pgd
from toolkit.attacks.surrogate import Surrogate
from toolkit.attacks.threat import PgdPlan, resolve_plan
from toolkit.config import DataConfig, ThreatConfig
from toolkit.data.sources import load_source
from toolkit.evaluators.environment import environment_record
from toolkit.models.loading import assemble, read_model_file

BATCH = 250


def measure(model: TorchModel, images: ImageSet, count: int, plan: PgdPlan) -> dict[str, Any]:
    """Clean and attacked accuracy on the first images."""
    split = Split(images, np.arange(min(count, len(images.labels)), dtype=np.int64))
    surrogate = Surrogate(model.module, model.spec.normalization, input_shape=model.spec.input_shape)
    clean = robust = 0
    for batch in split.batches(BATCH):
        clean += int((model.predict(batch.images).argmax(1) == batch.labels).sum())
        attacked = pgd(surrogate, batch.images, batch.labels, plan)
        robust += int((model.predict(attacked).argmax(1) == batch.labels).sum())
    return {name: Proportion(right, len(split)).as_dict() for name, right in (("clean", clean), ("robust", robust))}


def main() -> None:
    """Measure every model, and write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--threat", choices=["paper", "pixel"], default="paper")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source = load_source(DataConfig(source="fashion-mnist"))
    plan = resolve_plan(ThreatConfig(preset=arguments.threat), source.threat_key)
    rows = []
    for path in arguments.models:
        model = assemble(
            read_model_file(path),
            arch=None,
            class_names=source.train.class_names,
            input_shape=source.train.shape,
            normalization=source.normalization_hint,
            dataset=source.name,
        )
        parameters = sum(value.numel() for value in model.network.parameters())
        parts = {"training": source.train, "test": source.evaluation}
        found = {name: measure(model, images, arguments.images, plan) for name, images in parts.items()}
        rows.append({"model": path.name, "parameters": parameters, "threat": plan.record(), **found})
        shown = (f"{name} {100 * found[name][kind]['value']:.2f}" for kind in ("clean", "robust") for name in parts)
        print(f"{path.name} ({parameters:,} parameters), clean and robust: {', '.join(shown)}", flush=True)
        if arguments.json is not None:
            record = {"environment": environment_record(1), "rows": rows}
            arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
