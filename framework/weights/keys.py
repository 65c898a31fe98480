"""What the importers share: names of places, and the step from their names to a checked state dict.

An importer maps names only. A key of ours may end in `#<n>`: its tensor is then the n-th part of ours. One that ends in
`?` serves training alone, and is left out where the model has no place for it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from framework.errors import ConfigError

DROP = ""
"""Maps a key whose tensor no forward reads."""

_BLOCK = re.compile(
    r"(backbone\.((?:columns\.\d+\.)?stages\.[^.]+\.)?(?:blocks\.\d+|entry))\.(?:(?:outer|block)\.)*mlp\.fc1\.weight"
)
_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_SHOWN = 6


class Family(Protocol):
    """The importer of one family of published weights; a module of this package is one."""

    NAME: str

    def recognises(self, keys: Collection[str]) -> bool:
        """Whether a published state dict with these keys is of this family."""

    def names(self, keys: Collection[str], blocks: list[list[str]]) -> dict[str, str]:
        """Our key for each published one, or `DROP`; a key that it does not know is left out.

        `blocks` has the prefix of each of our blocks, stage by stage.
        """

    def layout(self, key: str, tensor: Tensor) -> Tensor:
        """A published tensor, given with its published key, in our layout."""


def block_prefixes(target: Iterable[str]) -> list[list[str]]:
    """The prefixes of a model's blocks with an MLP, stage by stage in the order of its state dict, column by column.

    Tokens, positions and embeddings between them, which publishers store elsewhere, are not counted.
    """
    stages: dict[str, list[str]] = {}
    for key in target:
        if found := _BLOCK.fullmatch(key):
            stages.setdefault(found[2] or "", []).append(found[1])
    return list(stages.values())


def rename(key: str, modules: Mapping[str, str]) -> str | None:
    """`key` with the module in front of its last dot renamed by `modules`; None where that does not know it.

    A whole key may stand in `modules` too. A `#<n>` behind the new name goes to the end.
    """
    if key in modules:
        return modules[key]
    module, _, leaf = key.rpartition(".")
    if leaf not in _LEAVES or module not in modules:
        return None
    name, mark, part = modules[module].partition("#")
    return f"{name}.{leaf}{mark}{part}"


def _modules(key: str) -> Iterator[str]:
    """The modules in which the tensor `key` lies, from the inmost."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def map_keys(
    keys: Iterable[str],
    tokens: Mapping[str, str],
    modules: Mapping[str, str],
    blocks: Mapping[str, tuple[str, Mapping[str, str]]],
) -> dict[str, str]:
    """Our key for each of `keys` that one of the tables knows.

    Args:
        keys: the published ones.
        tokens: names of whole keys.
        modules: names of modules outside of blocks.
        blocks: for the published prefix of each block, our prefix and the names of the modules in it.
    """
    named: dict[str, str] = {}
    for key in keys:
        theirs = next((name for name in _modules(key) if name in blocks), None)
        if theirs is None:
            ours = tokens.get(key, rename(key, modules))
        else:
            prefix, inside = blocks[theirs]
            ours = rename(key.removeprefix(f"{theirs}."), inside)
            ours = ours and f"{prefix}.{ours}"
        if ours is not None:
            named[key] = ours
    return named


def assemble(
    family: Family, state: Mapping[str, Tensor], target: Mapping[str, torch.Size], shapes: bool = True
) -> dict[str, Tensor]:
    """The published weights `state` of `family` under the keys of `target`: every one of them, with `shapes` in its
    shape. Of keys that are neither in `backbone` nor in `head`, only those that are published count.

    Raises:
        ConfigError: keys that the family does not know or the model has no place for, keys that are missing, or
            tensors of another shape; names them.
    """
    names = family.names(state, block_prefixes(target))
    optional = {ours[:-1] for ours in names.values() if ours.endswith("?")}
    target = {key: shape for key, shape in target.items() if key.startswith(("backbone.", "head.")) or key in optional}
    names = {key: DROP if ours.endswith("?") and ours[:-1] not in target else ours.rstrip("?")
             for key, ours in names.items()}  # fmt: skip
    unknown = [key for key in state if key not in names]
    unlike: list[str] = []
    found: dict[str, dict[int, Tensor]] = {}
    for key, ours in names.items():
        if ours == DROP:
            continue
        name, _, part = ours.partition("#")
        if name not in target:
            unknown.append(key)
            continue
        tensor = family.layout(key, state[key])
        first = found.setdefault(name, {}).setdefault(int(part or 0), tensor)
        # A shared tensor is published under each of its names.
        if first is not tensor and not torch.equal(first, tensor):
            unlike.append(key)
    converted = {name: _join(parts) for name, parts in found.items()}
    for name in target:
        # Weights from before 2018, or made lean, are without it; torch's own loading starts it at 0 as well.
        if name not in converted and name.endswith(".num_batches_tracked"):
            converted[name] = torch.tensor(0)
    wrong = [
        f"{name} {_show(value.shape)} (model: {_show(target[name])})"
        for name, value in converted.items()
        if shapes and value.shape != target[name]
    ]
    problems = [
        _list("no place for", unknown),
        _list("differs from its copy", unlike),
        _list("missing", [name for name in target if name not in converted]),
        _list("another shape", wrong),
    ]
    if any(problems):
        raise ConfigError(f"{family.NAME} weights do not fit this model: {'; '.join(filter(None, problems))}")
    return {name: converted[name] for name in target}


def _join(parts: dict[int, Tensor]) -> Tensor:
    """Parts of one tensor: rows of a Linear one below the other, tokens `(1, n, C)` one behind the other.

    Parts that do not fit together give the first, whose shape is then refused.
    """
    first, *others = [parts[i] for i in sorted(parts)]
    dim = 1 if first.dim() == 3 else 0
    fit = all(
        other.shape[:dim] + other.shape[dim + 1 :] == first.shape[:dim] + first.shape[dim + 1 :] for other in others
    )
    return torch.cat([first, *others], dim) if others and fit else first


def _show(shape: torch.Size) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _list(what: str, keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"{what}: {', '.join(keys[:_SHOWN])}{more}" if keys else ""
