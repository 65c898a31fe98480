"""Faster forms of Linear, MLP and folded norms against torch's own, in float64 where that says more."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from blocks.base import Site, linear
from blocks.kernels import batch_norm, folded, onednn, products
from blocks.kernels import linear as kernels
from blocks.mlp import GELU, Mlp, ReLU
from blocks.nextvit import NCB, NTB, Downsample
from blocks.norms import BatchNorm, LayerNorm
from blocks.stems import ConvStem
from tests.contract import features, randomise
from tests.kernels import FORMS, draw, error, in_form, saved_bytes

needs_products = pytest.mark.skipif(
    not (products.kernel(torch.float32) or onednn.multiplies(torch.float32)), reason="no products but torch's here"
)


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """The faster forms for small tensors too, without a look at the clock."""
    monkeypatch.setattr(products, "FLOOR", 0.0)
    monkeypatch.setattr(products, "_smallest", lambda: 0.0)


# ---- Linear

INPUTS = {
    "matrix": lambda: draw(30, 20),
    "tokens": lambda: draw(3, 10, 20),
    "strided": lambda: draw(10, 3, 20).transpose(0, 1),
    "slice": lambda: draw(3, 12, 20)[:, 1:11],
    "none": lambda: draw(0, 10, 20),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [False, True])
def test_linear_equals_float64(name: str, bias: bool, frozen: bool) -> None:
    layer = linear(20, 12, bias)
    layer.weight.requires_grad_(not frozen)
    double = copy.deepcopy(layer).double()
    x = INPUTS[name]()
    grads = []
    for module, given in ((layer, x.clone().requires_grad_()), (double, x.double().requires_grad_())):
        out = module(given)
        out.backward(torch.ones_like(out).cumsum(-1))
        grads.append([out, given.grad, *(p.grad for p in module.parameters() if p.requires_grad)])
        assert module.weight.requires_grad or module.weight.grad is None
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), double(x.double()), rtol=1e-5, atol=1e-5)


def test_linear_is_torch_s() -> None:
    """The same parameters, name and place in the class tree; a copy works by itself."""
    layer, torch_s = linear(4, 6), nn.Linear(4, 6)
    assert isinstance(layer, nn.Linear)
    assert repr(layer) == repr(torch_s)
    torch_s.load_state_dict(layer.state_dict(), strict=True)
    torch.testing.assert_close(layer(draw(9, 4)), torch_s(draw(9, 4)))


class Chain(nn.Module):
    """Norm, Linear, GELU, Linear: each Linear's input can be computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.act, self.fc2 = LayerNorm(24), linear(24, 96), GELU(), linear(96, 24)
        randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(self.norm(x))))

    def reference(self, x: Tensor) -> Tensor:
        norm, fc1, fc2 = self.norm, self.fc1, self.fc2
        x = F.layer_norm(x, (24,), norm.weight, norm.bias, norm.eps)
        return F.linear(F.gelu(F.linear(x, fc1.weight, fc1.bias)), fc2.weight, fc2.bias)


