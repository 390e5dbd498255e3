"""ONNX Runtime sessions: the only place that makes them (onnxruntime.quantization makes its own while calibrating)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.exporters.interface import FIX, GraphInterface, read_interface

Provider = Literal["cpu", "cuda"]

PROVIDER_NAMES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
LOG_ERRORS_ONLY = 3
LOG_NOTHING = 4


def hide_log() -> None:
    """Keep ONNX Runtime's own messages off stderr, those from outside sessions too; our errors say what matters."""
    onnxruntime.set_default_logger_severity(LOG_NOTHING)


def make_session(
    path: Path,
    *,
    provider: Provider = "cpu",
    threads: int | None = None,
    optimized: bool = True,
    spinning: bool = True,
    profile_prefix: Path | None = None,
    optimized_path: Path | None = None,
    custom_ops: str | None = None,
) -> Any:
    """An `onnxruntime.InferenceSession` on the provider asked for, or an error.

    Args:
        path: the ONNX file.
        provider: what is to run it; on `cuda`, operators that CUDA lacks run on the CPU as ONNX Runtime sees fit.
        threads: CPU threads; None: as many as torch uses.
        optimized: all graph optimisations, as deployed; False: none (the graph as it stands in the file).
        spinning: let idle threads wait busily. Faster while one session is alive, and it disturbs every other one.
        profile_prefix: where to write a profile; `end_profiling()` of the session gives the file's name.
        optimized_path: where to write the graph after optimisation.
        custom_ops: a library of operators that the graph needs.

    Raises:
        ToolkitError: no ONNX model in the file, or no such provider on this machine.
    """
    hide_log()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = LOG_NOTHING
    options.intra_op_num_threads = threads if threads is not None else torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    if custom_ops is not None:
        options.register_custom_ops_library(custom_ops)
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
    names = [PROVIDER_NAMES[provider]] if provider == "cpu" else [PROVIDER_NAMES[provider], PROVIDER_NAMES["cpu"]]
    if provider == "cuda":
        _require_cuda()
    session = _open(path, options, names)
    if session.get_providers()[0] != PROVIDER_NAMES[provider]:
        raise _no_provider(provider, f"the session fell back to {session.get_providers()[0]}")
    return session


def _open(path: Path, options: Any, providers: list[str]) -> Any:
    fix = "name an ONNX file that this version of ONNX Runtime can read"
    if not path.is_file():
        raise ToolkitError("there is no such ONNX file", found=str(path), fix="check the path")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        # ONNX Runtime's exception classes share no base of their own.
        reason = str(error).splitlines()[0][:300]
        raise ToolkitError("ONNX Runtime cannot load the file", found=f"{path}: {reason}", fix=fix) from error


def why_no_cuda() -> str | None:
    """What keeps ONNX Runtime off a GPU here; None: nothing that is known before a session is made."""
    if PROVIDER_NAMES["cuda"] not in onnxruntime.get_available_providers():
        return "this build of onnxruntime has no CUDA provider"
    return None if torch.cuda.is_available() else "torch finds no NVIDIA GPU or no driver"


def check_provider(provider: Provider) -> None:
    """Refuse a provider that this machine lacks."""
    reason = why_no_cuda() if provider == "cuda" else None
    if reason is not None:
        raise _no_provider(provider, reason)


def _require_cuda() -> None:
    check_provider("cuda")
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # torch's wheels bring the CUDA and cuDNN libraries


def _no_provider(provider: str, reason: str) -> ToolkitError:
    return ToolkitError(
        f"ONNX Runtime cannot run on '{provider}' here",
        found=reason,
        fix="use --provider cpu, or install onnxruntime-gpu and the NVIDIA driver (`toolkit doctor` checks both)",
    )


class OnnxPredictor:
    """Logits of an ONNX classifier file, ours or a stranger's, by ONNX Runtime.

    Args:
        path: file with one image input, [N, C, H, W] or [N, H, W, C] in float32, float16 or uint8, and one output
            [N, classes]: logits, or probabilities (then the logits are their logarithms).
        provider: `cpu` or `cuda`; the session is checked to run there.
        threads: CPU threads; None: as many as torch uses.
        optimized: the graph as deployed; False: as it stands in the file.
        batch_size: images per run; larger inputs are cut.
        interface: how the file is to be fed, where that differs from what the file says (a normalisation outside of
            it, or pixels up to 255 in a float input); None: `read_interface`.

    Raises:
        ToolkitError: no such file, no ONNX in it, no such provider, or a graph that is no image classifier.
    """

    def __init__(
        self,
        path: Path,
        *,
        provider: Provider = "cpu",
        threads: int | None = None,
        optimized: bool = True,
        batch_size: int = 256,
        interface: GraphInterface | None = None,
    ) -> None:
        self.path = path
        # Predictors live beside torch's threads and other sessions: no busy waiting.
        self._session = make_session(path, provider=provider, threads=threads, optimized=optimized, spinning=False)
        self.interface = interface or read_interface(path)
        """What the file takes and gives."""
        self._fixed = self.interface.batch
        self._batch_size = batch_size if self._fixed is None else self._fixed
        if self.interface.classes is None:
            self.interface = replace(self.interface, classes=self._count_classes())

    @property
    def provider(self) -> str:
        """The provider that the session really uses, in ONNX Runtime's words."""
        return str(self._session.get_providers()[0])

    @property
    def input_name(self) -> str:
        """Of the file's image input."""
        return self.interface.input_name

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """(channels, height, width) of the images; None where the file takes any."""
        return self.interface.input_shape

    def predict(self, images: Tensor) -> Tensor:
        """Logits float32 [n, classes] of images float32 [n, C, H, W] in [0, 1].

        Raises:
            ToolkitError: images of another shape than the file takes.
        """
        self._check(images)
        fed = self.interface.feed(images.detach().cpu().float()).numpy()
        starts = range(0, max(1, len(fed)), self._batch_size)
        parts = [self._run(fed[start : start + self._batch_size]) for start in starts]
        return self.interface.logits(torch.from_numpy(np.concatenate(parts)))

    def _run(self, part: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
        missing = 0 if self._fixed is None else self._fixed - len(part)
        padded = np.concatenate([part, np.zeros((missing, *part.shape[1:]), part.dtype)]) if missing else part
        (output,) = self._session.run([self.interface.output_name], {self.interface.input_name: padded})
        return np.asarray(output, dtype=np.float32)[: len(part)]

    def _count_classes(self) -> int | None:
        """The classes that one image shows; None if the file takes images of any size, so that none can be made."""
        channels, height, width = self.interface.input_shape
        if channels is None or height is None or width is None:
            return None
        output = self._run(self.interface.feed(torch.zeros(1, channels, height, width)).numpy())
        if output.ndim != 2:
            raise ToolkitError(
                "the ONNX file is no classifier",
                found=f"{self.path}: output '{self.interface.output_name}' of one image is {list(output.shape)}",
                fix=FIX,
            )
        return int(output.shape[1])

    def _check(self, images: Tensor) -> None:
        agree = images.ndim == 4 and all(
            wanted in (None, size) for wanted, size in zip(self.input_shape, images.shape[1:], strict=True)
        )
        if not agree:
            raise ToolkitError(
                "the images do not fit the ONNX file",
                found=f"images {tuple(images.shape)}, {self.path.name} takes [N, "
                + ", ".join("any" if size is None else str(size) for size in self.input_shape)
                + "]",
                fix="give images of the size and channels that the network was trained on (--data, --size)",
            )
