"""Figure 2: what layers make of one class's images, clean and attacked, laid out by t-SNE.

The only module that imports scikit-learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.manifold import TSNE
from torch import Tensor, nn

from toolkit.artifacts import Split, TorchModel
from toolkit.attacks.pgd import pgd
from toolkit.attacks.surrogate import Surrogate, resolve_precision
from toolkit.errors import ToolkitError
from toolkit.evaluators.fake_quantised import LAYERS
from toolkit.progress import task
from toolkit.reproduce.recipes import plan_of
from toolkit.reproduce.steps import POINTS, Step
from toolkit.reproduce.work import Bench

SHOWN_LAYERS = (6, 7, 8)
"""Of the paper's network of eight layers; of others the last three."""
INPUT = "input"
MIN_IMAGES, MAX_IMAGES = 4, 500
"""Of the class: so many have neighbours; with so many a layout takes seconds."""


def do_embedding(step: Step, bench: Bench) -> dict[str, Any]:
    """Attack one class's images on every network, and lay out input and layers, clean and attacked images together."""
    settings = step.settings
    split = _of_class(bench, settings["class"], settings["evaluation"][0])
    layouts: dict[str, npt.NDArray[np.float32]] = {}
    accuracy: dict[str, list[int]] = {}
    names = list(settings["forms"])
    with task("t-SNE", len(names) * (1 + len(SHOWN_LAYERS))) as bar:
        for name, parent in zip(names, step.parents, strict=True):
            form, rounding = settings["forms"][name]
            model = bench.model(parent) if form == "float" else bench.simulated(parent, rounding)
            clean, attacked, correct = _attack(model, split, bench)
            accuracy[name] = [correct, len(split)]
            both = torch.cat([clean, attacked])
            for layer, values in {INPUT: both, **_activations(model, both)}.items():
                layouts[f"{name}|{layer}"] = _lay_out(values, settings["perplexity"], settings["seed"])
                bar.advance()
    # numpy's stub takes a name that may be "allow_pickle" for that argument; these are "network|layer"
    np.savez_compressed(bench.file(step, POINTS), **layouts)  # type: ignore[arg-type]
    return {"images": len(split), "robust": accuracy, "layers": sorted({name.split("|")[1] for name in layouts})}


def position_of(class_name: str, class_names: Sequence[str]) -> int | None:
    """Which of the classes is meant, however it is written; None: none of them."""
    names = [name.lower() for name in class_names]
    return names.index(class_name.lower()) if class_name.lower() in names else None


def _of_class(bench: Bench, class_name: str, images: int) -> Split:
    split = bench.splits.evaluation.first(images)
    chosen = split.indices[split.labels == position_of(class_name, bench.world.source.train.class_names)]
    if len(chosen) < MIN_IMAGES:
        raise ToolkitError(
            f"too few images of the class {class_name} to lay out",
            found=f"{len(chosen)} among {len(split)} evaluation images",
            fix=f"raise --n until {MIN_IMAGES} are among them, or leave it away",
        )
    return Split(split.images, chosen[:MAX_IMAGES])


def _attack(model: TorchModel, split: Split, bench: Bench) -> tuple[Tensor, Tensor, int]:
    """Clean and attacked images, and how many of the latter are classified rightly."""
    normalization = model.spec.normalization
    precision = resolve_precision("auto")
    surrogate = Surrogate(
        model.module,
        normalization,
        "autocast" if precision == "bfloat16" else precision,  # rounded networks keep float32 weights
        input_shape=model.spec.input_shape,
    )
    plan = plan_of("pgd-paper", bench.world.experiment)
    batch = split.take(np.arange(len(split), dtype=np.int64))
    attacked = pgd(surrogate, batch.images, batch.labels, plan).cpu()
    return batch.images, attacked, int(model.predict(attacked).argmax(dim=1).eq(batch.labels).sum())


def _activations(model: TorchModel, images: Tensor) -> dict[str, Tensor]:
    """What the shown layers give, by their number counted from 1."""
    layers = [module for module in model.network.modules() if isinstance(module, LAYERS)]
    chosen = SHOWN_LAYERS if len(layers) == max(SHOWN_LAYERS) else range(max(1, len(layers) - 2), len(layers) + 1)
    found: dict[str, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(_module: nn.Module, _given: tuple[Tensor, ...], output: Tensor) -> None:
            found[f"layer {number}"] = output.detach()

        return hook

    handles = [layers[number - 1].register_forward_hook(keep(number)) for number in chosen]
    model.predict(images)
    for handle in handles:
        handle.remove()
    return found


def _lay_out(values: Tensor, perplexity: float, seed: int) -> npt.NDArray[np.float32]:
    """Two coordinates per image, float32 [n, 2]."""
    flat = values.flatten(1).float().numpy()
    perplexity = min(perplexity, (len(flat) - 1) / 3)
    layout: npt.NDArray[np.float32] = TSNE(
        perplexity=perplexity, learning_rate="auto", init="pca", random_state=seed
    ).fit_transform(flat)
    return layout.astype(np.float32)