def gradients(chain: Chain, forward: Any, x: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        out = forward(x)
    weights = draw(*out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [x, *chain.parameters()], weights)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chain_that_is_computed_again(dtype: torch.dtype) -> None:
    """Its gradients are as near to float64's as torch's own, and it keeps much less."""
    torch.manual_seed(0)
    chain = Chain()
    x = draw(4, 50, 24)
    double = copy.deepcopy(chain).double()
    exact = gradients(double, double.reference, x.double())
    ours, theirs = gradients(chain, chain, x, dtype), gradients(chain, chain.reference, x, dtype)
    for got, own, want in zip(ours, theirs, exact, strict=True):
        assert got.dtype == own.dtype
        assert error(got, want) < 1.5 * error(own, want) + 1e-6
    tokens, width = 200, torch.finfo(dtype).bits // 8
    parameters = list(chain.parameters())

    def run(forward: Any) -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            return saved_bytes(lambda: forward(x.clone().requires_grad_()), parameters)

    least = tokens * (24 * 4 + 96 * width)  # what comes in and what goes into GELU
    assert least <= run(chain) < least * 1.1
    assert run(chain.reference) > 1.6 * run(chain)


def test_checkpointing_computes_again_what_is_computed_again() -> None:
    chain, x = Chain(), draw(4, 50, 24)
    plain = gradients(chain, chain, x)
    again = gradients(chain, lambda x: checkpoint(chain, x, use_reentrant=False), x)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_second_derivatives() -> None:
    chain = Chain()

    def penalty(forward: Any, chain: Chain, x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        inner = torch.autograd.grad(forward(x).square().sum(), [x, chain.fc1.weight], create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in inner), list(chain.parameters())[:5]))

    double = copy.deepcopy(chain).double()
    for got, want in zip(penalty(chain, chain, draw(6, 24)), penalty(double.reference, double, draw(6, 24).double()),
                         strict=True):  # fmt: skip
        assert error(got, want) < 1e-4


def test_a_tensor_changed_in_place_is_not_computed_again() -> None:
    norm, layer = LayerNorm(24), linear(24, 8)
    x = draw(5, 24).requires_grad_()
    y = norm(x)
    y += 1
    layer(y).sum().backward()
    want = F.layer_norm(x, (24,)).add(1).sum(0).expand(8, 24)
    torch.testing.assert_close(layer.weight.grad, want)


def test_nobody_else_sees_private_operators() -> None:
    """Compilers, exporters, counters, float64 and the meta device get torch's own Linear."""
    chain, x = Chain().eval(), draw(4, 24)
    program = torch.export.export(chain, (x,))
    assert not [node for node in program.graph.nodes if "mkldnn" in str(node.target)]
    torch.testing.assert_close(program.module()(x), chain(x))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(chain, fullgraph=True, backend="eager")(x), chain(x))
    with FlopCounterMode(display=False) as counter:
        chain(x)
    assert counter.get_total_flops() == 2 * 4 * 24 * 96 * 2
    assert torch.equal(chain.double()(x.double()), chain.reference(x.double()))
    assert chain.to("meta")(x.double().to("meta")).is_meta
    mapped = torch.func.vmap(chain.float().to_empty(device="cpu").fc1)(x)
    assert mapped.shape == (4, 96)


# ---- folded norms, ReLU in place, pieces

BLOCKS = {
    "stem": lambda: ConvStem(Site.at(3, 16), dims=(8, 8), strides=(2, 1)),
    "ncb": lambda: NCB(Site.at(32, 6, dim=64, stride=2)),
    "ntb": lambda: NTB(Site.at(64, 6, dim=128, stride=1), sr_ratio=2),
}


