"""Convolutional vision Transformer: attention whose queries, keys and values come through convolutions on the map."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from blocks.attention import attend_on, score_position
from blocks.base import Grid, Mixer, Norm, NormFactory, Position, Site, linear, to_map, tokens
from blocks.norms import BatchNorm
from blocks.positions import NetPosition


class DepthwiseProjection(nn.Module):
    """A depthwise 3×3 convolution of some stride and a norm."""

    def __init__(self, dim: int, stride: int, norm: NormFactory) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=stride, padding=1, groups=dim, bias=False)
        self.norm: Norm = norm(dim)

    def forward(self, map: Tensor) -> Tensor:
        return self.norm.on_map(self.conv(map))


class ConvAttention(Mixer):
    """Attention with a convolutional projection: the map is convolved before the Linear layers; prefix tokens are not.

    Args:
        heads: number of heads; must divide the width.
        projection: what is before the Linear layers, by the names of the authors' configs: `dw_bn`, a depthwise 3×3
            convolution and a norm for each of queries, keys and values; `avg`, a mean over 3×3 for keys and values;
            `linear`, nothing, which is ordinary attention.
        kv_stride: stride of the convolutions (or means) of keys and values.
        qkv_bias: whether the Linear layers of queries, keys and values have biases.
        scale: by the square root of what the scores are divided: `width`, the whole width, as released; `head`, that of
            a head, as everywhere else.
        norm: the normalisation behind the convolutions.
        position: encoding on the scores, the net's by default; its keys lie on the smaller grid.

    Raises:
        BuildError: `heads` does not divide the width, or the stride is below 1.

    Source: CvT, arXiv 2103.15808, section 3.2; microsoft/CvT lib/models/cls_cvt.py, class Attention.
    """

    source = "CvT, arXiv 2103.15808; microsoft/CvT"

    def __init__(
        self,
        site: Site,
        heads: int = 8,
        projection: Literal["dw_bn", "avg", "linear"] = "dw_bn",
        kv_stride: int = 2,
        qkv_bias: bool = True,
        scale: Literal["width", "head"] = "width",
        norm: NormFactory = BatchNorm,
        position: Position = NetPosition(),
    ) -> None:
        super().__init__()
        dim, (h, w) = site.inp.dim, site.inp.grid
        if kv_stride < 1:
            raise site.error(self, f"needs a kv_stride of at least 1, got {kv_stride}")
        self.heads = heads
        head_dim = site.divides(self, dim, heads, "heads")
        # attention divides by the root of a head's width
        self.factor = heads**-0.5 if scale == "width" else 1.0
        self.conv_q: nn.Module | None = None
        self.conv_k: nn.Module | None = None
        self.conv_v: nn.Module | None = None
        keys = [h, w]
        if projection == "dw_bn":
            self.conv_q = DepthwiseProjection(dim, 1, norm)
            self.conv_k = DepthwiseProjection(dim, kv_stride, norm)
            self.conv_v = DepthwiseProjection(dim, kv_stride, norm)
            keys = [(side - 1) // kv_stride + 1 for side in (h, w)]
        elif projection == "avg":
            self.conv_k = self.conv_v = nn.AvgPool2d(3, kv_stride, padding=1, ceil_mode=True)
            _, _, *keys = self.conv_k(torch.empty(1, 1, h, w, device="meta")).shape
        # Queries of the map that nobody reads still count in a batch norm's statistics.
        self.per_token = projection != "dw_bn"
        self.q = linear(dim, dim, qkv_bias)
        self.k = linear(dim, dim, qkv_bias)
        self.v = linear(dim, dim, qkv_bias)
        self.position = score_position(position, site, site.inp, heads, head_dim, (keys[0], keys[1]))
        self.proj = linear(dim, dim)

    def forward(self, x: Tensor, grid: Grid, rows: int | None = None) -> Tensor:
        prefix = x[:, : x.shape[1] - grid[0] * grid[1]]
        map = to_map(x[:, prefix.shape[1] :], grid)
        q, k, v = x if rows is None else x[:, :rows], x, x
        keys = grid
        if self.conv_q is not None and rows is None:
            q = _joined(prefix, self.conv_q(map))
        if self.conv_k is not None and self.conv_v is not None:
            small = self.conv_k(map)
            keys = (small.shape[2], small.shape[3])
            k = _joined(prefix, small)
            v = k if self.conv_v is self.conv_k else _joined(prefix, self.conv_v(map))
        q = self.q(q) * self.factor if self.factor != 1.0 else self.q(q)
        return self.proj(attend_on(self.position, self.heads, q, self.k(k), self.v(v), grid, keys, rows))


def _joined(prefix: Tensor, map: Tensor) -> Tensor:
    return torch.cat([prefix, tokens(map)], dim=1) if prefix.shape[1] else tokens(map)
