"""Whether a network wants its pixels as it gets them, found by what it answers, and what to do if not."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from toolkit.artifacts import Predictor, Split
from toolkit.errors import ToolkitError
from toolkit.evaluators.probes import PROBED_IMAGES, probe_inputs
from toolkit.evaluators.scoring import TargetName, primary_of
from toolkit.evaluators.soundness import input_checks


def refuse_wrong_input(targets: Mapping[TargetName, Predictor], evaluation: Split) -> None:
    """Find out by statistics whether the graph that counts wants its images in another form.

    Args:
        targets: the graphs that are to be judged.
        evaluation: the images, of which the first `PROBED_IMAGES` are used.

    Raises:
        ToolkitError: it classifies images in another form much better, and not by chance.
    """
    found = probe_inputs(targets[primary_of(targets)], evaluation)
    form, best = max(found.others.items(), key=lambda item: item[1].value)
    alarming = any(check.alarming for check in input_checks(found) if check.name == "wrong_input")
    if alarming and best.low > found.accuracy.high:
        raise ToolkitError(
            "the model does not take pixels in [0, 1] as they are",
            found=f"it classifies {form} better ({best}) than pixels in [0, 1] ({found.accuracy})",
            fix=_advice(form, evaluation),
        )


def _advice(form: str, evaluation: Split) -> str:
    """What to do about a model that wants its images in the form that `probe_inputs` calls so."""
    told = {
        "pixels in [0, 255]": "--mean 0 --std 1/255",
        "pixels in [-1, 1]": "--mean 0.5 --std 0.5",
        "pixels standardised by channel": "--mean {} --std {}, which are those of these images".format(
            *(",".join(f"{value:.4f}" for value in values) for values in _statistics(evaluation))
        ),
    }
    if form not in told:
        return "name the images that it was trained on with --data: light and dark are exchanged in these"
    return (
        f"say what is done to pixels before the network gets them, as in its training: {told[form]} "
        "(a checkpoint that describes itself has to be saved again with the right normalisation)"
    )


def _statistics(evaluation: Split) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the pixels in [0, 1], per channel."""
    images = torch.cat([batch.images for batch in evaluation.first(PROBED_IMAGES).batches()])
    return images.mean(dim=(0, 2, 3)).tolist(), images.std(dim=(0, 2, 3)).tolist()
