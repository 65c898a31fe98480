"""The contract of tests/contract.py over the table of tests/settings.py, and what holds for all classes together."""

from __future__ import annotations

import gc
import importlib
import inspect
import pkgutil
import re
import typing
from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import blocks
from blocks.base import (
    PARTS,
    Act,
    Block,
    BuildError,
    Features,
    Mixer,
    Position,
    Site,
    Words,
    to_map,
    tokens,
)
from blocks.cct import ConvTokenizer
from blocks.heads import Head
from blocks.nextvit import EMHSA, NCB, NTB
from blocks.norms import BatchNorm, LayerNorm, RMSNorm
from blocks.positions import RoPE
from blocks.registry import usable
from blocks.revcol import Fusion
from blocks.stems import ConvStem, PatchStem
from blocks.structure import ClassToken, ConvEmbed, FromModule, MakeWords, Merge
from blocks.tnt import TNT, SentenceStem
from blocks.transformer import Encoder
from tests.contract import BLOCK_CHECKS, assert_channels_last, build, check_export, check_saved_export, features
from tests.contract_parts import PART_CHECKS
from tests.settings import ENCODER, HEADS, SLOTS, TABLE, UNPUBLISHED, WORDS, Case, at

BLOCK_ROWS = [(cls, case) for cls, cases in TABLE.items() if issubclass(cls, Block) for case in cases]
PART_ROWS = [(cls, case) for cls, cases in TABLE.items() if not issubclass(cls, Block) for case in cases]


# An export is saved for the first setting of each class, and run as it is for others: files take as long again.
BLOCK_TESTS = [
    (cls, case, check)
    for cls, case in BLOCK_ROWS
    for check in BLOCK_CHECKS
    if check is not (check_export if case is TABLE[cls][0] else check_saved_export)
]


def name_row(value: Any) -> str:
    return value.name if isinstance(value, Case) else value.__name__.removeprefix("check_")


@pytest.mark.parametrize(("cls", "case", "check"), BLOCK_TESTS, ids=name_row)
def test_block(cls: type[Block], case: Case, check: Any) -> None:
    check(cls, case)


@pytest.mark.parametrize(("cls", "case"), PART_ROWS, ids=name_row)
def test_part(cls: type, case: Case) -> None:
    next(check for base, check in PART_CHECKS.items() if issubclass(cls, base))(cls, case)


# ---- every class together


def modules() -> list[Any]:
    return [importlib.import_module(f"blocks.{info.name}") for info in pkgutil.iter_modules(blocks.__path__)]


def named_classes() -> list[type]:
    """Every concrete class of a slot that is defined in a module of `blocks`."""
    modules()
    found = [cls for slot in SLOTS for same in usable(slot).values() for cls in same]
    return [cls for cls in found if cls.__module__.startswith("blocks.") and cls is not Position]


def without_row() -> set[str]:
    return {cls.__name__ for cls in named_classes()} - {cls.__name__ for cls, cases in TABLE.items() if cases}


def test_every_class_has_a_row() -> None:
    assert not without_row(), f"add to TABLE in tests/settings.py: {', '.join(sorted(without_row()))}"


def test_a_class_without_a_row_is_found() -> None:
    forgotten = type("Forgotten", (Act,), {"__module__": "blocks.mlp", "forward": lambda self, x: x})
    try:
        assert without_row() == {forgotten.__name__}
    finally:
        del forgotten
        gc.collect()  # out of the class tree, which is the registry
    assert not without_row()


def test_every_module_is_imported_with_the_package() -> None:
    """A module that blocks/__init__.py forgets has classes that no config finds."""
    here = {module.__name__.removeprefix("blocks.") for module in modules()} - {"registry"}
    assert here == set(blocks.__all__)


def test_class_names_are_unique() -> None:
    where: dict[str, set[str]] = defaultdict(set)
    for module in modules():
        for name, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == module.__name__:
                where[name].add(module.__name__)
    assert not {name: found for name, found in where.items() if len(found) > 1}


