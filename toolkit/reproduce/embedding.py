"""Figure 2: what layers make of one class's images, clean and attacked, laid out by t-SNE.

The only module that imports scikit-learn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.manifold import TSNE
from torch import Tensor, nn

from toolkit.artifacts import Split, TorchModel
from toolkit.attacks.pgd import pgd
from toolkit.attacks.surrogate import Surrogate, resolve_precision
from toolkit.evaluators.fake_quantised import LAYERS
from toolkit.progress import task
from toolkit.reproduce.recipes import plan_of
from toolkit.reproduce.steps import POINTS, Step
from toolkit.reproduce.work import Bench

SHOWN_LAYERS = (6, 7, 8)
"""Of the paper's network of eight layers; of others the last three."""
INPUT = "input"
SAME = 1e-6
"""Of its largest value: so little may a layer vary, by rounding, that gives the same for every image."""
MIN_IMAGES, MAX_IMAGES = 4, 500
"""Of the class: so many have neighbours; with so many a layout takes seconds."""


def do_embedding(step: Step, bench: Bench) -> dict[str, Any]:
    """Attack one class's images on every network, and lay out input and layers, clean and attacked images together."""
    settings = step.settings
    split = _of_class(step, bench.splits.evaluation)
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
    np.savez_compressed(bench.store.unfinished(step, POINTS), **layouts)  # type: ignore[arg-type]
    return {"images": len(split), "robust": accuracy, "layers": sorted({name.split("|")[1] for name in layouts})}


def lacking_class(step: Step, evaluation: Split) -> str | None:
    """Why a step cannot lay out its class's images; None if it can."""
    name = step.settings["class"]
    if name.lower() not in map(str.lower, evaluation.images.class_names):
        return f"the data set has no class {name}"
    count = len(_of_class(step, evaluation))
    if count < MIN_IMAGES:
        found = f"{count} evaluation images of the class {name}"
        return f"{found}, and a layout wants {MIN_IMAGES}: raise --n or leave it away"
    return None


def _of_class(step: Step, evaluation: Split) -> Split:
    """The images of the step's class, however that is written."""
    split = evaluation.first(step.settings["evaluation"][0])
    position = [name.lower() for name in split.images.class_names].index(step.settings["class"].lower())
    return Split(split.images, split.indices[split.labels == position][:MAX_IMAGES])


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
    if np.ptp(flat, axis=0).max() <= SAME * max(1.0, float(np.abs(flat).max())):  # scikit-learn's t-SNE dies of it
        return np.zeros((len(flat), 2), dtype=np.float32)
    perplexity = min(perplexity, (len(flat) - 1) / 3)
    layout: npt.NDArray[np.float32] = TSNE(
        perplexity=perplexity, learning_rate="auto", init="pca", random_state=seed
    ).fit_transform(flat)
    return layout.astype(np.float32)
