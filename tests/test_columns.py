"""`Columns`: reversible training against plain training, and columns as a backbone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from blocks.attention import Attention
from blocks.base import BlockFactory, BuildError, Features
from blocks.convnext import ConvNeXt
from blocks.mlp import GELU
from blocks.nextvit import NCB
from blocks.norms import LayerNorm
from blocks.residual import Residual
from blocks.revcol import QUARTERS, Fusion
from blocks.stems import PatchStem
from blocks.structure import ClassToken, Identity, MakeWords
from blocks.tnt import TNT
from blocks.transformer import Encoder
from framework.backbones import Stage
from framework.bench.memory import saved_bytes
from framework.columns import ColumnLevel, Columns
from framework.data.base import Image
from tests.contract import assert_channels_last, randomise
from tests.vectors import assert_near

# ---- reversible columns

HEADS = partial(Encoder, mixer=partial(Attention, heads=4, attn_drop=0.1))
BLOCKS: dict[str, BlockFactory] = {
    "cnx": partial(ConvNeXt, kernel=3, residual=partial(Residual, layer_scale=0.5)),
    "ncb": partial(NCB, act=GELU),
    "enc": HEADS,
    "words": partial(MakeWords, words=1, word_dim=8),
    "tnt": partial(TNT, inner=partial(Encoder, mixer=partial(Attention, heads=2)), outer=HEADS),
}
LEVELS = {"s1": Stage(32, "cnx"), "s2": Stage(64, "ncb cnx", 2)}
MIXED = {"s1": Stage(32, "cnx ncb"), "s2": Stage(64, "enc cnx", 2), "s3": Stage(64, "words tnt cnx", 2)}


def columns(count: int = 4, reversible: bool = True, stages: dict[str, Stage] = LEVELS, **more: Any) -> Columns:
    torch.manual_seed(0)
    made = Columns(
        Image(16), stages, BLOCKS, count, partial(PatchStem, patch=2, prefix=0, norm=LayerNorm),
        reversible=reversible, **{"drop_path": 0.3, **more},
    )  # fmt: skip
    randomise(made)
    return made


def images(batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 3, 16, 16, dtype=dtype)


def read(features: Features) -> Tensor:
    """A number that every entry of the final map and of those behind quarters has a share in."""
    torch.manual_seed(2)
    found = [features.map, *(features.extra or {}).values()]
    return sum(((map * torch.randn_like(map)).sum() for map in found), torch.zeros(()))


def grads(net: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def assert_same_gradients(one: nn.Module, other: nn.Module, tolerance: float = 1e-9) -> None:
    for (name, got), want in zip(grads(one).items(), grads(other).values(), strict=True):
        assert got is not None, name
        assert want is not None, name
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("count", [1, 2, 8])
def test_reversible_columns_are_plain_ones(count: int) -> None:
    """Random drops, batch norms' statistics and what is drawn afterwards included."""
    nets = [columns(count, reversible, MIXED).double().train() for reversible in (True, False)]
    after, given = [], []
    for net in nets:
        given.append(images().requires_grad_())
        out = net(given[-1])
        before = torch.get_rng_state()
        loss = read(out)
        loss.backward()
        read(out)
        after.append((out.map, loss, torch.rand(3)))
        assert before.shape
    for got, want in zip(*after, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert_near(given[0].grad, given[1].grad, "images")
    assert_same_gradients(*nets)
    for (name, got), want in zip(nets[0].named_buffers(), nets[1].buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12, msg=name)
    counted = [value for name, value in nets[0].named_buffers() if name.endswith("num_batches_tracked")]
    assert counted
    assert all(value == 1 for value in counted)


def test_the_backward_pass_draws_nothing() -> None:
    net = columns().train()
    loss = read(net(images(dtype=torch.float32)))
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_maps_of_earlier_columns_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[StorageWeakRef] = []
    add = ColumnLevel.add

    def watched(*args: Any) -> Tensor:
        map = add(*args)
        seen.append(StorageWeakRef(map.untyped_storage()))
        return map

    monkeypatch.setattr(ColumnLevel, "add", watched)

    def alive(reversible: bool, count: int) -> tuple[list[bool], int]:
        seen.clear()
        net, out = columns(count, reversible, drop_path=0.0).train(), list[Features]()
        saved = saved_bytes(lambda: out.append(net(images(2, torch.float32))), net)
        assert len(seen) == 2 * count
        return [not ref.expired() for ref in seen[::2]], saved  # the second level's are read behind quarters

    kept, saved = alive(True, 4)
    assert kept == [False, False, False, True]
    assert alive(True, 8) == ([*[False] * 7, True], saved)
    kept, plain = alive(False, 4)
    assert all(kept)
    assert plain > 10 * saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_columns_back_lose_no_precision(dtype: torch.dtype) -> None:
    """Sums in float32 are off by more than a tenth of the gradients here."""
    nets = [columns(16, reversible, drop_path=0.0).train() for reversible in (True, False)]
    for net in nets:
        with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
            out = net(images(2, torch.float32))
        read(out).backward()
    found = [torch.cat([grad.flatten() for grad in grads(net).values() if grad is not None]) for net in nets]
    assert (found[0] - found[1]).norm() < (1e-4 if dtype is torch.float32 else 0.05) * found[1].norm()


def test_it_may_run_backward_again_or_in_part() -> None:
    nets = [columns(4, reversible).double().train() for reversible in (True, False)]
    found = []
    for net in nets:
        torch.manual_seed(5)
        out = net(images())
        assert out.extra is not None
        last, first = read(Features(out.map)), read(Features(out.extra[QUARTERS[0]]))
        parts = []
        for loss, number in ((last, 2), (last, 0), (first, 0)):
            weights = list(net.columns[number].parameters())
            parts.append(torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True))
        (first + last).backward(retain_graph=True)
        first.backward()
        found.append(parts)
    for got, want in zip(*found, strict=True):
        for one, other in zip(got, want, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert_near(one, other)
    assert_same_gradients(*nets)


def test_gradients_add_up_over_batches() -> None:
    nets = [columns(4, reversible).double().train() for reversible in (True, False)]
    for net in nets:
        torch.manual_seed(5)
        losses = [read(net(images())) for _ in range(2)]  # two passes before a backward one
        sum(losses).backward()  # type: ignore[union-attr]
        read(net(images())).backward()
    assert_same_gradients(*nets)


def test_frozen_parts_stay_without_gradients() -> None:
    nets = [columns(4, reversible).double().train() for reversible in (True, False)]
    for net in nets:
        torch.manual_seed(5)
        net.stem.requires_grad_(False)
        net.columns[0].requires_grad_(False)
        net.columns[2].stages.s2.requires_grad_(False)
        read(net(images())).backward()
    for (name, got), want in zip(grads(nets[0]).items(), grads(nets[1]).values(), strict=True):
        assert (got is None) == (want is None), name
        if got is not None and want is not None:
            assert_near(got, want, name)


def test_under_autocast() -> None:
    nets = [columns(4, reversible).train() for reversible in (True, False)]
    for net in nets:
        for inside in (False, True):  # wherever the backward pass stands
            torch.manual_seed(5)
            with torch.autocast("cpu", torch.bfloat16):
                out = net(images(dtype=torch.float32))
                assert out.map.dtype == torch.float32
                if inside:
                    read(out).backward()
            if not inside:
                read(out).backward()
    for name, got in grads(nets[0]).items():
        want = grads(nets[1])[name]
        assert got is not None
        assert want is not None
        assert got.dtype == want.dtype
        assert (got - want).norm() <= 0.05 * want.norm() + 1e-3, name


@pytest.mark.parametrize("change", [lambda net: net.eval(), lambda net: net.to(torch.bfloat16)])
def reverses(net: Columns, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a pass keeps no maps."""
    node, found = net(images(dtype=dtype)).map.grad_fn, False
    while node is not None:
        found = found or "_Run" in type(node).__name__
        node = next((parent for parent, _ in node.next_functions if parent is not None), None)
    return found


def test_it_is_plain_where_it_cannot_be_reversible() -> None:
    net = columns()
    assert reverses(net.train())
    assert not reverses(net.eval())
    with torch.no_grad():
        assert not reverses(net.train())
    assert not reverses(net.to(torch.bfloat16), torch.bfloat16)
    assert not reverses(columns(reversible=False).train())


def test_a_map_changed_in_place_is_found_out() -> None:
    net = columns().double().train()
    loss = (out := net(images()).map).sum()
    with torch.no_grad():
        out.zero_()
    with pytest.raises(RuntimeError, match="changed in place before its backward pass"):
        loss.backward()


def test_shares_keep_away_from_zero() -> None:
    net = columns(2)
    alpha = net.columns[1].stages.s1.alpha
    given = torch.linspace(-2e-3, 2e-3, 32).view_as(alpha)
    want = given.sign() * given.abs().clamp(min=1e-3)
    alpha.data.copy_(given)
    net.eval()
    net(images(dtype=torch.float32))
    assert torch.equal(alpha, given), "evaluation changes nothing"
    whole = net.train().double()(images())
    torch.testing.assert_close(alpha.float(), want)
    assert whole.map.isfinite().all()


def test_distributed_data_parallel_sees_every_gradient(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        net, plain = columns().double().train(), columns(reversible=False).double().train()
        wrapped = nn.parallel.DistributedDataParallel(net)
        for _ in range(2):  # DDP refuses the second step where a gradient was missing in the first
            torch.manual_seed(5)
            read(wrapped(images())).backward()
            torch.manual_seed(5)
            read(plain(images())).backward()
        assert_same_gradients(net, plain)
    finally:
        torch.distributed.destroy_process_group()


# ---- columns as a backbone


def test_drop_path_starts_anew_in_each_column() -> None:
    net = columns(3, stages={"s1": Stage(32, "cnx*2"), "s2": Stage(64, "cnx*3", 2)}, drop_path=0.4)
    rates = [block.residual.rate for _, _, block in net.steps()]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4] * 3)


def test_levels_keys_and_layers() -> None:
    net = columns(2, stages=MIXED)
    assert [(lv.name, lv.channels, lv.stride) for lv in net.levels] == [("s1", 32, 2), ("s2", 64, 4), ("s3", 64, 8)]
    assert [tuple(map.shape[1:]) for map in net.pyramid(images(dtype=torch.float32))] == [
        (32, 8, 8), (64, 4, 4), (64, 2, 2)
    ]  # fmt: skip
    keys = {key for key, _ in net.named_parameters()}
    assert "columns.0.stages.s1.fusion.proj.weight" not in keys
    assert {"columns.1.stages.s1.fusion.proj.weight", "columns.1.stages.s2.fusion.down.conv.weight"} <= keys
    layers = net.layers()
    assert set(layers) == keys
    assert layers["columns.1.stages.s1.alpha"] == layers["columns.1.stages.s1.blocks.0.conv.weight"] == 7
    assert net.out.extra == ()
    net = columns(8)
    assert net.out.extra == QUARTERS
    assert net.quarters == {1: "quarter1", 3: "quarter2", 5: "quarter3"}


def test_maps_stay_channels_last() -> None:
    for batch in (1, 2):
        for map in columns().eval().pyramid(images(batch, torch.float32)):
            assert_channels_last(map)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stem": PatchStem}, r"stem: Columns pass maps alone .* gives 1 prefix token\(s\); set prefix: 0"),
        ({"columns": 0}, r"columns: got 0, must be at least 1"),
        ({"stages": {}}, r"stages: needs at least one level"),
        ({"stages": {"s1": Stage(32, "cls cnx")}}, r"stages\.s1: a level of columns keeps .* 1 prefix token"),
        ({"stages": {"s1": Stage(32, "ncb", dims={"ncb": 64})}}, r"stages\.s1: a level .* gives 64 × 4×4; take"),
        ({"stages": {"s1": Stage(32, "cnx", 3)}}, r"stages\.s1\.fusion\.down: ConvEmbed cannot cut a 4×4 map"),
        ({"stages": {"s1": Stage(32, "cnx", 0)}}, r"stages\.s1\.stride: got 0"),
        ({"stages": {"s1": Stage(32, "tnt")}}, r"stages\.s1\.blocks\.tnt: TNT needs words"),
        ({"fusion": partial(Fusion, down=Identity)}, r"stages\.s2\.fusion: Fusion should give 64 × 2×2, but .* 32 × 4"),
        ({"drop_path": 1.0}, r"drop_path: got 1\.0"),
    ],
)
def test_what_does_not_fit_is_one_line(change: dict[str, Any], message: str) -> None:
    given = {
        "stages": {"s1": Stage(32, "cnx"), "s2": Stage(64, "cnx", 2)},
        "stem": partial(PatchStem, patch=4, prefix=0),
    }
    with pytest.raises(BuildError, match=r"^model\.backbone\." + message) as caught:
        Columns(Image(16), blocks={**BLOCKS, "cls": ClassToken}, **{**given, **change})
    assert "\n" not in str(caught.value)
