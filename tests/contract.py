"""What every class that can be swapped must satisfy, in one place; tests/test_blocks.py runs it over the table.

For a class of your own: `for check in BLOCK_CHECKS: check(MyBlock, Case(site, args))`.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blocks.base import (
    PARTS,
    Act,
    Block,
    Features,
    Gate,
    Norm,
    Position,
    Shape,
    to_map,
    tokens,
)
from blocks.heads import Head
from blocks.revcol import Fusion
from tests.settings import Case

CLASSES = 5


def build(cls: type, case: Case, training: bool = False) -> Any:
    """An object of `cls` at its row's place. Its weights, biases and statistics are all random, none zero or one."""
    torch.manual_seed(0)
    if issubclass(cls, (Norm, Gate)):
        made = cls(case.site.inp.dim, **case.args)
    elif issubclass(cls, Head):
        made = cls(case.site.inp, CLASSES, **case.args)
    elif issubclass(cls, Fusion):
        made = cls(case.site, Shape(48, (3, 2)), **case.args)
    elif issubclass(cls, (Act, Position)):
        made = cls(**case.args)
    else:
        made = cls(case.site, **case.args)
    if isinstance(made, nn.Module):
        made.train(training)
        randomise(made)
    return made


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.5 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.1
            parameter.add_(torch.randn_like(parameter), alpha=scale)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)


def features(shape: Shape, batch: int = 2, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Features:
    """Random features of `shape`, the map in channels_last memory."""
    torch.manual_seed(1)
    new: dict[str, Any] = {"dtype": dtype, "device": device}
    words = shape.words
    return Features(
        map=torch.randn(batch, shape.dim, *shape.grid, **new).contiguous(memory_format=torch.channels_last),
        prefix=torch.randn(batch, shape.prefix, shape.dim, **new) if shape.prefix else None,
        words=torch.randn(batch * words.over[0] * words.over[1], words.count, words.dim, **new) if words else None,
        extra={name: torch.randn(batch, shape.dim, *shape.grid, **new) for name in shape.extra} or None,
    )


def parts(given: Features) -> dict[str, Tensor]:
    """The tensors that are there, by name."""
    return {name: value for name in sorted(PARTS) if (value := getattr(given, name)) is not None}


def read_all(given: Features) -> Tensor:
    """A number that every entry of every part has a share in, each another one."""
    torch.manual_seed(2)
    return sum(((value * torch.randn_like(value)).sum() for value in parts(given).values()), torch.zeros(()))


def assert_same(got: Features, want: Features, tolerance: float = 0.0, only: frozenset[str] = PARTS) -> None:
    assert parts(got).keys() == parts(want).keys()
    for name, value in parts(want).items():
        if name in only:
            torch.testing.assert_close(
                parts(got)[name], value, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )


def assert_channels_last(map: Tensor, any_batch_stride: bool = False) -> None:
    """By strides: at batch 1, `is_contiguous` also accepts maps after which a convolution returns NCHW."""
    _, c, h, w = map.shape
    want, got = (h * w * c, 1, w * c, c), map.stride()
    assert got[1:] == want[1:], f"map {tuple(map.shape)} has strides {got}, channels_last are {want}"
    assert any_batch_stride or got[0] == want[0], f"map {tuple(map.shape)} has strides {got}, dense are {want}"


# ---- blocks


def check_shapes(cls: type[Block], case: Case) -> None:
    """Every part comes out as `out` declares."""
    block = build(cls, case)
    out, words = block.out, block.out.words
    for batch in (1, 2):
        got = {name: tuple(value.shape) for name, value in parts(block(features(case.site.inp, batch))).items()}
        want = {"map": (batch, out.dim, *out.grid)}
        if out.prefix:
            want["prefix"] = (batch, out.prefix, out.dim)
        if words:
            want["words"] = (batch * words.over[0] * words.over[1], words.count, words.dim)
        assert got == want


def check_float64(cls: type[Block], case: Case) -> None:
    """A float64 net stays in float64, and float32 gives the same to its precision."""
    block = build(cls, case)
    single = block(features(case.site.inp))
    double = block.double()(Features(*(None if v is None else v.double() for v in features(case.site.inp)[:3])))
    assert {value.dtype for value in parts(double).values()} == {torch.float64}
    for name, value in parts(double).items():
        torch.testing.assert_close(parts(single)[name].double(), value, rtol=1e-4, atol=1e-4)


def check_autocast(cls: type[Block], case: Case) -> None:
    """Under bfloat16 autocast the result is finite and near the float32 one, and gradients stay finite."""
    block = build(cls, case)
    want = block(features(case.site.inp))
    with torch.autocast("cpu", torch.bfloat16):
        got = block(features(case.site.inp))
    for name, value in parts(got).items():
        assert value.dtype in (torch.bfloat16, torch.float32)
        error = (value.float() - parts(want)[name]).norm() / parts(want)[name].norm()
        assert error < 0.03, f"{name} is off by {error:.1%} in bfloat16"
    loss = read_all(got)
    if loss.requires_grad:
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def check_gradients(cls: type[Block], case: Case) -> None:
    """A finite gradient reaches every parameter and every part that comes in."""
    block = build(cls, case, training=True)
    given = features(case.site.inp)
    for value in parts(given).values():
        value.requires_grad_()
    read_all(block(given)).backward()
    for name, tensor in [*block.named_parameters(), *parts(given).items()]:
        assert tensor.grad is not None, f"no gradient reaches {name}"
        assert tensor.grad.isfinite().all(), f"the gradient of {name} is not finite"
        assert tensor.grad.any(), f"the gradient of {name} is zero"


def check_eval_is_deterministic(cls: type[Block], case: Case) -> None:
    """In evaluation nothing is drawn and nothing is kept from one call to the next."""
    block = build(cls, case)
    given = features(case.site.inp)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    state = torch.get_rng_state()
    first = block(given)
    assert torch.equal(torch.get_rng_state(), state), "evaluation draws random numbers"
    assert_same(block(given), first)
    assert_same(given, features(case.site.inp))  # what came in was not changed in place
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name]), f"evaluation changes {name}"


