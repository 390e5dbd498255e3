"""One configuration per command, made of those of the stages that it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from toolkit.config.base import StageConfig
from toolkit.config.space import SearchConfig
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


class MachineConfig(StageConfig):
    """What makes a run repeatable."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of torch and ONNX Runtime; None: all that this process may use."""


class ModelRunConfig(MachineConfig):
    """A run on one network and one data set; every command that measures or changes a network has one."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    threat: ThreatConfig = ThreatConfig()


class HardenConfig(ModelRunConfig):
    """Everything `toolkit harden` needs; written resolved into the bundle as config.yaml."""

    prune: PruneConfig = PruneConfig()
    finetune: TrainConfig = TrainConfig()
    export: ExportConfig = ExportConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    attack: AttackConfig = AttackConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()
    gates: GateConfig = GateConfig()
    allow_float: bool = False
    """Ship a float model.onnx where `--int8` is not given, or where `--precision auto` finds that integers do not pay,
    or lose more than `max_drop` with a single layer; with `--precision int8`, as a bundle's config.yaml has it, nothing
    is timed to decide that."""


class AttackRunConfig(ModelRunConfig):
    """Everything `toolkit attack` needs."""

    attack: AttackConfig = AttackConfig()
    budget: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Seconds that the attacks may take; None: as long as they need."""


class SearchRunConfig(HardenConfig):
    """Everything `toolkit search` needs: what `harden` does where nothing is varied, and the search itself."""

    search: SearchConfig = SearchConfig()

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.search.seeds or (self.seed,)


class SimulateRunConfig(ModelRunConfig):
    """Everything `toolkit simulate` needs."""

    bits: tuple[str, ...] = ("16", "8", "4", "2", "1")
    """`8`: weights and activations of 8 bits; `4/8`: weights of 4; 32 stays float."""
    per_channel: bool = True


class TrainRunConfig(MachineConfig):
    """Everything `toolkit train` needs."""

    arch: str
    data: DataConfig = DataConfig(source="fashion-mnist")
    threat: ThreatConfig = ThreatConfig()
    training: TrainConfig = TrainConfig(objective="standard", epochs=8, ema=0.0)


class ReproduceConfig(StageConfig):
    """Everything `toolkit reproduce` needs."""

    target: str
    """A table, a figure, or `all`."""
    data: DataConfig = DataConfig()
    """Without a source: the paper's data sets, those of them that are there."""
    network: str | None = None
    """None: the paper's for the data set."""
    pretrained: Path | None = None
    """Checkpoint of a standard network, in place of training one; every seed starts from it."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], Field(min_length=1)] = (0, 1, 2)
    protocol: Literal["paper", "fast"] = "paper"
    work: Path | None = None
    budget: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Minutes after which this sitting stops; what is under way is kept and continued."""
    max_runs: Annotated[int, Field(ge=0)] | None = None
    """Steps of this sitting at most."""
    only: Annotated[str, Field(min_length=1)] | None = None
    """Part of `ROW; COLUMN` of the cells that this sitting fills, in any case of letters; None: all."""
    attack_images: Annotated[int, Field(ge=1)] = 1000
    """Evaluation images of AutoAttack and DeepFool; PGD takes all."""
    threads: Annotated[int, Field(ge=1)] | None = None
