"""The threat model that an ONNX file was hardened against, and the attack that the file alone allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from toolkit.artifacts import Normalization, TorchModel
from toolkit.attacks.planned import PlannedAttack
from toolkit.attacks.threat import PgdPlan, resolve_plan
from toolkit.config import ThreatConfig, override_threat
from toolkit.data.pixels import normalization_of
from toolkit.data.sources import DataSource
from toolkit.errors import ToolkitError
from toolkit.evaluators.surrogate import build_twin, twin_model
from toolkit.metadata import metadata_value
from toolkit.progress import notice


def threat_of_file(given: ThreatConfig, metadata: Mapping[str, str]) -> ThreatConfig:
    """The threat model that the file was hardened against, with what the user set in its place."""
    if "threat_model" not in metadata:
        return given
    base = metadata_value(metadata, "threat_model", _threat)
    return ThreatConfig(**override_threat(base, {name: getattr(given, name) for name in given.model_fields_set}))


def _threat(own: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: own[name] for name in ("preset", "norm", "eps")}
    ThreatConfig(**found)
    return found


def normalization_inside(metadata: Mapping[str, str]) -> Normalization | None:
    """What the file does to pixels first; None: it does not say."""
    if "normalization" not in metadata:
        return None
    return metadata_value(metadata, "normalization", normalization_of)


def plan_of_file(given: ThreatConfig, metadata: Mapping[str, str], source: DataSource) -> PgdPlan | None:
    """PGD under the threat model that the user, the file's metadata or the data set's preset names, in this order.

    Returns:
        None: none of them names a radius, and the user asked for nothing.
    """
    threat = threat_of_file(given, metadata)
    try:
        return resolve_plan(threat, source.threat_key)
    except ToolkitError:
        if given.model_fields_set:
            raise
        return None


def attack_on_float(
    path: Path,
    network: TorchModel | None,
    source: DataSource,
    plan: PgdPlan | None,
    normalization: Normalization,
    *,
    seed: int,
) -> PlannedAttack | None:
    """PGD on a float graph, or on the network that it was exported from.

    Args:
        path: a float ONNX file that takes pixels in [0, 1].
        network: that it was exported from; None: the graph is made differentiable itself.
        source: of its images.
        plan: `plan_of_file`.
        normalization: what the file does to pixels first, or about.
        seed: of random starts.

    Returns:
        None, with a notice why: no radius is known, the data have classes that the file has not, or there is no way to
        make it differentiable.
    """
    if plan is None:
        notice(
            "clean accuracy alone is looked at, for neither file nor data set names a threat model; for robust "
            "accuracy state one, e.g. --eps 8/255"
        )
        return None
    wanted = len(source.train.class_names)
    try:
        if network is None:
            twin = build_twin(path, input_shape=source.train.shape)
            if twin.classes < wanted:
                notice(f"clean accuracy alone is looked at: {path} knows {twin.classes} classes, the data {wanted}")
                return None
            model = twin_model(twin)
            network = replace(model, spec=replace(model.spec, normalization=normalization))
        return PlannedAttack(network, plan, seed=seed, precision="float32")
    except ToolkitError as error:
        notice(f"clean accuracy alone is looked at: {error.problem} ({error.found})")
        return None
