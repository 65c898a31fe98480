"""What the tests of kernels share."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blocks.attention import Attention
from blocks.base import Features, Site, to_map, tokens
from blocks.kernels import native
from blocks.mlp import Mlp
from blocks.transformer import Encoder

# What runs a kernel: this processor's library, or one for an older processor, and with how many threads.
FORMS = ["AVX2", "AVX512_BF16", "three threads"]


@contextmanager
def in_form(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels in one of `FORMS`; skips where this machine has it not."""
    order, threads = ["AVX2", "AVX512", "AVX512_BF16"], torch.get_num_threads()
    if native.library() is None:
        pytest.skip("no compiler, or a processor without a kernel")
    if name in order:
        if order.index(name) > order.index(native.capability()):
            pytest.skip(f"a processor without {name}")
        found = native.load(name, native.cache_folder())
        monkeypatch.setattr(native, "library", lambda: found)
    else:
        torch.set_num_threads(3)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def encoder(side: int, dim: int, heads: int = 2, ratio: float = 4.0, bias: bool = False, **parts: Any) -> Encoder:
    """An encoder whose every parameter tells in the result."""
    mixer = parts.pop("mixer", partial(Attention, heads=heads, qkv_bias=bias))
    mlp = parts.pop("mlp", partial(Mlp, ratio=ratio))
    site = Site.at(dim, side, drop_path=parts.pop("drop_path", 0.0))
    block = Encoder(site, mixer=mixer, mlp=mlp, **parts)
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    return block


def reference(block: Encoder, words: Tensor) -> Tensor:
    side = round(words.shape[1] ** 0.5)
    return tokens(block(Features(to_map(words, (side, side)))).map)


def worst(got: Tensor | None, want: Tensor | None) -> float:
    assert got is not None
    assert want is not None
    assert got.shape == want.shape
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def draw(*shape: int, **kind: Any) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), **kind)


def error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def trained(made: nn.Module, map: Tensor, low: bool = False) -> dict[str, Tensor]:
    """Result, gradients and statistics of one step."""
    torch.manual_seed(2)
    map = map.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        out = made(Features(map)).map
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out * weight.to(out.dtype)).sum().backward()
    found = {"result": out.detach(), "map": map.grad}
    found |= {name: p.grad for name, p in made.named_parameters()} | dict(made.named_buffers())
    assert all(value is not None for value in found.values())
    return {name: value.double() for name, value in found.items() if value is not None}


def again_alike(made: nn.Module, map: Tensor) -> None:
    """Under activation checkpointing the map's gradient is what it is in a plain step."""
    plain = trained(copy.deepcopy(made), map)
    x = map.clone(memory_format=torch.preserve_format).requires_grad_()
    out = checkpoint(lambda x: made(Features(x)).map, x, use_reentrant=False)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), plain["map"])


def saved_bytes(act: Any, parameters: list[nn.Parameter]) -> int:
    """Bytes that `act()` keeps for the backward pass, without parameters."""
    own, found = {p.untyped_storage().data_ptr() for p in parameters}, {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = act()
    assert result.requires_grad
    return sum(storage.nbytes() for storage in found.values())