def constructor_parameters(cls: type) -> list[str]:
    """What a config gives: all but what the parent gives by position."""
    by_position = 2 if issubclass(cls, (Head, Fusion)) else 0 if issubclass(cls, (Act, Position)) else 1
    given = list(inspect.signature(cls).parameters.values())[by_position:]
    return [parameter.name for parameter in given if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]


def documented(cls: type) -> set[str]:
    section = re.search(r"^ *Args:\n(.*?)(?:\n\s*\n|\Z)", inspect.getdoc(cls) or "", re.DOTALL | re.MULTILINE)
    return set(re.findall(r"^    (\w+): \S", section[1], re.MULTILINE)) if section else set()


@pytest.mark.parametrize("cls", list(TABLE), ids=name_row)
def test_parameters_have_types_and_texts(cls: type) -> None:
    names = constructor_parameters(cls)
    hints = typing.get_type_hints(cls.__init__) if names else {}
    assert not [name for name in names if name not in hints], "without a type"
    assert not set(names) - documented(cls), "without a line under Args"
    assert not documented(cls) - set(names), "under Args, but no parameter"


@pytest.mark.parametrize("cls", [c for c in TABLE if issubclass(c, (Block, Mixer))], ids=name_row)
def test_published_blocks_name_their_source(cls: type) -> None:
    assert bool(cls.source) != (cls in UNPUBLISHED)


def test_no_decay_names_are_parameters_somewhere() -> None:
    """The contract lets a row have None; over all rows each name must be a parameter once."""
    absent, present = set(), set()
    for cls, case in BLOCK_ROWS:
        for module in build(cls, case).modules():
            for name in getattr(module, "no_decay", ()):
                real = isinstance(getattr(module, name), nn.Parameter)
                (present if real else absent).add((type(module).__name__, name))
    assert present
    assert not absent - present


# ---- memory


