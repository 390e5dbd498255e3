"""`--round-to auto`: the multiple to which pruned widths are rounded, found by timing whole pruned networks.

Kernels work in blocks of columns, so a width just above a multiple costs as much as the next one. A candidate's network
is pruned, not tuned (weights do not change times), exported, quantised and timed side by side with all others, as the
graph that would ship: float, or, of the integer graphs with and without a float first layer, the faster one.

What counts is time per kept multiply-accumulate: a network that is faster merely because it is smaller gains nothing.
Candidates hold the multiply-accumulates of the asked ratio, give or take `TOLERANCE`; wider ones count where they take
no more time than the asked widths, which is capacity for nothing. Of those that cannot be told apart, the one nearest
to what was asked is taken.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from toolkit.artifacts import OnnxModel, Split, TorchModel
from toolkit.config import ExportConfig, PruneConfig, QuantizeConfig
from toolkit.errors import ToolkitError
from toolkit.evaluators.cost import macs
from toolkit.evaluators.latency import Stopclock
from toolkit.evaluators.timing import FloatArray, Interval, ratio_interval
from toolkit.exporters.onnx import export_onnx
from toolkit.exporters.quantize import Quantizer
from toolkit.progress import task
from toolkit.pruning import PruningResult, prune

MULTIPLES = (1, 2, 4, 8, 16, 32)
ASKED = 1
"""No rounding: the widths of the asked ratio."""
TOLERANCE = 0.1
"""By which multiply-accumulates may differ from those asked for."""
ROUNDS = 12
CALIBRATION = 32
"""Images: the ranges that they set do not change times."""
FLOAT, INTEGER, FIRST_FLOAT = "float", "integer", "first layer float"


@dataclass(frozen=True, slots=True)
class Rounding:
    """One multiple, or several that lead to the same widths, and what they come to."""

    round_to: int
    macs: int
    time: Interval
    """Of the graph that would ship, over that of the asked widths; geometric mean over the batch sizes."""
    float_time: Interval
    """The same of the float graph over the float graph of the asked widths."""
    per_mac: Interval
    """Time per multiply-accumulate over that of the best of the admitted."""
    graph: str
    """The one that would ship: `float`, `integer`, or `first layer float`."""
    admitted: bool
    """Near enough to what was asked for, or wider for nothing."""


@dataclass(frozen=True)
class RoundingChoice:
    """All multiples that were tried, and the one that is taken."""

    tried: tuple[Rounding, ...]
    chosen: int
    foreign_load: float = 0.0
    """Share of the CPU time that other processes took while they were timed."""

    def write(self, path: Path, key: str) -> None:
        """Keep it in a JSON file, for what `key` stands for alone."""
        path.write_text(json.dumps({"key": key, "found": asdict(self)}), encoding="utf-8")

    @classmethod
    def read(cls, path: Path, key: str) -> RoundingChoice | None:
        """What was kept for `key`; None: nothing."""
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if kept["key"] != key or set(kept["found"]) != {field.name for field in fields(cls)}:
            return None
        intervals = ("time", "float_time", "per_mac")
        tried = (
            Rounding(**{**row, **{name: Interval(**row[name]) for name in intervals}}) for row in kept["found"]["tried"]
        )
        return cls(tuple(tried), kept["found"]["chosen"], kept["found"]["foreign_load"])


def fingerprint(model: TorchModel, config: PruneConfig) -> str:
    """Of a network's weights and of how it is pruned."""
    digest = hashlib.sha256(config.model_dump_json(exclude={"round_to"}).encode())
    for name, tensor in model.network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Candidates:
    """How candidates are made: as the run would make what ships."""

    prune: PruneConfig
    """Ratio (above 0) and scope."""
    export: ExportConfig
    quantize: QuantizeConfig
    calibration: Split
    """Images, of which a few are taken."""
    folder: Path
    """Where they are written; the caller's to remove."""


def choose_rounding(model: TorchModel, how: Candidates, clock: Stopclock, *, seed: int = 0) -> RoundingChoice:
    """Prune, export, quantise and time `model` for every multiple in `MULTIPLES`.

    Args:
        model: left as it is.
        how: candidates are made.
        clock: times the files.
        seed: of the bootstrap.

    Raises:
        ToolkitError: the network cannot be pruned by that ratio, whatever the multiple.
    """
    found: dict[int, _Candidate] = {}
    known: set[tuple[int, ...]] = set()
    with task("widths", len(MULTIPLES)) as bar:
        for multiple in MULTIPLES:
            pruned = _prune(model, how.prune, multiple)
            widths = tuple(layer.after for layer in pruned.layers) if pruned else ()
            if pruned is not None and widths not in known:
                found[multiple] = _write(pruned.model, how, multiple)
                known.add(widths)
            bar.advance()
    files = {f"{multiple} {graph}": path for multiple, one in found.items() for graph, path in one.files.items()}
    times = clock.rounds(files, ROUNDS)
    work = {m: one.macs for m, one in found.items()}
    picked = pick(work, {m: _times_of(times, m) for m in found}, seed=seed)
    return replace(picked, foreign_load=clock.foreign_load)


