"""Columns whose maps are not kept for the backward pass, but worked out again from those of the column behind.

A column gives `new_i = f_i(new_(i−1), old_(i+1)) + α_i · old_i`, so `old_i = (new_i − f_i(…)) / α_i`, from the last
level to the first. What is kept is the last column's maps, whatever the number of columns.

Each column back multiplies what rounding has left: at α = 0.5 by about 3.6, so that 16 columns in float32 would leave
gradients a third of their norm off. The sums are float64 therefore, the levels themselves as in a plain pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import get_device_states, set_device_states

if TYPE_CHECKING:
    from framework.columns import Column, ColumnLevel

Maps = tuple[Tensor, ...]


@dataclass
class Draws:
    """The states of the random generators before a level ran."""

    cpu: Tensor
    devices: list[int]
    states: list[Tensor]

    @classmethod
    def now(cls, like: Tensor) -> Draws:
        return cls(torch.get_rng_state(), *get_device_states(like))

    @contextmanager
    def again(self, kind: str) -> Iterator[None]:
        """The same numbers are drawn as then, and later ones as if none had been."""
        with torch.random.fork_rng(self.devices, device_type=kind if self.devices else "cuda"):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states, device_type=kind)
            yield


class Kept:
    """A tensor for the backward pass, which must not have been changed in place by then."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version

    def get(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError("a map of a reversible column was changed in place before its backward pass")
        return self.tensor


class Reversible:
    """One pass of reversible columns: what they share until the backward pass.

    Gradients, random draws, autocast and buffers are those of a plain pass; it may be run backward again
    (`retain_graph`), in part (a loss on an early column), or more than once before the parameters change.

    Args:
        columns: in order.
        stem: the map that feeds the first level of each.
        dtype: of the maps that levels get.
    """

    def __init__(self, columns: Sequence[Column], stem: Tensor, dtype: torch.dtype) -> None:
        self.columns = columns
        self.dtype = dtype
        self.wide = dtype if stem.device.type == "mps" else torch.float64
        self.stem = Kept(stem)
        self.draws: list[list[Draws]] = []
        self.last: list[Kept] = []
        self.now: tuple[int, Maps] | None = None  # the column that the backward pass has reached, and its maps
        kind = self.kind = stem.device.type
        self.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

    def run(self, number: int, stem: Tensor, old: Maps | None) -> Maps:
        """The maps of a column, in `wide`, from those of the one before it."""
        column = self.columns[number]
        trained = [parameter for parameter in column.parameters() if parameter.requires_grad]
        given = old or (None,) * len(column.levels)
        made = _Run.apply(self, number, stem, *given, *trained)
        if number == len(self.columns) - 1:
            self.last = [Kept(map) for map in made]
        return made

    def forward(self, number: int, stem: Tensor, old: Maps | None) -> Maps:
        draws: list[Draws] = []
        new: list[Tensor] = []
        for i, level in enumerate(self.columns[number].levels):
            draws.append(Draws.now(stem))
            below = new[-1].to(self.dtype) if new else stem
            above = [old[i + 1].to(self.dtype)] if old and i + 1 < len(old) else []
            with saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):
                made = self.branch(level, below, *above)[0].detach()
            new.append(level.add(made.to(self.wide), old[i] if old else None))
        self.draws.append(draws)
        return tuple(new)

    def branch(self, level: ColumnLevel, *maps: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What a level's branch makes of maps, and these as inputs of its graph.

        With gradients each time, also where none are asked for: without them parts have faster forms that round
        otherwise, and what is subtracted on the way back has to be what was added, to the last bit.
        """
        given = [map.detach().requires_grad_() for map in maps]
        with torch.enable_grad(), self.precision():
            return level.branch(*given), given

    def precision(self) -> torch.autocast:
        """Autocast as in the forward pass, without its cache, which would keep a copy of every weight."""
        kind, dtype, enabled = self.autocast
        return torch.autocast(kind, dtype, enabled, cache_enabled=False)

    def maps(self, number: int) -> Maps:
        """The maps that a column gave."""
        if self.now is None or self.now[0] < number:
            self.now = len(self.columns) - 1, tuple(kept.get() for kept in self.last)
        while self.now[0] > number:
            undone = _Undo(self, self.now[0], self.now[1], (None,) * len(self.now[1]))
            self.now = self.now[0] - 1, undone.old
        return self.now[1]


class _Undo:
    """A column run backwards.

    Args:
        run: the pass that it was part of.
        number: of the column.
        new: its maps.
        grads: their gradients; None where nothing read them.

    Attributes:
        old: the maps of the column before.
        old_grads: their gradients.
        stem_grad: the gradient of the stem's map.
        grads: of its parameters, by identity.
    """

    def __init__(self, run: Reversible, number: int, new: Maps, grads: Sequence[Tensor | None]) -> None:
        self.run, self.number, self.new = run, number, new
        levels = run.columns[number].levels
        self.new_grads = list(grads)
        self.old_grads: list[Tensor | None] = [None] * len(levels)
        self.stem_grad: Tensor | None = None
        self.grads: dict[int, Tensor | None] = {}
        found: list[Tensor | None] = [None] * len(levels)
        for i in reversed(range(len(levels))):
            above = None if number == 0 or i + 1 == len(levels) else found[i + 1]
            grad = self.new_grads[i]
            if number or grad is not None:
                found[i] = self._level(i, levels[i], above, grad)
        self.old = tuple(map for map in found if map is not None)

    def _level(self, i: int, level: ColumnLevel, above: Tensor | None, grad: Tensor | None) -> Tensor | None:
        """The old map of level i; its inputs and parameters get their gradients."""
        maps = [self.new[i - 1].to(self.run.dtype) if i else self.run.stem.get()]
        maps += [] if above is None else [above.to(self.run.dtype)]
        kept = [(buffer, buffer.clone()) for buffer in level.buffers()]
        with self.run.draws[self.number][i].again(self.run.kind):
            made, maps = self.run.branch(level, *maps)
            old = (self.new[i] - made.detach()) / level.alpha.detach() if self.number else None
            if grad is not None:
                self._gradients(i, level, made, maps, old, grad)
        with torch.no_grad():
            for buffer, value in kept:  # batch norms have counted this batch twice
                buffer.copy_(value)
        return old

    def _gradients(
        self, i: int, level: ColumnLevel, made: Tensor, maps: list[Tensor], old: Tensor | None, grad: Tensor
    ) -> None:
        """Of the level's inputs `maps`, of its parameters, and of the map of the column before."""
        alpha = level.alpha
        trained = [p for p in level.parameters() if p.requires_grad and p is not alpha]
        found = torch.autograd.grad(made, [*maps, *trained], grad.to(made.dtype), allow_unused=True)
        below, above = found[0], found[1] if len(maps) > 1 else None
        self.grads |= {id(p): value for p, value in zip(trained, found[len(maps) :], strict=True)}
        if i:
            self.new_grads[i - 1] = _sum(self.new_grads[i - 1], below)
        else:
            self.stem_grad = below
        if above is not None:
            self.old_grads[i + 1] = _sum(self.old_grads[i + 1], above)
        if old is None:
            self.grads[id(alpha)] = torch.zeros_like(alpha)
        else:
            self.old_grads[i] = _sum(self.old_grads[i], grad * alpha.detach())
            self.grads[id(alpha)] = (grad * old).sum((0, 2, 3), keepdim=True).to(alpha.dtype)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one + other


class _Run(torch.autograd.Function):
    """One column, which keeps none of its maps. Its parameters are inputs, so that their gradients come as always."""

    @staticmethod
    def forward(ctx: Any, run: Reversible, number: int, stem: Tensor, *rest: Any) -> Maps:
        count = len(run.columns[number].levels)
        ctx.run, ctx.number, ctx.trained = run, number, [id(parameter) for parameter in rest[count:]]
        ctx.set_materialize_grads(False)
        return run.forward(number, stem, rest[:count] if number else None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        run, number = ctx.run, ctx.number
        undone = _Undo(run, number, run.maps(number), grads)
        run.now = (number - 1, undone.old) if number else None
        olds = (None if grad is None else grad.to(run.wide) for grad in undone.old_grads)
        return None, None, undone.stem_grad, *olds, *(undone.grads.get(key) for key in ctx.trained)
