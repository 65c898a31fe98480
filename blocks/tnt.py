"""Transformer in transformer: words inside each token, an inner block for them, an outer block for the tokens.

Paper: arXiv 2103.00112 (NeurIPS 2021). Code: huawei-noah/Efficient-AI-Backbones tnt_pytorch/tnt.py, and timm's
models/tnt.py for the form of the first arXiv version ("legacy"). The code differs from the paper: words come from a
convolution (equation 5 has a Linear), tokens start from their words (the paper: at zero), and the projection of
words stands between two norms (equation 8 has none). This is the code's form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.base import (
    Block,
    BlockFactory,
    BuildError,
    Features,
    NoPosition,
    NormFactory,
    Shape,
    Site,
    Words,
    linear,
    show_grid,
    to_map,
    token_parameter,
    tokens,
)
from blocks.kernels import inner as kernel
from blocks.kernels.linear import DTYPES, Linear, eager, unhooked
from blocks.kernels.linear import linear as fast_linear
from blocks.kernels.onto import words_onto
from blocks.norms import LayerNorm
from blocks.transformer import Encoder


class TNT(Block):
    """A transformer-in-transformer block: words through `inner`, their projection onto the tokens, `outer`.

    `inner` sees the words of each token as a small map of their own `(B·N, c, √m, √m)`; any block that keeps shape
    fits. `outer` sees map and prefix; any block that keeps the grid fits. A layer without an inner part, as the
    paper's TNT-S-1…4 have, is an ordinary `Encoder` in the pattern: words pass through it.

    Where `inner` is the textbook encoder, one kernel computes all of it (`blocks.kernels.inner`).

    Args:
        inner: the block for words. Its number of heads must divide the word width.
        outer: the block for tokens.
        norm: the normalisations around the projection.
        legacy: the form of the first arXiv version: norm over each word's channels, a bias, and no norm behind.

    Raises:
        BuildError: no words come in, they lie under another grid, or `inner` changes their shape.

    Source: arXiv 2103.00112, section 3; huawei-noah/Efficient-AI-Backbones tnt_pytorch/tnt.py, class Block.
    """

    source = "TNT, arXiv 2103.00112; huawei-noah/Efficient-AI-Backbones; timm tnt (legacy)"

    def __init__(
        self,
        site: Site,
        inner: BlockFactory = Encoder,
        outer: BlockFactory = Encoder,
        norm: NormFactory = LayerNorm,
        legacy: bool = False,
    ) -> None:
        super().__init__()
        words = site.need_words(self)
        inside = Shape(words.dim, words.grid)
        self.inner = inner(
            site.inside("inner", inp=inside, dim=words.dim, stride=1, position=site.word_position,
                        word_position=NoPosition())
        )  # fmt: skip
        if self.inner.out != inside:
            raise site.error(self, f"needs an inner block that keeps words as they are, {type(self.inner).__name__} "
                                   f"gives width {self.inner.out.dim} on {show_grid(self.inner.out.grid)}")  # fmt: skip
        dim, vector = site.inp.dim, words.count * words.dim
        self.legacy = legacy
        self.norm1_proj = norm(words.dim if legacy else vector)
        self.proj = linear(vector, dim, bias=legacy)
        self.norm2_proj = None if legacy else norm(dim)
        self.outer = outer(site.inside("outer"))
        self.word_grid = words.grid
        self.out = replace(self.outer.out, words=words)

    def keep(self, parts: frozenset[str]) -> frozenset[str]:
        return self.outer.keep(parts) | {"words"}

    def mix(self, words: Tensor, turn: int = 0) -> Tensor:
        """`(B·N, m, c)` words through `inner`."""
        if kernel.serves(self.inner, words):
            return kernel.run(self.inner, words)
        return tokens(self.inner(Features(to_map(words, self.word_grid), turn=turn)).map)

    def planned(self, features: Features) -> Features | None:
        words, outer = features.words, self.outer
        if self.legacy or words is None or type(outer) is not Encoder or not unhooked(outer):
            return None
        if not kernel.serves(self.inner, words) or not kernel.as_it_is(self.inner, words):
            return None
        both = self.onto(kernel.run(self.inner, words), features)
        made = None if both is None else outer.encoded(features, both[1])
        return None if both is None or made is None else made.replace(words=both[0])

    def onto(self, words: Tensor, features: Features) -> tuple[Tensor, Tensor] | None:
        """The words, and the tokens with what these words add to them; None where there is no kernel for it."""
        map, parts = features.map, (self.norm1_proj, self.proj, self.norm2_proj)
        return words_onto(words, map.shape[0], *parts, tokens(map), features.prefix)

    def forward(self, features: Features) -> Features:
        map, words = features.map, features.words
        assert words is not None
        words = self.mix(words, features.turn)
        if type(self.outer) is Encoder and unhooked(self.outer):
            both = self.onto(words, features)
            if both is not None:
                return self.outer.encode(features, both[1]).replace(words=both[0])
        if self.norm2_proj is None:
            y = self.proj(self.norm1_proj(words).flatten(1))
        else:
            y = self.norm2_proj(joined(words, self.norm1_proj, self.proj))
        b, _, h, w = map.shape
        map = map + to_map(y.view(b, h * w, y.shape[-1]), (h, w))
        return self.outer(features.replace(map=map)).replace(words=words)


def joined(words: Tensor, norm: nn.Module, proj: nn.Module) -> Tensor:
    """Words `(B·N, m, c)`, those of a token as one vector, through a norm and a Linear.

    The inner block's kernel leaves them as `(B·N, c, m)` in memory. Since the norm does not mind the order, the weights
    are turned then, which are smaller.
    """
    turned = words.transpose(1, 2)
    if type(norm) is not LayerNorm or type(proj) is not Linear or not unhooked(norm, proj):
        return proj(norm(words.flatten(1)))
    if words.is_contiguous() or not turned.is_contiguous():
        return proj(norm(words.flatten(1)))

    def turn(weight: Tensor) -> Tensor:
        return weight.unflatten(-1, words.shape[1:]).transpose(-1, -2).flatten(-2)

    x = F.layer_norm(turned.flatten(1), norm.normalized_shape, turn(norm.weight), turn(norm.bias), norm.eps)
    return fast_linear(x, turn(proj.weight), proj.bias)


def split_patches(images: Tensor, side: int) -> Tensor:
    """`(B, C, H, W)` to `(B·N, C, side, side)`, in channels_last memory: the patches that do not overlap, in order."""
    b, c, h, w = images.shape
    x = images.permute(0, 2, 3, 1).reshape(b, h // side, side, w // side, side, c)
    return x.transpose(2, 3).reshape(-1, side, side, c).permute(0, 3, 1, 2)


def convolved(patches: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv(patches)` of patches that are no larger than its kernel: as one product, with a matrix of its weights.

    What it finds at each place of a patch depends on all pixels, on each through one weight or none. A larger patch
    would take more multiplications so.
    """
    if type(conv) is not nn.Conv2d or not unhooked(conv) or not eager(patches, conv.weight, conv.bias):
        return conv(patches)
    if max(patches.shape[2:]) > min(conv.kernel_size) or patches.dtype not in DTYPES or conv.bias is None:
        return conv(patches)
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or conv.dilation != (1, 1) or conv.groups > 1:
        return conv(patches)
    rows = patches.permute(0, 2, 3, 1).flatten(1)
    numbers = numbered(patches.shape[1:], conv.weight.shape, conv.stride, conv.padding)
    matrix = F.pad(conv.weight.flatten(), (1, 0)).index_select(0, numbers.flatten()).view(rows.shape[1], -1)
    bias = conv.bias.repeat_interleave(numbers[0, 0].numel())
    return torch.addmm(bias, rows, matrix).view(-1, *numbers.shape[1:])