def pick(work: Mapping[int, int], times: Mapping[int, Mapping[str, FloatArray]], *, seed: int = 0) -> RoundingChoice:
    """Choose among measured candidates, by the rule that this module's text states.

    Args:
        work: multiply-accumulates by multiple; `ASKED` is among them.
        times: seconds by multiple and graph, [rounds]; every multiple has `float`, and where integers ship those too.
        seed: of the bootstrap.
    """
    ships = {multiple: _fastest(graphs) for multiple, graphs in times.items()}
    time = {m: ratio_interval(times[m][ships[m]], times[ASKED][ships[ASKED]], seed) for m in work}
    near = {m: work[m] / work[ASKED] for m in work}
    admitted = [m for m in work if near[m] >= 1 - TOLERANCE and (near[m] <= 1 + TOLERANCE or time[m].high <= 1)]
    best = min(admitted, key=lambda m: time[m].value / near[m])
    per_mac = {
        m: _scaled(ratio_interval(times[m][ships[m]], times[best][ships[best]], seed), near[best] / near[m])
        for m in work
    }
    alike = [m for m in admitted if per_mac[m].low <= 1]
    chosen = min(alike, key=lambda m: max(near[m], 1 / near[m]))
    tried = tuple(
        Rounding(
            round_to=m,
            macs=work[m],
            time=time[m],
            float_time=ratio_interval(times[m][FLOAT], times[ASKED][FLOAT], seed),
            per_mac=per_mac[m],
            graph=ships[m],
            admitted=m in admitted,
        )
        for m in work
    )
    return RoundingChoice(tried, chosen)


@dataclass(frozen=True)
class _Candidate:
    """A pruned network's multiply-accumulates, and its graphs."""

    macs: int
    files: Mapping[str, Path]


def _prune(model: TorchModel, config: PruneConfig, multiple: int) -> PruningResult | None:
    """None: rounded to this multiple nothing is removed."""
    try:
        return prune(model, config.model_copy(update={"round_to": multiple}))
    except ToolkitError:
        if multiple == ASKED:
            raise
        return None


def _write(pruned: TorchModel, how: Candidates, multiple: int) -> _Candidate:
    fp32 = export_onnx(pruned, how.folder / f"{multiple}-float.onnx", how.export)
    files = {FLOAT: fp32.path}
    if how.quantize.int8:
        files |= _write_integer(fp32, multiple, how)
    return _Candidate(macs(pruned), files)


def _write_integer(fp32: OnnxModel, multiple: int, how: Candidates) -> dict[str, Path]:
    config = how.quantize.model_copy(update={"calibrate": "minmax", "calibrate_adversarial": 0.0})
    quantizer = Quantizer(fp32, how.calibration.first(CALIBRATION), config)
    graphs: dict[str, Sequence[str]] = {INTEGER: ()}
    if config.precision == "auto":  # the layer that it leaves float most often
        first = next((name for name in quantizer.layers if name not in quantizer.kept), None)
        if first is not None and len(quantizer.layers) - len(quantizer.kept) > 1:
            graphs[FIRST_FLOAT] = (first,)
    files = {}
    for number, (graph, kept) in enumerate(graphs.items()):
        files[graph] = how.folder / f"{multiple}-integer-{number}.onnx"
        quantizer.write(files[graph], keep_float=kept)
    return files


def _times_of(times: Mapping[str, FloatArray], multiple: int) -> dict[str, FloatArray]:
    named = (key.split(" ", 1) for key in times)
    return {graph: times[f"{number} {graph}"] for number, graph in named if number == str(multiple)}


def _fastest(graphs: Mapping[str, FloatArray]) -> str:
    """Of the integer graphs, where there are any: float ships only where none was asked for."""
    integer = {graph: times for graph, times in graphs.items() if graph != FLOAT}
    return min(integer, key=lambda graph: float(sorted(integer[graph])[len(integer[graph]) // 2])) if integer else FLOAT


def _scaled(interval: Interval, factor: float) -> Interval:
    return Interval(interval.value * factor, interval.low * factor, interval.high * factor)
