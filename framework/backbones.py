"""Backbones: nets that are composed of blocks, and any net of timm's as a row to compare with.

Each gives final features to a head, and a pyramid of maps (`levels`) to segmentation, detection and analyses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from blocks.base import PARTS, Block, BlockFactory, BuildError, Features, NoPosition, NormFactory, Position, Shape, Site
from blocks.kernels.ahead import through
from blocks.norms import LayerNorm
from blocks.stems import PatchStem
from framework.build import Section, check_block, check_rate, compose, make_block, meta_features, quiet_meta
from framework.data.base import Image
from framework.errors import nearest

WHERE = "model.backbone"


@dataclass(frozen=True)
class Level:
    """One map of a backbone's pyramid: its name, its channels, and how many pixels one position spans."""

    name: str
    channels: int
    stride: int


@dataclass
class Stage:
    """One stage of a pyramid.

    Args:
        dim: width of its blocks.
        pattern: its blocks, in the stacking language: `(ncb*4 ntb)*2`.
        stride: how much the map shrinks in this stage; the first block that can takes it.
        dims: another width for some of the names.
        blocks: arguments or other blocks for some names, in this stage only; they inherit from the backbone's.
        entry: name of a block that runs before the pattern.
        drop_path: stochastic depth of this stage alone: rate of its last block, growing linearly from 0 at its first
            (CvT), or both rates (SReT); by default the backbone's, which grows over all stages.
    """

    dim: int
    pattern: str
    stride: int = 1
    dims: dict[str, int] = field(default_factory=dict)
    # "inherits" tells the config walk which argument beside `stages` gives the base of each value
    blocks: dict[str, BlockFactory] = field(default_factory=dict, metadata={"inherits": "blocks"})
    entry: str = ""
    drop_path: float | tuple[float, float] | None = None


class Backbone(nn.Module, ABC):
    """Images `(B, channels, size, size)` to final `Features`, and to a pyramid of maps.

    Attributes:
        out: shape of the final features.
        levels: what `pyramid` gives.
    """

    out: Shape
    levels: list[Level]

    @abstractmethod
    def forward(self, images: Tensor) -> Features: ...

    @abstractmethod
    def pyramid(self, images: Tensor) -> list[Tensor]:
        """The map behind each of `levels`, `(B, channels, size / stride, size / stride)`."""

    def keep(self, parts: frozenset[str]) -> None:
        """Told which parts of the final features are read; work for the others may be skipped. Reversible."""

    def steps(self) -> Iterator[tuple[str, str, Block]]:
        """Its blocks in order: state-dict prefix, name in the pattern, block."""
        return iter(())

    def layers(self) -> dict[str, int]:
        """The layer of each parameter, for rates that decay with depth: 0 in the stem, then 1, 2, …

        What is not in it belongs to one more layer, together with the head.
        """
        raise BuildError(f"{WHERE}: {type(self).__name__} does not tell its layers; set model.optimizer.layer_decay: 1")


class Composed(Backbone):
    """What the composed backbones share: a stem, a chain of blocks, and a final norm."""

    stem: Block
    norm: nn.Module
    kept: frozenset[str] = PARTS

    def finish(self, dim_out: Shape, norm: NormFactory) -> None:
        """Called last by a subclass's constructor: the final norm and the memory format of all weights."""
        self.out = dim_out
        self.norm = norm(dim_out.dim)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @abstractmethod
    def steps(self) -> Iterator[tuple[str, str, Block]]: ...

    def chain(self) -> list[Block]:
        """Stem and blocks in the order in which they run."""
        return [self.stem, *(block for _, _, block in self.steps())]

    def layers(self) -> dict[str, int]:
        found, layer = {f"stem.{name}": 0 for name, _ in self.stem.named_parameters()}, 0
        for key, _, block in self.steps():
            layer += block.counts  # a structural block goes with what is before it
            found |= {f"{key}.{name}": layer for name, _ in block.named_parameters()}
        return found

    def keep(self, parts: frozenset[str]) -> None:
        self.kept = parts
        for block in reversed(self.chain()):
            parts = block.keep(parts)

    def forward(self, images: Tensor) -> Features:
        features = Features(images.contiguous(memory_format=torch.channels_last))
        features = through(self.chain(), features)
        norm = cast(Any, self.norm)
        if "map" in self.kept:
            features = features.replace(map=norm.on_map(features.map))
        if features.prefix is not None and "prefix" in self.kept:
            features = features.replace(prefix=norm(features.prefix))
        return features

    def pyramid(self, images: Tensor) -> list[Tensor]:
        kept = self.kept
        self.keep(PARTS)  # a block that serves the class token alone would leave its map as it was
        try:
            features, chain = Features(images.contiguous(memory_format=torch.channels_last)), self.chain()
            maps = []
            for start, end in pairwise([-1, *self.taps]):
                features = through(chain[start + 1 : end + 1], features)
                maps.append(features.map)
            return maps
        finally:
            self.keep(kept)

    taps: list[int]  # the places in the chain behind which `levels` lie

    def _level(self, name: str, shape: Shape, image: Image) -> Level:
        return Level(name, shape.dim, round(image.size / shape.grid[0]))


