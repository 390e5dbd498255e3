"""Sessions whose integer sums do not saturate, for tests that compare graphs and not machines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnxruntime
import pytest

from toolkit.evaluators.saturating_layers import saturates_here


@contextmanager
def exact_sums() -> Iterator[None]:
    """On x86 without VNNI ONNX Runtime takes the slower kernels of unsigned weights; elsewhere nothing changes."""
    plain = onnxruntime.InferenceSession

    def exact(path: Any, sess_options: Any = None, *further: Any, **others: Any) -> Any:
        options = sess_options or onnxruntime.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", "1")
        return plain(path, options, *further, **others)

    with pytest.MonkeyPatch.context() as patch:
        if saturates_here():
            patch.setattr(onnxruntime, "InferenceSession", exact)
        yield
