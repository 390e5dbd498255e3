"""Documents as Markdown: our mean and standard error beside the paper's; an empty cell says why it is empty."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NOT_IN_PAPER, NOT_COMPARABLE = "not in the paper", "not comparable"
QUANTITIES, WHOSE = ("test", "robust"), ("ours", "paper", "difference")
ENERGY = "not measured: the machine does not tell"
MARK = " †"
MIXED = (
    "†: of a network that was trained again since, or whose start was, with another outcome, as on another machine. "
    "The figure is of the earlier one; what the JSON file says of its training is of the later one."
)
MASKED = (
    "Few bits mask gradients: PGD through the rounding, which is the paper's attack, can leave more than other attacks "
    "do. `worst case` is what stands against PGD on every network that it was made on; after quantisation-aware "
    "training that is the float network too. Neither stands for a composition of attacks."
)
"""Beside curves over precision."""
TELLING_GAP = 0.01
"""By so much must an attack made on another form of a network beat that made on its own for this to be told."""


def render(document: Mapping[str, Any], plot: str | None = None) -> str:
    """The whole document.

    Args:
        document: as `document.documents` gives it.
        plot: name of the image file beside the text, if there is one.
    """
    parts = [
        f"# {document['target']}: {document['title']}",
        f"Paper: {document['place']}. {document['numbering']}",
        f"Protocol `{document['protocol']}`, seeds {', '.join(map(str, document['seeds']))}. {_machine(document)}",
        "Accuracy in per cent: mean ± standard error over seeds, or of one seed [95 % Wilson interval]. `within`: the "
        "difference to the paper is at most two standard errors of the difference; behind it what that error is "
        "made of. Where the paper prints no error it is ours alone, and too small.",
    ]
    if document.get("pretrained"):
        parts.append(
            f"The standard network was not trained here but brought along: `{document['pretrained']['name']}`, SHA-256 "
            f"{document['pretrained']['sha256'][:16]}. It is the same for every seed, so rows without "
            "training have the interval of the test images alone."
        )
    if plot:
        parts.append(f"![{document['title']}]({plot})")
    for panel in document["panels"]:
        parts += _panel(document["kind"], panel)
    parts.append("## Differences from the paper's runs\n\n" + "\n".join(f"- {item}" for item in document["deviations"]))
    return "\n\n".join(parts) + "\n"


def _machine(document: Mapping[str, Any]) -> str:
    """On which machines the runs were made; those of before this was kept are of unknown ones."""
    runs = [run for panel in document["panels"] for run in _runs(panel)]
    runs += [found for panel in document["panels"] if "machine" in (found := panel.get("embedding", {}))]
    known = {json.dumps(run.get("machine")): run.get("machine") for run in runs}
    words = [
        f"{', '.join((found['cpu'], *found['gpus']))}, torch {found['torch']}" if found else "a machine not noted down"
        for found in known.values()
    ]
    return f"Run on: {'; '.join(words)}." if words else "Nothing was run."


def _panel(kind: str, panel: Mapping[str, Any]) -> list[str]:
    images = f", {panel['evaluation_images']:,} test images" if panel["evaluation_images"] else ""
    parts = [f"## {panel['title']}, {panel['network']}{images}"]
    if panel.get("from_files"):
        parts.append(
            f"The images come from files ({panel['images']}), whose format may have changed them a little: JPEG loses "
            "detail. The paper's numbers are of the data set's own pixels."
        )
    if not panel["comparable"]:
        parts.append("Not the paper's data set, images or network: its numbers do not stand beside these.")
    paper_cells = [cell for cell in panel["cells"] if cell["in_paper"]]
    if paper_cells:
        parts.append(_comparison(paper_cells, NOT_IN_PAPER if panel["comparable"] else NOT_COMPARABLE))
    if panel.get("together"):
        parts.append(_together(panel["together"]))
    others = [cell for cell in panel["cells"] if not cell["in_paper"]]
    if others:
        parts.append(f"### What the paper does not have\n\n{_columns_text(others, panel)}")
        parts.append(_matrix(others))
        parts.append(_reasons(others))
    if kind == "time":
        parts.append(_times(panel["times"]))
    parts += [_curve(curve) for curve in panel["curves"]]
    if any(curve["axis"] == "bits" for curve in panel["curves"]):
        parts.append(MASKED)
    if "embedding" in panel:
        parts.append(_embedding(panel["embedding"]))
    if any(run.get("mixed") for run in _runs(panel)):
        parts.append(MIXED)
    return [part for part in parts if part]


def _runs(panel: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All runs behind a panel."""
    places = [*panel["cells"], *panel.get("times", ()), *(p for curve in panel["curves"] for p in curve["points"])]
    return [run for place in places for run in place["runs"]]


