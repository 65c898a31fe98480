"""The command line. Imports the standard library only, until a command needs more: `--help` answers at once."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import NoReturn

from framework.errors import ConfigError, nearest, suggest
from framework.process import prepare

SECTIONS = ("model", "data", "trainer", "seed", "name", "weights", "ablation", "launcher")
EXAMPLES = """\
examples:
  python cli.py fit --config experiments/ablation_pos.yaml        train every variant of a study, print its table
  python cli.py fit --config experiments/base/tnt_digits.yaml --model.backbone.dim=96 --trainer.max_epochs=5
  python cli.py fit --config experiments/ablation_pos.yaml --launcher=Slurm --launcher.partition=gpu --launcher.gpus=1
  python cli.py plan --config experiments/ablation_hybrid.yaml    what a study would train
  python cli.py describe --config experiments/zoo/next_vit_s.yaml params, MACs, levels, one line for each block
  python cli.py predict --ckpt_path best.ckpt --images photos/    class names and probabilities, as CSV
  python cli.py bench --config experiments/zoo/tnt_s.yaml --against timm:tnt_s_patch16_224
  python cli.py blocks NTB                                        arguments, defaults and source of a class

Everything in a config can be set by its dotted path: --model.backbone.stages.s3.pattern='ncb*10'.
"""
OVERRIDES = "Any value of the config can be set by its dotted path: --model.backbone.dim=96 --trainer.max_epochs 5"


class Parser(argparse.ArgumentParser):
    """argparse with errors in one line and no abbreviations."""

    def __init__(self, *args, **kwargs) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def _check_value(self, action, value) -> None:
        if action.choices is not None and value not in action.choices:
            what = f"{action.option_strings[0]}: got" if action.option_strings else "no such command"
            raise ConfigError(f"{what} {value!r} ({suggest(str(value), action.choices)})")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parser() -> Parser:
    """The parser of all commands and their options; dotted overrides are left over by it."""
    main = Parser(
        prog="cli.py",
        description="Tessera: compose vision backbones of interchangeable blocks, compare them, believe the table.",
        epilog=EXAMPLES,
    )
    commands = main.add_subparsers(dest="command", metavar="command")

    def add(name: str, module: str, summary: str, config: bool = True) -> Parser:
        command = commands.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=OVERRIDES if config else None
        )
        command.set_defaults(module=module)
        if config:
            command.add_argument(
                "--config", action="append", metavar="FILE", help="config file; may be given again, a later one wins"
            )
            command.add_argument(
                "--plugins", action="append", default=[], metavar="FILE", help="Python file or import path to load"
            )
        return command

    fit = add("fit", "run", "train what the config describes: one run, or every cell of its ablation")
    fit.add_argument("--ckpt_path", metavar="FILE", help="go on from this checkpoint")
    fit.add_argument("--runs", default="runs", metavar="FOLDER", help="where run folders go (default: runs)")
    fit.add_argument("--dry-run", action="store_true", help="check everything, print what would be started, and stop")
    add_only(fit, "train only")
    for name, split in (("validate", "validation"), ("test", "test")):
        command = add(name, "run", f"measure a checkpoint on the {split} set")
        command.add_argument("--ckpt_path", metavar="FILE", help="the weights (default: last.ckpt of the run folder)")
    predict = add("predict", "run", "write the class probabilities of pictures, or of the test set, as CSV or JSON")
    predict.add_argument("--ckpt_path", metavar="FILE", help="the weights (default: last.ckpt of the run folder)")
    predict.add_argument(
        "--images", nargs="+", action="extend", metavar="PATH",
        help="pictures: files, folders with all that is below them, or patterns such as 'photos/*.jpg' "
        "(default: the test set)",
    )  # fmt: skip
    predict.add_argument(
        "--out", metavar="FILE", help="the .csv or .json file (default: predictions.csv beside the checkpoint)"
    )
    predict.add_argument("--top", type=int, metavar="K", help="only the K likeliest classes of each picture")
    export = add("export", "export", "write the net as a program of torch.export (.pt2) or as ONNX (.onnx)")
    export.add_argument("--ckpt_path", metavar="FILE", help="the weights (default: last.ckpt of the run folder)")
    export.add_argument("--out", required=True, metavar="FILE", help="the file to write, .pt2 or .onnx")
    export.add_argument("--batch", type=int, metavar="N", help="for batches of N images alone (default: of any size)")
    probe = add("probe", "probe", "measure the features of a frozen backbone: k-NN and a linear classifier")
    probe.add_argument("--ckpt_path", metavar="FILE", help="the weights (default: last.ckpt of the run folder)")
    probe.add_argument("--k", metavar="K,…", help="numbers of neighbours (default: 10,20,100,200)")
    probe.add_argument("--out", metavar="FOLDER", help="where probe.json goes (default: beside the checkpoint)")
    probe.add_argument("--json", action="store_true", help="as JSON")
    plan = add("plan", "study", "build every cell of a study and print what would be trained")
    plan.add_argument("--runs", default="runs", metavar="FOLDER", help="where run folders go (default: runs)")
    plan.add_argument("--no-probe", action="store_true", help="do not time a few steps of each cell")
    add_only(plan, "plan only")
    report = add("report", "study", "print and write the table of a study folder", config=False)
    report.add_argument("folder", help="folder of the study, for example runs/pos")
    report.add_argument("--watch", action="store_true", help="print it again and again until all runs are over")
    add_only(report, "print only")
    describe = add("describe", "show", "params, MACs, levels, and one line for each block of a net")
    describe.add_argument("--ckpt_path", metavar="FILE", help="a checkpoint, in place of a config")
    describe.add_argument("--json", action="store_true", help="as JSON")
    data = add("data", "data", "class counts, means, bad files, and a sheet of augmented images")
    data.add_argument("--out", metavar="FOLDER", help="where to write (default: runs/<name>-data)")
    data.add_argument(
        "--samples", type=int, default=64, metavar="N", help="images to draw, and to read where they are on disk (64)"
    )
    data.add_argument("--split", metavar="SPLIT", help="look at train, val or test alone (default: all, drawn: train)")
    data.add_argument("--json", action="store_true", help="as JSON")
    convert = add("convert", "weights", "translate a published checkpoint into a safetensors file with its model card")
    convert.add_argument("checkpoint", metavar="FILE", help="the official or timm checkpoint of the config's net")
    convert.add_argument("--out", required=True, metavar="FILE", help="the file to write, .safetensors")
    convert.add_argument("--origin", default="", metavar="TEXT", help="for the card: where the checkpoint comes from")
    convert.add_argument("--licence", default="", metavar="TEXT", help="for the card: under which licence")
    convert.add_argument("--accuracy", default="", metavar="TEXT", help="for the card: as published")
    bench = add("bench", "bench", "throughput, latency and memory of a net, alone or against another one")
    bench.add_argument("--against", metavar="timm:NAME|FILE", help="a net of timm's, or another config")
    add_bench(bench)
    bench.add_argument("--json", metavar="FILE", help="write everything that was measured, each round")
    blocks = add("blocks", "show", "the catalogue: every class that a config can name", config=False)
    blocks.add_argument("name", nargs="?", help="one class: its arguments, defaults and source")
    blocks.add_argument(
        "--plugins", action="append", default=[], metavar="FILE", help="Python file or import path to load"
    )
    blocks.add_argument("--json", action="store_true", help="as JSON")
    return main


def add_bench(command: argparse.ArgumentParser) -> None:
    """What `bench` and the scripts in benchmarks/ share."""
    command.add_argument("--mode", choices=["inference", "training", "both"], default="both", help="(default: both)")
    command.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "both"],
        default="float32",
        help="bfloat16 is autocast (default: float32)",
    )
    command.add_argument("--batch", metavar="N,…", help="images at a time (default: 8, on a GPU 256)")
    command.add_argument(
        "--threads", metavar="N,…", help="with 1, CPU time is measured, else wall time (default: all cores)"
    )
    command.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: a GPU if there)")
    command.add_argument("--compile", action="store_true", help="each net also compiled block by block; takes minutes")
    command.add_argument("--rounds", type=int, default=10, metavar="N", help="how often each is timed (default: 10)")


def add_only(command: Parser, what: str) -> None:
    command.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="AXIS=VALUE,…",
        help=f"{what} cells with these values of an axis of the study; may be given again for another axis",
    )


def split_overrides(rest: list[str], options: list[str]) -> dict[str, str]:
    """What argparse left over, as dotted path to text: `--a.b=c` and `--a.b c`.

    Raises:
        ConfigError: something is neither an option nor the path of a config value.
    """
    found: dict[str, str] = {}
    words = iter(rest)
    for word in words:
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            raise ConfigError(f"unexpected {word!r}; config values are set as --path.to.it=value")
        path = name[2:]
        if path.split(".")[0] not in SECTIONS:
            first, dot, below = name.partition(".")
            near = nearest(first, [f"--{section}" for section in SECTIONS] if dot else options)
            hint = f"did you mean {near}{dot}{below}?" if near else "config values are set as --model.backbone.dim=96"
            raise ConfigError(f"no such option {name} ({hint})")
        if not equals:
            follower = next(words, None)
            if follower is None or follower.startswith("--"):
                raise ConfigError(f"{name} needs a value: {name}=…")
            value = follower
        if path in found:
            raise ConfigError(f"{name} is given twice")
        found[path] = value
    return found


def main(argv: list[str]) -> int:
    """Runs one command. Gives the exit code."""
    return told(partial(command, argv))


def command(argv: list[str]) -> int | None:
    """Runs one command, or prints the help where none is named."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    if args.command is None:
        top.print_help()
        return 0
    if hasattr(args, "config"):
        chosen = top._subparsers._group_actions[0].choices[args.command]  # type: ignore[union-attr, index]
        args.settings = split_overrides(rest, list(chosen._option_string_actions))
    elif rest:
        raise ConfigError(f"unexpected {rest[0]!r}; see python cli.py {args.command} --help")
    prepare()
    return importlib.import_module(f"framework.commands.{args.module}").run(args)


def told(act: Callable[[], int | None]) -> int:
    """Does what gives an exit code. Ctrl-C (130) and a mistake that a user can mend (2) are told of in one line."""
    try:
        return act() or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not is_users(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def is_users(error: Exception) -> bool:
    """Whether an error is a user's to mend. A BuildError can only come from `blocks`, which is not imported here."""
    base = sys.modules.get("blocks.base")
    # OSError: no right to write, a full disk, an image that cannot be read
    return isinstance(error, ConfigError | OSError) or (base is not None and isinstance(error, base.BuildError))
