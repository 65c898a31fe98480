"""The commands of `cli.py`; each module has `run(args) -> int | None`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any


def document(args: Namespace) -> dict[str, Any]:
    """The composed document of a command's `--config`, `--plugins` and dotted overrides.

    Raises:
        ConfigError: there is no config, or a mistake in it.
    """
    from framework.config import compose, parse_value
    from framework.errors import ConfigError

    if not args.config:
        raise ConfigError("name a config, for example --config experiments/base/tnt_digits.yaml")
    settings = {path: parse_value(text, f"--{path}") for path, text in args.settings.items()}
    weights = settings.get("weights")
    if isinstance(weights, str) and weights and not weights.startswith("timm:"):
        settings["weights"] = str(Path(weights).resolve())
    return compose(args.config, settings, args.plugins)
