"""Frozen configurations, one per stage and one per command. Every default stands here, and only here."""

from __future__ import annotations

from toolkit.config.base import CalibrationName, PrecisionChoice, StageConfig, parse_fraction, parse_multiple
from toolkit.config.files import build, merge, override_threat, read_settings, write_settings
from toolkit.config.runs import (
    AttackRunConfig,
    HardenConfig,
    MachineConfig,
    ModelRunConfig,
    ReproduceConfig,
    SearchRunConfig,
    SimulateRunConfig,
    TrainRunConfig,
)
from toolkit.config.space import Options, RangeConfig, SearchConfig
from toolkit.config.stages import (
    AttackConfig,
    BenchmarkConfig,
    DataConfig,
    ExportConfig,
    GateConfig,
    ModelConfig,
    PruneConfig,
    QuantizeConfig,
    ThreatConfig,
    TrainConfig,
)

__all__ = [
    "AttackConfig",
    "AttackRunConfig",
    "BenchmarkConfig",
    "CalibrationName",
    "DataConfig",
    "ExportConfig",
    "GateConfig",
    "HardenConfig",
    "MachineConfig",
    "ModelConfig",
    "ModelRunConfig",
    "Options",
    "PrecisionChoice",
    "PruneConfig",
    "QuantizeConfig",
    "RangeConfig",
    "ReproduceConfig",
    "SearchConfig",
    "SearchRunConfig",
    "SimulateRunConfig",
    "StageConfig",
    "ThreatConfig",
    "TrainConfig",
    "TrainRunConfig",
    "build",
    "merge",
    "override_threat",
    "parse_fraction",
    "parse_multiple",
    "read_settings",
    "write_settings",
]
