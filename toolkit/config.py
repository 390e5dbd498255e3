"""One frozen configuration per stage. Every default stands here, and only here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from toolkit import paths
from toolkit.errors import ToolkitError


class StageConfig(BaseModel):
    """Base of all stage configurations: immutable, and unknown keys are errors.

    A part that is given in part keeps the rest of what this configuration sets for it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _keep_defaults_of_parts(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        completed = dict(values)
        for name, field in cls.model_fields.items():
            if isinstance(field.default, StageConfig) and isinstance(values.get(name), dict):
                completed[name] = {**field.default.model_dump(exclude_unset=True), **values[name]}
        return completed


def parse_fraction(value: object) -> object:
    """Turn `8/255` into a float; anything that is no such text is returned for pydantic to judge."""
    if isinstance(value, str) and value.count("/") == 1:
        top, bottom = value.split("/")
        try:
            return float(top) / float(bottom)
        except (ValueError, ZeroDivisionError):
            return value
    return value


def parse_multiple(value: object) -> int | Literal["auto"]:
    """Turn text or a number into a multiple of at least 1, or `auto`."""
    if value == "auto":
        return "auto"
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            if int(value) >= 1:
                return int(value)
    raise PydanticCustomError("multiple", "a whole number of at least 1, or auto, is wanted")


Fraction = Annotated[float, BeforeValidator(parse_fraction)]
Multiple = Annotated[int | Literal["auto"], PlainValidator(parse_multiple)]
PrecisionChoice = Literal["auto", "float32", "bfloat16"]
CalibrationName = Literal["minmax", "moving-average", "percentile", "entropy", "mse"]
CalibrationSetting = Literal["minmax", "moving-average", "percentile", "entropy", "mse", "auto"]
Epsilon = Annotated[Fraction, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class DataConfig(StageConfig):
    """Where images come from and how many serve which purpose."""

    source: str | None = None
    """`sample`, `fashion-mnist`, `cifar10`, `folder:DIR`, `npz:FILE`; None: the checkpoint's own data set."""
    data_dir: Path | None = None
    download: bool = False
    size: Annotated[int, Field(ge=4)] | None = None
    calibration: Annotated[int, Field(ge=1)] = 500
    evaluation: Annotated[int, Field(ge=1)] | None = None
    """Number of evaluation images; None: all."""


class ThreatConfig(StageConfig):
    """Threat model and PGD schedule; what is None is filled in from the preset of the data set."""

    preset: Literal["pixel", "paper"] = "pixel"
    norm: Literal["linf", "l2", "l1"] = "linf"
    eps: Epsilon | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    step_size: Epsilon | None = None
    random_start: bool | None = None
    restarts: Annotated[int, Field(ge=1)] = 1


class PruneConfig(StageConfig):
    """Structured filter pruning."""

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.5
    scope: Literal["layer", "global"] = "layer"
    round_to: Multiple = 8
    """Widths are rounded to the nearest multiple of this; 8 keeps the integer kernels' columns full. 1: no rounding.
    `auto`: the multiple with which this machine takes least time per multiply-accumulate, found by measuring."""
    importance: Literal["l1", "l2", "geometric-median"] = "l1"
    """Which filters go: those of least norm, or those that the others of their layer can best stand in for."""
    ratios: Mapping[str, Annotated[float, Field(ge=0, lt=1)]] = {}
    """Shares of single layers, by module name; layers that can only be pruned together follow the one named."""

    @property
    def prunes(self) -> bool:
        """Whether any filter is to go."""
        return self.ratio > 0 or any(share > 0 for share in self.ratios.values())

    @property
    def multiple(self) -> int:
        """The multiple, once it is known.

        Raises:
            ValueError: it is still `auto`.
        """
        if self.round_to == "auto":
            raise ValueError("no multiple is chosen")
        return self.round_to


class TrainConfig(StageConfig):
    """Training from scratch and fine-tuning."""

    objective: Literal["adversarial", "fgsm", "trades", "distill", "standard", "none"] = "adversarial"
    epochs: Annotated[int, Field(ge=0)] = 24
    batch_size: Annotated[int, Field(ge=1)] = 128
    """Images of an optimiser step, over all processes."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Parts in which a step's images (of this process) go through the network, to save memory; gradients are summed."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5e-4
    schedule: Literal["one-cycle", "stepped", "constant"] = "one-cycle"
    """`one-cycle`: linear warm-up to the rate, then linear to 0. `stepped`: the paper's, a tenth after epoch 4."""
    attack_steps: Annotated[int, Field(ge=1)] | None = None
    """PGD steps, of `fgsm` those after a collapse. None: 2 of `adversarial` and `distill`, 7 of `fgsm` and `trades`."""
    attack_schedule: Literal["crossing", "threat"] = "crossing"
    """`crossing`: steps that together cross the ball 2.5 times, from a random start. `threat`: as the threat model's
    preset measures, with its step size, start and, unless `attack_steps` is set, steps."""
    radius: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Of the attack in training, in units of the threat model's radius; above 1 trades clean for robust accuracy."""
    clean_share: Share | None = None
    """Share of the loss on clean images, of `adversarial`, `fgsm` and `distill`; None: 1/6 of `distill`, else 0."""
    beta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 6.0
    """Weight of the divergence of `trades`."""
    teacher: Path | None = None
    """Checkpoint whose soft labels `distill` learns."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """By which `distill` divides logits."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the exponential moving average of the weights, which is shipped in their place; 0: none."""
    keep: Literal["best", "last"] = "best"
    """`best`: the last epoch that validation cannot tell from the best; `last`: the last."""
    precision: PrecisionChoice = "auto"
    qat: bool = False
    """Whether, in `harden`, the last part of the training computes on rounded weights and activations."""
    augment: bool = False
    """Random horizontal flips and shifts of up to an eighth of the side."""


class ExportConfig(StageConfig):
    """ONNX export."""

    opset: Annotated[int, Field(ge=18, le=23)] = 20
    end_to_end: bool = True


class QuantizeConfig(StageConfig):
    """Static integer quantisation: int8 symmetric weights, uint8 asymmetric activations."""

    int8: bool = False
    engine: Literal["ort", "inc"] = "ort"
    """What calibrates and rounds: ONNX Runtime's tools on the float twin, Intel Neural Compressor on the network."""
    precision: Literal["int8", "auto"] = "auto"
    """`int8`: every layer but `keep_float`; `auto`, in `harden`: the fastest assignment within `max_drop`, found by
    measuring."""
    max_drop: Share = 0.005
    """What `auto` may lose in clean and in robust accuracy against the float twin, on validation images."""
    calibrate: CalibrationSetting = "minmax"
    """`auto`: the method that loses least on validation images."""
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    per_channel: bool = True
    equalize: bool = True
    """Channels between two layers are scaled so that one step suits them all; the engine ort with `per_channel`,
    and not with learnt ranges."""
    reduce_range: bool | None = None
    """Weights of seven bits, which no pair of products overflows 16 bits with: for x86 without VNNI. None: if this
    machine is one."""
    keep_float: tuple[str, ...] = ()
    """Layers that are not quantised, by their nodes' names in the float twin; `*` stands for anything."""
    keep_float_here: tuple[str, ...] = ()
    """More of them, which are float for speed alone, as `auto` found on the machine where it measured: model.onnx has
    them in float, files for other runtimes have not. No flag sets it, and `auto` begins without."""
    activation_bits: int = 8
    """8, or 16, which ONNX Runtime stores and then computes in float."""
    weight_bits: int = 8
    """8, or 4: of the linear layers; ONNX Runtime has no convolution that multiplies int4."""
    targets: tuple[str, ...] = ()
    """Other runtimes for which a file of its own is written beside model.onnx: `tensorrt`, `cuda`."""
    calibrate_adversarial: Share = 0.0
    """Share of the calibration images that is attacked first, by the run's PGD on the float network."""

    @property
    def int8_bits(self) -> int:
        """Bits that int8 weights use of their eight."""
        return 7 if self.reduce_range else 8

    @property
    def searches(self) -> bool:
        """Whether `harden` looks for the fastest layers; no choice of them makes 16-bit activations run in integers."""
        return self.precision == "auto" and self.activation_bits == 8


class BenchmarkConfig(StageConfig):
    """Latency measurement with ONNX Runtime."""

    provider: Literal["cpu", "cuda"] = "cpu"
    batches: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 64)
    threads: Annotated[int, Field(ge=1)] | None = None
    rounds: Annotated[int, Field(ge=3)] = 30
    """Number of interleaved rounds; each gives one sample per file."""


class AttackConfig(StageConfig):
    """Which attacks make up the worst case."""

    attacks: str = "fast"
    """`fast`, `ensemble`, `pgd` (the transfer matrix alone), or attacks by name with commas between."""


class GateConfig(StageConfig):
    """Lower limits that a user sets on the deployed graph; unmet ones end `harden` with exit code 3."""

    min_accuracy: Share | None = None
    min_robust: Share | None = None
    min_integer_coverage: Share | None = None


class ModelConfig(StageConfig):
    """Which network, and how to read its file."""

    path: Path
    """A checkpoint, state dict or pickled module; `shipped:NAME` is one that comes with the package."""
    arch: str | None = None
    trust_pickle: bool = False
    mean: tuple[Annotated[Fraction, Field(allow_inf_nan=False)], ...] | None = None
    """Per-channel mean of the input that a bare state dict was trained on, in pixels [0, 1]; None: the data set's.
    Of an ONNX file to be attacked: what is done to the pixels before it gets them; None: nothing."""
    std: tuple[Epsilon, ...] | None = None


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


MOST_VALUES = 1000
"""Of one range: each is checked before a search begins."""


class RangeConfig(StageConfig):
    """Numbers that a search may try: from `low` to `high`, both included, `step` apart."""

    low: Annotated[float, Field(allow_inf_nan=False)]
    high: Annotated[float, Field(allow_inf_nan=False)]
    step: Annotated[float, Field(gt=0, allow_inf_nan=False)]

    @model_validator(mode="after")
    def _check_order(self) -> RangeConfig:
        if not self.low < self.high:
            raise ValueError(f"{self.low:g} is not below {self.high:g}")
        count = (self.high - self.low) / self.step + 1
        if count > MOST_VALUES:
            raise ValueError(f"that is {count:.3g} values, and at most {MOST_VALUES:,} are tried; take a larger step")
        return self

    @property
    def values(self) -> tuple[float, ...]:
        """Every number, free of the rounding that repeated addition brings."""
        count = int((self.high - self.low) / self.step + 1e-9) + 1
        return tuple(round(self.low + index * self.step, 10) for index in range(count))


Options = RangeConfig | Annotated[tuple[Any, ...], Field(min_length=1)]


def parse_space(value: object) -> object:
    """Turn `prune.ratio=0.2:0.8:0.1; quantize.calibrate=minmax,mse` into a mapping; leave what is no text."""
    if not isinstance(value, str):
        return value
    found: dict[str, Any] = {}
    for part in filter(None, map(str.strip, value.split(";"))):
        name, sign, options = map(str.strip, part.partition("="))
        numbers = options.split(":")
        if not (name and sign and options) or name in found or len(numbers) not in (1, 3):  # YAML reads 1:7 as 67
            raise ValueError(f"'{part}' is no NAME=LOW:HIGH:STEP or NAME=ONE,OTHER,... (each name once)")
        if len(numbers) == 3:
            found[name] = dict(zip(("low", "high", "step"), numbers, strict=True))
        else:
            found[name] = [_option(option) for option in options.split(",")]
    return found


def _option(text: str) -> Any:
    """What YAML takes an option for."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"'{text}' is neither a number nor a name") from error


def parse_bytes(value: object) -> object:
    """Turn `500k` or `2M` into a number of bytes; leave what is no such text."""
    units = {"k": 1_000, "m": 1_000_000, "g": 1_000_000_000}
    if isinstance(value, str) and value[-1:].lower() in units:
        with contextlib.suppress(ValueError):
            return round(float(value[:-1]) * units[value[-1].lower()])
    return value


class SearchConfig(StageConfig):
    """What `toolkit search` varies, how far it looks, and what limits hold beside those of `gates`."""

    space: Annotated[Mapping[str, Options], BeforeValidator(parse_space), Field(min_length=1)] = {
        "prune.ratio": RangeConfig(low=0.2, high=0.9, step=0.1),
        "prune.importance": ("l1", "l2", "geometric-median"),
        "precision": ("int8", "first-float", "ends-float", "float"),
        "quantize.calibrate": ("minmax", "percentile", "mse"),
        "finetune.radius": (1.0, 1.25, 1.5),
    }
    """Settings of `harden` by dotted name, with what each may be; `precision` is which layers stay float."""
    per_group: bool = False
    """Whether every group of layers that are pruned together has a ratio of its own, from those of `prune.ratio`."""
    trials: Annotated[int, Field(ge=1)] = 24
    budget: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Seconds after which no trial begins; None: all `trials` are made."""
    images: Annotated[int, Field(ge=1)] = 512
    """Validation images of the cheap evidence."""
    attacks: str = "fast"
    """Of the cheap evidence; the front gets those of `attack.attacks`."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] | None = None
    """Every trial is trained with each of them, and their mean counts; None: the run's own seed."""
    bundles: Annotated[int, Field(ge=1)] = 4
    """So many points of the front get full evidence, up to twice as many where none keeps the limits."""
    storage: str | None = None
    """URL of the data base that keeps the trials; None: an SQLite file in the output's folder."""
    study: str = "search"
    """Name of the search in its storage."""
    address: str | None = None
    """Ray cluster that runs the trials: `auto`, `local` or HOST:PORT; None: this process runs them."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Trainings at a time, on Ray; None: as many as the cluster's CPUs and GPUs allow."""
    gpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """GPUs that each of them needs, on Ray."""
    max_latency: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Most milliseconds per call of model.onnx, at the first of the benchmark's batch sizes."""
    max_size: Annotated[int, Field(gt=0), BeforeValidator(parse_bytes)] | None = None
    """Most bytes of model.onnx."""

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: tuple[int, ...] | None) -> tuple[int, ...] | None:
        twice = sorted({seed for seed in seeds or () if (seeds or ()).count(seed) > 1})
        if twice:
            raise ValueError(f"seed {twice[0]} stands there more than once; each may count once")
        if seeds == ():
            raise ValueError("there is no seed")
        return seeds


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
    attack_images: Annotated[int, Field(ge=1)] = 1000
    """Evaluation images of AutoAttack and DeepFool; PGD takes all."""
    threads: Annotated[int, Field(ge=1)] | None = None