def check_passes(cls: type[Block], case: Case) -> None:
    """What is not the block's business comes out as the very objects that came in."""
    block = build(cls, case)
    given = features(case.site.inp)
    foreign = {"words": torch.randn(48, 4, 5), "prefix": torch.randn(2, 1, block.out.dim)}
    given = given._replace(extra={"plug-in": torch.zeros(1)}, turn=1)
    given = given._replace(**{n: v for n, v in foreign.items() if n in case.passes and getattr(given, n) is None})
    out = block(given)
    assert out.extra is given.extra, "the state of plug-ins is lost"
    assert out.turn == 1, "the number of the run of a shared block is lost"
    for name in case.passes:
        assert getattr(out, name) is getattr(given, name), f"{name} should pass"


def check_layout(cls: type[Block], case: Case) -> None:
    """channels_last in, channels_last out, and a convolution behind the block gives channels_last too."""
    shape = case.site.inp
    for training, batch in ((False, 1), (False, 2), (True, 2)):
        block = build(cls, case, training).to(memory_format=torch.channels_last)
        follower = nn.Conv2d(block.out.dim, 8, 3, padding=1).to(memory_format=torch.channels_last)
        given = features(shape, batch)
        # the map as it is behind a block that ran with a prefix: the same numbers, another batch stride
        wide = torch.zeros(batch, shape.positions + 1, shape.dim)
        wide[:, 1:] = tokens(given.map)
        dense, loose = block(given), block(given._replace(map=to_map(wide[:, 1:], shape.grid)))
        assert_channels_last(dense.map, any_batch_stride=block.out.prefix > 0)
        assert_channels_last(loose.map, any_batch_stride=True)
        for out in (dense, loose):
            assert_channels_last(follower(out.map))
        if not training:
            assert_same(loose, dense, 1e-5)


def check_meta(cls: type[Block], case: Case) -> None:
    """Builds and runs on the meta device, with the same parameters and shapes."""
    real = build(cls, case)
    with torch.device("meta"):
        block = cls(case.site, **case.args).eval()
    out = block(features(case.site.inp, device="meta"))
    assert block.out == real.out
    assert all(value.is_meta for value in [*block.parameters(), *block.buffers(), *parts(out).values()])
    assert {n: v.shape for n, v in block.state_dict().items()} == {n: v.shape for n, v in real.state_dict().items()}
    want = {n: v.shape for n, v in parts(real(features(case.site.inp))).items()}
    assert {n: v.shape for n, v in parts(out).items()} == want


