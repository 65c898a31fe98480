"""`export`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from framework.commands import document as composed
from framework.commands import run_checkpoint
from framework.errors import ConfigError


def run(args: Namespace) -> int:
    target = Path(args.out)
    if target.suffix not in (".pt2", ".onnx"):
        raise ConfigError(f"--out: got {args.out}; name a file that ends in .pt2 or .onnx")
    if not target.parent.is_dir():
        raise ConfigError(f"--out: no such folder: {target.parent}")
    if args.batch is not None and args.batch < 1:
        raise ConfigError(f"--batch: got {args.batch}, must be at least 1")
    document = composed(args)
    for section in ("ablation", "launcher"):
        document.pop(section, None)

    from framework.checkpoints import Kept, kept_in, read_checkpoint
    from framework.construct import Workbench, build_model, complete
    from framework.export import export
    from framework.run import LAST, load_weights
    from framework.weights.transfer import source, start_from

    kept: Kept | None = None
    # What a run ended with goes before what it started from, but not before what the command line names.
    trained = args.ckpt_path or ("weights" not in args.settings and (Path(args.config[-1]).parent / LAST).is_file())
    if trained or not document.get("weights"):
        checkpoint = run_checkpoint(args)
        kept = kept_in(read_checkpoint(checkpoint), checkpoint)
        facts = kept.facts(document) if kept else None
        task = build_model(document, facts)
        load_weights(task, checkpoint)
        kept = kept if facts else None
    else:
        task = build_model(document)
        print(f"{document['weights']}: {start_from(task, source(document['weights']))}")
    try:
        kept = kept or Kept.of(document, Workbench(complete(document)).make_data())
    except ConfigError as error:
        print(f"without class names and normalisation: {error}")
    difference = export(task, target, metadata(document, kept), args.batch or 0)
    print(f"largest difference to the net: {difference:.1e} of its largest logit\n{target}")
    return 0


def metadata(document: dict[str, Any], kept: Any) -> dict[str, Any]:
    """What a reader of the file needs to know: how images go in, what the logits mean, and the config."""
    from framework.config import dump

    found: dict[str, Any] = {"name": document["name"], "config": dump(document)}
    if kept is not None:
        found |= {key: value for key, value in kept.plain().items() if key != "config"}
    return found
