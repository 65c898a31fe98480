"""A branch of batch norm and MLP that is trained as one function, against its parts one by one and in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from blocks import residual
from blocks.base import Site
from blocks.kernels import batch_norm, branch, native
from blocks.mlp import GELU, Mlp
from blocks.nextvit import NCB, NTB
from blocks.norms import BatchNorm, LayerNorm, NoNorm
from blocks.residual import Residual
from tests.contract import features, randomise
from tests.kernels import again_alike, trained

pytestmark = [
    pytest.mark.skipif(native.library() is None, reason="no kernels on this machine"),
    pytest.mark.usefixtures("ours"),
]

BLOCKS: dict[str, Callable[[], NCB | NTB]] = {
    "ncb": lambda: NCB(Site.at(32, 6)),
    "ntb": lambda: NTB(Site.at(64, 6, dim=128), sr_ratio=2),
}


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of a small batch."""
    monkeypatch.setattr(branch, "HIDDEN", 3 * 36 * 96)


def block(name: str, drop_path: float = 0.0) -> NCB | NTB:
    torch.manual_seed(0)
    made = BLOCKS[name]()
    randomise(made)
    for part in made.modules():
        if isinstance(part, Residual):
            part.rate = drop_path
    return made.train()


def given(name: str, batch: int = 11) -> Tensor:
    map = features(Site.at({"ncb": 32, "ntb": 64}[name], 6).inp, batch=batch).map
    shift = torch.randn(1, map.shape[1], 1, 1, generator=torch.Generator().manual_seed(1))
    return (map + shift).detach()


