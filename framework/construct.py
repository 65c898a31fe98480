"""Documents to objects. Everything is built through Lightning's parser, so that a checkpoint's hyper-parameters are
plain data: it loads with `weights_only=True`, and `load_from_checkpoint` rebuilds the whole composed net."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict
from functools import lru_cache
from typing import Any, TypeVar

from blocks import registry
from blocks.base import BuildError
from framework import loop, typed
from framework.config import resolve
from framework.data import Image, ImageData
from framework.errors import ConfigError, reason
from framework.tasks import Task
from framework.walk import ARGS, CLASS

# Lightning 2.6 makes calls that jsonargparse 4.49 deprecates.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI

Made = TypeVar("Made")
_bench: Workbench | None = None  # that of `build_model`


class Workbench(LightningCLI):
    """Lightning's CLI over one complete document: no command line, no subcommands, nothing instantiated until asked.

    Args:
        document: a complete one (`complete`), or some of its sections.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = document
        super().__init__(
            Task,
            ImageData,
            run=False,
            save_config_callback=None,
            seed_everything_default=False,
            auto_configure_optimizers=False,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_kwargs={"exit_on_error": False},
        )

    def add_core_arguments_to_parser(self, parser: Any) -> None:
        """Only what the document holds, and required: what may be null is a Union, which swallows errors.

        Values are converted and names checked in one pass. A second, over what that gives, finds no more, and takes
        twice as long for each level that a document is deep.
        """
        parser.validate = lambda *args, **kwargs: None
        if "trainer" in self.document:
            parser.add_lightning_class_args(Trainer, "trainer")
        for key, base in (("model", Task), ("data", ImageData)):
            if key in self.document:
                action = parser.add_argument(f"--{key}", type=base, required=True)
                action.sub_add_kwargs = {"fail_untyped": False}  # classes from outside may have no types

    def use(self, document: Mapping[str, Any]) -> Workbench:
        """The same bench over another document with the same sections; making a parser takes longer than using it."""
        self.document = document
        self.parse_arguments(self.parser, None)
        return self

    def parse_arguments(self, parser: Any, args: Any) -> None:
        sections = {key: deepcopy(self.document[key]) for key in ("model", "data", "trainer") if key in self.document}
        sections["seed_everything"] = False
        try:
            self.config = parser.parse_object(sections, defaults=False)
        except Exception as error:  # what the walk lets through, in jsonargparse's words
            raise ConfigError(_parser_error(str(error))) from error

    def _dump_config(self) -> None:
        """What checkpoints keep as hyper-parameters: the document, which is plain data already."""
        self.config_dump = deepcopy(dict(self.document))

    def instantiate_classes(self) -> None:
        """Nothing yet: a net is not needed to look at data, nor the other way round."""

    def _part(self, key: str) -> Any:
        part = Namespace()
        part[key] = self.config[key]
        return self.parser.instantiate_classes(part)[key]

    def make_model(self) -> Task:
        return checked(lambda: self._part("model"), "model")

    def make_data(self) -> ImageData:
        return checked(lambda: self._part("data"), "data")

    def make_trainer(self, **arguments: Any) -> Trainer:
        """The Trainer; `callbacks` among `arguments` go behind those of the document."""
        given = dict(checked(lambda: self._part("trainer"), "trainer") if self.config.get("trainer") else {})
        callbacks = given.pop("callbacks", None) or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        arguments["callbacks"] = [*callbacks, *arguments.get("callbacks", [])]
        try:
            return loop.Trainer(**{**given, **arguments})
        except Exception as error:  # Lightning checks values here, each in its own way
            raise ConfigError(f"trainer: {_one_line(str(error))}") from error


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:3])[:400]


def _parser_error(text: str) -> str:
    """The path and the innermost message of a parser's many lines; it names no keys of mappings in the path."""
    keys = re.findall(r'Parser key "([^"]+)":', text)
    inner = re.split(r'Parser key "[^"]+":', text)[-1]
    inner = (inner.partition("Errors:")[2] or inner).partition("Given value")[0]
    lines = [line.strip(" -") for line in inner.splitlines() if line.strip(" -")]
    # The alternatives of a Union that were not meant only say what they expect.
    said = next((line for line in reversed(lines) if not line.startswith("Expected a")), lines[0])
    return f"{'.'.join(keys)}: {said.partition('. Got value')[0].rpartition('callable class: ')[2]}"


def checked(make: Callable[[], Made], where: str) -> Made:
    """`make()`, with whatever a class from outside or a library raises as a ConfigError at `where`."""
    try:
        return make()
    except (ConfigError, BuildError):
        raise
    except Exception as error:
        raise ConfigError(f"{where}: {reason(error)}") from error


def complete(document: Mapping[str, Any], facts: tuple[Image, int] | None = None) -> dict[str, Any]:
    """The resolved document with image and classes filled in from the data module: what `Workbench` takes.

    Args:
        document: a composed document.
        facts: image and number of classes, where they are known without the data.

    Raises:
        ConfigError: an argument is missing or wrong, or the data module cannot tell its image size or classes.
    """
    resolved = resolve(dict(document))
    args = resolved["model"].setdefault(ARGS, {})
    takes = typed.arguments(registry.find(Task, resolved["model"][CLASS]))
    image, num_classes = facts or _facts(json.dumps(resolved["data"], sort_keys=True))
    if "image" in takes and Image(**args.setdefault("image", asdict(image))) != image:
        given, there = args["image"], asdict(image)
        raise ConfigError(f"model.image: got {given}, but the data gives {there}; leave model.image out")
    if "num_classes" in takes and args.setdefault("num_classes", num_classes) < num_classes:
        raise ConfigError(f"model.num_classes: got {args['num_classes']}, but the data has {num_classes} classes")
    return resolved


def check_validated(given: Mapping[str, Any]) -> None:
    """Raises ConfigError where these arguments of a Trainer leave the last epoch, whose metrics count, unvalidated."""
    epochs, every = given.get("max_epochs") or 0, given.get("check_val_every_n_epoch") or 1
    if epochs > 0 and epochs % every and not given.get("fast_dev_run"):
        raise ConfigError(
            f"trainer.check_val_every_n_epoch: got {every}, which does not divide trainer.max_epochs: {epochs}, so "
            f"the last epoch is not validated; give a divisor of {epochs}, or max_epochs: {-(-epochs // every) * every}"
        )


@lru_cache(maxsize=64)
def _facts(section: str) -> tuple[Image, int]:
    """Image and number of classes of a data section; the cells of a study share theirs."""
    with torch.device("cpu"):  # a set may be opened for them, also where a net is built on the meta device
        data = Workbench({"data": json.loads(section)}).make_data()
        return data.image, data.num_classes


def build_model(document: Mapping[str, Any], facts: tuple[Image, int] | None = None) -> Task:
    """The task of a composed document, with its net, on the current default device.

    Args:
        document: the document.
        facts: image and number of classes, where they are known without the data.

    Raises:
        ConfigError: the document is wrong.
        BuildError: the net cannot be built as asked.
    """
    global _bench
    section = {"model": complete(document, facts)["model"]}
    _bench = _bench.use(section) if _bench else Workbench(section)
    return _bench.make_model()
