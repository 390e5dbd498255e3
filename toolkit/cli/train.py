"""A reference network."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from toolkit import progress
from toolkit.cli import flags
from toolkit.cli.app import Force, Json, Quiet, Resume, Settings, Verbose, app, resume_hint, start
from toolkit.cli.printing import radius_of
from toolkit.config import TrainRunConfig, build

TRAIN_FLAGS = (
    flags.Flag("--objective", "training.objective", "standard, adversarial, fgsm, trades or distill."),
    *flags.under("training", flags.TRAINING),
    *flags.DATA,
    *flags.THREAT,
    *flags.MACHINE,
)


@app.command()
@flags.with_flags(TRAIN_FLAGS, TrainRunConfig)
def train(
    settings: Settings,
    arch: Annotated[str, typer.Argument(metavar="ARCH", help="cnn8, resnet18, torchvision:NAME or file.py:callable.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The checkpoint to write.")] = Path("model.pt"),
    force: Force = False,
    resume: Resume = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a reference network, standard or adversarially."""
    start(quiet, verbose)
    values = flags.nested(settings | {"arch": arch})
    config = build(TrainRunConfig, values, flags.names_by_path(TRAIN_FLAGS))
    from toolkit import stages
    from toolkit.training.distributed import follows

    if follows():
        progress.set_quiet(True)
        stages.train_network(config, output, force=force, resume=resume)
        return
    resume_hint(lambda: stages.training_checkpoint(output).is_file(), str(output))
    result = stages.train_network(config, output, force=force, resume=resume)
    best = next((epoch for epoch in result.epochs if epoch.epoch == result.best_epoch), None)
    if as_json:
        record = dict(result.model.spec.training[-1]) if result.model.spec.training else {}
        print(json.dumps({"output": str(output), **record}))
        return
    if best is not None:
        robust = f"; attacked {best.robust}" if best.robust else ""
        print(f"epoch {best.epoch} kept; validation: clean {best.accuracy}{robust}")
    radius = radius_of(result.model)
    print(f"\nwritten: {output}\nnext:    toolkit harden {shlex.quote(str(output))} --prune 0.5 --int8{radius}")
