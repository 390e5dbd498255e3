"""Latency and throughput of ONNX files, interleaved, as ratios with intervals.

One session is alive at a time: idle sessions' thread pools spin and slow down whoever is being measured; and turning
the spinning off slows every file by another factor than users will see. So each round takes the files in a new random
order; each gets a fresh session, a warm-up and a block of timed calls. The block's median is the round's sample; the
ratio is the median over rounds of file / baseline of the SAME round, so drifts of the machine's speed cancel out.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from toolkit.config import BenchmarkConfig
from toolkit.errors import ToolkitError, unknown_name
from toolkit.evaluators.environment import usable_threads
from toolkit.evaluators.timing import BUSY, FloatArray, collector_off, foreign_load, ratio_interval, time_block
from toolkit.exporters.session import make_session
from toolkit.progress import notice, task

ImageArray = npt.NDArray[np.float32]

ISOLATION = "one session alive at a time, thread pool spinning"
FP16 = "fp16"
CELL_S = 5.0
"""Time for all calls of one file at one batch, on average; once it is spent no round follows, after `MIN_ROUNDS`."""
TELLING_S = 2.0
"""Seconds of timing over which the load by other processes is told; in less, a daemon's moment looks like load."""
MIN_ROUNDS = 6
"""The least and the largest of 6 ratios enclose their median with 97 % confidence; of 5, with 94 %."""


@dataclass(frozen=True, slots=True)
class LatencyRow:
    """One file at one batch size; times are milliseconds per call, ratios are time(file) / time(baseline)."""

    file: str
    provider: str
    batch: int
    threads: int
    p50: float
    p90: float
    p99: float
    throughput: float
    """Images per second at the median time."""
    runs: int
    rounds: int
    baseline: str
    ratio: float
    """Below 1 is faster than the baseline."""
    ratio_low: float
    ratio_high: float
    foreign_load: float
    """Share of the CPU time that other processes took meanwhile; above `BUSY` nothing in the row is to be trusted."""
    isolation: str = ISOLATION

    @property
    def trusted(self) -> bool:
        """Whether this machine was left alone while the file was timed."""
        return self.foreign_load <= BUSY

    @property
    def speedup(self) -> float:
        return 1 / self.ratio

    @property
    def speedup_low(self) -> float:
        return 1 / self.ratio_high

    @property
    def speedup_high(self) -> float:
        return 1 / self.ratio_low

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data, the speed-up with its interval included."""
        faster = {name: getattr(self, name) for name in ("speedup", "speedup_low", "speedup_high")}
        return {**asdict(self), **faster}


def benchmark(
    files: Mapping[str, Path],
    config: BenchmarkConfig,
    input_shape: tuple[int, int, int],
    *,
    baseline: str,
    seed: int = 0,
    images: ImageArray | None = None,
) -> tuple[LatencyRow, ...]:
    """Time ONNX classifiers side by side.

    Args:
        files: name to file; on CUDA the baseline in float16 is timed too, as `fp16`.
        config: provider, batch sizes, threads, rounds.
        input_shape: (channels, height, width) of all files.
        baseline: the name in `files` that ratios refer to.
        seed: of the order of the files, of made-up images and of the bootstrap.
        images: float32 [n, C, H, W] in [0, 1], repeated to fill a batch; None: uniform noise.

    Returns:
        One row per file and batch size, batch sizes in the order of the config, files in theirs.

    Raises:
        ToolkitError: no such provider on this machine, no such baseline, or a file that takes other inputs.
    """
    if baseline not in files:
        raise unknown_name("baseline of the benchmark", baseline, files)
    threads = usable_threads(config.threads)
    with tempfile.TemporaryDirectory() as folder:
        named = dict(files)
        if config.provider == "cuda":
            _open(files[baseline], config, threads).check(
                input_shape, config.batches
            )  # no CUDA: said before converting
            named.setdefault(FP16, convert_float16(files[baseline], Path(folder) / "fp16.onnx"))
        pixels = images if images is not None else _noise(input_shape, seed)
        feeds = {batch: _fill(pixels, batch, input_shape) for batch in dict.fromkeys(config.batches)}
        with foreign_load() as load, task("benchmark", config.rounds * len(named)) as shown:
            samples = _measure(named, config, threads, feeds, seed, shown.advance)
    if load() > BUSY:
        notice(f"benchmark: other processes took {load():.0%} of the CPU time; times and ratios are not to be trusted")
    measured = _Measured(samples, baseline, config.provider, threads, load(), seed)
    return tuple(_row(name, batch, measured) for batch in feeds for name in named)


def convert_float16(path: Path, output: Path) -> Path:
    """Write a float ONNX file with float16 weights and arithmetic; inputs and outputs stay float32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), output)
    return output


