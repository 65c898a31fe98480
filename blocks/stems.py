"""Stems: blocks that take images. Any block may stand in a net's stem slot; `SentenceStem` is in `blocks.tnt`."""

from __future__ import annotations

from torch import nn

from blocks.base import ActFactory, Block, Features, NormFactory, Shape, Site, token_parameter
from blocks.kernels.folded import convs_of_images
from blocks.mlp import ReLU
from blocks.norms import BatchNorm, NoNorm
from blocks.tnt import patch_grid


class PatchStem(Block):
    """Images to tokens by a convolution over patches that do not overlap; then prefix tokens and positions.

    Args:
        patch: side of a patch in pixels; must divide the image.
        prefix: number of prefix tokens: 1 class token, 2 class and distillation token (in this order), 0 none.
        norm: a normalisation behind the convolution.
        drop: dropout rate on the tokens, behind the positions.

    Raises:
        BuildError: the patch does not divide the image.

    Source: ViT, arXiv 2010.11929, equation 1; DeiT, arXiv 2012.12877, section 4.
    """

    source = "ViT, arXiv 2010.11929; DeiT, arXiv 2012.12877; facebookresearch/deit"
    counts = False
    no_decay = frozenset({"prefix"})

    def __init__(
        self, site: Site, patch: int = 16, prefix: int = 1, norm: NormFactory = NoNorm, drop: float = 0.0
    ) -> None:
        super().__init__()
        grid = patch_grid(self, site, patch)
        self.conv = nn.Conv2d(site.inp.dim, site.dim, patch, stride=patch)
        self.norm = norm(site.dim)
        self.out = Shape(site.dim, grid, prefix)
        self.prefix = token_parameter(1, prefix, site.dim) if prefix else None
        self.position = site.position.tokens(self.out)
        self.drop = nn.Dropout(drop)

    def forward(self, features: Features) -> Features:
        map = self.norm.on_map(self.conv(features.map))
        prefix = None if self.prefix is None else self.prefix.expand(map.shape[0], -1, -1)
        map, prefix = self.position(map, prefix)
        return features.replace(map=self.drop(map), prefix=None if prefix is None else self.drop(prefix))


class ConvStem(Block):
    """Images to a map by 3×3 convolutions, each with norm and activation.

    Args:
        dims: width behind each convolution.
        strides: stride of each convolution; their product is the stem's stride.
        norm: the normalisation behind each convolution.
        act: the activation behind each norm.
        bias: whether the convolutions have biases (SReT).

    Raises:
        BuildError: `dims` and `strides` differ in length, or are empty.

    Source: Next-ViT, arXiv 2207.05501; bytedance/Next-ViT classification/nextvit.py; with biases SReT, arXiv
    2111.05297.
    """

    source = "Next-ViT, arXiv 2207.05501; bytedance/Next-ViT (Apache-2.0)"
    counts = False

    def __init__(
        self,
        site: Site,
        dims: tuple[int, ...] = (64, 32, 64, 64),
        strides: tuple[int, ...] = (2, 1, 1, 2),
        norm: NormFactory = BatchNorm,
        act: ActFactory = ReLU,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if not dims or len(dims) != len(strides):
            raise site.error(
                self, f"needs one stride for each width, got dims {list(dims)} and strides {list(strides)}"
            )
        self.layers = nn.ModuleList()
        width, grid = site.inp.dim, site.inp.grid
        for dim, stride in zip(dims, strides, strict=True):
            conv = nn.Conv2d(width, dim, 3, stride=stride, padding=1, bias=bias)
            nn.init.trunc_normal_(conv.weight, std=0.02)
            self.layers.append(nn.ModuleDict({"conv": conv, "norm": norm(dim), "act": act()}))
            width, grid = dim, ((grid[0] - 1) // stride + 1, (grid[1] - 1) // stride + 1)
        self.position = site.position.tokens(Shape(width, grid))
        self.out = Shape(width, grid)

    def forward(self, features: Features) -> Features:
        layers = ((layer["conv"], layer["norm"], layer["act"]) for layer in self.layers)  # type: ignore[index]
        map = convs_of_images(layers, features.map)  # type: ignore[arg-type]
        return features.replace(map=self.position(map)[0])