LAYERS = {
    "linear": lambda: linear(48, 70, bias=False),
    "bias": lambda: linear(48, 70),
    "odd": lambda: linear(50, 70),  # not by the kernel
    "conv": lambda: nn.Conv2d(32, 48, 3, bias=False),
    "channels last": lambda: nn.Conv2d(32, 48, 3).to(memory_format=torch.channels_last),
    "image": lambda: nn.Conv2d(3, 48, 3, bias=False),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_a_norm_in_a_layer(name: str, dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LAYERS[name]()
    for behind in (True, False)[: 1 + isinstance(layer, nn.Linear)]:
        norm = BatchNorm(layer.weight.shape[0 if behind else 1])
        randomise(norm)
        exact, by = copy.deepcopy(layer).double(), copy.deepcopy(norm).double().bn
        scale = by.weight / (by.running_var + by.eps).sqrt()
        shift, bias = by.bias - by.running_mean * scale, 0.0 if layer.bias is None else exact.bias
        scaled = scale.view(-1, *[1] * (layer.weight.dim() - 1)) if behind else scale
        want = (exact.weight * scaled, shift + bias * scale if behind else exact.weight @ shift + bias)
        with in_form(form, monkeypatch), torch.no_grad():
            made = folded.fold(norm, layer.weight, layer.bias, dtype, behind)
        assert made[0].stride() == layer.weight.stride()
        for a, b in zip(made, want, strict=True):
            assert a.dtype is dtype
            assert error(a, b) < (1e-6 if dtype is torch.float32 else 4e-3)


@pytest.mark.parametrize("name", BLOCKS)
def test_folded_equals_unfolded(name: str) -> None:
    """Without gradients, in evaluation, to float32's precision; also right after weights were changed by hand."""
    torch.manual_seed(0)
    block = BLOCKS[name]()
    randomise(block)
    block.eval()
    given = features(Site.at({"stem": 3, "ncb": 32, "ntb": 64}[name], 16 if name == "stem" else 6).inp, batch=40)
    for _ in range(2):
        exact = copy.deepcopy(block).double()(given._replace(map=given.map.double())).map
        with torch.no_grad():
            got = block(given).map
        assert error(got, exact) < 1e-6
        assert got.stride() == exact.stride()
        for parameter in block.parameters():
            parameter.data.mul_(1.5)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("grad", [False, True])
def test_what_a_block_was_given_stays(name: str, grad: bool) -> None:
    """Sums and activations are written over what a block has made, never over what came in."""
    block = BLOCKS[name]().eval()
    given = features(Site.at({"stem": 3, "ncb": 32, "ntb": 64}[name], 16 if name == "stem" else 6).inp, batch=40)
    before = given.map.clone()
    same = NCB(Site.at(32, 6)).eval() if name == "ncb" else block
    with torch.set_grad_enabled(grad):
        for each in (block, same):
            first = each(given).map.clone()
            assert torch.equal(given.map, before)
            assert torch.equal(each(given).map, first)


@pytest.mark.parametrize("name", BLOCKS)
def test_folded_in_bfloat16(name: str) -> None:
    """Under autocast as near to float64 as torch's own operators are, and in the same type."""
    torch.manual_seed(0)
    block = BLOCKS[name]()
    randomise(block)
    block.eval()
    given = features(Site.at({"stem": 3, "ncb": 32, "ntb": 64}[name], 16 if name == "stem" else 6).inp, batch=40)
    exact = copy.deepcopy(block).double()(given._replace(map=given.map.double())).map
    with torch.autocast("cpu", torch.bfloat16):
        plain = block(given).map
        with torch.no_grad():
            got = block(given).map
    assert got.dtype is plain.dtype
    assert error(got, exact) < 1.3 * error(plain, exact)


def test_a_stem_takes_images_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    stem = BLOCKS["stem"]().eval()
    given = features(Site.at(3, 16).inp, batch=2 * torch.get_num_threads() + 1)
    with torch.no_grad():
        whole = stem(given).map
        monkeypatch.setattr(folded, "PIXELS", 0)
        pieces = stem(given).map
        assert stem(given.replace(map=given.map[:0])).map.shape == (0, *whole.shape[1:])
    torch.testing.assert_close(pieces, whole)
    assert pieces.stride() == whole.stride()


def test_without_convolutions_of_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that is missing or wrong is not used, and the blocks give the same without it."""
    block, given = NCB(Site.at(32, 6)).eval(), features(Site.at(32, 6).inp, batch=40)
    with torch.no_grad():
        expected = block(given).map
        monkeypatch.setattr(onednn, "conv", lambda map, weight, bias, like, relu=False: F.conv2d(map, weight))
        onednn.convolves.cache_clear()
        assert not onednn.convolves(torch.float32)
        torch.testing.assert_close(block(given).map, expected)
    onednn.convolves.cache_clear()


def test_what_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch norm but those in front of the attention; none with gradients, in training, or with a hook."""
    runs = []
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: runs.append(self) or F.batch_norm(
        x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps))  # fmt: skip
    monkeypatch.setattr(batch_norm, "available", lambda dtype: False)  # which would serve in training
    ncb = NCB(Site.at(32, 6, dim=64, stride=2))
    given = features(Site.at(32, 6).inp, batch=40)
    with torch.no_grad():
        ncb.eval()(given)
        assert not runs
        ncb.train()(given)
        assert len(runs) == 3
        ncb.eval().norm.register_forward_hook(lambda *args: None)
        ncb(given)
        assert len(runs) == 4
    ncb(given)
    assert len(runs) == 7


def test_a_block_with_relu_in_place_trains_alike() -> None:
    torch.manual_seed(0)
    block = NCB(Site.at(32, 6, dim=64, stride=2)).train()
    double = copy.deepcopy(block).double()
    given = features(Site.at(32, 6).inp, batch=8)
    block(given).map.square().mean().backward()
    double(given._replace(map=given.map.double())).map.square().mean().backward()
    for (name, p), exact in zip(block.named_parameters(), double.parameters(), strict=True):
        assert error(p.grad, exact.grad) < 1e-4, name


def test_a_hook_sees_what_was_there() -> None:
    """ReLU in place would change what a hook was given."""
    mlp = Mlp(Site.at(8, 4), act=ReLU)
    seen: list[Tensor] = []
    mlp.fc1.register_forward_hook(lambda module, args, out: seen.append(out))
    mlp(draw(2, 16, 8), (4, 4))
    assert (seen[0] < 0).any()


@pytest.mark.parametrize("act", [GELU, ReLU])
def test_mlp_in_pieces(monkeypatch: pytest.MonkeyPatch, act: type) -> None:
    mlp, x = Mlp(Site.at(8, 4), act=act), draw(30, 16, 8)
    pieces: list[int] = []
    run = Mlp._piece
    monkeypatch.setattr(Mlp, "_piece", lambda self, *args: pieces.append(len(args[-1])) or run(self, *args))
    whole = mlp(x, (4, 4))
    monkeypatch.setattr(kernels, "LARGE", 0)
    monkeypatch.setattr(kernels, "ROWS", 100)
    with torch.no_grad():
        got = mlp(x, (4, 4))
    torch.testing.assert_close(got, whole)
    assert pieces == [30, *[96] * 5]


@needs_products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_in_the_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients an MLP's GELU is part of the product in front of it; not where somebody looks between."""
    torch.manual_seed(0)
    mlp, x = Mlp(Site.at(24, 4)), draw(5, 16, 24)
    exact = copy.deepcopy(mlp).double()(x.double(), (4, 4))
    calls, forward, low = [], products.forward, products.faster(1e9, torch.bfloat16)

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str = "none") -> Tensor:
        calls.extend([x.dtype] if act == "gelu" else [])
        return forward(x, weight, bias, act)

    monkeypatch.setattr(products, "forward", watched)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        got = mlp(x, (4, 4))
        assert calls == ([dtype] if dtype is torch.float32 or low else [])
        theirs = F.linear(F.gelu(F.linear(x, mlp.fc1.weight, mlp.fc1.bias)), mlp.fc2.weight, mlp.fc2.bias)
        assert got.dtype == theirs.dtype
        assert error(got, exact) < 1.2 * error(theirs, exact) + 1e-7
        calls.clear()
        mlp.fc1.register_forward_hook(lambda *args: None)
        torch.testing.assert_close(mlp(x, (4, 4)), theirs)
        assert not calls


def test_folding_knows_its_norm() -> None:
    x = draw(2, 16, 8)
    with torch.no_grad():
        assert folded.linear_norm(linear(8, 8), BatchNorm(8).eval(), x) is not None
        assert folded.linear_norm(linear(8, 8), BatchNorm(8), x) is None
        assert folded.linear_norm(linear(8, 8), LayerNorm(8).eval(), x) is None
        assert folded.linear_norm(linear(8, 8), BatchNorm(8).eval(), x.double()) is None
    assert folded.linear_norm(linear(8, 8), BatchNorm(8).eval(), x) is None
    assert Downsample(8, 8, 1, BatchNorm).proj is None