@cache
def numbered(patch: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """For each pixel and channel of a patch the weight that leads from it to each result, from 1 on; 0 for none."""
    channels, height, width = patch
    with torch.inference_mode(False):  # gradients may need it later
        weights = torch.arange(1, prod(kernel) + 1, dtype=torch.float64, device="cpu").view(*kernel)
        single = torch.eye(prod(patch), dtype=torch.float64, device="cpu").view(-1, height, width, channels)
        return F.conv2d(single.permute(0, 3, 1, 2), weights, None, stride, padding).long()


class SentenceStem(Block):
    """Images to tokens ("sentences") and the words under each: TNT's embedding.

    A 7×7 convolution on each patch by itself (its padding sees zeros at every patch border) gives the words; their
    concatenation through norm, Linear, norm gives the token. Then positions are added at both levels.

    Args:
        patch: side of a patch in pixels; must divide the image.
        words: number of words in a patch, a square.
        word_dim: width of a word.
        prefix: number of prefix tokens: 1 class token, 2 class and distillation token, 0 none.
        norm: the normalisations around the projection.
        drop: dropout rate on the tokens, behind the positions.
        legacy: the form of the first arXiv version: the convolution runs over the whole image.

    Raises:
        BuildError: the patch does not divide the image, or the words are not a square that fits it.

    Source: arXiv 2103.00112, equations 1 to 4; huawei-noah/Efficient-AI-Backbones, class PatchEmbed.
    """

    source = "TNT, arXiv 2103.00112; huawei-noah/Efficient-AI-Backbones; timm tnt (legacy)"
    counts = False

    def __init__(
        self,
        site: Site,
        patch: int = 16,
        words: int = 16,
        word_dim: int = 24,
        prefix: int = 1,
        norm: NormFactory = LayerNorm,
        drop: float = 0.0,
        legacy: bool = False,
    ) -> None:
        super().__init__()
        grid = patch_grid(self, site, patch)
        # the legacy convolution runs over all patches, so their words only meet if its stride divides the patch
        fits = {(-(-patch // s)) ** 2: s for s in range(patch, 0, -1) if not (legacy and patch % s)}
        if words not in fits:
            raise site.error(
                self, f"cannot lay {words} words into a patch of {patch} px; words that fit: {sorted(fits)}"
            )
        stride, side = fits[words], round(words**0.5)
        self.patch, self.legacy = patch, legacy
        self.conv = nn.Conv2d(site.inp.dim, word_dim, 7, stride=stride, padding=3)
        under = Words(word_dim, (side, side), over=grid)
        self.word_position = site.word_position.tokens(Shape(word_dim, under.grid))
        self.norm1_proj = norm(words * word_dim)
        self.proj = linear(words * word_dim, site.dim)
        self.norm2_proj = norm(site.dim)
        self.out = Shape(site.dim, grid, prefix, under)
        self.prefix = token_parameter(1, prefix, site.dim) if prefix else None
        self.position = site.position.tokens(self.out)
        self.drop = nn.Dropout(drop)

    no_decay = frozenset({"prefix"})

    def forward(self, features: Features) -> Features:
        images = features.map
        b, _, h, w = images.shape
        grid = (h // self.patch, w // self.patch)
        if self.legacy:
            assert self.out.words is not None
            map = split_patches(self.conv(images), self.out.words.grid[0])
        else:
            map = convolved(split_patches(images, self.patch), self.conv)
        words = tokens(self.word_position(map)[0])
        both = words_onto(words, b, self.norm1_proj, self.proj, self.norm2_proj)
        if both is None:
            x = self.norm2_proj(joined(words, self.norm1_proj, self.proj))
        else:
            words, x = both
        x = to_map(x.view(b, grid[0] * grid[1], x.shape[-1]), grid)
        prefix = None if self.prefix is None else self.prefix.expand(b, -1, -1)
        x, prefix = self.position(x, prefix)
        x, prefix = self.drop(x), None if prefix is None else self.drop(prefix)
        return features.replace(map=x, prefix=prefix, words=words)


def patch_grid(who: Block, site: Site, patch: int) -> tuple[int, int]:
    """The grid of patches on the map of `site`. Raises BuildError where `patch` does not divide it."""
    h, w = site.inp.grid
    if patch < 1 or h % patch or w % patch:
        near = max(h // max(patch, 1), 1) * max(patch, 1)
        raise BuildError(
            f"{site.where}: {type(who).__name__} cannot cut {h}×{w} px into patches of {patch}; "
            f"use a patch that divides {h} and {w}, or images of {near} or {near + patch} px"
        )
    return (h // patch, w // patch)