def error(got: Tensor, exact: Tensor) -> float:
    return ((got - exact).norm() / exact.norm().clamp_min(1e-30)).item()


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("low", [False, True])
def test_as_near_to_float64_as_the_parts(name: str, low: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if low and not batch_norm.available(torch.bfloat16):
        pytest.skip("no bfloat16 kernels on this machine")
    made, map = block(name), given(name)
    exact = trained(copy.deepcopy(made).double(), map.double())
    runs, run = [], branch.branch
    monkeypatch.setattr(branch, "branch", lambda *args: runs.append(1) or run(*args))
    map = map.bfloat16() if low else map
    got = trained(copy.deepcopy(made), map, low)
    assert runs
    monkeypatch.setattr(branch, "serves", lambda *args: False)
    plain = trained(made, map, low)
    assert len(runs) == 1
    for key, value in exact.items():
        assert error(got[key], value) < 2 * error(plain[key], value) + (1e-2 if low else 1e-6), key


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_drops_the_same_samples(name: str, low: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And does nothing for them."""
    if low and not batch_norm.available(torch.bfloat16):
        pytest.skip("no bfloat16 kernels on this machine")
    made, map = block(name, 0.5), given(name)
    map = map.bfloat16() if low else map
    got = trained(copy.deepcopy(made), map, low)
    monkeypatch.setattr(branch, "serves", lambda *args: False)
    for key, value in trained(made, map, low).items():
        if key != "attn.k.bias":  # whose gradient is 0
            assert error(got[key], value) < (0.1 if low else 2e-5), key


@pytest.mark.parametrize("name", BLOCKS)
def test_where_all_samples_are_dropped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics are brought on, and no parameter of a branch learns anything."""
    made, map = block(name, 0.5), given(name)
    monkeypatch.setattr(residual, "kept", lambda x, rate: x.new_zeros(len(x), 1, 1))
    got = trained(copy.deepcopy(made), map)
    if name == "ncb":
        torch.testing.assert_close(got["result"], map.double(), rtol=0, atol=0)
    assert not any(got[key].any() for key in ("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"))
    monkeypatch.setattr(branch, "serves", lambda *args: False)
    for key, value in trained(made, map).items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dim", "batch", "dropped"), [(32, 80, 0.0), (32, 80, 0.9), (192, 30, 0.0), (192, 30, 0.5)])
def test_pieces_that_threads_share(dim: int, batch: int, dropped: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where weights are small each goes through rows of its own; else they share each piece."""
    monkeypatch.setattr(branch, "HIDDEN", 11 * 36 * 3 * dim)
    made, map = NCB(Site.at(dim, 6)).train(), torch.randn(batch, dim, 6, 6, generator=torch.Generator().manual_seed(1))
    randomise(made)
    keep = (torch.rand(batch, 1, 1, generator=torch.Generator().manual_seed(2)) >= dropped) / (1 - dropped)
    monkeypatch.setattr(residual, "kept", lambda x, rate: keep.to(x))
    for part in made.modules():
        if isinstance(part, Residual):
            part.rate = dropped
    exact = trained(copy.deepcopy(made).double(), map.double())
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        got = trained(made, map)
    finally:
        torch.set_num_threads(threads)
    for key in ("map", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias", "norm.bn.weight"):
        assert error(got[key], exact[key]) < 1e-5, key


def test_keeps_less() -> None:
    """The input and what ReLU gave, and not what the norm gave."""
    made, x = NCB(Site.at(32, 6)).train(), torch.randn(11, 36, 32, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    parts = (made.mlp_residual, made.norm, made.mlp)
    assert branch.serves(*parts, x)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        branch.branch(*parts, x)
    small = sum(p.numel() for p in (*made.mlp.parameters(), *made.norm.parameters())) + 3 * 32
    assert sum(kept.values()) == 4 * (11 * 36 * (32 + 96) + small) + 8 * 2 * 32


@pytest.mark.usefixtures("pieces")
def test_differentiated_twice() -> None:
    made, x = NCB(Site.at(32, 2)).train(), torch.randn(3, 4, 32)
    parts = (made.mlp_residual, made.norm, made.mlp)

    def penalty(x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return second

    got = penalty(x, lambda x: branch.branch(*parts, x))
    double = copy.deepcopy(made).double()
    want = penalty(x.double(), lambda x: x + double.mlp(double.norm(x), (2, 2)))
    assert error(got.double(), want) < 1e-5


def test_under_checkpointing() -> None:
    """Gradients are the same, and statistics are counted as torch counts them: once more."""
    made = block("ncb")
    again_alike(made, given("ncb"))
    assert made.norm.bn.num_batches_tracked == 2


@pytest.mark.parametrize("change", [
    lambda b: b.eval(),
    lambda b: b.norm.bn.eval(),
    lambda b: setattr(b.norm.bn, "momentum", None),
    lambda b: setattr(b, "norm", nn.SyncBatchNorm.convert_sync_batchnorm(b.norm)),
    lambda b: setattr(b, "norm", LayerNorm(32)),
    lambda b: setattr(b, "norm", NoNorm(32)),
    lambda b: setattr(b.mlp, "act", GELU()),
    lambda b: setattr(b.mlp, "fc1", nn.Linear(32, 96)),
    lambda b: setattr(b.mlp.drop, "p", 0.1),
    lambda b: setattr(b, "mlp_residual", partial(Residual, layer_scale=0.1)(Site.at(32, 6))),
    lambda b: b.mlp.fc2.register_forward_hook(lambda *args: None),
    lambda b: b.norm.bn.register_full_backward_hook(lambda *args: None),
    lambda b: b.double(),
    lambda b: b.bfloat16(),
])  # fmt: skip
def test_what_it_does_not_serve(change: Callable[[NCB], object]) -> None:
    made, x = NCB(Site.at(32, 6)).train(), torch.randn(11, 36, 32)
    assert branch.serves(made.mlp_residual, made.norm, made.mlp, x)
    change(made)
    assert not branch.serves(made.mlp_residual, made.norm, made.mlp, x)


def test_which_tokens_it_does_not_serve() -> None:
    made, x = NCB(Site.at(32, 6)).train(), torch.randn(11, 36, 32)
    parts = (made.mlp_residual, made.norm, made.mlp)
    assert not branch.serves(*parts, x.double())
    assert not branch.serves(*parts, x.to("meta"))
    assert not branch.serves(*parts, x[:1, :1])
    assert not branch.serves(*parts, x.transpose(0, 1))
    with torch.no_grad():
        assert not branch.serves(*parts, x)
    with torch.autocast("cpu", torch.bfloat16):  # the sum would be in float32
        assert not branch.serves(*parts, x)
        assert branch.serves(*parts, x.bfloat16()) == batch_norm.available(torch.bfloat16)
    made.requires_grad_(False)
    assert not branch.serves(*parts, x)
    assert isinstance(made.norm, BatchNorm)
    assert isinstance(made.mlp, Mlp)
