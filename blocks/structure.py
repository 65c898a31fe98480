"""Ordinary blocks that build a net's structure: tokens, positions, words, changes of grid and width, wrappers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from blocks.base import (
    PARTS,
    Block,
    BlockFactory,
    Features,
    NormFactory,
    Position,
    Shape,
    Site,
    Words,
    describe_shape,
    linear,
    show_grid,
    to_map,
    token_parameter,
    tokens,
)
from blocks.norms import LayerNorm, NoNorm
from blocks.positions import NetPosition


class Identity(Block):
    """Gives what it gets: a place in a pattern that an ablation fills."""

    counts = False

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.out = site.inp

    def forward(self, features: Features) -> Features:
        return features

    def keep(self, parts: frozenset[str]) -> frozenset[str]:
        return parts


class ClassToken(Block):
    """Puts learned tokens in front of the prefix: class, distillation or register tokens.

    Args:
        count: how many.

    Source: ViT, arXiv 2010.11929, equation 1; in the midst of a net as in PVT, arXiv 2102.12122.
    """

    source = "ViT, arXiv 2010.11929; PVT, arXiv 2102.12122"
    counts = False
    no_decay = frozenset({"prefix"})

    def __init__(self, site: Site, count: int = 1) -> None:
        super().__init__()
        if count < 1:
            raise site.error(self, f"needs a count of at least 1, got {count}")
        self.prefix = token_parameter(1, count, site.inp.dim)
        self.out = replace(site.inp, prefix=site.inp.prefix + count)

    def forward(self, features: Features) -> Features:
        prefix = self.prefix.expand(features.map.shape[0], -1, -1)
        if features.prefix is not None:
            prefix = torch.cat([prefix, features.prefix], dim=1)
        return features.replace(prefix=prefix)


class AddPosition(Block):
    """Adds a position encoding to the tokens.

    Args:
        position: which one, the net's by default.
        drop: dropout rate behind it.

    Source: PVT, arXiv 2102.12122, section 3.2 (in the midst of a net); CPVT, arXiv 2102.10882 (between blocks).
    """

    source = "PVT, arXiv 2102.12122; CPVT, arXiv 2102.10882"
    counts = False

    def __init__(self, site: Site, position: Position = NetPosition(), drop: float = 0.0) -> None:
        super().__init__()
        chosen = site.position if isinstance(position, NetPosition) else position
        self.position = chosen.tokens(site.inp)
        self.drop = nn.Dropout(drop)
        self.out = site.inp

    def forward(self, features: Features) -> Features:
        map, prefix = self.position(features.map, features.prefix)
        return features.replace(map=self.drop(map), prefix=None if prefix is None else self.drop(prefix))


class MakeWords(Block):
    """Lays words under a map: each window of the map becomes one token's words, one word for each position.

    The map passes unchanged. The words are meant for a TNT behind the next block that takes the stride: with 4
    words a window is 2×2, and they lie under the map at half the size.

    Args:
        words: number of words in a window, a square; its side must divide the map.
        word_dim: width of a word.
        norm: the normalisation behind the projection.

    Raises:
        BuildError: `words` is no square, or its side does not divide the map.
    """

    counts = False

    def __init__(self, site: Site, words: int = 4, word_dim: int = 24, norm: NormFactory = NoNorm) -> None:
        super().__init__()
        side = round(max(words, 0) ** 0.5)
        h, w = site.inp.grid
        if side < 1 or side * side != words or h % side or w % side:
            fits = [n * n for n in range(1, min(h, w) + 1) if h % n == 0 and w % n == 0]
            raise site.error(self, f"cannot make {words} words on a {show_grid((h, w))} map; words that fit: {fits}")
        self.side = side
        self.proj = linear(site.inp.dim, word_dim)
        self.norm = norm(word_dim)
        made = Words(word_dim, (side, side), over=(h // side, w // side))
        self.position = site.word_position.tokens(Shape(word_dim, made.grid))
        self.out = replace(site.inp, words=made)

    def forward(self, features: Features) -> Features:
        x = self.norm(self.proj(tokens(features.map)))
        b, _, h, w = features.map.shape
        s = self.side
        x = x.view(b, h // s, s, w // s, s, -1).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, x.shape[-1])
        words = tokens(self.position(to_map(x, (s, s)))[0])
        return features.replace(words=words)


class Merge(Block):
    """Patch merging: takes the offered stride by joining stride×stride neighbours, then norm and Linear.

    Args:
        norm: the normalisation of the joined channels.

    Raises:
        BuildError: the stride does not divide the map, or prefix tokens come along.

    Source: Swin, arXiv 2103.14030, section 3.1; microsoft/Swin-Transformer, class PatchMerging.
    """

    source = "Swin, arXiv 2103.14030; microsoft/Swin-Transformer"
    counts = False

    def __init__(self, site: Site, norm: NormFactory = LayerNorm) -> None:
        super().__init__()
        site.no_prefix(self)
        s, (h, w) = site.stride, site.inp.grid
        if h % s or w % s:
            raise site.error(self, f"cannot join {s}×{s} neighbours on a {show_grid((h, w))} map; change the image")
        self.stride = s
        self.norm = norm(s * s * site.inp.dim)
        self.proj = linear(s * s * site.inp.dim, site.dim, bias=False)
        self.out = replace(site.inp, dim=site.dim, grid=(h // s, w // s))

    def forward(self, features: Features) -> Features:
        b, c, h, w = features.map.shape
        s = self.stride
        # Swin's order of the neighbours: down the first column, then down the next.
        x = features.map.permute(0, 2, 3, 1).reshape(b, h // s, s, w // s, s, c)
        x = x.permute(0, 1, 3, 4, 2, 5).reshape(b, -1, s * s * c)
        return features.replace(map=to_map(self.proj(self.norm(x)), (h // s, w // s)))


class ConvEmbed(Block):
    """Patch embedding between stages: a convolution that takes the offered stride and width, then a norm.

    Args:
        kernel: side of the convolution; 0 is the stride itself, so that patches do not overlap (PVT).
        norm: the normalisation behind it.
        padding: zeros at each edge; by default half of the kernel, and none where patches do not overlap.
        depthwise: whether each channel that comes in makes its own share of those that go out (SReT).
        before: a normalisation before the convolution (ConvNeXt, with NoNorm behind).

    Raises:
        BuildError: the kernel is smaller than the stride, patches that do not overlap do not fit the map, the map is
            smaller than the kernel, a depthwise convolution's width does not divide, or prefix tokens come along.

    Source: PVT, arXiv 2102.12122, section 3.2; overlapping as in CvT, arXiv 2103.15808, section 3.1; depthwise as in
    SReT, arXiv 2111.05297.
    """

    source = "PVT, arXiv 2102.12122; CvT, arXiv 2103.15808; SReT, arXiv 2111.05297"
    counts = False

    def __init__(
        self,
        site: Site,
        kernel: int = 0,
        norm: NormFactory = LayerNorm,
        padding: int | None = None,
        depthwise: bool = False,
        before: NormFactory = NoNorm,
    ) -> None:
        super().__init__()
        site.no_prefix(self)
        s, (h, w) = site.stride, site.inp.grid
        k = kernel or s
        if k < s:
            raise site.error(self, f"with kernel {k} skips pixels at stride {s}; use a kernel of at least {s}")
        pad = padding if padding is not None else 0 if k == s else k // 2
        if k == s and pad == 0 and (h % s or w % s):
            raise site.error(self, f"cannot cut a {show_grid((h, w))} map into patches of {s}; use kernel: {2 * s - 1}")
        if min(h, w) + 2 * pad < k or not 0 <= pad < k:
            raise site.error(self, f"with kernel {k} and padding {pad} does not fit a {show_grid((h, w))} map")
        if depthwise:
            site.divides(self, site.dim, site.inp.dim, "depthwise channels")
        groups = site.inp.dim if depthwise else 1
        self.before = before(site.inp.dim)
        self.conv = nn.Conv2d(site.inp.dim, site.dim, k, stride=s, padding=pad, groups=groups)
        self.norm = norm(site.dim)
        grid = ((h + 2 * pad - k) // s + 1, (w + 2 * pad - k) // s + 1)
        self.out = replace(site.inp, dim=site.dim, grid=grid)

    def forward(self, features: Features) -> Features:
        return features.replace(map=self.norm.on_map(self.conv(self.before.on_map(features.map))))


class Recursive(Block):
    """Runs one block several times, each time followed by a block of its own.

    The weights of `block` are there once: counted, decayed and saved once. Parts of it that work in another way in
    later runs (`SlicedAttention`) see which one it is in `Features.turn`. Batch norms inside keep one set of running
    statistics, of all runs together.

    Args:
        block: the block that is shared.
        times: how often it runs.
        after: what follows each run, with weights of its own (SReT: `NLL`).

    Raises:
        BuildError: `times` is below 1, or a block does not give the shape that it gets.

    Source: SReT, arXiv 2111.05297, section 3; szq0214/SReT.
    """

    source = "SReT, arXiv 2111.05297; szq0214/SReT (MIT)"

    def __init__(self, site: Site, block: BlockFactory, times: int = 2, after: BlockFactory = Identity) -> None:
        super().__init__()
        if times < 1:
            raise site.error(self, f"needs to run its block at least once, got times: {times}")
        self.block = block(site.inside("block"))
        self.after = nn.ModuleList(after(site.inside("after")) for _ in range(times))
        for name, made in (("block", self.block), ("after", cast(Block, self.after[0]))):
            if made.out != site.inp:
                raise site.error(
                    self, f"cannot have {type(made).__name__} as {name}: it makes {describe_shape(made.out)} of "
                    f"{describe_shape(site.inp)}; put what changes the shape before this, in the pattern"
                )  # fmt: skip
        self.out = site.inp

    def keep(self, parts: frozenset[str]) -> frozenset[str]:
        # What one run does not give, the next would miss: only the last of the blocks between may skip work.
        parts = cast(Block, self.after[-1]).keep(parts)
        return self.block.keep(parts if len(self.after) == 1 else PARTS)

    def forward(self, features: Features) -> Features:
        turn = features.turn
        for i, after in enumerate(self.after):
            features = after(self.block(features.replace(turn=i)))
        return features.replace(turn=turn)


class FromModule(Block):
    """Any module that keeps shape, as a block: from timm, torchvision or a file of your own, by config alone.

    Prefix tokens go through a module of tokens together with the map's, and round a module of maps. Words pass.

    Args:
        module: the class, by its full import path; it is called with the width, as its first argument.
        layout: what it takes and gives: `tokens` `(B, P + N, C)` or `map` `(B, C, H, W)`.
        site_args: further arguments that come from the site, as {argument: field of Site}, for example
            {drop_path: drop_path}.

    Raises:
        BuildError: the width or the stride should change here, or `site_args` names no field of Site.
    """

    def __init__(
        self,
        site: Site,
        module: Callable[[int], nn.Module],
        layout: Literal["tokens", "map"] = "tokens",
        site_args: dict[str, str] = {},  # noqa: B006 (read only)
    ) -> None:
        super().__init__()
        site.keeps_width(self)
        for field in site_args.values():
            if field not in Site.__dataclass_fields__:
                known = ", ".join(Site.__dataclass_fields__)
                raise site.error(self, f"site_args: a site has no {field!r}; it has {known}")
        self.module = module(site.inp.dim, **{name: getattr(site, field) for name, field in site_args.items()})
        self.layout = layout
        self.out = site.inp

    def forward(self, features: Features) -> Features:
        map, prefix = features.map, features.prefix
        if self.layout == "map":
            return features.replace(map=self.module(map))
        grid = (map.shape[2], map.shape[3])
        x: Tensor = tokens(map)
        if prefix is None:
            return features.replace(map=to_map(self.module(x), grid))
        count = prefix.shape[1]
        x = self.module(torch.cat([prefix, x], dim=1))
        return features.replace(map=to_map(x[:, count:], grid), prefix=x[:, :count])
