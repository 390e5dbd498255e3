"""`toolkit attack` as users meet it: on checkpoints, bundles and anybody's ONNX files, with all that can go wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto
from PIL import Image

from tests import strangers, tiny
from tests.tiny import World, entries
from toolkit import cli
from toolkit.evaluators import worst_case
from toolkit.exporters.onnx import read_metadata, write_metadata
from toolkit.reports.schema import AttackReport

EPS = 0.12
QUICK = ("--eps", str(EPS), "--zero-start", "--steps", "5", "--n", "30", "--threads", "1")
DATA = ("--data", "npz:data.npz")
PGD = ("--attacks", "pgd")
Capture = pytest.CaptureFixture[str]


def said(captured: str) -> str:
    """The text of an error without its frame, line breaks and blanks."""
    return "".join(line.strip("│ ").replace(" ", "") for line in captured.splitlines())


def attack(capsys: Capture, *arguments: str | Path) -> dict[str, Any]:
    """What `toolkit attack --json` prints; it is always a valid report."""
    capsys.readouterr()
    code = tiny.run("attack", *arguments, "--json", "-q")
    captured = capsys.readouterr()
    assert code == cli.DONE, captured.err
    found: dict[str, Any] = json.loads(captured.out)
    jsonschema.validate(found, AttackReport.model_json_schema())
    return found


def refused(capsys: Capture, *arguments: str | Path) -> str:
    """What an attack that cannot be made says."""
    capsys.readouterr()
    assert tiny.run("attack", *arguments, "-q") == cli.BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == "" and "found:" in captured.err and "fix:" in captured.err
    return said(captured.err)


@pytest.fixture
def stranger(hardened: World, here: Path) -> Callable[[Callable[[ModelProto], ModelProto]], Path]:
    """Writes the float twin of the bundle in another form, as `other.onnx`."""

    def write(form: Callable[[ModelProto], ModelProto]) -> Path:
        onnx.save(form(strangers.bare(hardened.bundle / "model.fp32.onnx")), here / "other.onnx")
        return Path("other.onnx")

    return write


# What can be attacked


@pytest.mark.usefixtures("here")
def test_a_checkpoint(capsys: Capture) -> None:
    found = attack(capsys, "model.pt", *QUICK, *PGD)
    assert found["target"] == "model.pt" and found["images"] == 30 and found["data"] == "npz:data.npz"
    assert set(found["accuracy"]) == {"torch"} and set(found["robust_accuracy"]) == {"torch", "deployed_from_file"}
    assert {(row["surrogate"], row["target"]) for row in found["robustness"]} == {("float", "torch")}
    assert found["fidelity"] is None and found["columns"] == [] and found["clipped_share"] is None
    assert found["worst_case"] == {"attacks": "pgd", "passes": [], "complete": True, "not_run": []}


def test_a_checkpoint_and_a_file_made_from_it(out: Path, capsys: Capture) -> None:
    found = attack(capsys, out / "model.pt", "--target", out / "model.onnx", *QUICK, *PGD)
    assert {(row["surrogate"], row["target"]) for row in found["robustness"]} == {
        (surrogate, target)
        for surrogate in ("float", "twin")
        for target in ("torch", "deployed", "deployed_unoptimised")
    }
    assert found["fidelity"]["valid"] and 0 <= found["clipped_share"] <= 1


def test_a_bundle_has_the_whole_matrix(out: Path, capsys: Capture) -> None:
    found = attack(capsys, out, "--attacks", "apgd-ce,square", "--n", "30", "--threads", "1")
    surrogates = {"float", "twin", "fake_quantised"}
    targets = {"torch", "fp32", "deployed", "deployed_unoptimised"}
    cells = {(row["surrogate"], row["target"]) for row in found["robustness"]}
    assert cells == {(surrogate, target) for surrogate in surrogates for target in targets}
    assert set(found["robust_accuracy"]) == {"fp32", "deployed", "deployed_from_file"}
    assert {(column["first"], column["second"]) for column in found["columns"]} == {
        ("torch", "fp32"), ("fp32", "deployed"), ("deployed", "deployed_unoptimised"),
    }  # fmt: skip
    worst = found["robust_accuracy"]["deployed"]["value"]
    assert all(worst <= row["value"] for row in found["robustness"] if row["target"] == "deployed")
    assert worst <= found["accuracy"]["deployed"]["value"]
    assert [point["eps"] for point in found["security_curve"]] == sorted(p["eps"] for p in found["security_curve"])
    assert found["security_curve"][0]["eps"] == 0 and found["step_ladder"]
    assert found["saturation"] and found["fidelity"]["valid"]


def test_our_file_alone_is_attacked_on_its_twin(out: Path, capsys: Capture) -> None:
    found = attack(capsys, out / "model.onnx", *QUICK, "--attacks", "apgd-ce")
    assert found["target"] == "model.onnx" and found["data"] == "npz:data.npz", "the file names its data set"
    assert {row["surrogate"] for row in found["robustness"]} == {"twin"}
    assert {row["target"] for row in found["robustness"]} == {"deployed", "deployed_unoptimised"}
    assert found["fidelity"]["agreement_clean"]["value"] >= 0.99
    assert [(row["attack"], row["surrogate"]) for row in found["worst_case"]["passes"]] == [("apgd-ce", "twin")]
    assert tiny.run("attack", out / "model.onnx", *QUICK, *PGD, "--mean", "0.5", "-q", "--json") == cli.DONE
    assert "--mean and --std are ignored" in capsys.readouterr().err, "the normalisation is inside"


@pytest.mark.parametrize("form", strangers.FORMS)
def test_a_strangers_file_in_any_form(form: str, stranger: Callable[..., Path], out: Path, capsys: Capture) -> None:
    """The same network in another form answers the same, clean and attacked."""
    same = attack(capsys, out / "model.fp32.onnx", *QUICK, *PGD)
    found = attack(capsys, stranger(strangers.FORMS[form]), *DATA, *QUICK, *PGD)
    assert found["accuracy"]["deployed"]["correct"] == same["accuracy"]["deployed"]["correct"] == 30
    assert found["fidelity"]["valid"]
    robust, expected = (result["robust_accuracy"]["deployed"]["correct"] for result in (found, same))
    assert expected < 30
    # A file that takes whole numbers rounds what the attack does between them.
    assert abs(robust - expected) <= (6 if form == "uint8" else 1)


@pytest.mark.parametrize("operators", [False, True], ids=["QDQ", "QOperator"])
def test_a_strangers_integer_file(operators: bool, out: Path, capsys: Capture) -> None:
    strangers.quantised(out / "model.fp32.onnx", Path("int8.onnx"), Path("data.npz"), operators=operators)
    kinds = {entry.op_type for entry in onnx.load("int8.onnx").graph.node}
    assert ("QLinearConv" in kinds) == operators
    found = attack(capsys, "int8.onnx", *DATA, *QUICK, *PGD)
    assert found["accuracy"]["deployed"]["correct"] >= 28 and found["fidelity"]["valid"]
    assert found["robust_accuracy"]["deployed"]["correct"] < 25, "gradients go through the rounding"
    assert len(found["saturation"]) >= 3


def test_a_file_without_a_twin_is_still_searched_by_queries(stranger: Callable[..., Path], capsys: Capture) -> None:
    path = stranger(strangers.unconvertible)
    code = tiny.run("attack", path, *DATA, *QUICK, "--attacks", "square", "--json", "-q")
    captured = capsys.readouterr()
    assert code == cli.DONE and "TopK" in captured.err and "without its twin" in captured.err
    found = json.loads(captured.out)
    assert found["robustness"] == [] and found["fidelity"] is None and found["security_curve"] == []
    (search,) = found["worst_case"]["passes"]
    assert (search["attack"], search["surrogate"]) == ("square", None) and search["fooled"] > 0


# The form of the pixels


@pytest.mark.parametrize(
    ("form", "advice"),
    [
        (strangers.up_to_255, ["--mean", "0", "--std", "1/255"]),
        (lambda made: strangers.normalised_outside(made, 3.0, 0.05), ["--mean", "3", "--std", "0.05"]),
    ],
    ids=["[0, 255]", "standardised"],
)
def test_other_pixels_are_found_out_and_the_advice_helps(
    form: Callable[[ModelProto], ModelProto], advice: list[str], stranger: Callable[..., Path], capsys: Capture
) -> None:
    path = stranger(form)
    if advice[1] == "0":
        words = refused(capsys, path, *DATA, *QUICK, *PGD)
        assert "doesnottakepixelsin[0,1]" in words and "".join(advice) in words, words
    found = attack(capsys, path, *DATA, *QUICK, *PGD, *advice)
    assert found["accuracy"]["deployed"]["correct"] == 30
    assert not [alarm for alarm in found["soundness"] if alarm["name"] == "wrong_input"]


def test_exchanged_light_and_dark_is_a_matter_of_the_images(stranger: Callable[..., Path], capsys: Capture) -> None:
    words = refused(capsys, stranger(strangers.negative), *DATA, *QUICK, *PGD)
    assert "negativeimages" in words and "lightanddark" in words and "--mean" not in words


@pytest.mark.parametrize("form", [strangers.up_to_255, strangers.uint8], ids=["[0, 255]", "uint8"])
def test_a_graph_that_wants_other_pixels_is_not_quantised(
    form: Callable[[ModelProto], ModelProto], stranger: Callable[..., Path], capsys: Capture
) -> None:
    """Its integer graph would take pixels in [0, 1]."""
    assert tiny.run("quantize", stranger(form), *DATA, "--threads", "1", "-q") == cli.BAD_INPUT
    words = said(capsys.readouterr().err)
    assert "takesuint8" in words or "doesnottakepixelsin[0,1]" in words
    assert not Path("model.onnx").exists()


def test_what_a_stranger_calls_as_we_do_is_not_taken_for_ours(stranger: Callable[..., Path], capsys: Capture) -> None:
    path = stranger(lambda made: made)
    made = onnx.load(path)
    for key, value in (("class_names", "cat,dog"), ("normalization", "none"), ("threat_model", "l2"), ("dataset", "x")):
        made.metadata_props.add(key=key, value=value)
    onnx.save(made, path)
    assert attack(capsys, path, *DATA, *QUICK, *PGD)["accuracy"]["deployed"]["correct"] == 30
    assert tiny.run("quantize", path, *DATA, "--threads", "1", "-q") == cli.DONE
    kept = {entry.key: entry.value for entry in onnx.load("model.onnx").metadata_props}
    assert kept["class_names"] == "cat,dog", "what is not ours stays"


# Attacks, time, interruptions


def test_an_attack_of_the_norm_that_the_file_was_hardened_for(out: Path, here: Path, capsys: Capture) -> None:
    """The file says its norm: nobody needs to say it again."""
    made = onnx.load(out / "model.fp32.onnx")
    (entry,) = (entry for entry in made.metadata_props if entry.key == "threat_model")
    entry.value = json.dumps({**json.loads(entry.value), "norm": "l2", "eps": 0.5})
    onnx.save(made, here / "l2.onnx")
    found = attack(capsys, "l2.onnx", *DATA, "--n", "12", "--threads", "1", "--steps", "2", "--attacks", "cw")
    assert found["threat"]["norm"] == "l2" and found["worst_case"]["attacks"] == "cw"
    assert "cwdoesnotexistinthenormlinf" in refused(capsys, "l2.onnx", *DATA, "--norm", "linf", "--attacks", "cw")


@pytest.mark.usefixtures("here")
def test_attacks_by_name(capsys: Capture) -> None:
    found = attack(capsys, "model.pt", *QUICK, "--attacks", "apgd-ce,apgd-t")
    assert {row["attack"] for row in found["worst_case"]["passes"]} <= {"apgd-ce", "apgd-t"}
    words = refused(capsys, "model.pt", *QUICK, "--attacks", "apgd-ce,apgd-tt")
    assert "unknownattack" in words and "'apgd-tt'" in words and "didyoumean'apgd-t'" in words and "square" in words


@pytest.mark.usefixtures("here")
def test_a_budget_says_what_was_not_run(capsys: Capture) -> None:
    found = attack(capsys, "model.pt", *QUICK, "--budget", "0.001")
    assert found["budget"] == 0.001 and not found["worst_case"]["complete"]
    assert any("pgd-5 on float" in what for what in found["worst_case"]["not_run"])
    assert found["robustness"] == []
    assert tiny.run("attack", "model.pt", *QUICK, "--budget", "0.001", "-q") == cli.DONE
    page = capsys.readouterr().out
    assert "NOT RUN  pgd-5 on float" in page and "UNFINISHED" in page and "--resume" in page
    assert page.index("NOT RUN") < page.index("--budget"), "beside the figure"
    assert tiny.run("attack", "model.pt", *QUICK, "--resume", "-q") == cli.DONE
    captured = capsys.readouterr()
    assert captured.err == "" and "UNFINISHED" not in captured.out and "--budget" not in captured.out


def test_an_interrupted_attack_goes_on(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    command = ["model.pt", *QUICK, "--attacks", "apgd-ce,square"]
    whole = attack(capsys, *command)
    real, calls = worst_case._attack, []

    def interrupted(attempt: Any, *rest: Any) -> Any:
        if attempt.how.by_queries:
            raise KeyboardInterrupt
        calls.append(str(attempt))
        return real(attempt, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(worst_case, "_attack", interrupted)
        assert tiny.run("attack", *command, "-q") == cli.INTERRUPTED
    err = capsys.readouterr().err
    assert "what was attacked so far is kept; continue with: toolkit attack model.pt" in err and "--resume" in err
    folder = Path(os.environ["XDG_CACHE_HOME"], "toolkit/attacks")
    assert len(entries(folder)) == 1 and calls
    assert [name for name in entries(here) if name != "__pycache__"] == ["data.npz", "layers.py", "model.pt", "net.py"]

    def only_what_is_left(attempt: Any, *rest: Any) -> Any:
        assert str(attempt) not in calls, "made twice"
        return real(attempt, *rest)

    monkeypatch.setattr(worst_case, "_attack", only_what_is_left)
    resumed = attack(capsys, *command, "--resume")
    for key in ("robust_accuracy", "robustness", "worst_case", "accuracy"):
        assert resumed[key] == whole[key], key
    assert entries(folder) == [], "a finished run keeps nothing"


@pytest.mark.usefixtures("here")
def test_a_resume_with_nothing_kept_starts_anew_and_says_so(capsys: Capture) -> None:
    assert tiny.run("attack", "model.pt", *QUICK, *PGD, "--resume", "--json", "-q") == cli.DONE
    captured = capsys.readouterr()
    assert "nothing is kept of a run with these settings" in captured.err
    assert json.loads(captured.out)["worst_case"]["complete"]


@pytest.mark.usefixtures("here")
def test_equal_runs_find_equal_figures(capsys: Capture) -> None:
    one, two = (attack(capsys, "model.pt", *QUICK, "--attacks", "apgd-t,square", "--seed", "3") for _ in range(2))
    for found in (one, two):
        del found["seconds"], found["environment"]
    assert one == two


# Images that survive the file format


def test_saved_images_fool_the_graph_when_they_are_read_back(out: Path, here: Path, capsys: Capture) -> None:
    found = attack(capsys, out, "--n", "30", "--threads", "1", *PGD, "--save-adversarial", "fooling")
    clean, robust = found["accuracy"]["deployed"]["correct"], found["robust_accuracy"]["deployed_from_file"]["correct"]
    files = sorted((here / "fooling").glob("*.png"))
    assert clean - robust == len(files) > 0
    with np.load("data.npz") as archive:
        originals = archive["x_test"].astype(np.int64)
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    for file in files:
        pixels = np.asarray(Image.open(file))
        label = int(file.stem.partition("-class")[2])
        logits = session.run(None, {"image": pixels[None, None].astype(np.float32) / 255})[0]
        assert logits.argmax() != label, file.name
        distance = np.abs(originals - pixels.astype(np.int64)).max(axis=(1, 2, 3)).min()
        assert distance <= EPS * 255, "within the threat model, and of an evaluation image"
    assert tiny.run("attack", "model.pt", *QUICK, *PGD, "--save-adversarial", "others", "-q") == cli.DONE
    assert "images that fool the graph: others" in capsys.readouterr().out
    assert "isnotempty" in refused(capsys, "model.pt", *QUICK, *PGD, "--save-adversarial", "fooling")


@pytest.mark.usefixtures("here")
def test_a_gallery_that_cannot_be_written(capsys: Capture) -> None:
    words = refused(capsys, "model.pt", *QUICK, "--save-adversarial", "net.py/images")
    assert "--save-adversarialnet.py/images" in words


# The page


def test_the_page_of_a_bundle(out: Path, capsys: Capture) -> None:
    more = ("--n", "30", "--eps", "0.08", "--threads", "1", "--attacks", "apgd-ce,square")
    assert tiny.run("attack", out, *more, "-q") == cli.DONE
    page = capsys.readouterr().out
    words = (
        "out on npz:data.npz, 30 images", "l-inf, eps 0.08", "attacks: apgd-ce,square", "robust accuracy",
        "deployed, from 8-bit PNG files", "made on", "twin of the deployed graph", "square-5000", "by queries",
        "over the radius",
    )  # fmt: skip
    assert not [word for word in words if word not in page], page
    assert page.index("robust accuracy") < page.index("made on")
    assert "None" not in page and "nan" not in page and "UNFINISHED" not in page
    assert max(len(line) for line in page.splitlines() if not line.startswith("ALARM")) <= 120


# Bad input


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (strangers.detector, "isnoclassifier"),
        (strangers.segmenter, "isnoclassifier"),
        (strangers.of_unknown_rank, "isnoclassifier"),
        (strangers.two_inputs, "isnoimageclassifier"),
    ],
)
def test_what_is_no_classifier(make: Callable[[], ModelProto], words: str, here: Path, capsys: Capture) -> None:
    onnx.save(make(), here / "other.onnx")
    text = refused(capsys, "other.onnx", *DATA, *QUICK)
    assert words in text and "other.onnx" in text


def test_labels_that_the_file_does_not_know(stranger: Callable[..., Path], here: Path, capsys: Capture) -> None:
    path = stranger(strangers.FORMS["float"])
    tiny.write_archive(here / "four.npz", classes=4)
    words = refused(capsys, path, "--data", "npz:four.npz", *QUICK)
    assert "numberofclasses" in words and "3classes" in words and "has4" in words


def test_images_of_another_size(stranger: Callable[..., Path], capsys: Capture) -> None:
    words = refused(capsys, stranger(strangers.FORMS["float"]), "--data", "sample", *QUICK)
    assert "16x16" in words or "classes" in words
    words = refused(capsys, stranger(strangers.sizeless), "--data", "sample", *QUICK)
    assert "cannotberunontheimages" in words and "--size" in words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing.onnx", *DATA, *QUICK], "nothing.onnx"),
        (["nothing.pt", *QUICK], "nothing.pt"),
        (["broken.onnx", *DATA, *QUICK], "broken.onnx"),
        (["empty.onnx", *DATA, *QUICK], "empty.onnx"),
        (["model.pt", *PGD, "--eps", "0"], "--eps"),
        (["model.pt", *PGD, "--eps", "nan"], "--eps"),
        (["model.pt", *PGD], "--eps"),
        (["model.pt", *PGD, "--eps", "0.1", "--n", "151"], "--n151,and150images"),
        (["model.pt", *PGD, "--eps", "0.1", "--n", "0"], "--n"),
        (["model.pt", *QUICK, "--budget", "0"], "--budget"),
        (["model.pt", *QUICK, "--target", "nothing.onnx"], "nothing.onnx"),
        (["model.pt", *QUICK, "--target", "net.py"], "net.py"),
        (["other.onnx", *QUICK], "--data:sample"),
        (["other.onnx", *DATA, *QUICK, "--target", "other.onnx"], "isitsowntarget"),
        (["other.onnx", *DATA, *QUICK, "--mean", "0.5,0.5"], "2"),
    ],
)  # fmt: skip
def test_bad_input(
    arguments: list[str], words: str, stranger: Callable[..., Path], here: Path, capsys: Capture
) -> None:
    stranger(strangers.FORMS["float"])
    (here / "broken.onnx").write_bytes((here / "other.onnx").read_bytes()[:500])
    (here / "empty.onnx").touch()
    before = entries(here)
    assert words in refused(capsys, *arguments)
    assert [name for name in entries(here) if name != "__pycache__"] == before


def test_users_images_that_a_file_names_are_told_and_looked_at(out: Path, here: Path, capsys: Capture) -> None:
    """What lies there under the same name may be something else."""
    assert read_metadata(out / "model.onnx")["dataset"] == "npz:data.npz"
    assert tiny.run("attack", out / "model.onnx", *QUICK, *PGD) == cli.DONE
    told = " ".join(capsys.readouterr().err.split())
    assert "npz:data.npz in the working folder" in told and "does not look like" not in told
    archive = dict(np.load("data.npz"))
    np.savez(here / "data.npz", **{name: 255 - part if "x" in name else part for name, part in archive.items()})
    tiny.run("attack", out / "model.onnx", *QUICK, *PGD, "-q")
    assert "does not look like" in capsys.readouterr().err
    (here / "data.npz").unlink()
    assert "doesnotsaywhatdataset" in refused(capsys, out / "model.onnx", *QUICK)
    assert tiny.run("quantize", out / "model.fp32.onnx", "--output", "int8.onnx", "-q") == cli.BAD_INPUT


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("class_names", "no JSON"),
        ("class_names", "5"),
        ("normalization", "{}"),
        ("normalization", '{"mean": "a", "std": [1]}'),
        ("threat_model", "[]"),
        ("threat_model", '{"preset": "pixel", "norm": "linf", "eps": -1}'),
        ("pixel_statistics", '{"mean": [0.5]}'),
    ],
)
def test_damaged_words_of_our_own_file(key: str, text: str, out: Path, here: Path, capsys: Capture) -> None:
    graph = onnx.load(out / "model.fp32.onnx")
    for entry in graph.metadata_props:
        if entry.key == key:
            entry.value = text
    onnx.save(graph, here / "damaged.onnx")
    capsys.readouterr()
    for command in ("attack", "quantize"):
        if (command, key) in {("attack", "pixel_statistics"), ("quantize", "class_names")}:
            continue  # it does not look at that
        output = ("--output", "int8.onnx") if command == "quantize" else QUICK
        assert tiny.run(command, "damaged.onnx", *DATA, *output, "-q") == cli.BAD_INPUT
        captured = said(capsys.readouterr().err)
        assert f"metadata{key}" in captured and "damaged" in captured


def test_a_bundle_whose_graph_was_changed_is_attacked_with_a_warning(out: Path, capsys: Capture) -> None:
    assert tiny.run("attack", out, *QUICK, *PGD, "-q") == cli.DONE
    assert "manifest" not in capsys.readouterr().err
    write_metadata(out / "model.onnx", {"added": "afterwards"})
    assert tiny.run("attack", out, *QUICK, *PGD, "-q") == cli.DONE
    assert "warning: model.onnx of " in capsys.readouterr().err


def test_a_bundle_brings_its_own_targets(out: Path, capsys: Capture) -> None:
    assert "bringsitsowntargets" in refused(capsys, out, "--target", out / "model.onnx", *QUICK)
