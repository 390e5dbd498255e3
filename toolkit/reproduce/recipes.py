"""What is done to a network, in words of the paper, and the steps that this takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from toolkit.artifacts import Split, Splits
from toolkit.attacks.threat import PgdPlan, resolve_plan
from toolkit.bundle import sha256
from toolkit.config import ThreatConfig
from toolkit.models.loading import resolve_path
from toolkit.models.registry import code_digest
from toolkit.paths import public_name
from toolkit.reproduce.protocol import Experiment, Protocol, Stage
from toolkit.reproduce.steps import Step

Start = Literal["standard", "robust"]
Finetuning = Literal["none", "standard", "adversarial", "distill"]
Form = Literal["float", "simulated", "integer"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """One network of a table."""

    start: Start
    pruned: float = 0.0
    tuned: Finetuning = "none"
    form: Form = "float"
    """`simulated`: rounded weights and activations in floats, as in the paper; `integer`: the ONNX graph."""
    bits: int = 8
    tuned_as: Literal["after_pruning", "with_quantisation", "with_rounding"] = "after_pruning"
    """`with_rounding`: quantisation-aware training, in the place of any other; the float network is what it rounds."""

    def __str__(self) -> str:
        if self.tuned_as == "with_rounding":
            return f"QAT int{self.bits}" + (", integer graph" if self.form == "integer" else "")
        parts: list[str] = [self.start]
        if self.pruned:
            parts.append(f"pruned {self.pruned:g}")
        if self.tuned != "none":
            parts.append(f"{self.tuned} fine-tuning")
        forms = {"simulated": f"PTQ int{self.bits}", "integer": f"integer graph int{self.bits}"}
        if self.form != "float":
            parts.append(forms[self.form])
        return ", ".join(parts)

    @property
    def rounds_as_trained(self) -> bool:
        """Whether what is judged is what a quantisation-aware training computed."""
        return self.form == "simulated" and self.tuned_as == "with_rounding"


Measure = Literal["pgd-paper", "pgd-pixel", "autoattack-paper", "autoattack-pixel", "deepfool-paper", "pgd-l2"]
MEASURES: Mapping[Measure, str] = {
    "pgd-paper": "PGD-20, eps behind the normalisation, no clipping",
    "pgd-pixel": "PGD-20, the same eps in pixels, clipped",
    "autoattack-paper": "AutoAttack's composition, eps behind the normalisation, no clipping",
    "autoattack-pixel": "AutoAttack's composition, the same eps in pixels, clipped",
    "deepfool-paper": "DeepFool within the paper's ball",
    "pgd-l2": "PGD-20 in l2, in pixels, clipped",
}
WHOLE: tuple[Measure, ...] = ("pgd-paper", "pgd-pixel", "pgd-l2")
"""Measures made on all evaluation images; the dear ones take fewer."""


def plan_of(measure: Measure, experiment: Experiment) -> PgdPlan:
    """Threat model and schedule of a measure."""
    if measure == "pgd-l2":
        return resolve_plan(ThreatConfig(norm="l2", eps=experiment.l2), experiment.data)
    preset = "paper" if measure.endswith("paper") else "pixel"
    return resolve_plan(ThreatConfig.model_validate({"preset": preset}), experiment.data)


@dataclass(frozen=True)
class Planner:
    """Turns recipes for one data set, network and seed into steps."""

    experiment: Experiment
    protocol: Protocol
    network: str
    source: str
    """Where the images come from, in the user's words."""
    splits: Splits
    seed: int
    images: int
    """Evaluation images of dear measures."""
    pretrained: Path | None = None
    """Checkpoint of the standard network, which is then not trained."""

    def network_of(self, recipe: Recipe) -> Step:
        """The step whose network the recipe ends in, before it is rounded."""
        if recipe.tuned_as == "with_rounding":
            return self._qat(recipe)
        base = self._base(recipe.start)
        step = base
        if recipe.pruned:
            settings: dict[str, Any] = {"ratio": recipe.pruned, "scope": "layer", "round_to": 1}
            if self.protocol.prunes == "convolutions":
                settings["layers"] = "convolutions"
            step = Step(
                "prune", f"{self._name}: prune {recipe.pruned:g} of the {recipe.start} network", settings, (base,)
            )
        if recipe.tuned == "none":
            return step
        teacher = (self._base("robust"),) if recipe.tuned == "distill" else ()
        label = f"{self._name}: {recipe.tuned} fine-tuning of {step.label.removeprefix(self._name + ': ')}"
        return Step("train", label, self._training(recipe.tuned_as, recipe.tuned), (step, *teacher))

    def measure(self, recipe: Recipe, measure: Measure) -> Step:
        """The step that measures the recipe's network."""
        parents: tuple[Step, ...] = (self.network_of(recipe),)
        if recipe.form == "integer":
            parents = (*parents, self.integer(recipe))
        settings = self._measuring(recipe, measure)
        return Step("measure", f"{self._name}: {recipe}: {MEASURES[measure]}", settings, parents)

    def integer(self, recipe: Recipe) -> Step:
        """The step that writes the recipe's network as an integer graph."""
        per_channel = recipe.tuned_as == "with_rounding" and self.protocol.qat_per_channel
        calibration = self._named(self.splits.calibration)
        settings = {"calibration": calibration, "per_channel": per_channel, "calibrate": "minmax"}
        network = self.network_of(recipe)
        label = f"{self._name}: integer graph of {network.label.removeprefix(self._name + ': ')}"
        return Step("integer", label, settings, (network,))

    def embed(self, recipes: Mapping[str, Recipe], class_name: str) -> Step:
        """The step that lays out what layers make of one class's images, clean and attacked, in two dimensions."""
        settings = {
            "forms": {name: [recipe.form, self._rounding(recipe)] for name, recipe in recipes.items()},
            "class": class_name,
            "perplexity": 30,
            "evaluation": self._evaluated("pgd-paper"),
            "seed": self.seed,
        }
        parents = tuple(self.network_of(recipe) for recipe in recipes.values())
        return Step("embed", f"{self._name}: t-SNE of the class {class_name}", settings, parents)

    @property
    def _name(self) -> str:
        return f"{public_name(self.source)}, {public_name(self.network)}, seed {self.seed}"

    @property
    def _pretrained(self) -> bool:
        """As the paper's ResNet-18: the standard network is trained for longer, and the robust one starts from it."""
        return self.experiment.pretraining is not None and self.network == self.experiment.network

    def _base(self, start: str) -> Step:
        if start == "standard" and self._loaded is not None:
            return self._loaded
        objective = "standard" if start == "standard" else "adversarial"
        settings = self._training("base", objective)
        parents: tuple[Step, ...] = ()
        if start == "standard" and self._pretrained and self.protocol.name == "paper":
            settings = {**settings, "config": {**settings["config"], "epochs": self.experiment.pretraining}}
        if start == "robust" and self._pretrained:
            parents = (self._base("standard"),)
        origin = {} if parents else self._origin
        return Step("train", f"{self._name}: {start} network", {**settings, **origin}, parents)

    @cached_property
    def _loaded(self) -> Step | None:
        """The user's checkpoint, known by what it holds."""
        if self.pretrained is None:
            return None
        facts = {"file": sha256(resolve_path(self.pretrained)), **self._origin}
        return Step("load", f"{self._name}: standard network from {self.pretrained.name}", facts)

    @property
    def _origin(self) -> dict[str, str]:
        """What is trained: a name of ours, or the user's file as it is now."""
        code = code_digest(self.network)
        return {"network": self.network, **({"code": code} if code else {})}

    def _training(self, stage: Stage, objective: str) -> dict[str, Any]:
        # what the protocol leaves open is left out, so that new settings elsewhere make no run worthless
        config = self.protocol.training(stage, objective).model_dump(mode="json", exclude_unset=True)
        chooses = config.get("keep") == "best" and ":" in self.source
        plan = plan_of("pgd-paper", self.experiment) if objective != "standard" else None
        return {
            "config": config,
            "plan": plan and [plan.record(), plan.steps, plan.step_size, plan.random_start],
            "seed": self.seed,
            "train": self._named(self.splits.train),
            **({"validation": self._named(self.splits.validation)} if chooses else {}),
        }

    def _measuring(self, recipe: Recipe, measure: Measure) -> dict[str, Any]:
        plan = plan_of(measure, self.experiment)
        facts = {
            "measure": measure,
            "form": "qat" if recipe.rounds_as_trained else recipe.form,
            "plan": [plan.record(), plan.steps, plan.step_size, plan.random_start],
            "evaluation": self._evaluated(measure),
            "seed": self.seed,
        }
        if recipe.form != "float":
            facts |= self._rounding(recipe)
        return facts

    def _rounding(self, recipe: Recipe) -> dict[str, Any]:
        """How the simulated form is made: fine-tuning has recorded the ranges, else calibration images tell them."""
        recorded = recipe.tuned != "none"
        # QAT's own rounding reads no images either, but steps that were made of it are known by them
        needless = recorded and recipe.form == "simulated" and not recipe.rounds_as_trained
        calibration = None if needless else self._named(self.splits.calibration)
        return {"bits": recipe.bits, "recorded": recorded, "calibration": calibration}

    def _evaluated(self, measure: Measure) -> list[Any]:
        split = self.splits.evaluation if measure in WHOLE else self.splits.evaluation.first(self.images)
        return [len(split), self._named(split)]

    def _named(self, split: Split) -> str:
        """What names the images, and their labels where the user may change those: a data set's own stand fast."""
        return split.labelled_digest if ":" in self.source else split.digest

    def _qat(self, recipe: Recipe) -> Step:
        settings = self._training("with_rounding", "adversarial")
        parents = (self._base("standard"),) if self._pretrained else ()
        origin = {} if parents else self._origin
        label = f"{self._name}: quantisation-aware training, int{recipe.bits}"
        grid: dict[str, Any] = {"bits": recipe.bits, "per_channel": self.protocol.qat_per_channel}
        if self.protocol.qat_extremes:
            grid["extremes"] = True
        return Step("qat", label, {**settings, **origin, **grid}, parents)
