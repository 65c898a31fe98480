"""SReT's parts: attention in slices, and the non-linear projection between two runs of a shared block.

Paper: arXiv 2111.05297 (ECCV 2022). Code: szq0214/SReT SReT.py. The recursion itself is `Recursive` in
`blocks.structure`, the learned coefficients are `LearnedResidual` in `blocks.residual`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from blocks.attention import Attention
from blocks.base import (
    PARTS,
    Block,
    BuildError,
    Features,
    Grid,
    MlpFactory,
    NoPosition,
    NormFactory,
    Site,
    to_map,
    tokens,
)
from blocks.mlp import Mlp
from blocks.norms import LayerNorm
from blocks.residual import LearnedResidual, ResidualFactory

SOURCE = "SReT, arXiv 2111.05297; szq0214/SReT (MIT)"


class SlicedAttention(Attention):
    """Multi-head self-attention inside groups of tokens, with other groups in each run of a shared block.

    In the first run the groups are slices of the sequence, which on a map are horizontal strips. In later ones they are
    drawn anew for each batch while it trains; in evaluation they are dealt like cards, every G-th token to one of G
    groups, so that each spans the map and the result does not depend on chance.

    Works on maps without prefix tokens, and without positions on the scores: the tokens of a group lie on no grid.

    Args:
        heads: number of heads; must divide the width.
        qkv_bias: whether queries, keys and values have biases: yes in SReT.
        groups: number of groups in each run, the last of them for all further ones; each must divide the number of
            tokens.
        draw_in_eval: whether groups are drawn in evaluation too, as released: the same images then give other logits
            each time.
        attn_drop: dropout rate on the attention weights.
        proj_drop: dropout rate on the output.

    Raises:
        BuildError: `heads` does not divide the width, a number of groups does not divide the tokens (with images of
            another size: when they come), prefix tokens come in, or the net's position works on scores.

    Source: arXiv 2111.05297, sliced group self-attention; szq0214/SReT SReT.py, class Attention.
    """

    source = SOURCE
    by_turn = True

    def __init__(
        self,
        site: Site,
        heads: int = 8,
        qkv_bias: bool = False,
        groups: tuple[int, ...] = (1,),
        draw_in_eval: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        site.no_prefix(self)
        if site.position.on_scores:
            raise site.error(
                self, f"cannot use {type(site.position).__name__}: the tokens of a group lie on no grid; use a "
                "position on tokens (LearnedPosition, ConditionalPosition), or Attention here"
            )  # fmt: skip
        super().__init__(site, heads, qkv_bias, NoPosition(), attn_drop=attn_drop, proj_drop=proj_drop)
        self.per_token = False
        if not groups:
            raise site.error(self, "needs a number of groups for the first run, for example groups: [1]")
        self.groups, self.draw_in_eval, self.where = tuple(groups), draw_in_eval, site.where
        for count in self.groups:
            self._divide(site.inp.positions, count)

    def _divide(self, length: int, count: int) -> int:
        """Tokens in each of `count` groups of `length` tokens. Raises BuildError where that is no whole number."""
        if count < 1 or length % count:
            near = sorted((n for n in range(1, length + 1) if length % n == 0), key=lambda n: abs(n - count))[:4]
            raise BuildError(
                f"{self.where + ': ' if self.where else ''}SlicedAttention cannot share {length} tokens out to {count} "
                f"groups; near numbers that fit: {', '.join(map(str, sorted(near)))}"
            )
        return length // count

    def forward(self, x: Tensor, grid: Grid, rows: int | None = None, turn: int = 0) -> Tensor:
        b, n, c = x.shape
        groups = self.groups[min(turn, len(self.groups) - 1)]
        if groups == 1:
            return super().forward(x, grid)
        size = self._divide(n, groups)
        if turn == 0:
            return super().forward(x.reshape(b * groups, size, c), (1, size)).view(b, n, c)
        if self.training or self.draw_in_eval:
            order = torch.randperm(n, device=x.device)
        else:
            order = torch.arange(n, device=x.device).view(size, groups).t().flatten()
        y = super().forward(x[:, order].view(b * groups, size, c), (1, size)).view(b, n, c)
        return y[:, order.argsort()]


class NLL(Block):
    """SReT's non-linear projection layer: `x ← residual(x, mlp(norm(x)))` on prefix and map tokens, without drop path.

    Words pass unchanged.

    Args:
        mlp: works on each token (SReT: of ratio 1 or 2).
        norm: the normalisation before it.
        residual: how its branch is added.

    Source: arXiv 2111.05297, non-linear projection layer; szq0214/SReT SReT.py, class Non_proj.
    """

    source = SOURCE
    counts = False

    def __init__(
        self,
        site: Site,
        mlp: MlpFactory = Mlp,
        norm: NormFactory = LayerNorm,
        residual: ResidualFactory = LearnedResidual,
    ) -> None:
        super().__init__()
        site.keeps_width(self)
        here = replace(site, drop_path=0.0)
        self.norm = norm(site.inp.dim)
        self.mlp = mlp(here.inside("mlp"))
        self.residual = residual(here.inside("residual"))
        self.out = site.inp

    def keep(self, parts: frozenset[str]) -> frozenset[str]:
        alone = all(part.per_token for part in (self.norm, self.mlp, self.residual.gate))
        return parts if alone else PARTS

    def forward(self, features: Features) -> Features:
        map, prefix = features.map, features.prefix
        grid = (map.shape[2], map.shape[3])
        x = tokens(map)
        if prefix is not None:
            x = torch.cat([prefix, x], dim=1)
        x = self.residual(x, self.mlp(self.norm(x), grid))
        if prefix is None:
            return features.replace(map=to_map(x, grid))
        count = prefix.shape[1]
        return features.replace(map=to_map(x[:, count:], grid), prefix=x[:, :count])
