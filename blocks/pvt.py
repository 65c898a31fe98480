"""Pyramid Vision Transformer: attention whose keys and values are a smaller map, made by a strided convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blocks.attention import attend_on, score_position
from blocks.base import Grid, Mixer, NormFactory, Position, Site, linear, show_grid, to_map, tokens
from blocks.norms import LayerNorm
from blocks.positions import NetPosition


class ReducedAttention(Mixer):
    """Spatial-reduction attention: keys and values come from the map after a convolution of stride `sr`, normed.

    Prefix tokens are keys and values too, as they are. Rows and columns that are left over at the edge of the map are
    no part of any key.

    Args:
        heads: number of heads; must divide the width.
        sr: side of the patch of tokens that makes one key; 1 is plain attention with separate projections.
        qkv_bias: whether queries, keys and values have biases.
        norm: the normalisation behind the convolution.
        position: encoding on the scores, the net's by default; its keys lie on the smaller grid.

    Raises:
        BuildError: `heads` does not divide the width, or the map is smaller than `sr`.

    Source: PVT, arXiv 2102.12122, section 3.3; whai362/PVT classification/pvt.py, class Attention (Apache-2.0).
    """

    source = "PVT, arXiv 2102.12122; whai362/PVT (Apache-2.0)"
    per_token = True

    def __init__(
        self,
        site: Site,
        heads: int = 8,
        sr: int = 1,
        qkv_bias: bool = True,
        norm: NormFactory = LayerNorm,
        position: Position = NetPosition(),
    ) -> None:
        super().__init__()
        dim, (h, w) = site.inp.dim, site.inp.grid
        self.heads = heads
        head_dim = site.divides(self, dim, heads, "heads")
        if not 1 <= sr <= min(h, w):
            raise site.error(self, f"needs an sr from 1 to {min(h, w)} on a {show_grid((h, w))} map, got {sr}")
        self.q = linear(dim, dim, qkv_bias)
        self.kv = linear(dim, 2 * dim, qkv_bias)
        self.sr = sr
        self.reduce = nn.Conv2d(dim, dim, sr, stride=sr) if sr > 1 else None
        self.norm = norm(dim) if sr > 1 else None
        self.position = score_position(position, site, site.inp, heads, head_dim, (h // sr, w // sr))
        self.proj = linear(dim, dim)

    def forward(self, x: Tensor, grid: Grid, rows: int | None = None) -> Tensor:
        y, keys = x, grid
        if self.reduce is not None and self.norm is not None:
            prefix = x.shape[1] - grid[0] * grid[1]
            keys = (grid[0] // self.sr, grid[1] // self.sr)
            y = self.norm(tokens(self.reduce(to_map(x[:, prefix:], grid))))
            y = torch.cat([x[:, :prefix], y], dim=1) if prefix else y
        q = self.q(x if rows is None else x[:, :rows])
        k, v = self.kv(y).chunk(2, dim=-1)
        return self.proj(attend_on(self.position, self.heads, q, k, v, grid, keys, rows))
