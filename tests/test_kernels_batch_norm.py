"""Batch norm of training, alone and with ReLU behind it, against torch's own in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from blocks.base import Features, Site
from blocks.kernels import batch_norm as kernel
from blocks.kernels import native
from blocks.kernels.batch_norm import batch_norm
from blocks.norms import BatchNorm
from blocks.stems import ConvStem
from tests.kernels import draw, error

pytestmark = pytest.mark.skipif(native.library() is None, reason="no kernels on this machine")

# Fewer rows than are summed at a time, as many, and many; widths of one group of vectors, several and a part.
SHAPES = [(2, 16, 1, 1), (2, 32, 4, 4), (3, 80, 7, 5), (5, 192, 14, 14)]


def norm(channels: int) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(channels, eps=1e-4, momentum=0.3)
    for value in (bn.weight.data, bn.bias.data, bn.running_mean, bn.running_var):
        assert value is not None
        value.copy_(draw(channels) * (1 if value is bn.bias.data else 0.3) + 1)
    return bn


def given(*shape: int) -> Tensor:
    """A map of channels with means and widths of their own."""
    map = draw(*shape) * draw(shape[1]).exp().view(-1, 1, 1) + 3 * draw(shape[1]).view(-1, 1, 1)
    return map.contiguous(memory_format=torch.channels_last)


def looked_at(made: Tensor) -> Tensor:
    weight = draw(*made.shape, 1)[..., 0].bfloat16()  # the same in every precision
    return (made * weight.to(made.dtype)).sum()


def trained(bn: nn.BatchNorm2d, act: Callable[[Tensor], Tensor], map: Tensor) -> dict[str, Tensor]:
    map = map.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    made = act(map)
    looked_at(made).backward()
    found = {"made": made.detach(), "map": map.grad, "weight": bn.weight.grad, "bias": bn.bias.grad}
    assert all(value is not None for value in found.values())
    return {key: value for key, value in (found | dict(bn.named_buffers())).items() if value is not None}


def both(shape: tuple[int, ...], relu: bool, low: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By the kernel, and by torch in float64."""
    bn, map = norm(shape[1]), given(*shape)
    exact, map = copy.deepcopy(bn).double(), map.bfloat16() if low else map

    def by_kernel(map: Tensor) -> Tensor:
        made = batch_norm(bn, map, relu)
        assert made is not None
        return made

    want = trained(exact, lambda map: F.relu(exact(map)) if relu else exact(map), map.double())
    return trained(bn, by_kernel, map), want


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_in_float64(shape: tuple[int, ...], relu: bool) -> None:
    got, want = both(shape, relu)
    few = shape[0] * shape[2] == 2  # two rows: what is normalised is ±1, and its gradient nearly 0
    for key, value in want.items():
        assert got[key].shape == value.shape
        assert error(got[key], value.double()) < (1e-2 if few and key == "map" else 1e-6), key
    assert got["made"].is_contiguous(memory_format=torch.channels_last)
    assert got["map"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(not kernel.available(torch.bfloat16), reason="no bfloat16 kernels on this machine")
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_bfloat16(shape: tuple[int, ...], relu: bool) -> None:
    got, want = both(shape, relu, low=True)
    assert got["made"].dtype is got["map"].dtype is torch.bfloat16
    assert got["weight"].dtype is got["running_mean"].dtype is torch.float32
    for key, value in want.items():
        assert error(got[key], value.double()) < (5e-3 if key in ("made", "map") else 1e-5), key


def test_sums_over_many_rows_are_exact() -> None:
    """Where torch's own, for channels last, are not."""
    bn, map = norm(16), given(8, 16, 120, 120) + 5
    batch_norm(bn, map)
    mean, variance = map.double().mean((0, 2, 3)), map.double().var((0, 2, 3))
    for own, before, batch in zip(bn.buffers(), norm(16).double().buffers(), (mean, variance), strict=False):
        torch.testing.assert_close(own.double(), 0.7 * before + 0.3 * batch, rtol=2e-7, atol=0)


def test_threads_share_the_rows() -> None:
    threads = torch.get_num_threads()
    bn, map = norm(64), given(4, 64, 56, 56)
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            mine = copy.deepcopy(bn)
            found.append(trained(mine, lambda map, mine=mine: batch_norm(mine, map, True), map))  # type: ignore[misc]
    finally:
        torch.set_num_threads(threads)
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, msg=key)


