"""Config documents: compose first (extends, files, overrides), validate each layer, resolve inheritance last.

A document is plain data with the keys of `Document`. `compose` gives one before inheritance, so that a change over
it still inherits; `resolve` gives the one that is built.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from blocks import registry
from framework.ablation.grid import Ablation
from framework.errors import ConfigError, nearest, suggest
from framework.typed import REQUIRED, Arguments, as_slot
from framework.walk import ABSENT, Walk

Settings = Mapping[str, Any]

# The one in C where PyYAML has it: a study writes thousands of configs.
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

# What a document says of a study, and not of a run.
NOT_BUILT = ("ablation", "launcher")


@dataclass
class Document:
    """What a config file may hold.

    Args:
        model: the task with its backbone, head, objectives, optimizer and schedule.
        data: the data module.
        trainer: arguments of Lightning's Trainer.
        seed: of weights, data order and augmentation.
        name: of the run folder; the file's name by default.
        weights: file of weights to start from, ours or published (relative to the config file), or timm:NAME.
        plugins: Python files (relative to the config file) or import paths, loaded before anything is looked up.
        ablation: the study that `fit` runs, in place of one run.
        launcher: where the runs of the study run. No part of a run's own config, so that a study can be moved.
    """

    model: Any
    data: Any
    trainer: Any
    seed: int = 0
    name: str = ""
    weights: str = ""
    plugins: list[str] = field(default_factory=list)
    ablation: Ablation | None = None
    launcher: Any = None


def document_hints() -> dict[str, tuple[Any, Any]]:
    """The type and the default of each key of a document. Imports Lightning."""
    from lightning.pytorch import Trainer

    import framework.optim  # noqa: F401 (registers optimizers and schedules)
    from framework.ablation.launch import Launcher, Local
    from framework.data import Digits, ImageData
    from framework.tasks import Classification, Task

    return {
        "name": (str, ""),
        "seed": (int, 0),
        "weights": (str, ""),
        "plugins": (list[str], REQUIRED),
        "model": (Task, Classification),
        "data": (ImageData, Digits),
        "trainer": (Arguments(Trainer), REQUIRED),
        "ablation": (Ablation, REQUIRED),
        "launcher": (Launcher, Local),
    }


def load_yaml(path: Path) -> dict[str, Any]:
    """One file as plain data.

    Raises:
        ConfigError: there is no such file, it is no YAML, it holds no mapping, or it names a key twice.
    """
    if not path.is_file():
        near = nearest(path.name, (p.name for p in path.parent.glob("*.y*ml") if p.is_file()))
        what = "is a folder, not a file" if path.is_dir() else "no such file"
        raise ConfigError(f"{path}: {what}" + (f" (did you mean {path.parent / near}?)" if near else ""))
    try:
        text = path.read_text(encoding="utf-8")
        _check_nodes(yaml.compose(text, yaml.SafeLoader), str(path))
        loaded = get_loader("yaml")(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path}{at}: not readable as YAML: {problem}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is no text in UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: must hold a mapping with keys such as model and data, got {type(loaded).__name__}")
    return loaded


def _check_nodes(node: yaml.Node | None, where: str, above: tuple[yaml.Node, ...] = ()) -> None:
    """Raises ConfigError for what YAML takes: of two equal keys the second, silently, and what contains itself."""
    if node is None:
        return
    if node in above:
        raise ConfigError(f"{where}, line {node.start_mark.line + 1}: an anchor stands for what contains its own alias")
    above = (*above, node)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.value != "<<":
                    raise ConfigError(f"{where}, line {key.start_mark.line + 1}: {key.value!r} stands here twice")
                seen.add(key.value)
            _check_nodes(value, where, above)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_nodes(value, where, above)


def layers(path: Path, seen: set[Path], above: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """The layers of a file, what it extends first; each with its name.

    What is in `seen` is not extended once more: two files with one base change it both. The files are added to it.

    Raises:
        ConfigError: a file cannot be read, or extends itself.
    """
    path = Path(os.path.normpath(path))
    if path.resolve() in above:
        raise ConfigError(f"{path}: extends itself through {' → '.join(p.name for p in above)}")
    loaded = load_yaml(path)
    bases = loaded.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: extends: expected a file or a list of files, got {bases!r}")
    if loaded.get("plugins") is not None:
        plugins = loaded["plugins"]
        plugins = [plugins] if isinstance(plugins, str) else plugins
        if not isinstance(plugins, list) or not all(isinstance(p, str) for p in plugins):
            raise ConfigError(f"{path}: plugins: expected a list of files or import paths, got {plugins!r}")
        # Absolute, so that the run folder's config.yaml finds them too.
        loaded["plugins"] = [str((path.parent / p).resolve()) if p.endswith(".py") else p for p in plugins]
    weights = loaded.get("weights")
    if isinstance(weights, str) and weights and not weights.startswith("timm:"):
        loaded["weights"] = str((path.parent / weights).resolve())
    found: list[tuple[str, dict[str, Any]]] = []
    for base in bases:
        target = path.parent / base
        if not base.strip():
            raise ConfigError(f"{path}: extends: got {base!r}, must be a config file, or left out")
        if not target.is_file():
            what = "is a folder, not a file" if target.is_dir() else "no such file"
            raise ConfigError(f"{path}: extends: {what}: {target}")
        if target.resolve() not in seen:
            found += layers(target, seen, (*above, path.resolve()))
    seen.add(path.resolve())
    return [*found, (str(path), loaded)]


def nested(path: str, value: Any) -> dict[str, Any]:
    """A dotted setting as a nested mapping."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def parse_value(text: str, where: str) -> Any:
    """A value of the command line, as YAML reads it."""
    try:
        _check_nodes(yaml.compose(text, yaml.SafeLoader), where)
        return get_loader("yaml")(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not readable as YAML: {text!r}: {getattr(error, 'problem', error)}") from None


def merge_layer(document: dict[str, Any], layer: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`layer` over `document`, canonical and checked.

    Raises:
        ConfigError: the first mistake in the layer.
    """
    hints = document_hints()
    walk = Walk(source)
    merged = dict(document)
    for key, value in layer.items():
        if key not in hints:
            raise walk.error((str(key),), f"no such section ({suggest(str(key), [*hints, 'extends'])})")
        hint, default = hints[key]
        if value is None and as_slot(hint) is None:
            merged.pop(key, None)
            continue
        if key == "plugins":
            value = [*merged.get(key, []), *(p for p in value if p not in merged.get(key, []))]
        merged[key] = walk.merge(hint, merged.get(key, ABSENT), value, (key,), default)
    return {key: merged[key] for key in hints if key in merged}


def compose(
    files: Iterable[str | Path],
    settings: Settings = {},  # noqa: B006 (read only)
    plugins: Iterable[str] = (),
    kept: tuple[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Files, what they extend, and dotted settings over them, as one canonical document before inheritance.

    Args:
        files: config files; a later one goes over an earlier one.
        settings: dotted path to value, such as {"model.backbone.dim": 192}; they go over all files.
        plugins: Python files or import paths to load first.
        kept: a document under all files, with the name of what it comes from, such as a checkpoint.

    Raises:
        ConfigError: the first mistake, with its file and path.
    """
    found: list[tuple[str, dict[str, Any]]] = [kept] if kept else []
    names = []
    for file in files:
        if not str(file).strip():
            raise ConfigError(f"--config: got {str(file)!r}, must be a config file")
        names.append(Path(file))
    seen: set[Path] = set()
    for path in names:
        found += layers(path, seen)
    asked = [*plugins, *(p for _, layer in found for p in layer.get("plugins") or [])]
    load_plugins(asked)
    document: dict[str, Any] = {}
    for source, layer in found:
        document = merge_layer(document, layer, source)
    document = override(document, settings)
    extra = [str(Path(p).resolve()) if p.endswith(".py") else p for p in plugins]
    if extra:
        document = merge_layer(document, {"plugins": extra}, "--plugins")
    # What is left out stands in the document all the same, so that it can be overridden, read and run again.
    left_out = {"name": names[-1].stem if names else "run", "seed": 0, "data": {}, "trainer": {}}
    document = merge_layer({}, left_out, "") | document
    _check(document)
    return document


def load_plugins(plugins: Iterable[str]) -> None:
    """Loads what installed packages offer, and these Python files or import paths; what is there already stays.

    Raises:
        ConfigError: one of them cannot be loaded.
    """
    try:
        registry.load_entry_points()
        for plugin in plugins:
            registry.load_plugin(plugin)
    except LookupError as error:
        raise ConfigError(f"plugins: {error}") from error


def _check(document: Mapping[str, Any]) -> None:
    """Raises ConfigError where a seed or a name has the right type, but cannot be used."""
    seed, name = document["seed"], document["name"]
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed: got {seed}, must be 0 to {2**32 - 1}")
    if not name.strip() or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConfigError(f"name: got {name!r}, must be the name of a folder under runs")


def override(document: dict[str, Any], settings: Settings, where: str = "") -> dict[str, Any]:
    """A new document with dotted settings over `document`, one after the other.

    Args:
        document: a composed document.
        settings: dotted path to value.
        where: where the settings come from, for messages.

    Raises:
        ConfigError: the first mistake.
    """
    for path, value in settings.items():
        document = merge_layer(document, nested(path, value), where)
    return document


def resolve(document: dict[str, Any]) -> dict[str, Any]:
    """The document with all inheritance filled in, complete and checked: what is built.

    Raises:
        ConfigError: an argument is missing, or what inherits does not fit.
    """
    hints = document_hints()
    walk = Walk(partial=False)
    if "model" not in document:
        raise ConfigError("model: is missing, so there is no net; add it, or name one more --config that has it")
    return {key: walk.inherit(hints[key][0], value, (key,)) for key, value in document.items() if key not in NOT_BUILT}


def dump(document: Mapping[str, Any]) -> str:
    """A document as YAML; `load_yaml` reads it back as it was."""
    return yaml.dump(dict(document), Dumper=DUMPER, sort_keys=False, allow_unicode=True, width=120)
