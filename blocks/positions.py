"""Position encodings: on tokens (learned, sin-cos, conditional) and on attention scores (relative bias, RoPE).

Each is a small frozen object that makes its parts where a net wants them, at the sentence level (`position`) and
at the word level (`word_position`) alike. `NoPosition` is in `blocks.base`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.base import (
    BuildError,
    Grid,
    Position,
    ScorePosition,
    Shape,
    TokenPosition,
    show_grid,
    to_map,
    token_parameter,
    tokens,
)


@dataclass(frozen=True)
class NetPosition(Position):
    """The net's own encoding: the default of every attention, which may name another one instead."""


Resize = Literal["bicubic", "bilinear"]


def resize_grid(table: Tensor, old: Grid, new: Grid, mode: Resize = "bicubic") -> Tensor:
    """`(1, old_h·old_w, C)` to `(1, new_h·new_w, C)`: corners not aligned, no antialias.

    Source: facebookresearch/deit main.py, which T2T-ViT, LV-ViT and TNT follow; timm's default differs (antialias).
    """
    if old == new:
        return table
    return tokens(F.interpolate(to_map(table, old), size=new, mode=mode, align_corners=False))


class PositionTable(TokenPosition):
    """A learned vector for each prefix token and each map position; resized in 2-D when the grid changes."""

    table: Tensor

    def __init__(self, at: Shape, std: float, resize: Resize, decay: bool = False) -> None:
        super().__init__()
        self.no_decay = frozenset() if decay else frozenset({"table"})
        self.grid, self.prefix, self.resize = at.grid, at.prefix, resize
        self._fill(at, std)

    def _fill(self, at: Shape, std: float) -> None:
        self.table = token_parameter(1, at.prefix + at.positions, at.dim, std=std)

    def resized(self, grid: Grid) -> Tensor:
        """The vectors of the map's positions on another grid, `(1, h·w, C)`."""
        return resize_grid(self.table[:, self.prefix :], self.grid, grid, self.resize)

    def forward(self, map: Tensor, prefix: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        grid = (map.shape[2], map.shape[3])
        map = map + to_map(self.resized(grid), grid)
        return map, None if prefix is None else prefix + self.table[:, : self.prefix]


@dataclass(frozen=True)
class LearnedPosition(Position):
    """A learned vector for each position, prefix tokens included.

    Args:
        std: standard deviation of the initial values.
        resize: how they are interpolated at another image size; PVT and CCT do it bilinearly.
        decay: whether weight decay applies to them, as in PVT.

    Source: ViT, arXiv 2010.11929; TNT, arXiv 2103.00112, equations 3 and 4.
    """

    std: float = 0.02
    resize: Resize = "bicubic"
    decay: bool = False

    def tokens(self, at: Shape) -> TokenPosition:
        return PositionTable(at, self.std, self.resize, self.decay)


class SinusoidTable(PositionTable):
    """A fixed vector for each token, prefix tokens first, kept in checkpoints as their publishers do."""

    def _fill(self, at: Shape, std: float) -> None:
        self.no_decay = frozenset()  # nothing here is learned
        where = torch.arange(at.prefix + at.positions, dtype=torch.float64)[:, None]
        channel = torch.arange(at.dim, dtype=torch.float64)
        angles = where / 10000.0 ** (2 * torch.div(channel, 2, rounding_mode="floor") / at.dim)
        table = torch.where(channel % 2 == 0, angles.sin(), angles.cos())
        self.register_buffer("table", table[None].to(torch.get_default_dtype()))


@dataclass(frozen=True)
class SinusoidPosition(Position):
    """Fixed sines and cosines of the place in the sequence, prefix tokens included: in one dimension, not two.

    Args:
        resize: how they are interpolated at another image size.

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.5; as T2T-ViT, arXiv 2101.11986, and CCT, arXiv
    2104.05704, use it.
    """

    resize: Resize = "bicubic"

    def tokens(self, at: Shape) -> TokenPosition:
        return SinusoidTable(at, 0.0, self.resize)


def sincos_table(grid: Grid, dim: int, temperature: float) -> Tensor:
    """`(h·w, dim)`: the first half encodes the column, the second the row, each a sine and a cosine block."""
    freqs = temperature ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float64), torch.arange(grid[1], dtype=torch.float64), indexing="ij"
    )
    angles = [axis.reshape(-1, 1) * freqs for axis in (x, y)]
    return torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=1)