Samples = dict[tuple[str, int], list[FloatArray]]
"""File and batch to one array per round: seconds of every timed call."""


@dataclass(frozen=True, slots=True)
class _Measured:
    """All samples of a benchmark and what they were taken under."""

    samples: Samples
    baseline: str
    provider: str
    threads: int
    foreign_load: float
    seed: int


def _measure(
    files: Mapping[str, Path],
    config: BenchmarkConfig,
    threads: int,
    feeds: Mapping[int, ImageArray],
    seed: int,
    advance: Callable[[], object] = lambda: None,
) -> Samples:
    """Run the rounds; a batch size whose time is spent takes no part in later ones, for all files alike."""
    generator = np.random.default_rng(seed)
    samples: Samples = {(name, batch): [] for batch in feeds for name in files}
    spent = dict.fromkeys(feeds, 0.0)
    shape = next(iter(feeds.values())).shape[1:]
    with collector_off():
        for index in range(config.rounds):
            due = [batch for batch in feeds if index < MIN_ROUNDS or spent[batch] < CELL_S * len(files)]
            for name in generator.permutation(list(files)) if due else ():
                runner = _open(files[str(name)], config, threads)
                runner.check(shape, due)
                for batch in due:
                    start = time.perf_counter()
                    samples[str(name), batch].append(time_block(runner.caller(feeds[batch])))
                    spent[batch] += time.perf_counter() - start
                del runner
                advance()
    return samples


class Stopclock:
    """Times files side by side again and again, for a search: one time per round and file.

    Args:
        config: provider, batch sizes, threads.
        images: float32 [n, C, H, W] in [0, 1], repeated to fill a batch.
        seed: of the order of the files.
    """

    def __init__(self, config: BenchmarkConfig, images: ImageArray, *, seed: int = 0) -> None:
        self._config, self._threads, self._seed = config, usable_threads(config.threads), seed
        shape = images.shape[1:]
        self._feeds = {batch: _fill(images, batch, shape) for batch in dict.fromkeys(config.batches)}
        self._seconds = self._foreign = self._largest = 0.0

    @property
    def foreign_load(self) -> float:
        """Share of the CPU time that other processes took while it was timing; above `BUSY` it is not to be trusted.

        Over all of that time, or, where it is more, over one call that took long enough to tell.
        """
        return max(self._largest, self._foreign / self._seconds) if self._seconds else 0.0

    def rounds(self, files: Mapping[str, Path], count: int) -> dict[str, FloatArray]:
        """Seconds per call, geometric mean over the batch sizes of the median in each block, [rounds].

        Rounds are fewer where a batch size takes long, as in `benchmark`.
        """
        config = self._config.model_copy(update={"rounds": count})
        start = time.perf_counter()
        with foreign_load() as load:
            samples = _measure(files, config, self._threads, self._feeds, self._seed)
        seconds = time.perf_counter() - start
        self._seconds, self._foreign = self._seconds + seconds, self._foreign + load() * seconds
        if seconds >= TELLING_S:
            self._largest = max(self._largest, load())
        blocks = {key: np.array([np.median(block) for block in found]) for key, found in samples.items()}
        made = min(map(len, blocks.values()))
        return {
            name: np.exp(np.mean([np.log(blocks[name, batch][:made]) for batch in self._feeds], axis=0))
            for name in files
        }