def test_keeps_its_input_alone() -> None:
    bn, map, kept = norm(64), given(4, 64, 28, 28).requires_grad_(), {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        batch_norm(bn, map, relu=True)
    assert sum(kept.values()) == map.untyped_storage().nbytes() + 64 * (2 * 4 + 2 * 8 + 3 * 4)


def test_differentiated_twice() -> None:
    bn, map = norm(32), given(4, 32, 3, 3)
    exact = copy.deepcopy(bn).double()

    def penalty(map: Tensor, act: Callable[[Tensor], Tensor | None]) -> Tensor:
        map = map.detach().requires_grad_()
        made = act(map)
        assert made is not None
        (first,) = torch.autograd.grad(made.square().sum(), map, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), map)
        return second

    got = penalty(map, lambda map: batch_norm(bn, map, relu=True))
    assert error(got, penalty(map.double(), lambda map: F.relu(exact(map)))) < 1e-5


def test_only_the_gradients_that_are_asked_for() -> None:
    bn, map = norm(32), given(4, 32, 3, 3).requires_grad_()
    want = trained(bn, lambda map: batch_norm(bn, map), map)["map"]  # type: ignore[arg-type, return-value]
    bn.requires_grad_(False).zero_grad()
    made = batch_norm(bn, map)
    assert made is not None
    looked_at(made).backward()
    torch.testing.assert_close(map.grad, want)
    assert bn.weight.grad is None
    assert batch_norm(norm(32), map.detach()) is not None


def test_under_checkpointing_statistics_are_counted_as_torch_counts_them() -> None:
    bn, map = norm(32), given(4, 32, 3, 3)
    again = copy.deepcopy(bn)
    want = trained(bn, lambda map: batch_norm(bn, map), map)["map"]  # type: ignore[arg-type, return-value]
    map = map.requires_grad_()
    made = checkpoint(lambda map: batch_norm(again, map), map, use_reentrant=False)
    looked_at(made).backward()
    torch.testing.assert_close(map.grad, want)
    assert again.num_batches_tracked is not None
    assert again.num_batches_tracked == 2


def test_infinite_and_missing_numbers_stay() -> None:
    bn, map = norm(16), given(2, 16, 3, 3)
    map[0, 3, 1, 1], map[1, 5, 0, 0] = float("nan"), float("inf")
    made = batch_norm(bn, map, relu=True)
    assert made is not None
    assert made[:, [3, 5]].isnan().all()
    assert made[:, [0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("change", [
    lambda bn: bn.eval(),
    lambda bn: setattr(bn, "momentum", None),
    lambda bn: bn.double(),
    lambda bn: bn.register_forward_hook(lambda *args: None),
    lambda bn: bn.register_full_backward_hook(lambda *args: None),
    lambda bn: setattr(bn, "running_mean", None),
])  # fmt: skip
def test_which_norms_are_torchs(change: Callable[[nn.BatchNorm2d], object]) -> None:
    bn, map = norm(32), given(4, 32, 3, 3)
    assert batch_norm(bn, map) is not None
    change(bn)
    assert batch_norm(bn, map) is None


def test_which_maps_are_torchs() -> None:
    bn, map = norm(32), given(4, 32, 3, 3)
    for other in (map.contiguous(), map.double(), map.to("meta"), map[:1, :, :1, :1], map[:, :, ::2]):
        assert batch_norm(bn, other) is None
    assert batch_norm(norm(24), given(4, 24, 3, 3)) is None
    assert batch_norm(nn.SyncBatchNorm.convert_sync_batchnorm(norm(32)), map) is None
    assert batch_norm(nn.BatchNorm2d(32, affine=False), map) is None
    with pytest.raises(ValueError, match="more than 1 value"):
        BatchNorm(32)(torch.randn(1, 32))


@pytest.mark.parametrize("low", [False, True])
def test_a_stem_of_it(low: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast too; where the library is missing it runs as well, and the state is the same."""
    stem, images = ConvStem(Site.at(3, 32)).train(), draw(3, 3, 32, 32)
    plain, exact = copy.deepcopy(stem), copy.deepcopy(stem).double()

    def run(stem: ConvStem, images: Tensor) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=low and images.dtype is torch.float32):
            map = stem(Features(images)).map
        looked_at(map).backward()
        return {name: p.grad for name, p in stem.named_parameters() if p.grad is not None} | dict(stem.named_buffers())

    runs, own = [], kernel._BatchNorm.apply
    monkeypatch.setattr(kernel._BatchNorm, "apply", lambda *args: runs.append(1) or own(*args))
    got = run(stem, images)
    assert len(runs) == (4 if kernel.available(torch.bfloat16 if low else torch.float32) else 0)
    monkeypatch.setattr(kernel, "available", lambda dtype: False)
    by_torch, want = run(plain, images), run(exact, images.double())
    for key, value in want.items():
        assert error(got[key], value.double()) < 2 * error(by_torch[key], value.double()) + (2e-2 if low else 2e-6), key
