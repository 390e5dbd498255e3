"""The command line's flags: each sets one field of a configuration, and takes its default from there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag: the field that it sets (dotted path), its help, and its type on the command line."""

    name: str
    path: str
    help: str
    type: type = str
    short: str | None = None


MODEL = (
    Flag("--arch", "model.arch", "Network of a bare state dict: cnn8, resnet18, torchvision:NAME, file.py:callable."),
    Flag("--trust-pickle", "model.trust_pickle", "Unpickle a whole module; this runs code from the file.", bool),
    Flag(
        "--mean",
        "model.mean",
        "Mean per channel, e.g. 0.5 or 0.49,0.48,0.45, where the file does not say it: a bare state dict, or an ONNX "
        "file that wants normalised pixels.",
    ),
    Flag("--std", "model.std", "Standard deviation per channel, where the file does not say it; fractions are fine."),
)
DATA = (
    Flag("--data", "data.source", "sample, fashion-mnist, cifar10, folder:DIR or npz:FILE.", short="-d"),
    Flag("--data-dir", "data.data_dir", "Folder that holds the data set's files.", Path),
    Flag("--download", "data.download", "Let torchvision download a data set that is not there.", bool),
    Flag("--size", "data.size", "Side to which the images of a folder are resized and cropped.", int),
    Flag("--calibration", "data.calibration", "Number of calibration images.", int),
)
EVALUATION = (Flag("--n", "data.evaluation", "Number of evaluation images, drawn by class with the seed.", int, "-n"),)
THREAT = (
    Flag("--threat", "threat.preset", "Preset of the threat model: pixel (sound) or paper.", short="-t"),
    Flag("--norm", "threat.norm", "Norm of the ball: linf, l2 or l1."),
    Flag("--eps", "threat.eps", "Radius of the ball, e.g. 8/255."),
    Flag("--steps", "threat.steps", "PGD steps.", int),
    Flag("--step-size", "threat.step_size", "PGD step size."),
    Flag("--random-start/--zero-start", "threat.random_start", "Where PGD starts.", bool),
    Flag("--restarts", "threat.restarts", "PGD restarts; the worst counts.", int),
)
ATTACKS = (
    Flag(
        "--attacks",
        "attack.attacks",
        "fast, ensemble (as AutoAttack), pgd, or by name: apgd-ce,apgd-t,fab-t,square,...; dear ones last.",
    ),
)
PRUNE = (
    Flag("--prune", "prune.ratio", "Share of the filters to remove, in [0, 1).", float, "-p"),
    Flag("--importance", "prune.importance", "Which filters go: least l1 or l2 norm, or geometric-median."),
    Flag("--scope", "prune.scope", "layer: the same share in every layer; global: the weakest of all."),
    Flag("--round-to", "prune.round_to", "Widths become multiples of this; 1: no rounding; auto: the fastest here."),
)
TRAINING = (
    Flag("--epochs", "epochs", "Epochs.", int, "-e"),
    Flag("--batch-size", "batch_size", "Images per step, over all processes.", int),
    Flag(
        "--accumulate",
        "accumulate",
        "Parts in which a step's images are processed, to save memory; batch norm sees one part at a time.",
        int,
    ),
    Flag("--learning-rate", "learning_rate", "Peak learning rate.", float),
    Flag("--momentum", "momentum", "SGD momentum.", float),
    Flag("--weight-decay", "weight_decay", "SGD weight decay.", float),
    Flag("--schedule", "schedule", "one-cycle, stepped as in the paper, or constant."),
    Flag(
        "--attack-steps",
        "attack_steps",
        "PGD steps of the attack in training; by default 2, of trades, and of fgsm after a collapse, 7.",
        int,
    ),
    Flag(
        "--attack-schedule",
        "attack_schedule",
        "crossing: steps that cross the ball from a random start; threat: as the preset measures.",
    ),
    Flag("--radius", "radius", "Radius of the attack in training, in units of eps; above 1: more robust.", float),
    Flag(
        "--clean-share", "clean_share", "Share of the loss on clean images; by default 1/6 of distill, else 0.", float
    ),
    Flag("--beta", "beta", "Weight of the divergence of trades.", float),
    Flag("--teacher", "teacher", "Robust checkpoint whose soft labels distill learns.", Path),
    Flag("--temperature", "temperature", "By which distill divides logits.", float),
    Flag("--ema", "ema", "Decay of the moving average of the weights, e.g. 0.999; 0: none.", float),
    Flag("--keep", "keep", "Which epoch is kept: best on validation images, or last."),
    Flag("--train-precision", "precision", "Of the arithmetic in training: auto, float32 or bfloat16."),
    Flag("--augment/--no-augment", "augment", "Random flips and shifts.", bool),
)
EXPORT = (
    Flag("--opset", "export.opset", "ONNX opset.", int),
    Flag("--end-to-end/--no-end-to-end", "export.end_to_end", "Write model.e2e.onnx as well.", bool),
)
QUANTIZE = (
    Flag(
        "--engine",
        "quantize.engine",
        "ort: ONNX Runtime; inc: Intel Neural Compressor on the torch network, with --calibrate minmax (its moving "
        "average), entropy (its kl) or auto.",
    ),
    Flag(
        "--calibrate",
        "quantize.calibrate",
        "minmax, moving-average, percentile, entropy, mse, or auto: the best of them.",
    ),
    Flag("--percentile", "quantize.percentile", "Percentile of --calibrate percentile.", float),
    Flag("--per-channel/--per-tensor", "quantize.per_channel", "Granularity of weight scales.", bool),
    Flag(
        "--equalize/--no-equalize",
        "quantize.equalize",
        "Scale channels between layers so that one step of int8 suits all; with --engine ort --per-channel, not --qat.",
        bool,
    ),
    Flag(
        "--reduce-range/--full-range",
        "quantize.reduce_range",
        "Weights of 7 bits, for x86 machines without VNNI; by default if this machine is one.",
        bool,
    ),
    Flag("--keep-float", "quantize.keep_float", "Layers to leave float, e.g. node_conv2d,node_linear*."),
    Flag("--activation-bits", "quantize.activation_bits", "8, or 16 (which ONNX Runtime computes in float).", int),
    Flag("--weight-bits", "quantize.weight_bits", "8, or 4 for linear layers; `toolkit simulate` has others.", int),
    Flag(
        "--target",
        "quantize.targets",
        "Files for other runtimes as well: tensorrt (symmetric int8, model.trt.onnx), cuda (float16, model.fp16.onnx).",
    ),
    Flag(
        "--calibrate-adversarial",
        "quantize.calibrate_adversarial",
        "Share of the calibration images to attack first; harden alone can, and measures whether it helps.",
        float,
    ),
)
SIMULATE = (
    Flag(
        "--bits",
        "bits",
        "Bits, 1 to 16 (1: binary), of weights and activations; 4/8: of each apart; 32: left float.",
    ),
    Flag("--per-channel/--per-tensor", "per_channel", "Granularity of weight scales.", bool),
)
PRECISION = (
    Flag("--precision", "quantize.precision", "auto: the fastest layers in integers, by measuring; int8: all layers."),
    Flag("--max-drop", "quantize.max_drop", "Clean and robust accuracy that auto may lose, as a fraction.", float),
)
BENCHMARK = (
    Flag("--provider", "benchmark.provider", "cpu or cuda."),
    Flag("--batch", "benchmark.batches", "Batch sizes, e.g. 1,64."),
    Flag("--rounds", "benchmark.rounds", "Interleaved rounds.", int),
)
GATES = (
    Flag("--min-accuracy", "gates.min_accuracy", "Least clean accuracy of model.onnx, as a fraction.", float),
    Flag("--min-robust", "gates.min_robust", "Least robust accuracy of model.onnx, as a fraction.", float),
    Flag("--min-integer-coverage", "gates.min_integer_coverage", "Least integer share of MACs, as a fraction.", float),
)
SEARCH = (
    Flag("--max-latency", "search.max_latency", "Most milliseconds of model.onnx, at the first of --batch.", float),
    Flag("--max-size", "search.max_size", "Most bytes of model.onnx, e.g. 500k."),
    Flag(
        "--space",
        "search.space",
        'What varies: "prune.ratio=0.2:0.8:0.1; precision=int8,float; NAME=ONE,OTHER"; a NAME is a setting that makes '
        "the network or its graph, as in config.yaml (prune, finetune, quantize, export).",
    ),
    Flag("--per-group", "search.per_group", "A prune ratio for every group of layers that go together.", bool),
    Flag("--trials", "search.trials", "Number of trials, those of other processes on the storage included.", int),
    Flag("--budget", "search.budget", "Seconds after which no trial begins; the bundles come after them.", float),
    Flag("--images", "search.images", "Validation images that judge a trial.", int),
    Flag("--quick-attacks", "search.attacks", "Attacks that judge a trial; --attacks judge the bundles."),
    Flag("--seeds", "search.seeds", "Seeds of every trial, e.g. 0,1,2: their mean counts; by default --seed."),
    Flag(
        "--bundles",
        "search.bundles",
        "So many points of the front become bundles, up to twice as many where none keeps the limits.",
        int,
    ),
    Flag("--storage", "search.storage", "URL of the data base of trials; by default SQLite in the output's folder."),
    Flag("--study", "search.study", "Name of the search in its storage."),
    Flag("--address", "search.address", "Ray cluster for the trials: local, auto or HOST:PORT; by default none."),
    Flag(
        "--workers",
        "search.workers",
        "Trials at a time on Ray; each takes --threads CPUs, by default its share of this machine.",
        int,
    ),
    Flag("--trial-gpus", "search.gpus", "GPUs that each of them needs, on Ray.", float),
)
MACHINE = (
    Flag("--seed", "seed", "Seed of everything random.", int),
    Flag("--threads", "threads", "CPU threads.", int),
)
REPRODUCE = (
    Flag("--seeds", "seeds", "Seeds, one run of everything each, e.g. 0,1,2."),
    Flag(
        "--protocol",
        "protocol",
        "paper: as published, with the differences that its output lists; fast: as many epochs by our own recipe.",
    ),
    Flag("--arch", "network", "Another network than the paper's: cnn8, resnet18, torchvision:NAME, file.py:callable."),
    Flag(
        "--pretrained",
        "pretrained",
        "Checkpoint of the standard network, in place of training one; every seed starts from it. Needs --data.",
        Path,
    ),
    Flag("--work", "work", "Folder in which everything that was run is kept; by default in the user's cache.", Path),
    Flag("--budget", "budget", "Minutes after which this sitting stops; the next one goes on.", float),
    Flag("--max-runs", "max_runs", "Steps of this sitting at most; 0 shows what is known.", int),
    Flag("--only", "only", "Fill only cells whose 'ROW; COLUMN' has this in it, e.g. 'from robust' or 'AutoAttack'."),
    Flag("--attack-images", "attack_images", "Evaluation images of AutoAttack and DeepFool; PGD takes all.", int),
    Flag("--threads", "threads", "CPU threads.", int),
)
LISTS = (
    *("model.mean", "model.std", "benchmark.batches", "quantize.keep_float", "quantize.targets"),
    *("bits", "seeds", "search.seeds"),
)
"""Fields whose flags take several values with commas between."""


