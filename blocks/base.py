"""The contract between everything that can be swapped: what flows between blocks, and what a parent tells a child.

A net is a chain of blocks. Each one takes and gives `Features`; its constructor is given a `Site` (what is
there, what is wished) and sets `out`, the `Shape` that it really gives. Every slot, here and inside blocks, is
a factory: a class, or a class with some arguments bound, that is called with the one thing only the parent knows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import EllipsisType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from blocks.kernels.linear import Linear

Grid = tuple[int, int]

PARTS = frozenset({"map", "prefix", "words"})


class BuildError(Exception):
    """A net that cannot be built as asked: one line that says where, what was got and what would be right."""


class Features(NamedTuple):
    """What flows between blocks.

    Shape:
        map: `(B, C, H, W)` in channels_last memory; its batch stride may be larger than `H·W·C` after a block
            that ran with a prefix.
        prefix: `(B, P, C)` class, distillation or register tokens, or None.
        words: `(B·N, m, c)` finer tokens under each of the N map positions (raster order), or None.
        extra: the state of a plug-in; every block passes on what it does not know.
        turn: which run of a shared block this is, counted by `Recursive`; 0 elsewhere. It flows, rather than being
            told to the parts, so that what is computed again in the backward pass sees the turn that it had.
    """

    map: Tensor
    prefix: Tensor | None = None
    words: Tensor | None = None
    extra: dict[str, Tensor] | None = None
    turn: int = 0

    def replace(
        self,
        map: Tensor | EllipsisType = ...,
        prefix: Tensor | EllipsisType | None = ...,
        words: Tensor | EllipsisType | None = ...,
        turn: int | EllipsisType = ...,
    ) -> Features:
        """The same features with other parts. (`_replace` does the same, but torch 2.9 cannot compile it.)"""
        return Features(
            self.map if isinstance(map, EllipsisType) else map,
            self.prefix if isinstance(prefix, EllipsisType) else prefix,
            self.words if isinstance(words, EllipsisType) else words,
            self.extra,
            self.turn if isinstance(turn, EllipsisType) else turn,
        )


# Under a serialized name, or torch.export could not save a block that takes or gives Features.
_pytree._register_namedtuple(Features, serialized_type_name="blocks.base.Features")


@dataclass(frozen=True)
class Words:
    """The words of a net: their width, the grid of words in one position, and the map grid that they lie under."""

    dim: int
    grid: Grid
    over: Grid

    @property
    def count(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Shape:
    """`Features` at one point of a net, known without data: width, map grid, number of prefix tokens, words.

    `extra` names what a backbone puts into the `extra` of its final features: maps like the final one.
    """

    dim: int
    grid: Grid
    prefix: int = 0
    words: Words | None = None
    extra: tuple[str, ...] = ()

    @property
    def positions(self) -> int:
        return self.grid[0] * self.grid[1]


def tokens(map: Tensor) -> Tensor:
    """`(B, C, H, W)` to `(B, H·W, C)` in raster order: a view, and contiguous where the map is channels_last."""
    return map.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """`(B, H·W, C)` to `(B, C, H, W)` in channels_last memory: a view.

    The order matters: with transpose before unflatten the batch-1 map passes `is_contiguous`, but its strides
    make the next convolution return NCHW.
    """
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


class TokenPosition(nn.Module):
    """Adds position to the tokens of one point of a net; this one adds nothing."""

    def forward(self, map: Tensor, prefix: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return map, prefix


class ScorePosition(nn.Module):
    """Puts position into the attention scores of one mixer; this one changes nothing.

    `rotate` turns queries or keys `(B, heads, P + N, head_dim)` that lie on `grid`; `bias` gives what is added to
    the scores, `(1, heads, P + Nq, P + Nk)`, or None. (Four dimensions: a 3-D bias takes SDPA off its fast path.)
    """

    def rotate(self, x: Tensor, grid: Grid) -> Tensor:
        return x

    def bias(self, grid: Grid) -> Tensor | None:
        return None


class Position(ABC):  # noqa: B024 (a base: no value by itself)
    """A position encoding: a frozen config object that makes its parts where a net wants them.

    A net-wide one travels in `Site`; an encoding works on tokens, on attention scores, or on both.
    """

    def tokens(self, at: Shape) -> TokenPosition:
        """The part that stems and `AddPosition` apply to the tokens of `at`."""
        return TokenPosition()

    def scores(self, at: Shape, heads: int, head_dim: int, keys: Grid) -> ScorePosition:
        """The part that a mixer with `heads` heads applies; its queries lie on `at.grid`, its keys on `keys`."""
        return ScorePosition()

    @property
    def on_scores(self) -> bool:
        """Whether this encoding works on attention scores, which need keys that lie on a grid."""
        return type(self).scores is not Position.scores


@dataclass(frozen=True)
class NoPosition(Position):
    """No position encoding: the net cannot tell where a token lies, except by what its convolutions see."""


@dataclass(frozen=True)
class Site:
    """All that a parent tells a child: what is there, what is wished, and where in the net it is.

    Args:
        inp: the features that come in.
        dim: wish: the width to give.
        stride: wish: how much the map should still shrink. It is offered along a pattern until a block takes it.
        stage: number of the stage in the net.
        place: number of the block in its stage.
        index: number of the block in the net, counting those with residual branches.
        depth: how many blocks the net has, counted so.
        drop_path: rate of this block's residual branches.
        where: config path, for messages.
        position: the net's position encoding between tokens.
        word_position: the net's position encoding between the words of one token.
    """

    inp: Shape
    dim: int
    stride: int = 1
    stage: int = 0
    place: int = 0
    index: int = 0
    depth: int = 1
    drop_path: float = 0.0
    where: str = ""
    position: Position = field(default_factory=NoPosition)
    word_position: Position = field(default_factory=NoPosition)

    @classmethod
    def at(cls, width: int, grid: Grid | int, prefix: int = 0, words: Words | None = None, **wishes: Any) -> Site:
        """A site for a block that stands alone: `Site.at(384, 14, prefix=1, stride=2, dim=512)`."""
        grid = (grid, grid) if isinstance(grid, int) else grid
        return cls(inp=Shape(width, grid, prefix, words), **{"dim": width, **wishes})

    def error(self, who: object, message: str) -> BuildError:
        """A `BuildError` that names this place and the class of `who`."""
        return BuildError(f"{self.where + ': ' if self.where else ''}{type(who).__name__} {message}")

    def keeps_width(self, who: object) -> None:
        """For blocks that give the width they get. Raises BuildError where another one is wished."""
        if self.dim != self.inp.dim:
            raise self.error(
                who,
                f"keeps its width, but gets {self.inp.dim} and should give {self.dim}; put a block that changes "
                f"the width (ConvEmbed, Merge, NCB) before it, or set dim: {self.inp.dim}",
            )

    def no_prefix(self, who: object) -> None:
        """For parts that only know maps. Raises BuildError where there are prefix tokens."""
        if self.inp.prefix:
            raise self.error(
                who, f"works on maps, but {self.inp.prefix} prefix token(s) come in; take the class token out"
            )

    def need_words(self, who: object) -> Words:
        """The words under this map. Raises BuildError where there are none, or they lie under another grid."""
        words = self.inp.words
        if words is None:
            raise self.error(
                who, "needs words, and nothing before it makes them; use stem: SentenceStem or put MakeWords before it"
            )
        if words.over != self.inp.grid:
            raise self.error(
                who,
                f"needs words under its {show_grid(self.inp.grid)} map, but they lie under {show_grid(words.over)}; "
                "put MakeWords behind the block that changed the grid, or make words for the coming stride",
            )
        return words

    def divides(self, who: object, dim: int, by: int, what: str) -> int:
        """`dim // by`. Raises BuildError where `by` does not divide `dim`; `what` names `by`."""
        if by < 1 or dim % by:
            near = [n for n in range(1, dim + 1) if dim % n == 0]
            near.sort(key=lambda n: (abs(n - by), n))
            choices = ", ".join(str(n) for n in sorted(near[:4]))
            raise self.error(who, f"cannot split width {dim} by {what}: {by}; near values that fit: {choices}")
        return dim // by

    def inside(self, name: str, **changes: Any) -> Site:
        """The site of a part of a block: the same place with `changes`, and `name` added to `where`."""
        return replace(self, where=f"{self.where}.{name}" if self.where else name, **changes)


def show_grid(grid: Grid) -> str:
    return f"{grid[0]}×{grid[1]}"


def describe_shape(shape: Shape) -> str:
    """A shape in words: `384 × 14×14 + 1 prefix, 16 words of 24`."""
    text = f"{shape.dim} × {show_grid(shape.grid)}"
    if shape.prefix:
        text += f" + {shape.prefix} prefix"
    if shape.words:
        text += f", {shape.words.count} words of {shape.words.dim}"
    return text


class Block(nn.Module, ABC):
    """One step of a net. A subclass's first constructor argument is `site`; it sets `out`, and forwards Features.

    Attributes:
        out: the shape that it gives: the truth, which may differ from the wish.
        counts: whether it is one of the net's layers, as drop-path decay and depth count them; structural blocks
            (tokens, positions, embeddings) are not.
        source: the paper and the repository that it comes from.
    """

    out: Shape
    counts: ClassVar[bool] = True
    source: ClassVar[str] = ""

    @abstractmethod
    def forward(self, features: Features) -> Features: ...

    def planned(self, features: Features) -> Features | None:
        """What `forward` gives without gradients, by calls of kernels alone; None where it takes more than that.

        The kernels may be called later (`blocks.kernels.ahead`): it may ask for the shapes of what it is given, and of
        what it gives, but not for a number.
        """
        return None

    def keep(self, parts: frozenset[str]) -> frozenset[str]:
        """Told which parts of the output are read, gives which parts of the input it reads for them.

        A block may skip work that nobody reads; called again with `PARTS` it does all of it again.
        """
        return PARTS


def linear(dim: int, out: int, bias: bool = True) -> nn.Linear:
    """A Linear with weights from N(0, .02²), cut off at ±2, and zero biases: the init of all families here."""
    layer = Linear(dim, out, bias)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def token_parameter(*shape: int, std: float = 0.02) -> nn.Parameter:
    """A parameter for tokens or positions from N(0, std²), cut off at ±2."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=std))


