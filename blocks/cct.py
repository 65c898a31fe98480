"""Compact Transformers (ViT-Lite, CVT, CCT): stems that cut small images, and a head that pools the sequence.

Paper: arXiv 2104.05704. Code: SHI-Labs/Compact-Transformers. Their layers are `Encoder` with `norm_stream`. ViT-Lite
has `CompactPatchStem` and a class token, CVT the same stem without one and `SeqPoolHead`, CCT `ConvTokenizer` and
`SeqPoolHead`.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from blocks.base import ActFactory, Block, Features, NormFactory, Shape, Site, linear, tokens
from blocks.heads import Head
from blocks.mlp import ReLU
from blocks.norms import NoNorm
from blocks.stems import PatchStem

SOURCE = "Compact Transformers, arXiv 2104.05704; SHI-Labs/Compact-Transformers (Apache-2.0)"


class ConvTokenizer(Block):
    """Images to tokens by convolutions without bias, each with activation and a 3×3 max pooling of stride 2.

    Args:
        layers: how many convolutions; the last one gives the net's width.
        hidden: width behind the others.
        kernel: side of each convolution.
        stride: stride of each convolution; by default half of the kernel less one, at least 1 (3: 1, 7: 2).
        padding: zeros at each edge; by default half of the kernel, at least 1.
        act: the activation behind each convolution.
        drop: dropout rate on the tokens, behind the positions.

    Raises:
        BuildError: there is no convolution, or one does not fit the image.

    Source: arXiv 2104.05704; SHI-Labs/Compact-Transformers src/utils/tokenizer.py.
    """

    source = SOURCE
    counts = False

    def __init__(
        self,
        site: Site,
        layers: int = 1,
        hidden: int = 64,
        kernel: int = 3,
        stride: int | None = None,
        padding: int | None = None,
        act: ActFactory = ReLU,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise site.error(self, f"needs at least 1 of layers, got {layers}")
        stride = max(1, kernel // 2 - 1) if stride is None else stride
        padding = max(1, kernel // 2) if padding is None else padding
        widths = [site.inp.dim, *[hidden] * (layers - 1), site.dim]
        grid = site.inp.grid
        self.convs = nn.ModuleList()
        for width, dim in pairwise(widths):
            if kernel < 1 or stride < 1 or padding < 0 or min(grid) + 2 * padding < kernel:
                raise site.error(
                    self,
                    f"cannot run a convolution of kernel {kernel}, stride {stride}, padding {padding} over a "
                    f"{grid[0]}×{grid[1]} map; use fewer layers, another kernel or larger images",
                )
            conv = nn.Conv2d(width, dim, kernel, stride, padding, bias=False)
            nn.init.kaiming_normal_(conv.weight)
            self.convs.append(conv)
            h, w = ((side + 2 * padding - kernel) // stride + 1 for side in grid)
            grid = ((h - 1) // 2 + 1, (w - 1) // 2 + 1)  # the pooling's
        self.act = act()
        self.out = Shape(site.dim, grid)
        self.position = site.position.tokens(self.out)
        self.drop = nn.Dropout(drop)

    def forward(self, features: Features) -> Features:
        map = features.map
        for conv in self.convs:
            map = F.max_pool2d(self.act(conv(map)), 3, stride=2, padding=1)
        return features.replace(map=self.drop(self.position(map)[0]))


class CompactPatchStem(PatchStem):
    """`PatchStem` as ViT-Lite and CVT start it: kernels from He's normal distribution, prefix tokens at zero.

    Args:
        patch: side of a patch in pixels; must divide the image.
        prefix: number of prefix tokens: 1 class token (ViT-Lite), 0 none (CVT).
        norm: a normalisation behind the convolution.
        drop: dropout rate on the tokens, behind the positions.

    Raises:
        BuildError: the patch does not divide the image.

    Source: arXiv 2104.05704; SHI-Labs/Compact-Transformers src/vit.py and src/cvt.py.
    """

    source = SOURCE

    def __init__(
        self, site: Site, patch: int = 4, prefix: int = 1, norm: NormFactory = NoNorm, drop: float = 0.0
    ) -> None:
        super().__init__(site, patch, prefix, norm, drop)
        nn.init.kaiming_normal_(self.conv.weight)
        if self.prefix is not None:
            nn.init.zeros_(self.prefix)


class SeqPoolHead(Head):
    """A Linear on a weighted mean over the map, by weights that another Linear gives each position; prefix tokens are
    not read.

    The weights' Linear has a bias, as released, though a softmax does not see it.

    Source: arXiv 2104.05704; SHI-Labs/Compact-Transformers src/utils/transformers.py.
    """

    reads = frozenset({"map"})
    source = SOURCE

    def __init__(self, shape: Shape, num_classes: int) -> None:
        super().__init__()
        self.pool = linear(shape.dim, 1)
        self.fc = linear(shape.dim, num_classes)

    def pooled(self, features: Features) -> Tensor:
        x = tokens(features.map)
        weights = self.pool(x).softmax(dim=1)
        return (weights.transpose(1, 2) @ x).squeeze(1)

    def forward(self, features: Features) -> Tensor:
        return self.fc(self.pooled(features))
