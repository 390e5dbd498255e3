"""The report of a bundle as types; its JSON Schema in docs/ is generated from them."""

from __future__ import annotations

import json
from typing import Any, Literal

from toolkit.reports.schema.graphs import (
    Assigned,
    Assignment,
    CalibrationComparison,
    CalibrationMethod,
    CalibrationSide,
    ElsewhereRow,
    EndToEnd,
    IslandRecord,
    KernelRow,
    KernelTime,
    Latency,
    LayerOverflow,
    PairedTest,
    ParityRecord,
    Portability,
    ProviderCoverage,
    Quantization,
    Sensitivity,
    SparedLayer,
    TargetFile,
)
from toolkit.reports.schema.network import Data, Epoch, Finetuning, Layer, Model, RoundingRecord, SplitRecord
from toolkit.reports.schema.parts import Change, Part, Share
from toolkit.reports.schema.robustness import (
    Accuracy,
    AlarmRecord,
    Attack,
    Baseline,
    CheckRecord,
    ColumnTest,
    CurvePoint,
    FidelityRecord,
    PassRecord,
    RobustAccuracy,
    Robustness,
    SaturationRecord,
    Threat,
    WorstCase,
)

SCHEMA_VERSION: Literal["1.1"] = "1.1"


class Gate(Part):
    """A limit that the user set, and what was measured."""

    name: str
    limit: float
    value: float
    met: bool


class AttackReport(Robustness):
    """What `toolkit attack` found."""

    target: str
    """The file's or folder's name."""
    data: str
    images: int
    threat: Threat
    steps: int
    step_size: float
    restarts: int
    random_start: bool
    seed: int
    budget: float | None
    """Seconds that were set; such a run need not be repeatable."""
    seconds: float
    accuracy: dict[str, Share]
    robust_accuracy: dict[str, Share]
    """By graph, and `deployed_from_file`: the graph that counts, reading attacked images from 8-bit PNG files."""
    clipped_share: float | None
    environment: dict[str, Any]


class Report(Robustness):
    """Everything that is claimed of a bundle."""

    schema_version: Literal["1.1"]
    toolkit_version: str
    seed: int
    model: Model
    data: Data
    threat: Threat
    finetuning: Finetuning
    baseline: Baseline
    accuracy: Accuracy
    robust_accuracy: RobustAccuracy
    parity: list[ParityRecord]
    end_to_end: EndToEnd | None
    quantization: Quantization
    targets: list[TargetFile] = []
    latency: list[Latency]
    gates: list[Gate]
    environment: dict[str, Any]
    timings: dict[str, float]
    """Seconds of every stage."""


def schema_text() -> str:
    """The JSON Schema of `Report` as it stands in docs/report.schema.json."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Report.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


__all__ = [
    "SCHEMA_VERSION",
    "Accuracy",
    "AlarmRecord",
    "Assigned",
    "Assignment",
    "Attack",
    "AttackReport",
    "Baseline",
    "CalibrationComparison",
    "CalibrationMethod",
    "CalibrationSide",
    "Change",
    "CheckRecord",
    "ColumnTest",
    "CurvePoint",
    "Data",
    "ElsewhereRow",
    "EndToEnd",
    "Epoch",
    "FidelityRecord",
    "Finetuning",
    "Gate",
    "IslandRecord",
    "KernelRow",
    "KernelTime",
    "Latency",
    "Layer",
    "LayerOverflow",
    "Model",
    "PairedTest",
    "ParityRecord",
    "Part",
    "PassRecord",
    "Portability",
    "ProviderCoverage",
    "Quantization",
    "Report",
    "RobustAccuracy",
    "Robustness",
    "RoundingRecord",
    "SaturationRecord",
    "Sensitivity",
    "Share",
    "SparedLayer",
    "SplitRecord",
    "TargetFile",
    "Threat",
    "WorstCase",
    "schema_text",
]