Config = TypeVar("Config", bound=StageConfig)


def build(kind: type[Config], values: dict[str, Any], flags: Mapping[str, str] = MappingProxyType({})) -> Config:
    """Validate `values` as a `kind`; what pydantic refuses becomes a `ToolkitError` that quotes the flag.

    Args:
        kind: the configuration's class.
        values: nested settings.
        flags: command-line flag by dotted path of the setting, e.g. `{"prune.ratio": "--prune"}`.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
        name = flags.get(path, f"the setting '{path}'")
        problem = f"{name} is missing" if first["type"] == "missing" else f"{name} has no usable value"
        raise ToolkitError(
            problem,
            found=f"{path} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}",
            fix=f"correct {name}; `--help` shows what it takes",
        ) from error


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Deep merge of two nested mappings; `over` wins."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def override_threat(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Resolved threat settings with a user's own in their place.

    Another preset or norm takes nothing over from `base`; another radius or number of steps gets its own step size,
    and restarts start at random.
    """
    if any(over.get(name, base.get(name)) != base.get(name) for name in ("preset", "norm")):
        return dict(over)
    changed = any(over.get(name, base.get(name)) != base.get(name) for name in ("eps", "steps"))
    follows: dict[str, Any] = {"step_size": None} if changed else {}
    if (over.get("restarts") or 1) > 1:
        follows["random_start"] = None  # restarts from one point would all be the same
    return {**base, **follows, **over}


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a config file; relative paths in it start at its own folder, as `write_settings` writes them.

    Raises:
        ToolkitError: the file is missing, is not YAML, or holds no mapping.
    """
    return _map_paths(_read_yaml(path), lambda setting: paths.resolved(setting, path.absolute().parent))


def write_settings(config: StageConfig, path: Path, home: Path, title: str | None = None) -> None:
    """Write the resolved configuration to `path`, which will stand in the folder `home`, under a comment if given."""
    values = _map_paths(config.model_dump(mode="json"), lambda setting: paths.relative(setting, home.absolute()))
    comment = f"# {title}\n" if title else ""
    path.write_text(comment + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _map_paths(values: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """`values` with `change` applied to every setting that may hold a path."""

    def plain(path: str) -> str:
        return path if path.startswith("shipped:") else change(f"folder:{path}").removeprefix("folder:")

    places = {
        ("model", "path"): plain,
        ("model", "arch"): change,
        ("data", "source"): change,
        ("data", "data_dir"): plain,
        ("finetune", "teacher"): plain,
    }
    mapped = {part: dict(inner) if isinstance(inner, dict) else inner for part, inner in values.items()}
    for (part, name), how in places.items():
        inner = mapped.get(part)
        if isinstance(inner, dict) and isinstance(inner.get(name), str):
            inner[name] = how(inner[name])
    return mapped


def _read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ToolkitError: the file is missing, is not YAML, or holds no mapping.
    """
    fix = "name a config.yaml as `toolkit harden` writes it into a bundle"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ToolkitError(
            "the config file cannot be read", found=f"{path}: {type(error).__name__}", fix=fix
        ) from error
    if not isinstance(values, dict):
        raise ToolkitError("the config file holds no settings", found=f"{path}: {type(values).__name__}", fix=fix)
    return values
