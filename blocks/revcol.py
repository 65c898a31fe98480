"""RevCol's parts: what joins the levels of neighbouring columns, and what supervises columns before the last.

Paper: arXiv 2212.11696. Code: megvii-research/RevCol models/revcol.py and modules.py. The columns
themselves, which take any blocks, are the backbone `Columns`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from blocks.base import (
    BlockFactory,
    BuildError,
    Features,
    Grid,
    NormFactory,
    Shape,
    Site,
    linear,
    show_grid,
    to_map,
    tokens,
)
from blocks.heads import AveragePoolHead
from blocks.norms import LayerNorm, NoNorm
from blocks.structure import ConvEmbed

SOURCE = "RevCol, arXiv 2212.11696; megvii-research/RevCol"

QUARTERS = ("quarter1", "quarter2", "quarter3")
"""The names in `Features.extra` of the last level's maps behind each quarter of the columns but the last."""


class Fusion(nn.Module):
    """What a level of a column begins with: the level below it, shrunk, plus the one above it, enlarged.

    The level below is of the same column; the one above of the column before, by a Linear, a norm and nearest
    neighbours. Built with the site, whose `inp` is the level below, and the shape of the level above, if any.

    Args:
        down: the block that takes the level's stride and width; none is made where neither changes. Its convolutions
            start as in the released code.
        norm: the normalisation on the way up.

    Raises:
        BuildError: `down` does not take stride and width, or gives more than a map.

    Source: RevCol, arXiv 2212.11696, section 2.2; megvii-research/RevCol modules.py, class Fusion.
    """

    source = SOURCE

    def __init__(
        self, site: Site, above: Shape | None, down: BlockFactory = ConvEmbed, norm: NormFactory = LayerNorm
    ) -> None:
        super().__init__()
        self.down = None
        self.out = site.inp
        if site.stride > 1 or site.dim != site.inp.dim:
            self.down = down(site.inside("down"))
            self.out = self.down.out
            for part in self.down.modules():
                if isinstance(part, nn.Conv2d):
                    nn.init.trunc_normal_(part.weight, std=0.02)
                    if part.bias is not None:
                        nn.init.zeros_(part.bias)
        (h, w), s = site.inp.grid, site.stride
        fits = {(h // s, w // s), (-(-h // s), -(-w // s))}
        if self.out.grid not in fits or self.out != Shape(site.dim, self.out.grid):
            raise site.error(
                self, f"should give {site.dim} × {show_grid(min(fits))}, but its down block "
                f"{type(self.down).__name__} gives {self.out.dim} × {show_grid(self.out.grid)}"
                + (f" and {self.out.prefix} prefix token(s)" if self.out.prefix else "")
                + "; take one that takes stride and width, such as ConvEmbed"
            )  # fmt: skip
        self.proj = None if above is None else linear(above.dim, site.dim)
        self.norm = None if above is None else norm(site.dim)

    def forward(self, below: Tensor, above: Tensor | None = None) -> Tensor:
        """The maps of both levels to one of this level; the first column has none above."""
        map = below if self.down is None else self.down(Features(below)).map
        if above is None or self.proj is None or self.norm is None:
            return map
        enlarged = to_map(self.norm(self.proj(tokens(above))), (above.shape[2], above.shape[3]))
        return map + F.interpolate(enlarged, size=map.shape[2:], mode="nearest")


FusionFactory = Callable[[Site, Shape | None], Fusion]


class QuarterHead(AveragePoolHead):
    """A classifier behind each quarter of the columns, each as in `AveragePoolHead`; the last one is evaluated.

    The others learn from `IntermediateCrossEntropy`.

    Args:
        drop: dropout rate before each Linear.
        norm: the normalisation of the means.

    Raises:
        BuildError: the backbone gives no maps behind quarters.

    Source: RevCol, arXiv 2212.11696, section 2.4; megvii-research/RevCol models/revcol.py, cls_blocks.
    """

    source = SOURCE
    classifiers = len(QUARTERS) + 1

    def __init__(self, shape: Shape, num_classes: int, drop: float = 0.0, norm: NormFactory = NoNorm) -> None:
        super().__init__(shape, num_classes, drop, norm)
        need_quarters("model.head", self, shape)
        self.intermediate = nn.ModuleList(AveragePoolHead(shape, num_classes, drop, norm) for _ in QUARTERS)

    def each(self, features: Features) -> tuple[Tensor, ...]:
        assert features.extra is not None
        maps = [features.extra[name] for name in QUARTERS]
        before = [head(Features(map)) for head, map in zip(self.intermediate, maps, strict=True)]
        return (*before, self(features))

    def evaluated(self, each: tuple[Tensor, ...]) -> Tensor:
        return each[-1]


def need_quarters(where: str, who: object, shape: Shape) -> None:
    """Raises BuildError where the backbone gives no maps behind quarters of its columns."""
    if not set(QUARTERS) <= set(shape.extra):
        raise BuildError(
            f"{where}: {type(who).__name__} reads maps behind each quarter of the columns, which this backbone does "
            "not give; use backbone: Columns with a multiple of 4 columns"
        )


class Decoder(nn.Module):
    """The last level's map to an image, step by step up the levels.

    Each step is a Linear, a norm, GELU, an enlargement (bilinear, corners aligned) and a block; then a Linear gives
    each position its pixels.

    Args:
        dim: width of the map.
        steps: width and grid of each level to go up to, the smallest first.
        image: channels, and how many pixels one position of the last step spans.
        block: runs in each step.
        norm: the normalisation in each step.
        where: config path, for messages.

    Source: megvii-research/RevCol models/modules.py, class Decoder, for up to 1,000 classes.
    """

    def __init__(
        self,
        dim: int,
        steps: Sequence[tuple[int, Grid]],
        image: tuple[int, int],
        block: BlockFactory,
        norm: NormFactory,
        where: str,
    ) -> None:
        super().__init__()
        self.steps = nn.ModuleList()
        self.grids = [grid for _, grid in steps]
        for out, grid in steps:
            site = Site.at(out, grid, where=where)
            made = block(site)
            if made.out != site.inp:
                raise site.error(made, "changes its shape, which a decoder's block must keep")
            self.steps.append(nn.ModuleDict({"proj": linear(dim, out), "norm": norm(out), "block": made}))
            dim = out
        channels, self.patch = image
        self.back = linear(dim, channels * self.patch**2)

    def forward(self, map: Tensor) -> Tensor:
        for step, grid in zip(self.steps, self.grids, strict=True):
            assert isinstance(step, nn.ModuleDict)
            small = (map.shape[2], map.shape[3])
            map = to_map(F.gelu(step["norm"](step["proj"](tokens(map)))), small)
            map = F.interpolate(map, size=grid, mode="bilinear", align_corners=True)
            map = step["block"](Features(map)).map
        grid = (map.shape[2], map.shape[3])
        return F.pixel_shuffle(to_map(self.back(tokens(map)), grid), self.patch)