def under(prefix: str, flags: Sequence[Flag]) -> tuple[Flag, ...]:
    """The same flags for fields of the part `prefix`."""
    return tuple(Flag(f.name, f"{prefix}.{f.path}", f.help, f.type, f.short) for f in flags)


def with_flags(
    flags: Sequence[Flag], config: type[BaseModel] | None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: give a command the flags, and pass what was set as its argument `settings`, by dotted path.

    Args:
        flags: the flags, in the order of the help.
        config: the configuration whose defaults the help shows; None: the defaults are not those of a configuration.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "settings"]
        names = {f"set_{index}": flag for index, flag in enumerate(flags)}

        def run(**values: Any) -> None:
            settings = {flag.path: values.pop(name) for name, flag in names.items()}
            command(settings={path: value for path, value in settings.items() if value is not None}, **values)

        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[flag.type | None, _option(flag, config)],
            )
            for name, flag in names.items()
        ]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + added
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__doc__, run.__name__ = command.__doc__, command.__name__
        return run

    return decorate


def _option(flag: Flag, config: type[BaseModel] | None) -> Any:
    names = [flag.name, *([flag.short] if flag.short else [])]
    default = _default(config, flag.path.split(".")) if config else ""
    return typer.Option(*names, help=flag.help, show_default=default or False)


