"""The commands of `cli.py`; each module has `run(args) -> int | None`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any


def document(args: Namespace) -> dict[str, Any]:
    """The composed document of a command's `--config`, or else of its `--ckpt_path`, with `--plugins` and dotted
    overrides over it.

    Raises:
        ConfigError: there is no config, or a mistake in it.
    """
    from framework.errors import ConfigError
    from framework.process import imports

    checkpoint: str = getattr(args, "ckpt_path", None) or ""
    if not args.config and not checkpoint:
        instead = ", or a checkpoint with --ckpt_path" if hasattr(args, "ckpt_path") else ""
        raise ConfigError(f"name a config, for example --config experiments/base/tnt_digits.yaml{instead}")
    with imports():
        from framework.config import compose, parse_value

        settings = {path: parse_value(text, f"--{path}") for path, text in args.settings.items()}
        weights = settings.get("weights")
        if isinstance(weights, str) and weights and not weights.startswith("timm:"):
            settings["weights"] = str(Path(weights).resolve())
        kept = None if args.config else (checkpoint, kept_document(checkpoint, args.plugins))
        return compose(args.config or [], settings, args.plugins, kept)


def kept_document(checkpoint: str, plugins: list[str]) -> dict[str, Any]:
    """The document that a checkpoint keeps; a plug-in file that is given anew takes the place of its old one.

    Raises:
        ConfigError: there is no such checkpoint, it keeps none, or a plug-in of it is gone.
    """
    from framework.checkpoints import document_of, read_checkpoint
    from framework.errors import ConfigError
    from framework.run import existing

    path = existing(checkpoint)
    document = document_of(read_checkpoint(path), path)
    if not document.get("plugins"):
        return document
    anew = {Path(plugin).name for plugin in plugins}
    left = [plugin for plugin in document["plugins"] if Path(plugin).name not in anew]
    for plugin in left:
        if plugin.endswith(".py") and not Path(plugin).is_file():
            raise ConfigError(f"--ckpt_path: {path} needs a plug-in that is gone: {plugin}; name it: --plugins FILE")
    return {**document, "plugins": left}


def run_checkpoint(args: Namespace) -> Path:
    """The checkpoint of a command, by default the last one of the run folder that its config lies in."""
    from framework.errors import ConfigError
    from framework.run import LAST, existing

    if args.ckpt_path:
        return existing(args.ckpt_path)
    last = Path(args.config[-1]).parent / LAST
    if not last.is_file():
        raise ConfigError(
            "name the weights with --ckpt_path, or the config of a run folder that has them (runs/…/config.yaml)"
        )
    return last