def make_stem(stem: BlockFactory, image: Image, dim: int, position: Position, word_position: Position) -> Block:
    """The stem, made and checked like any block; it sees the image as a map of `image.channels` channels."""
    where, inp = f"{WHERE}.stem", Shape(image.channels, (image.size, image.size))
    site = Site(inp=inp, dim=dim, where=where, position=position, word_position=word_position)
    with quiet_meta():
        check_block(make_block(stem, site), meta_features(inp), where)
    return make_block(stem, site)


class Isotropic(Composed):
    """A net of one width and one grid: a stem, a pattern of blocks, a final norm (ViT, DeiT, TNT).

    Its pyramid has four levels of equal stride, evenly spaced in depth (blocks 3, 6, 9 and 12 of 12, where TNT's
    paper takes its detection features).

    Args:
        blocks: the blocks that the pattern names.
        pattern: which of them, in order: `tnt*12`.
        dim: width of the tokens.
        stem: images to tokens.
        position: position encoding between tokens.
        word_position: position encoding between the words of one token.
        drop_path: stochastic depth: rate of the last block, growing linearly from 0 at the first.
        norm: the norm behind the last block.

    Raises:
        BuildError: the parts do not fit together.
    """

    def __init__(
        self,
        image: Image,
        blocks: dict[str, BlockFactory],
        pattern: str,
        dim: int,
        stem: BlockFactory = PatchStem,
        position: Position = NoPosition(),
        word_position: Position = NoPosition(),
        drop_path: float = 0.0,
        norm: NormFactory = LayerNorm,
    ) -> None:
        super().__init__()
        check_rate(drop_path, WHERE)
        section = Section(WHERE, pattern, dim, blocks=blocks)
        self.stem = make_stem(stem, image, dim, position, word_position)
        made = compose([section], self.stem.out, drop_path=drop_path, position=position, word_position=word_position)[0]
        self.blocks = nn.ModuleList(made)
        self.names = section.names()
        ends = [i for i, block in enumerate(made) if block.counts] or [len(made) - 1]
        count = min(4, len(ends))
        picked = [ends[len(ends) * (i + 1) // count - 1] for i in range(count)]
        self.taps = [i + 1 for i in picked]
        self.levels = [self._level(f"block{i + 1}", made[i].out, image) for i in picked]
        self.finish(made[-1].out, norm)

    def steps(self) -> Iterator[tuple[str, str, Block]]:
        for i, (name, block) in enumerate(zip(self.names, self.blocks, strict=True)):
            yield f"blocks.{i}", name, cast(Block, block)


class StageBlocks(nn.Module):
    """The blocks of one stage; its names are the state-dict keys `entry` and `blocks.<i>`."""

    def __init__(self, names: list[str], blocks: list[Block], entry: bool) -> None:
        super().__init__()
        self.entry = blocks.pop(0) if entry else None
        self.blocks = nn.ModuleList(blocks)
        self.names = names

    def steps(self) -> Iterator[tuple[str, str, Block]]:
        entry = [] if self.entry is None else [("entry", self.entry)]
        keyed = [*entry, *((f"blocks.{i}", cast(Block, block)) for i, block in enumerate(self.blocks))]
        for (key, block), name in zip(keyed, self.names, strict=True):
            yield key, name, block


class Pyramid(Composed):
    """A net of stages, each with its own width and grid: a stem, the stages, a final norm (Next-ViT, PVT).

    Its pyramid has one level for each stage.

    Args:
        stages: the stages in order, any number.
        blocks: the blocks that patterns name, for all stages.
        stem: images to the first stage's map.
        position: position encoding between tokens.
        word_position: position encoding between the words of one token.
        drop_path: stochastic depth: rate of the last block, growing linearly from 0 at the first.
        norm: the norm behind the last block.

    Raises:
        BuildError: the parts do not fit together.
    """

    def __init__(
        self,
        image: Image,
        stages: dict[str, Stage],
        blocks: dict[str, BlockFactory],
        stem: BlockFactory = PatchStem,
        position: Position = NoPosition(),
        word_position: Position = NoPosition(),
        drop_path: float = 0.0,
        norm: NormFactory = LayerNorm,
    ) -> None:
        super().__init__()
        check_rate(drop_path, WHERE)
        if not stages:
            raise BuildError(f"{WHERE}.stages: needs at least one stage, for example s1: {{dim: 64, pattern: …}}")
        sections = [
            Section(
                f"{WHERE}.stages.{name}",
                s.pattern,
                s.dim,
                s.stride,
                {**blocks, **s.blocks},
                s.dims,
                s.entry,
                s.drop_path,
            )
            for name, s in stages.items()
        ]  # fmt: skip
        self.stem = make_stem(stem, image, sections[0].dim, position, word_position)
        made = compose(sections, self.stem.out, drop_path=drop_path, position=position, word_position=word_position)
        ends = [chain[-1].out for chain in made]
        lengths = [len(chain) for chain in made]
        self.taps = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        self.levels = [self._level(name, out, image) for name, out in zip(stages, ends, strict=True)]
        self.stages = nn.ModuleDict(
            {
                name: StageBlocks(section.names(), chain, bool(section.entry))
                for name, section, chain in zip(stages, sections, made, strict=True)
            }
        )
        self.finish(ends[-1], norm)

    def steps(self) -> Iterator[tuple[str, str, Block]]:
        for name, stage in self.stages.items():
            for key, alias, block in cast(StageBlocks, stage).steps():
                yield f"stages.{name}.{key}", alias, block


class TimmBackbone(Backbone):
    """Any of timm's nets, as the baseline row of a table; its weights are initialised by timm, never downloaded.

    Use it with `ClassTokenHead`: the prefix is the net's own pooled vector, as its classifier would get it.

    Args:
        name: timm's name of the net, for example `tnt_s_patch16_224`.
        args: further arguments for `timm.create_model`, for example {drop_rate: 0.1}.
        drop_path: stochastic depth: timm's `drop_path_rate`, for nets that have it.

    Raises:
        BuildError: timm knows no such net, or it does not take the image size.
    """

    def __init__(
        self,
        image: Image,
        name: str,
        args: dict[str, Any] = {},  # noqa: B006 (read only)
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        import timm

        for key in ("img_size", "in_chans", "num_classes", "pretrained"):
            if key in args:
                raise BuildError(
                    f"{WHERE}.args: {key} is not set here: image and classes come from the data, weights from training"
                )
        need_timm_name(name, f"{WHERE}.name")
        check_rate(drop_path, WHERE)
        if drop_path:
            args = {"drop_path_rate": drop_path, **args}
        self.net = timm_net(timm.create_model, name, image, args)
        with torch.random.fork_rng(devices=[]):
            on_meta = timm_net(timm.create_model, name, image, args, device="meta").eval().requires_grad_(False)
        images = torch.empty(2, image.channels, image.size, image.size, device="meta")
        try:
            pooled = on_meta.forward_head(on_meta.forward_features(images), pre_logits=True)
            maps = on_meta.forward_intermediates(images, intermediates_only=True)
        except Exception as error:
            raise BuildError(f"{WHERE}: timm's {name} does not run at {image.size} px with pooled features and "
                             f"intermediates: {str(error).splitlines()[0]}") from error  # fmt: skip
        self.levels = [Level(f"level{i}", m.shape[1], round(image.size / m.shape[2])) for i, m in enumerate(maps)]
        self.out = Shape(pooled.shape[1], (1, 1), prefix=1)

    def forward(self, images: Tensor) -> Features:
        net = cast(Any, self.net)
        pooled = net.forward_head(net.forward_features(images), pre_logits=True)
        return Features(map=pooled[:, :, None, None], prefix=pooled[:, None])

    def pyramid(self, images: Tensor) -> list[Tensor]:
        return cast(Any, self.net).forward_intermediates(images, intermediates_only=True)

    def layers(self) -> dict[str, int]:
        from timm.models import group_parameters

        net = cast(Any, self.net)
        found = group_parameters(net, net.group_matcher(coarse=False), reverse=True)
        return {f"net.{name}": layer for name, layer in found.items()}  # timm puts the final norm to the last block


def need_timm_name(name: str, where: str) -> None:
    """Raises BuildError where timm has no such net."""
    import timm

    if not timm.is_model(name):
        near = nearest(name, timm.list_models())
        hint = f"did you mean {near!r}?" if near else "timm.list_models() gives their names"
        raise BuildError(f"{where}: timm has no net {name!r} ({hint})")


def timm_net(
    create: Callable[..., nn.Module],
    name: str,
    image: Image,
    args: dict[str, Any],
    where: str = WHERE,
    device: str = "",
) -> Any:
    """timm's net for this image; the size is only named to nets whose constructor asks for it."""
    with torch.device(device) if device else torch.device(torch.get_default_device()):
        options = {"in_chans": image.channels, "num_classes": 0, **args}
        try:
            try:
                return create(name, img_size=image.size, **options)
            except TypeError:
                return create(name, **options)
        except (TypeError, AssertionError, ValueError, RuntimeError) as error:
            raise BuildError(f"{where}: timm cannot make {name}: {str(error).splitlines()[0]}") from error


BackboneFactory = Callable[[Image], Backbone]