class Mixer(nn.Module, ABC):
    """Mixes tokens with each other, the slot of `Encoder` that attention usually fills. Built with a `site`.

    Attributes:
        per_token: whether some rows of the result can be had, exactly, without computing the others. Norms,
            feed-forwards and gates have it too: it allows an encoder to skip rows that nobody reads.
        by_turn: whether it works in another way in later runs of a shared block: its forward then has an argument
            `turn`, the number of the run.
    """

    source: ClassVar[str] = ""
    per_token: bool = False
    by_turn: ClassVar[bool] = False

    @abstractmethod
    def forward(self, x: Tensor, grid: Grid, rows: int | None = None) -> Tensor:
        """`(B, P + N, C)`, prefix tokens first, the N others in raster order on `grid`; gives the same shape.

        With `rows`, only the first `rows` (prefix) tokens of the result are wanted, and only they are given.
        """


class FeedForward(nn.Module, ABC):
    """Works on each token's channels. Built with a `site`; keeps the width."""

    source: ClassVar[str] = ""
    per_token: bool = False

    @abstractmethod
    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """`(B, P + N, C)`, prefix tokens first, the others in raster order on `grid`; gives the same shape."""


class Norm(nn.Module, ABC):
    """A normalisation over channels. Built with the width."""

    per_token: bool = False

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Tokens `(..., C)`, normalised over (LayerNorm) or per (BatchNorm) their last dimension."""

    def on_map(self, map: Tensor) -> Tensor:
        """The same on a map `(B, C, H, W)`: a view of its tokens, so channels_last stays so without a copy."""
        return to_map(self(tokens(map)), (map.shape[2], map.shape[3]))


class Gate(nn.Module, ABC):
    """Weighs the channels of a branch by what is in it. Built with the width."""

    source: ClassVar[str] = ""
    per_token: bool = False

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Tokens `(B, N, C)` to the gated tokens, which replace them."""


class Act(nn.Module, ABC):
    """An activation function. Built with nothing."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...


# The slots: factories that are called with what only the parent knows.
BlockFactory = Callable[[Site], Block]
MixerFactory = Callable[[Site], Mixer]
MlpFactory = Callable[[Site], FeedForward]
NormFactory = Callable[[int], Norm]
GateFactory = Callable[[int], Gate]
ActFactory = Callable[[], Act]