def _comparison(cells: Sequence[Mapping[str, Any]], otherwise: str) -> str:
    """Ours beside the paper's, or beside why there are none."""
    header = ("network", "fine-tuning", *(f"{name}, {whose}" for name in QUANTITIES for whose in WHOSE))
    return _table(
        header,
        [
            (cell["row"], cell["column"], *(part for name in QUANTITIES for part in _pair(cell, name, otherwise)))
            for cell in cells
        ],
    )


def _together(found: Mapping[str, Any]) -> str:
    """Whether as many figures agree as should, and the one that agrees least."""
    figures = found["figures"]
    least = min(figures, key=lambda one: one["p_value"])
    name = f"{least['row']}, fine-tuning {least['column']}, {least['quantity']}"
    return (
        f"**Together:** of {len(figures)} figures for which both sides know their seeds' spread, {found['within']} are "
        f"within. The one least alike ({name}) has p = {least['p_value']:.2g} by Welch's test, which knows how few the "
        f"seeds are, and {least['p_corrected']:.2g} corrected for {len(figures)} comparisons (Holm)."
    )


def _pair(cell: Mapping[str, Any], name: str, otherwise: str) -> tuple[str, str, str]:
    """Ours, the paper's, and the difference."""
    theirs = _figure(cell["paper"][name]) if cell["paper"] else otherwise
    if not cell["runs"]:
        return (f"not run: {_why(cell)}" if name == QUANTITIES[0] else "not run"), theirs, ""
    ours = _text(cell, name)
    if cell["missing"]:
        ours += f" (n = {len(cell['runs'])} seed(s); {_seeds(cell['missing'])} not run)"
    return ours, theirs, cell["agreement"][name]["text"] if cell["agreement"] else ""


def _text(place: Mapping[str, Any], name: str) -> str:
    """Our mean, with a mark if something behind it was made again."""
    return f"{place['means'][name]['text']}{MARK if any(run.get('mixed') for run in place['runs']) else ''}"


def _figure(figure: Mapping[str, Any]) -> str:
    error = "" if figure["error"] is None else f" ± {figure['error']:.2f}"
    return f"{figure['mean']:.2f}{error}"


def _why(cell: Mapping[str, Any]) -> str:
    return "; ".join(dict.fromkeys(cell["missing"].values()))


def _seeds(missing: Iterable[str]) -> str:
    return "seed " + ", ".join(missing)


def _columns_text(cells: Sequence[Mapping[str, Any]], panel: Mapping[str, Any]) -> str:
    texts = {cell["column"]: cell["measure_text"] for cell in cells}
    lines = [f"- {column}: {text}" for column, text in texts.items()]
    lines.append(
        f"- test / robust; AutoAttack and DeepFool on the first {panel['attack_images']:,} test images. AutoAttack is "
        "the worst case per image over its attacks, PGD-20 and the clean image. Of an integer graph PGD is made on its "
        "differentiable twin; of AutoAttack, PGD and untargeted Auto-PGD are made on its twin, its simulated form and "
        "the float network, the other attacks on those that fool it most, Square on the graph itself. `worst case`, "
        "seed by seed, stands where the attack fools more images when it is made on another form of the network, which "
        "is a sign of masked gradients."
    )
    return "\n".join(lines)


def _matrix(cells: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(cell["column"] for cell in cells))
    rows = dict.fromkeys(cell["row"] for cell in cells)
    by_place = {(cell["row"], cell["column"]): cell for cell in cells}
    return _table(("network", *columns), [(row, *(_both(by_place[row, column]) for column in columns)) for row in rows])