class SinCosTable(TokenPosition):
    """A fixed sin-cos vector for each map position, zero for prefix tokens."""

    table: Tensor

    def __init__(self, at: Shape, temperature: float) -> None:
        super().__init__()
        self.grid, self.temperature = at.grid, temperature
        table = sincos_table(at.grid, at.dim, temperature).to(torch.get_default_dtype())
        # Made where the net is made, without a gap for torch.device("meta"), and not part of checkpoints.
        self.register_buffer("table", table[None], persistent=False)

    def forward(self, map: Tensor, prefix: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        grid = (map.shape[2], map.shape[3])
        table = self.table
        if grid != self.grid:
            table = sincos_table(grid, map.shape[1], self.temperature)[None].to(map)
        return map + to_map(table, grid), prefix


@dataclass(frozen=True)
class SinCosPosition(Position):
    """Fixed two-dimensional sines and cosines; prefix tokens get zero.

    Args:
        temperature: base of the frequencies.

    Raises:
        BuildError: the width is not a multiple of 4, or the temperature not above 0.

    Source: MAE, arXiv 2111.06377, appendix A.1; facebookresearch/mae util/pos_embed.py.
    """

    temperature: float = 10000.0

    def tokens(self, at: Shape) -> TokenPosition:
        if at.dim % 4:
            raise BuildError(f"SinCosPosition needs a width that 4 divides, got {at.dim}")
        if not self.temperature > 0:
            raise BuildError(f"SinCosPosition needs a temperature above 0, got {self.temperature}")
        return SinCosTable(at, self.temperature)


class DepthwisePosition(TokenPosition):
    """A depthwise convolution added to the map: the position comes from what lies around it, and from its edges."""

    def __init__(self, at: Shape, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(at.dim, at.dim, kernel, padding=kernel // 2, groups=at.dim)

    def forward(self, map: Tensor, prefix: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return map + self.conv(map), prefix


@dataclass(frozen=True)
class ConditionalPosition(Position):
    """A depthwise convolution over the tokens, which works at any image size; prefix tokens are left alone.

    Args:
        kernel: side of the convolution, odd.

    Raises:
        BuildError: the kernel is even.

    Source: CPVT, arXiv 2102.10882, section 3.3; Meituan-AutoML/Twins.
    """

    kernel: int = 3

    def tokens(self, at: Shape) -> TokenPosition:
        if self.kernel % 2 == 0:
            raise BuildError(f"ConditionalPosition needs an odd kernel, got {self.kernel}")
        return DepthwisePosition(at, self.kernel)


class RelativeBiasTable(ScorePosition):
    """One learned number for each head and offset, and three more where there are prefix tokens."""

    index: Tensor
    no_decay: ClassVar[frozenset[str]] = frozenset({"table", "prefix_table"})

    def __init__(self, at: Shape, heads: int, std: float) -> None:
        super().__init__()
        h, w = self.grid = at.grid
        self.prefix = at.prefix
        self.table = token_parameter(heads, 2 * h - 1, 2 * w - 1, std=std)
        # prefix query to position, position query to prefix, prefix to prefix: as in BEiT (arXiv 2106.08254)
        self.prefix_table = token_parameter(heads, 3, std=std) if at.prefix else None
        self.register_buffer("index", self._index(at.grid), persistent=False)

    @staticmethod
    def _index(grid: Grid) -> Tensor:
        """`(N, N)`: for each query and key the number of their offset in the flattened table."""
        h, w = grid
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        y, x = y.flatten(), x.flatten()
        return (y[:, None] - y + h - 1) * (2 * w - 1) + (x[:, None] - x + w - 1)

    def bias(self, grid: Grid) -> Tensor:
        table: Tensor = self.table
        index = self.index
        if grid != self.grid:
            size = (2 * grid[0] - 1, 2 * grid[1] - 1)
            table = F.interpolate(table[None], size=size, mode="bicubic", align_corners=False)[0]
            index = self._index(grid).to(table.device)
        bias = table.flatten(1)[:, index]
        if self.prefix_table is not None:
            to, back, within = self.prefix_table.unbind(1)
            heads, n, p = table.shape[0], index.shape[0], self.prefix
            top = torch.cat([within.view(-1, 1, 1).expand(heads, p, p), to.view(-1, 1, 1).expand(heads, p, n)], dim=2)
            bias = torch.cat([top, torch.cat([back.view(-1, 1, 1).expand(heads, n, p), bias], dim=2)], dim=1)
        return bias[None]


@dataclass(frozen=True)
class RelativeBias(Position):
    """A learned bias on each attention score by the offset between query and key.

    Args:
        std: standard deviation of the initial values.

    Raises:
        BuildError: the mixer's keys lie on another grid than its queries.

    Source: Swin, arXiv 2103.14030, equation 4; prefix tokens as in BEiT, arXiv 2106.08254.
    """

    std: float = 0.02

    def scores(self, at: Shape, heads: int, head_dim: int, keys: Grid) -> ScorePosition:
        if keys != at.grid:
            raise BuildError(
                f"RelativeBias needs keys on the {show_grid(at.grid)} grid of the queries, got {show_grid(keys)}; "
                "give this mixer position: NoPosition or sr_ratio: 1"
            )
        return RelativeBiasTable(at, heads, self.std)


class Rotation(ScorePosition):
    """Turns pairs of channels by angles that grow with the position: half of them by row, half by column."""

    def __init__(self, grid: Grid, head_dim: int, base: float) -> None:
        super().__init__()
        self.grid, self.pairs, self.base = grid, head_dim // 4, base
        cos, sin = self._angles(grid)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    cos: Tensor
    sin: Tensor

    def _angles(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """`(N, 4·pairs)` each; another grid is laid over the one that the net was built for."""
        freqs = self.base ** (-torch.arange(self.pairs, dtype=torch.float64) / self.pairs)
        axes = [
            (torch.arange(n, dtype=torch.float64) + 0.5) * (built / n) - 0.5
            for n, built in zip(grid, self.grid, strict=True)
        ]
        y, x = torch.meshgrid(*axes, indexing="ij")
        angles = torch.cat([y.reshape(-1, 1) * freqs, x.reshape(-1, 1) * freqs], dim=1).repeat_interleave(2, dim=1)
        dtype = torch.get_default_dtype()
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def rotate(self, x: Tensor, grid: Grid) -> Tensor:
        cos, sin = self.cos, self.sin
        if grid != self.grid:
            cos, sin = (t.to(x.device) for t in self._angles(grid))
        count, turned = cos.shape
        prefix = x.shape[2] - count
        part = x[:, :, prefix:, :turned]
        paired = torch.stack([-part[..., 1::2], part[..., ::2]], dim=-1).flatten(-2)
        part = (part * cos + paired * sin).to(x.dtype)
        rest = x[:, :, prefix:, turned:]
        return torch.cat([x[:, :, :prefix], torch.cat([part, rest], dim=-1)], dim=2)


@dataclass(frozen=True)
class RoPE(Position):
    """Rotary encoding in two dimensions: a quarter of each head's channel pairs turns with each axis.

    Prefix tokens are not turned; of a head width that 4 does not divide, the last channels are not.

    Args:
        base: base of the frequencies.

    Raises:
        BuildError: the head width is below 4, or the base not above 0.

    Source: RoFormer, arXiv 2104.09864; axial form of EVA-02, arXiv 2303.11331, as timm's RotaryEmbeddingCat.
    """

    base: float = 10000.0

    def scores(self, at: Shape, heads: int, head_dim: int, keys: Grid) -> ScorePosition:
        if head_dim < 4:
            raise BuildError(f"RoPE needs heads of at least 4 channels, got {head_dim}; use fewer heads")
        if not self.base > 0:
            raise BuildError(f"RoPE needs a base above 0, got {self.base}")
        return Rotation(at.grid, head_dim, self.base)
