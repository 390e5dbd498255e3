"""A config file and the command line, merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolkit.cli import flags
from toolkit.cli.app import Settings
from toolkit.config import merge, override_threat, read_settings
from toolkit.errors import ToolkitError


def merged(settings: Settings, model: str | None, config: Path | None) -> dict[str, Any]:
    """The settings of a config file with what the command line says in their place.

    Args:
        settings: what the flags say, by dotted path.
        model: the model's file, or, where no `config` is named, a config file.
        config: the config file.

    Raises:
        ToolkitError: no model is named.
    """
    if model is not None and config is None and Path(model).suffix in (".yaml", ".yml"):
        config, model = Path(model), None
    given = flags.nested(settings | ({"model.path": model} if model else {}))
    saved = read_settings(config) if config else {}
    if "threat" in given and isinstance(saved.get("threat"), dict):
        saved["threat"] = override_threat(saved["threat"], given["threat"])
    values = merge(saved, given)
    if "model" not in values:
        raise ToolkitError(
            "no model is named",
            found="neither MODEL nor --config",
            fix="name a checkpoint, such as model.pt or shipped:cnn8, or settings with --config FILE",
        )
    return values