def _both(cell: Mapping[str, Any]) -> str:
    if not cell["runs"]:
        return "not run"
    test, robust = (_text(cell, name) for name in QUANTITIES)
    seeds = f" ({len(cell['runs'])} seed(s))" if cell["missing"] else ""
    worst = f"; worst case {_worst(cell['runs'])}" if _is_masked(cell["runs"]) else ""
    return f"{test} / {robust}{worst}{seeds}"


def _is_masked(runs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the same attack, made elsewhere, leaves less than made on the judged network, in any run."""
    shares = [[share["value"] for share in run.get("by_surrogate", {}).values()] for run in runs]
    return any(
        run["robust"]["value"] - min(found) > TELLING_GAP for run, found in zip(runs, shares, strict=True) if found
    )


def _reasons(cells: Sequence[Mapping[str, Any]]) -> str:
    """Why cells of the matrix are empty, where there is no room for it."""
    reasons = dict.fromkeys(reason for cell in cells for reason in cell["missing"].values())
    return "\n".join(f"- not run: {reason}" for reason in reasons)


def _times(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of the last training of each network; the ratio is that of processor times, seed by seed."""
    header = ("training", "seeds", "minutes", "minutes of processor time", "share of full training", "energy, Wh")
    full = {_alike(run): run["cpu_seconds"] for run in rows[0]["runs"]}
    body = []
    for row in rows:
        if not row["runs"]:
            body.append((row["row"], "0", f"not run: {_why(row)}", "", "", ""))
            continue
        runs = row["runs"]
        shares = [run["cpu_seconds"] / full[_alike(run)] for run in runs if _alike(run) in full]
        body.append(
            (
                row["row"],
                str(len(runs)),
                _average([run["seconds"] / 60 for run in runs], ".1f") + _lost(runs),
                _average([run["cpu_seconds"] / 60 for run in runs], ".1f"),
                _share_of_full(shares, len(runs)),
                ENERGY
                if any(run["joules"] is None for run in runs)
                else _average([run["joules"] / 3600 for run in runs], ".2f"),
            )
        )
    note = (
        "Without what the training starts from. Processor time leaves out what other processes took of the machine, "
        "but not what they took of its caches; energy is that of all processor packages meanwhile. The paper's numbers "
        "are not at hand."
    )
    return f"{note}\n\n{_table(header, body)}"


def _share_of_full(shares: Sequence[float], runs: int) -> str:
    if not shares:
        return "not known: no full training on this machine"
    return _average(shares, ".3f") + (f" ({len(shares)} seed(s))" if len(shares) < runs else "")


def _alike(run: Mapping[str, Any]) -> str:
    """Runs whose times compare have the same: seed, machine and threads."""
    return json.dumps([run["seed"], run.get("machine"), run.get("threads")])


def _lost(runs: Sequence[Mapping[str, Any]]) -> str:
    lost = sum(run["lost"] for run in runs)
    return f" (at least: {lost} sitting(s) were killed)" if lost else ""


def _average(values: Sequence[float], form: str) -> str:
    return format(sum(values) / len(values), form)


def _curve(curve: Mapping[str, Any]) -> str:
    header = (curve["axis"], "test", "robust (PGD-20)", "worst case", "seeds")
    rows = []
    for point in curve["points"]:
        values = (
            [*(_text(point, name) for name in QUANTITIES), _worst(point["runs"])]
            if point["runs"]
            else [f"not run: {_why(point)}", "", ""]
        )
        rows.append((f"{point['x']:g}", *values, str(len(point["runs"]))))
    return f"### {curve['title']}\n\n{_table(header, rows)}"


def _worst(runs: Sequence[Mapping[str, Any]]) -> str:
    """The share of images that stand against PGD on every network that it was made on, seed by seed."""
    found = [run["worst_case"] for run in runs]
    return ", ".join(f"{100 * share['value']:.2f}" for share in found if share)


def _embedding(found: Mapping[str, Any]) -> str:
    if "missing" in found:
        return f"not run: {found['missing']}"
    rows = [
        (name, found["networks"][name], f"{correct} of {total}") for name, (correct, total) in found["robust"].items()
    ]
    text = f"{found['images']} test images of the class {found['class']}, seed {found['seed']}; t-SNE, perplexity 30."
    return f"{text}\n\n{_table(('panel', 'network', 'attacked images classified rightly'), rows)}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