class Copies(TorchDispatchMode):
    """Records operations that copy a tensor as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("clone", "copy_", "_to_copy", "cat", "contiguous"):
            self.found.append(f"{func} {tuple(args[0].shape) if isinstance(args[0], torch.Tensor) else ''}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_and_maps_are_views(batch: int) -> None:
    map = torch.randn(batch, 8, 6, 4).contiguous(memory_format=torch.channels_last)
    x = tokens(map)
    assert x.data_ptr() == map.data_ptr()
    assert x.is_contiguous()
    assert torch.equal(x[0, 5], map[0, :, 1, 1])  # raster order
    back = to_map(x, (6, 4))
    assert back.data_ptr() == map.data_ptr()
    assert back.stride() == map.stride()
    assert torch.equal(back, map)


@pytest.mark.parametrize("batch", [1, 2])
def test_conv_encoder_conv_makes_no_copy(batch: int) -> None:
    """From the convolution into the encoder and out of it, the map stays where it is."""
    first, second = (nn.Conv2d(32, 32, 3, padding=1).to(memory_format=torch.channels_last) for _ in range(2))
    encoder = Encoder(at(), mixer=HEADS).eval()
    seen: dict[str, torch.Tensor] = {}
    encoder.norm1.register_forward_hook(lambda m, args, out: seen.update(into=args[0]))
    encoder.mlp_residual.register_forward_hook(lambda m, args, out: seen.update(out=out))
    with torch.no_grad(), Copies() as copies:
        map = first(torch.randn(batch, 32, 6, 4).contiguous(memory_format=torch.channels_last))
        copies.found.clear()
        out = encoder(Features(map)).map
        last = second(out)
    assert not copies.found
    assert seen["into"].data_ptr() == map.data_ptr()
    assert out.data_ptr() == seen["out"].data_ptr()
    for made in (map, out, last):
        assert_channels_last(made)


def test_encoder_with_prefix_makes_one_concatenation() -> None:
    encoder = Encoder(at(prefix=2), mixer=HEADS).eval()
    given = features(at(prefix=2).inp)
    with torch.no_grad(), Copies() as copies:
        encoder(given)
    assert [name.split(".")[1] for name in copies.found] == ["cat"]


# ---- work that nobody reads


def flops(block: Block, given: Features) -> int:
    with FlopCounterMode(display=False) as counter:
        block(given)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("cls", "case"), [row for row in BLOCK_ROWS if row[0] in (Encoder, TNT) and row[1].site.inp.prefix], ids=name_row
)
@pytest.mark.parametrize("training", [False, True])
def test_keep_skips_work_only_where_that_is_exact(cls: type[Block], case: Case, training: bool) -> None:
    block, given = build(cls, case, training), features(case.site.inp)
    whole = flops(block, given)
    block.keep(frozenset({"prefix"}))
    less = flops(block, given)
    if case.name in ("se", "gate", "batchnorm"):
        assert less == whole
    else:
        assert less < 0.8 * whole
    block.keep(PARTS)
    assert flops(block, given) == whole


# ---- mistakes


MISTAKES = [
    (Encoder, at(dim=64), {}, "keeps its width, but gets 32 and should give 64"),
    (Encoder, at(), {"mixer": partial(HEADS, heads=5)}, "cannot split width 32 by heads: 5"),
    (TNT, at(), {}, "needs words"),
    (TNT, at(words=Words(8, (2, 2), (3, 2))), {}, "6×4 map, but they lie under 3×2"),
    (TNT, at(words=WORDS), {"inner": ClassToken, "outer": ENCODER}, "keeps words as they are"),
    (NCB, at(prefix=1, dim=64), {}, "1 prefix token(s) of width 32"),
    (NCB, at(), {"head_dim": 24}, "cannot split width 32 by head_dim: 24"),
    (NTB, at(), {}, "splits width 32 into 32 + 0"),
    (NTB, at(dim=64), {"shrink": 1.0}, "shares that fit: 0.5"),
    (EMHSA, at(32, (2, 2)), {"sr_ratio": 4}, "has 4 tokens here"),
    (EMHSA, at(position=RoPE()), {"sr_ratio": 2}, "lie on no grid"),
    (PatchStem, Site.at(3, 30, dim=32), {"patch": 16}, "cannot cut 30×30 px into patches of 16"),
    (SentenceStem, Site.at(3, 32, dim=32), {"patch": 16, "words": 5}, "cannot lay 5 words"),
    (SentenceStem, Site.at(3, 32, dim=32), {"patch": 16, "words": 9, "legacy": True}, "fit: [1, 4, 16, 64, 256]"),
    (MakeWords, at(), {"words": -1}, "cannot make -1 words"),
    (ConvStem, Site.at(3, 32, dim=32), {"dims": (8,)}, "one stride for each width"),
    (ConvTokenizer, Site.at(3, 32, dim=32), {"layers": 0}, "at least 1 of layers, got 0"),
    (ConvTokenizer, Site.at(3, 32, dim=32), {"layers": 6, "padding": 0}, "padding 0 over a 1×1 map"),
    (ConvTokenizer, Site.at(3, 32, dim=32), {"stride": 0}, "kernel 3, stride 0"),
    (MakeWords, at(), {"words": 9}, "cannot make 9 words on a 6×4 map"),
    (Merge, at(32, (7, 5), stride=2), {}, "cannot join 2×2 neighbours on a 7×5 map"),
    (Merge, at(prefix=1), {}, "1 prefix token(s) come in"),
    (ConvEmbed, at(stride=4), {"kernel": 3}, "skips pixels"),
    (ClassToken, at(), {"count": 0}, "count of at least 1"),
    (FromModule, at(), {"module": nn.Linear, "site_args": {"bias": "nothing"}}, "a site has no 'nothing'"),
]


@pytest.mark.parametrize(("cls", "site", "args", "text"), MISTAKES)
def test_a_mistake_is_one_line_that_says_what_is_wrong(cls: type, site: Site, args: dict[str, Any], text: str) -> None:
    with pytest.raises(BuildError, match=re.escape(text)) as caught:
        cls(replace(site, where="model.here"), **args)
    assert str(caught.value).startswith("model.here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm, BatchNorm])
def test_no_norm_takes_the_root_of_less_than_nothing(norm: type) -> None:
    with pytest.raises(BuildError, match=f"^{norm.__name__} needs an eps of at least 0, got -1.0$"):
        norm(8, eps=-1.0)
    norm(8, eps=0.0)
