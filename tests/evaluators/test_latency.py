from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

from toolkit.config import BenchmarkConfig
from toolkit.errors import ToolkitError
from toolkit.evaluators import latency
from toolkit.evaluators.latency import Stopclock, benchmark, convert_float16


def write_network(path: Path, *, batch: str | int = "N", layers: int = 1) -> Path:
    """Layers of 3x3 convolutions, 4 channels, 8x8 pixels, and their mean."""
    generator = np.random.default_rng(0)
    kernels = [generator.normal(0, 0.2, (4, 4, 3, 3)).astype(np.float32) for _ in range(layers)]
    names = ["image", *(f"features{index}" for index in range(layers))]
    nodes = [
        helper.make_node("Conv", [names[index], f"kernel{index}"], [names[index + 1]], pads=[1, 1, 1, 1])
        for index in range(layers)
    ]
    nodes += [
        helper.make_node("GlobalAveragePool", [names[-1]], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [batch, 4, 8, 8])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [batch, 4])],
        [numpy_helper.from_array(kernel, f"kernel{index}") for index, kernel in enumerate(kernels)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {
        "fp32": write_network(tmp_path / "a.onnx"),
        "same": write_network(tmp_path / "b.onnx"),
        "large": write_network(tmp_path / "c.onnx", layers=4),
    }


def test_a_real_benchmark_has_a_row_per_file_and_batch(files: dict[str, Path]) -> None:
    config = BenchmarkConfig(batches=(1, 3), rounds=3, threads=1)
    rows = benchmark(files, config, (4, 8, 8), baseline="fp32")
    assert [(row.batch, row.file) for row in rows] == [(b, f) for b in (1, 3) for f in ("fp32", "same", "large")]
    for row in rows:
        assert 0 < row.p50 <= row.p90 <= row.p99
        assert row.ratio_low <= row.ratio <= row.ratio_high
        assert row.speedup == pytest.approx(1 / row.ratio)
        assert row.speedup_low <= row.speedup <= row.speedup_high
        assert row.throughput == pytest.approx(row.batch / row.p50 * 1000)
        assert (row.provider, row.threads, row.rounds, row.baseline) == ("cpu", 1, 3, "fp32")
        assert row.runs >= 3 and 0 <= row.foreign_load <= 1
        assert "one session alive at a time" in row.isolation
    assert [row.ratio for row in rows if row.file == "fp32"] == [1.0, 1.0]
    json.dumps([row.as_dict() for row in rows], allow_nan=False)


def test_order_changes_from_round_to_round_and_is_repeatable(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    opened = latency._open

    def spy(path: Path, config: BenchmarkConfig, threads: int) -> Any:
        seen.append(path.name)
        return opened(path, config, threads)

    monkeypatch.setattr(latency, "_open", spy)
    config = BenchmarkConfig(batches=(1,), rounds=8, threads=1)
    benchmark(files, config, (4, 8, 8), baseline="fp32", seed=1)
    first = list(seen)
    seen.clear()
    benchmark(files, config, (4, 8, 8), baseline="fp32", seed=1)
    assert seen == first
    rounds = [tuple(first[start : start + 3]) for start in range(0, len(first), 3)]
    assert all(sorted(names) == ["a.onnx", "b.onnx", "c.onnx"] for names in rounds)
    assert len(set(rounds)) > 1


def test_a_batch_that_takes_long_gets_fewer_rounds(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "CELL_S", 0.0)
    rows = benchmark(files, BenchmarkConfig(batches=(1,), rounds=9, threads=1), (4, 8, 8), baseline="fp32")
    assert {row.rounds for row in rows} == {latency.MIN_ROUNDS}


def test_a_busy_machine_is_said(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(latency, "BUSY", -1.0)
    benchmark(files, BenchmarkConfig(batches=(1,), rounds=3, threads=1), (4, 8, 8), baseline="fp32")
    assert "other processes took" in capsys.readouterr().err


def test_a_batch_that_does_not_fit_into_memory_is_refused() -> None:
    with pytest.raises(ToolkitError, match="does not fit into memory"):
        latency._fill(np.zeros((1, 1, 28, 28), np.float32), 10**10, (1, 28, 28))


def test_given_images_are_repeated_to_fill_the_batch() -> None:
    images = np.arange(2 * 4 * 8 * 8, dtype=np.float32).reshape(2, 4, 8, 8)
    filled = latency._fill(images, 5, (4, 8, 8))
    assert filled.shape == (5, 4, 8, 8)
    np.testing.assert_array_equal(filled[4], images[0])


def test_images_of_another_shape_are_refused(files: dict[str, Path]) -> None:
    images = np.zeros((1, 3, 8, 8), dtype=np.float32)
    with pytest.raises(ToolkitError, match="images do not fit"):
        benchmark(files, BenchmarkConfig(threads=1), (4, 8, 8), baseline="fp32", images=images)


def test_an_unknown_baseline_names_the_nearest(files: dict[str, Path]) -> None:
    with pytest.raises(ToolkitError, match="unknown baseline") as caught:
        benchmark(files, BenchmarkConfig(threads=1), (4, 8, 8), baseline="fp23")
    assert "did you mean 'fp32'" in caught.value.fix


def test_files_of_another_input_shape_are_refused(files: dict[str, Path]) -> None:
    with pytest.raises(ToolkitError, match="takes other inputs"):
        benchmark(files, BenchmarkConfig(threads=1, rounds=3), (4, 9, 9), baseline="fp32")


def test_a_fixed_batch_is_refused_unless_asked_for(tmp_path: Path) -> None:
    files = {"fixed": write_network(tmp_path / "fixed.onnx", batch=2)}
    with pytest.raises(ToolkitError, match="takes other inputs") as caught:
        benchmark(files, BenchmarkConfig(threads=1, rounds=3, batches=(1, 2)), (4, 8, 8), baseline="fixed")
    assert "--batch" in caught.value.fix
    assert benchmark(files, BenchmarkConfig(threads=1, rounds=3, batches=(2,)), (4, 8, 8), baseline="fixed")


def test_cuda_without_a_gpu_is_an_error_that_says_what_is_missing(files: dict[str, Path]) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ToolkitError, match="cannot run on 'cuda'") as caught:
        benchmark(files, BenchmarkConfig(provider="cuda"), (4, 8, 8), baseline="fp32")
    assert "--provider cpu" in caught.value.fix


def test_cuda_runs_bound_and_times_float16_too(files: dict[str, Path]) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    rows = benchmark(files, BenchmarkConfig(provider="cuda", rounds=3, batches=(2,)), (4, 8, 8), baseline="fp32")
    assert [row.file for row in rows] == ["fp32", "same", "large", "fp16"]
    assert {row.provider for row in rows} == {"cuda"}


def test_float16_keeps_inputs_outputs_and_answers(tmp_path: Path) -> None:
    from toolkit.exporters.session import make_session

    source = write_network(tmp_path / "fp32.onnx", layers=2)
    converted = convert_float16(source, tmp_path / "fp16.onnx")
    graph = onnx.load(converted).graph
    assert {tensor.data_type for tensor in graph.initializer} == {onnx.TensorProto.FLOAT16}
    images = np.random.default_rng(0).random((5, 4, 8, 8), dtype=np.float32)
    (full,), (half,) = (make_session(path, threads=1).run(None, {"image": images}) for path in (source, converted))
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, full, atol=2e-3)


class FakeSession:
    """Records how the CUDA path binds and runs."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def get_inputs(self) -> list[Any]:
        return [type("Node", (), {"name": "image"})]

    get_outputs = get_inputs

    def io_binding(self) -> Any:
        log = self.log

        class Binding:
            def bind_ortvalue_input(self, name: str, _value: object) -> None:
                log.append(f"in {name}")

            def bind_output(self, name: str, device: str) -> None:
                log.append(f"out {name} {device}")

            def synchronize_outputs(self) -> None:
                log.append("wait")

        return Binding()

    def run_with_iobinding(self, _binding: object) -> None:
        self.log.append("run")


def test_cuda_binds_once_and_waits_for_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", lambda *_arguments: None)
    session = FakeSession()
    call = latency._Runner("a.onnx", session, on_cuda=True).caller(np.zeros((1, 4, 8, 8), dtype=np.float32))
    call()
    call()
    assert session.log == ["in image", "out image cuda", "run", "wait", "run", "wait"]


def test_two_inputs_are_refused(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 18]>
        two (float[N, 4, 8, 8] a, float[N, 4, 8, 8] b) => (float[N, 4, 8, 8] c) { c = Add (a, b) }"""
    onnx.save(parser.parse_model(text), tmp_path / "two.onnx")
    with pytest.raises(ToolkitError, match="takes other inputs"):
        benchmark({"two": tmp_path / "two.onnx"}, BenchmarkConfig(threads=1), (4, 8, 8), baseline="two")


def test_a_stopclock_gives_the_mean_over_batch_sizes_round_by_round(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(1, 100))
    monkeypatch.setattr(latency, "time_block", lambda _call: np.full(3, float(next(seconds))))
    clock = Stopclock(BenchmarkConfig(batches=(1, 4), threads=1), np.zeros((2, 4, 8, 8), np.float32))
    found = clock.rounds({"a": files["fp32"]}, 2)
    assert found["a"] == pytest.approx([np.sqrt(1 * 2), np.sqrt(3 * 4)])
    assert set(clock.rounds(files, 1)) == set(files)