def check_copies(cls: type[Block], case: Case) -> None:
    """deepcopy and pickle give an independent block that computes the same."""
    block = build(cls, case)
    given = features(case.site.inp)
    want = block(given)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert_same(twin(given), want)
        for parameter in twin.parameters():
            parameter.data.zero_()
    assert_same(block(given), want)


def check_checkpointing(cls: type[Block], case: Case) -> None:
    """Recomputed in the backward pass (use_reentrant=False), it gives the same gradients, random drops included."""
    grads = []
    for recompute in (False, True):
        block = build(cls, case, training=True)
        given = features(case.site.inp)
        given.map.requires_grad_()
        out = checkpoint(block, given, use_reentrant=False) if recompute else block(given)
        assert isinstance(out, Features)
        read_all(out).backward()
        grads.append({"map": given.map.grad, **{n: p.grad for n, p in block.named_parameters()}})
    for name, grad in grads[0].items():
        assert torch.equal(grads[1][name], grad), f"checkpointing changes the gradient of {name}"


def check_compile(cls: type[Block], case: Case) -> None:
    """One graph without a break, which computes the same: up to rounding, for only outside of it kernels are ours."""
    torch._dynamo.reset()
    block = build(cls, case)
    given = features(case.site.inp)
    assert_same(torch.compile(block, fullgraph=True, backend="eager")(given), block(given), 1e-5)


def check_export(cls: type[Block], case: Case, saved: bool = False) -> None:
    """Can be exported, and computes the same."""
    block = build(cls, case)
    given = features(case.site.inp)
    exported = torch.export.export(block, (given,))
    if saved:
        file = io.BytesIO()
        torch.export.save(exported, file)
        file.seek(0)
        exported = torch.export.load(file)
    out = exported.module()(given)
    assert isinstance(out, Features)
    assert_same(out, block(given), 1e-5)


def check_saved_export(cls: type[Block], case: Case) -> None:
    """Can be exported, saved and loaded, and computes the same."""
    check_export(cls, case, saved=True)


def check_keep(cls: type[Block], case: Case) -> None:
    """Told that only one part of its output is read, it gives that part all the same, from the parts it then asks for.

    In training too, where a norm or gate that looks at all tokens must not lose any.
    """
    for training in (False, True):
        block = build(cls, case, training).double()
        given = features(case.site.inp, dtype=torch.float64)
        torch.manual_seed(3)
        before = torch.get_rng_state()
        whole = block(given)
        draws = not torch.equal(torch.get_rng_state(), before)
        for part in parts(whole):
            needed = block.keep(frozenset({part}))
            assert needed <= PARTS
            if draws:
                continue  # what is skipped draws no numbers, so the others get other ones
            junk = {name: torch.randn_like(value) for name, value in parts(given).items() if name not in needed}
            assert_same(block(given._replace(**junk)), whole, 1e-12, only=frozenset({part}))
        block.keep(PARTS)
        torch.manual_seed(3)
        assert_same(block(given), whole)


def check_no_decay(cls: type[Block], case: Case) -> None:
    """Names that optimizers leave without weight decay are parameters (None where this row has none)."""
    for path, module in build(cls, case).named_modules():
        for name in getattr(module, "no_decay", ()):
            value = getattr(module, name, "missing")
            assert value is None or isinstance(value, nn.Parameter), f"{path}.{name} is in no_decay, but no parameter"


def check_batch_order(cls: type[Block], case: Case) -> None:
    """In evaluation a sample's result does not depend on the others, nor on its place among them."""
    block = build(cls, case)
    given = features(case.site.inp, batch=3)

    def pick(given: Features, *samples: int) -> Features:
        order = list(samples)
        chosen = {name: value.unflatten(0, (3, -1))[order].flatten(0, 1) for name, value in parts(given).items()}
        return given._replace(**chosen)

    whole = block(given)
    assert_same(block(pick(given, 2, 0, 1)), pick(whole, 2, 0, 1), 1e-5)
    assert_same(block(pick(given, 1)), pick(whole, 1), 1e-5)


BLOCK_CHECKS: list[Callable[[type[Block], Case], None]] = [
    check_shapes,
    check_float64,
    check_autocast,
    check_gradients,
    check_eval_is_deterministic,
    check_passes,
    check_layout,
    check_meta,
    check_copies,
    check_checkpointing,
    check_compile,
    check_export,
    check_saved_export,
    check_keep,
    check_no_decay,
    check_batch_order,
]
