"""Multi-head self-attention, the default mixer of the standard encoder."""

from __future__ import annotations

from torch import Tensor, nn

from blocks.base import GateFactory, Grid, Mixer, Position, ScorePosition, Shape, Site, linear
from blocks.gates import NoGate
from blocks.kernels.attention import attend, attend_joined, split
from blocks.kernels.linear import Linear, unhooked
from blocks.kernels.linear import linear as fast_linear
from blocks.positions import NetPosition


def score_position(position: Position, site: Site, at: Shape, heads: int, head_dim: int, keys: Grid) -> ScorePosition:
    """What `position`, or the net's own for `NetPosition`, does to the scores of a mixer at `at`."""
    return (site.position if isinstance(position, NetPosition) else position).scores(at, heads, head_dim, keys)


def attend_on(
    position: ScorePosition, heads: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid, keys: Grid, rows: int | None
) -> Tensor:
    """Attention of queries `(B, n, C)` on keys and values `(B, m, C)`, in heads, with `position` on the scores.

    Prefix tokens come first in each; the others lie on `grid` and on `keys`. With `rows` the queries are prefix tokens.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if rows is None:  # no encoding turns prefix tokens
        q = position.rotate(q, grid)
    bias = position.bias(grid)
    if bias is not None:
        bias = bias[:, :, : q.shape[2]].to(q.dtype)
    return attend(q, position.rotate(k, keys), v, bias).transpose(1, 2).flatten(2)


class Attention(Mixer):
    """Multi-head self-attention with one fused projection for queries, keys and values.

    Args:
        heads: number of heads; must divide the width.
        qkv_bias: whether queries, keys and values have biases: yes in ViT and DeiT, no in TNT.
        position: encoding on the scores (`RelativeBias`, `RoPE`), the net's by default.
        gate: weighs the output's channels, behind the projection (T2T-ViT's SE).
        attn_drop: dropout rate on the attention weights.
        proj_drop: dropout rate on the output.

    Raises:
        BuildError: `heads` does not divide the width.

    Source: arXiv 1706.03762; fused as in timm and facebookresearch/deit.
    """

    source = "ViT, arXiv 2010.11929; facebookresearch/deit"

    def __init__(
        self,
        site: Site,
        heads: int = 8,
        qkv_bias: bool = False,
        position: Position = NetPosition(),
        gate: GateFactory = NoGate,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        dim = site.inp.dim
        if not 0 <= attn_drop < 1:
            raise site.error(self, f"needs an attn_drop from 0 to below 1, got {attn_drop}")
        self.heads = heads
        self.head_dim = site.divides(self, dim, heads, "heads")
        self.qkv = linear(dim, 3 * dim, qkv_bias)
        self.position = score_position(position, site, site.inp, heads, self.head_dim, site.inp.grid)
        self.proj = linear(dim, dim)
        self.gate = gate(dim)
        self.per_token = self.gate.per_token
        self.attn_drop = attn_drop
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid: Grid, rows: int | None = None) -> Tensor:
        b, n, c = x.shape
        drop = self.attn_drop if self.training else 0.0
        if rows is None or type(self.qkv) is not Linear or not unhooked(self.qkv):
            parts = [self.qkv(x).view(b, n, 3, self.heads, self.head_dim)]
            if rows is not None:
                parts = [parts[0][:, :rows, :1], parts[0][:, :, 1:]]
        else:
            # Only prefix rows are wanted, which no encoding turns; keys and values are needed of every token.
            b_q, b_kv = (None, None) if self.qkv.bias is None else self.qkv.bias.split([c, 2 * c])
            q = fast_linear(x[:, :rows], self.qkv.weight[:c], b_q)
            kv = fast_linear(x, self.qkv.weight[c:], b_kv)
            parts = [q.view(b, rows, 1, self.heads, self.head_dim), kv.view(b, n, 2, self.heads, self.head_dim)]
        if type(self.position) is ScorePosition and not drop:
            return self._out(attend_joined(*parts))
        q, k, v = split(parts)
        if rows is None:
            q = self.position.rotate(q, grid)
        bias = self.position.bias(grid)
        if bias is not None:
            bias = bias[:, :, : q.shape[2]].to(q.dtype)
        return self._out(attend(q, self.position.rotate(k, grid), v, bias, drop))

    def _out(self, y: Tensor) -> Tensor:
        """What the heads found, `(B, heads, N, d)`, as tokens."""
        return self.proj_drop(self.gate(self.proj(y.transpose(1, 2).flatten(2))))
