"""ConvNeXt's block: a depthwise convolution and an MLP in one residual branch."""

from __future__ import annotations

from torch import nn

from blocks.base import Block, Features, MlpFactory, NormFactory, Site, to_map, tokens
from blocks.mlp import Mlp
from blocks.norms import LayerNorm
from blocks.residual import Residual, ResidualFactory


class ConvNeXt(Block):
    """`x ← residual(x, mlp(norm(conv(x))))` with a depthwise convolution.

    Prefix tokens and words pass unchanged. The released nets have LayerNorm with eps 1e-6, and a layer scale that
    starts at 1e-6 (`residual: {layer_scale: 1e-6}`).

    Args:
        kernel: side of the convolution, odd: 7 in ConvNeXt, 3 in RevCol.
        norm: the normalisation behind the convolution.
        mlp: works on each position.
        residual: how the branch is added (layer scale, gate, factor).

    Raises:
        BuildError: the width should change here, or the kernel is even.

    Source: ConvNeXt, arXiv 2201.03545, section 2.5; facebookresearch/ConvNeXt, class Block.
    """

    source = "ConvNeXt, arXiv 2201.03545; facebookresearch/ConvNeXt"

    def __init__(
        self,
        site: Site,
        kernel: int = 7,
        norm: NormFactory = LayerNorm,
        mlp: MlpFactory = Mlp,
        residual: ResidualFactory = Residual,
    ) -> None:
        super().__init__()
        site.keeps_width(self)
        if kernel < 1 or kernel % 2 == 0:
            raise site.error(self, f"needs an odd kernel, got {kernel}")
        dim = site.inp.dim
        self.conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        nn.init.trunc_normal_(self.conv.weight, std=0.02)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        self.norm = norm(dim)
        self.mlp = mlp(site.inside("mlp"))
        self.residual = residual(site.inside("residual"))
        self.out = site.inp

    def forward(self, features: Features) -> Features:
        map = features.map
        grid = (map.shape[2], map.shape[3])
        y = self.mlp(self.norm(tokens(self.conv(map))), grid)
        return features.replace(map=to_map(self.residual(tokens(map), y), grid))