def _default(config: type[BaseModel], path: Sequence[str]) -> str:
    """The default of a field in words; empty where there is none."""
    field = config.model_fields[path[0]]
    if len(path) > 1 and field.default is PydanticUndefined:
        part = field.annotation
        return _default(part, path[1:]) if isinstance(part, type) and issubclass(part, BaseModel) else ""
    value = field.default
    for name in path[1:]:
        value = getattr(value, name)
    if isinstance(value, Mapping):
        return "; ".join(f"{key}={_options_text(options)}" for key, options in value.items())
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return "" if value is None or value is PydanticUndefined or isinstance(value, bool) else str(value)


def _options_text(options: Any) -> str:
    """What a setting may be, as `config.parse_space` reads it."""
    if isinstance(options, (tuple, list)):
        return ",".join(map(str, options))
    return f"{options.low:g}:{options.high:g}:{options.step:g}"


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted path as nested mappings, lists split."""
    values: dict[str, Any] = {}
    for path, value in settings.items():
        *parts, last = path.split(".")
        inner = values
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[last] = [item.strip() for item in str(value).split(",") if item.strip()] if path in LISTS else value
    return values


def names_by_path(flags: Sequence[Flag]) -> dict[str, str]:
    """The flag that sets each field, for error messages."""
    return {flag.path: flag.name.split("/")[0] for flag in flags}


def tails(flags: Sequence[Flag]) -> dict[str, str]:
    """The same by the last part of its path, for a configuration that is built on its own."""
    return {flag.path.split(".")[-1]: flag.name.split("/")[0] for flag in flags}
