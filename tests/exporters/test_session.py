from __future__ import annotations

from pathlib import Path

import pytest
import torch
from onnx import helper

from toolkit.config import ExportConfig
from toolkit.errors import ToolkitError
from toolkit.exporters.onnx import export_onnx
from toolkit.exporters.session import OnnxPredictor, make_session

from .small import onnx_file, tiny, wrap


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(wrap(tiny(), (1, 8, 8)), tmp_path_factory.mktemp("session") / "m.onnx", ExportConfig()).path


def test_images_are_cut_into_batches_and_put_together_again(file: Path) -> None:
    images = torch.rand(10, 1, 8, 8)
    whole, cut = OnnxPredictor(file), OnnxPredictor(file, batch_size=3)
    torch.testing.assert_close(cut.predict(images), whole.predict(images))
    assert whole.predict(images).shape == (10, 3)
    assert whole.predict(images[:0]).shape == (0, 3)
    assert whole.provider == "CPUExecutionProvider"


def test_unoptimised_and_optimised_sessions_agree_with_torch(file: Path) -> None:
    images = torch.rand(5, 1, 8, 8)
    wanted = wrap(tiny(), (1, 8, 8)).predict(images)
    for optimized in (True, False):
        torch.testing.assert_close(OnnxPredictor(file, optimized=optimized, threads=1).predict(images), wanted)


def test_a_file_with_a_fixed_batch_is_padded(tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "f.onnx", [helper.make_node("Flatten", ["image"], ["logits"])], [4, 1, 2, 2])
    images = torch.rand(6, 1, 2, 2)
    torch.testing.assert_close(OnnxPredictor(path).predict(images), images.flatten(1))


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match="no such ONNX file"):
        make_session(tmp_path / "none.onnx")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x08\x07\x12\x07pytorch"])
def test_a_file_without_onnx_is_refused_and_nothing_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes
) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(ToolkitError, match="ONNX Runtime cannot load the file"):
        make_session(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_where_there_is_none_says_what_is_missing(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ToolkitError, match="'cuda'") as caught:
        OnnxPredictor(file, provider="cuda")
    assert "GPU" in caught.value.found or "CUDA" in caught.value.found
    assert "--provider cpu" in caught.value.fix
    assert capfd.readouterr() == ("", "")


def test_images_that_do_not_fit_are_refused(file: Path) -> None:
    for shape in ((2, 3, 8, 8), (2, 1, 9, 8), (1, 8, 8)):
        with pytest.raises(ToolkitError, match="do not fit"):
            OnnxPredictor(file).predict(torch.rand(shape))


def test_a_graph_that_takes_no_image_is_refused(tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "f.onnx", [helper.make_node("Relu", ["image"], ["logits"])], ["N", 7])
    with pytest.raises(ToolkitError, match="no image classifier"):
        OnnxPredictor(path)


def test_profile_and_optimised_graph_are_written_where_asked(file: Path, tmp_path: Path) -> None:
    session = make_session(file, profile_prefix=tmp_path / "profile", optimized_path=tmp_path / "optimised.onnx")
    assert Path(session.end_profiling()).parent == tmp_path
    assert (tmp_path / "optimised.onnx").stat().st_size > 0
