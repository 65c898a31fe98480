"""The standard pre-norm transformer block, with every part a slot."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from blocks.attention import Attention
from blocks.base import (
    PARTS,
    Block,
    Features,
    Grid,
    MixerFactory,
    MlpFactory,
    NormFactory,
    Site,
    to_map,
    tokens,
)
from blocks.kernels import encoder as kernel
from blocks.kernels.linear import Linear, unhooked
from blocks.mlp import Mlp
from blocks.norms import LayerNorm
from blocks.residual import Residual, ResidualFactory, add_norm, add_to


class Encoder(Block):
    """`x ← residual(x, mixer(norm(x)))`, then `x ← residual(x, mlp(norm(x)))`, over prefix and map tokens.

    Words pass unchanged. Where only the prefix of its output is read, queries, projection and MLP are computed for
    the prefix alone, which gives the same prefix.

    Args:
        mixer: mixes the tokens.
        mlp: works on each token.
        norm: the normalisation before each of the two.
        mixer_residual: how the mixer's branch is added (layer scale, gate, factor).
        mlp_residual: how the MLP's branch is added.
        norm_stream: whether the second norm also replaces what the MLP's branch is added to, as in CCT.

    Source: ViT, arXiv 2010.11929, equations 2 and 3; the slots follow MetaFormer, arXiv 2111.11418; `norm_stream`
    SHI-Labs/Compact-Transformers src/utils/transformers.py.
    """

    source = "ViT, arXiv 2010.11929; DeiT, arXiv 2012.12877; facebookresearch/deit"

    def __init__(
        self,
        site: Site,
        mixer: MixerFactory = Attention,
        mlp: MlpFactory = Mlp,
        norm: NormFactory = LayerNorm,
        mixer_residual: ResidualFactory = Residual,
        mlp_residual: ResidualFactory = Residual,
        norm_stream: bool = False,
    ) -> None:
        super().__init__()
        site.keeps_width(self)
        self.norm1 = norm(site.inp.dim)
        self.mixer = mixer(site.inside("mixer"))
        self.mixer_residual = mixer_residual(site.inside("mixer_residual"))
        self.norm2 = norm(site.inp.dim)
        self.mlp = mlp(site.inside("mlp"))
        self.mlp_residual = mlp_residual(site.inside("mlp_residual"))
        self.norm_stream = norm_stream
        self.prefix_only = False
        self.out = site.inp

    def keep(self, parts: frozenset[str]) -> frozenset[str]:
        exact = (self.norm2, self.mixer, self.mixer_residual.gate, self.mlp, self.mlp_residual.gate)
        alone = all(part.per_token for part in exact)
        self.prefix_only = alone and self.out.prefix > 0 and "map" not in parts
        return parts | {"map", "prefix"} if self.prefix_only else PARTS

    def forward(self, features: Features) -> Features:
        x = tokens(features.map)
        if features.prefix is None:
            return self.encode(features, x, own=False)
        return self.encode(features, torch.cat([features.prefix, x], dim=1))

    def planned(self, features: Features) -> Features | None:
        x = tokens(features.map) if features.prefix is None else as_one(features.prefix, tokens(features.map))
        return None if x is None or type(self) is not Encoder else self.encoded(features, x)

    def encoded(self, features: Features, x: Tensor) -> Features | None:
        """`encode` in one kernel; None where that is not possible."""
        count = 0 if features.prefix is None else features.prefix.shape[1]
        made = kernel.encode(self, x, count if self.prefix_only else None)
        if made is None:
            return None
        return features.replace(prefix=made) if self.prefix_only else self._apart(features, made, count)

    def encode(self, features: Features, x: Tensor, own: bool = True) -> Features:
        """`forward`, of the prefix and the map that lie in `x` as tokens; of `features` grid and prefix are read.

        What nobody else holds (`own`) may be overwritten.
        """
        grid, prefix = (features.map.shape[2], features.map.shape[3]), features.prefix
        count = 0 if prefix is None else prefix.shape[1]
        mixer, residual = self.mixer, self.mixer_residual
        made = self.encoded(features, x) if type(self) is Encoder else None
        if made is not None:
            return made
        multiplies = type(mixer) is Attention and type(mixer.qkv) is Linear and unhooked(mixer, mixer.qkv)
        x, y = add_norm(x, self.norm1, multiplies) or (x, self.norm1(x))
        turn = {"turn": features.turn} if mixer.by_turn else {}
        if self.prefix_only:
            x = residual(cast(Tensor, prefix), mixer(y, grid, rows=count, **turn))
            return features.replace(prefix=self._feed_forward(x, self.norm2(x), (0, 0)))
        y = mixer(y, grid, **turn)
        mlp = self.mlp
        multiplies = type(mlp) is Mlp and type(mlp.fc1) is Linear and unhooked(mlp, mlp.fc1) and not self.norm_stream
        both = add_norm(x, self.norm2, multiplies, y, residual, own=own)
        if both is None:
            x = residual(x, y)
            x = self._feed_forward(x, self.norm2(x), grid)
        elif self.norm_stream:
            x = self._feed_forward(*both, grid)
        else:
            x = add_to(both[0], mlp(both[1], grid), self.mlp_residual)
        return self._apart(features, x, count)

    @staticmethod
    def _apart(features: Features, x: Tensor, count: int) -> Features:
        """Features with the prefix, of `count` tokens, and the map that lie in `x`."""
        grid = (features.map.shape[2], features.map.shape[3])
        if not count:
            return features.replace(map=to_map(x, grid))
        prefix, x = x.split([count, x.shape[1] - count], dim=1)
        return features.replace(map=to_map(x, grid), prefix=prefix)

    def _feed_forward(self, x: Tensor, y: Tensor, grid: Grid) -> Tensor:
        return self.mlp_residual(y if self.norm_stream else x, self.mlp(y, grid))


def as_one(prefix: Tensor, x: Tensor) -> Tensor | None:
    """`torch.cat([prefix, x], dim=1)` of tokens that lie so already, parts of one tensor; None where they do not."""
    (batch, count, dim), step = prefix.shape, prefix.stride()
    behind = x.data_ptr() == prefix.data_ptr() + count * dim * prefix.element_size() and x.dtype is prefix.dtype
    if not behind or x.untyped_storage().data_ptr() != prefix.untyped_storage().data_ptr():
        return None
    # Of a single sample the distance to the next says nothing.
    if not step[1:] == x.stride()[1:] == (dim, 1) or (batch > 1 and x.stride(0) != step[0]):
        return None
    return prefix.as_strided((batch, count + x.shape[1], dim), step)