@dataclass(frozen=True, slots=True)
class _Runner:
    """A live session on one file."""

    name: str
    session: Any
    on_cuda: bool

    def check(self, shape: tuple[int, ...], batches: tuple[int, ...] | list[int]) -> None:
        inputs = self.session.get_inputs()
        wanted = inputs[0].shape
        fits = len(inputs) == 1 and len(wanted) == 4 and inputs[0].type == "tensor(float)"
        fits = fits and all(
            not isinstance(size, int) or size == ours for size, ours in zip(wanted[1:], shape, strict=True)
        )
        fits = fits and (not isinstance(wanted[0], int) or all(batch == wanted[0] for batch in batches))
        if not fits:
            raise ToolkitError(
                "the ONNX file takes other inputs than the benchmark gives",
                found=f"{self.name}: {inputs[0].type} {wanted}; the benchmark gives float32 {[*batches]} x {[*shape]}",
                fix="give files of one input shape, with a dynamic batch or with --batch set to their own",
            )

    def caller(self, images: ImageArray) -> Callable[[], object]:
        """A function that runs the session once on `images`; on CUDA with inputs and outputs bound there."""
        name = self.session.get_inputs()[0].name
        if not self.on_cuda:
            feed = {name: images}
            return lambda: self.session.run(None, feed)
        import onnxruntime

        binding = self.session.io_binding()
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(images, "cuda", 0))
        for output in self.session.get_outputs():
            binding.bind_output(output.name, "cuda")

        def run() -> None:
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return run


def _open(path: Path, config: BenchmarkConfig, threads: int) -> _Runner:
    """A session on the provider asked for (`make_session` refuses any other)."""
    return _Runner(path.name, make_session(path, provider=config.provider, threads=threads), config.provider == "cuda")


def _row(name: str, batch: int, measured: _Measured) -> LatencyRow:
    blocks = measured.samples[name, batch]
    times = np.concatenate(blocks)
    p50, p90, p99 = (float(value) for value in np.quantile(times, (0.5, 0.9, 0.99)) * 1000)
    ours, theirs = (
        np.array([np.median(block) for block in measured.samples[which, batch]]) for which in (name, measured.baseline)
    )
    ratio = ratio_interval(ours, theirs, measured.seed)
    return LatencyRow(
        file=name,
        provider=measured.provider,
        batch=batch,
        threads=measured.threads,
        p50=p50,
        p90=p90,
        p99=p99,
        throughput=batch / p50 * 1000,
        runs=len(times),
        rounds=len(blocks),
        baseline=measured.baseline,
        ratio=ratio.value,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        foreign_load=measured.foreign_load,
    )


def _noise(shape: tuple[int, int, int], seed: int) -> ImageArray:
    return np.random.default_rng(seed).random((8, *shape), dtype=np.float32)


def _fill(images: ImageArray, batch: int, shape: tuple[int, int, int]) -> ImageArray:
    """`batch` images, repeating those given."""
    if images.ndim != 4 or len(images) == 0 or images.shape[1:] != shape:
        raise ToolkitError(
            "the images do not fit the benchmark",
            found=f"shape {images.shape}, wanted [n, {', '.join(map(str, shape))}]",
            fix="give at least one image of the network's input shape",
        )
    needed, available = 4 * batch * int(np.prod(shape)), psutil.virtual_memory().available
    if needed > available:
        raise ToolkitError(
            "a batch does not fit into memory",
            found=f"--batch {batch}: {needed / 2**30:.1f} GiB, and {available / 2**30:.1f} GiB are free",
            fix="name smaller batches",
        )
    return np.ascontiguousarray(np.resize(images, (batch, *shape)), dtype=np.float32)
