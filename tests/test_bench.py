"""The benchmark harness and the `bench` command: what they compute and say, never how long anything takes."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blocks.base import BuildError
from framework.bench import compare, equal, harness, memory, nets, report, script
from framework.bench.harness import Candidate, Section, Spread, Timing, race
from framework.bench.nets import Form, Ours, Setting, Timm
from framework.cli import main, parser
from framework.config import dump
from framework.data.base import Image
from framework.errors import ConfigError
from tests.conftest import EXPERIMENTS

Tiny = Callable[..., dict[str, Any]]
CPU = Setting("inference", "float32", 2, 1, "cpu")
CONFIG = EXPERIMENTS / "base/tnt_digits.yaml"


# ---- the race


class Clock:
    """A stopwatch whose time passes only where a candidate says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def candidate(self, name: str, *seconds: float, images: int = 0) -> Candidate:
        """Takes these seconds, one after the other and again from the start."""
        calls = iter(range(10**6))

        def act() -> None:
            self.order.append(name)
            self.now += seconds[next(calls) % len(seconds)]

        return Candidate(name, act, images)

    def __call__(self, act: harness.Act) -> float:
        start = self.now
        act()
        return self.now - start


def test_the_order_turns_round_by_round_and_the_warm_up_does_not_count() -> None:
    clock = Clock()
    candidates = [clock.candidate("a", 9.0, 1.0), clock.candidate("b", 9.0, 2.0), clock.candidate("c", 9.0, 4.0)]
    timings = race(candidates, clock, rounds=1, warm_up=1)
    assert clock.order == ["a", "b", "c", "c", "b", "a"]
    assert [timing.seconds for timing in timings] == [[1.0], [2.0], [4.0]]
    clock.order.clear()
    race(candidates, clock, rounds=2, warm_up=1)
    assert clock.order == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]


def test_a_quick_act_is_repeated_and_told_for_one() -> None:
    clock = Clock()
    slow, quick = race([clock.candidate("slow", 1.0), clock.candidate("quick", 0.25)], clock, rounds=2, least=1.0)
    assert (slow.seconds, quick.seconds) == ([1.0, 1.0], [0.25, 0.25])
    assert (clock.order.count("slow"), clock.order.count("quick")) == (2 + 2, 2 + 2 * 4)


def test_ratios_are_taken_within_each_round() -> None:
    """A machine that is ten times as slow for one round changes no ratio."""
    first = Timing("first", 8, {}, [2.0, 20.0, 2.0, 4.0])
    other = Timing("other", 8, {}, [1.0, 10.0, 1.0, 1.0])
    assert other.times_as_fast(first) == Spread(2.0, 2.0, 2.5)
    assert first.times_as_fast(first) == Spread(1.0, 1.0, 1.0)
    assert other.spread == Spread(1.0, 1.0, 3.25)
    assert other.images_per_s == 8.0
    assert Timing("twice the images", 16, {}, [2.0, 20.0, 2.0, 4.0]).times_as_fast(first).median == 2.0


def test_an_act_may_time_itself() -> None:
    (timing,) = race([Candidate("self", lambda: 0.125)], harness.told, rounds=2, least=0)
    assert timing.seconds == [0.125, 0.125]


def test_what_runs_elsewhere_is_timed_there() -> None:
    counts: list[int] = []
    clock = Clock()

    def timed(count: int) -> float:
        counts.append(count)
        return 0.25 * count

    here, there = race([clock.candidate("here", 1.0), Candidate("there", list, timed=timed)], clock, 2, least=1.0)
    assert (here.seconds, there.seconds) == ([1.0, 1.0], [0.25, 0.25])
    assert counts == [1, 1, 4, 4]


def test_no_garbage_is_collected_while_the_clock_runs() -> None:
    seen: list[bool] = []
    race([Candidate("a", lambda: seen.append(gc.isenabled()))], Clock(), rounds=2, least=0)
    assert seen == [False] * 4
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        race([Candidate("a", lambda: 1 / 0)], Clock(), rounds=1)
    assert gc.isenabled()


# ---- the report


@pytest.fixture
def section() -> Section:
    timings = [
        Timing("timm", 8, {"peak MiB": 20.0}, [0.5, 0.5]),
        Timing("ours", 8, {"Δ logits": 5.3e-7}, [0.2, 0.25]),
    ]
    return Section("inference", "CPU time", timings, ["a note [with brackets]"], {"batch": 8}, "batch 8")


def test_the_table_has_time_throughput_ratio_and_what_is_more(
    section: Section, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Section("inference", "CPU time", section.timings, section.notes, {"batch": 1}, "batch 1")
    report.show([section, other])
    text = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.replace("│", "┃").split("┃")] for line in text.splitlines()]
    assert text.startswith("inference, CPU time")
    assert ["", "ms", "images/s", "times as fast", "peak MiB", "Δ logits"] in rows
    assert rows.count(["timm", "500 [500–500]", "16.0", "1", "20.0", "–"]) == 2
    assert rows.count(["ours", "225 [213–238]", "35.6", "2.25 [2.12–2.38]", "–", "5.3e-07"]) == 2
    assert [row[0] for row in rows if row[0].startswith("batch")] == ["batch 8", "batch 1"]
    assert text.count("a note [with brackets]") == 1


def test_among_several_rivals_the_best_is_told(section: Section, capsys: pytest.CaptureFixture[str]) -> None:
    assert section.best is None
    quick = Timing("timm, quick", 8, {}, [0.25, 0.3], rival=True)
    section.timings[0].rival = True
    section.timings.insert(1, quick)
    assert section.best is quick
    report.show([section])
    rows = [line.replace("│", "┃").split("┃") for line in capsys.readouterr().out.splitlines()]
    cells = {row[0].strip(): [cell.strip() for cell in row] for row in rows}
    at = cells["batch 8"].index("as the best rival")
    assert [cells[name][at] for name in ("timm", "timm, quick", "ours")] == ["–", "the best", "1.23 [1.21–1.24]"]
    data = report.as_data(section)
    assert data["best"] == "timm, quick"
    assert data["candidates"][2]["times_as_fast_as_the_best"]["median"] == pytest.approx(1.225)
    assert not any("times_as_fast_as_the_best" in row for row in data["candidates"][:2])


def test_the_json_has_every_round_and_the_circumstances(section: Section, tmp_path: Path) -> None:
    path = report.write(tmp_path / "x.json", "x", report.sections([section]), {"rounds": 2})
    found = json.loads(path.read_text())
    assert {"benchmark", "arguments", "time", "commit", "machine", "clocks", "load_average", "packages"} < set(found)
    assert torch.__version__.startswith(found["packages"]["torch"])
    assert found["packages"]["timm"]
    assert {"cpu", "cores"} < set(found["machine"])
    (data,) = found["results"]
    assert (data["title"], data["batch"], data["reference"]) == ("inference", 8, "timm")
    ours = data["candidates"][1]
    assert (ours["rounds"], ours["images"], ours["Δ logits"]) == ([0.2, 0.25], 8, 5.3e-7)
    assert ours["times_as_fast"] == {"median": 2.25, "low": 2.125, "high": 2.375}
    assert "times_as_fast" not in data["candidates"][0]


def test_results_are_named_by_machine_and_date_and_none_is_lost(tmp_path: Path) -> None:
    first = report.where("nets", tmp_path)
    assert first.name.startswith("nets_")
    assert first.stem.split("_")[-1].count("-") == 2
    first.write_text("")
    assert report.where("nets", tmp_path).name == f"{first.stem}_1.json"


# ---- memory


def test_saved_bytes_are_exact() -> None:
    layer = nn.Linear(4, 8)
    images = torch.randn(2, 4)
    # the images for the weight's gradient, and the output of the activation; not the weight
    assert memory.saved_bytes(lambda: layer(images).relu().sum(), layer) == 4 * (2 * 4 + 2 * 8)
    # both saved views lie in one storage, which counts as a whole
    wide = torch.randn(2, 16)
    both = memory.saved_bytes(lambda: (layer(wide[:, :4]) + layer(wide[:, 4:8])).sum(), layer)
    assert both == 4 * 2 * 16
    assert memory.saved_bytes(torch.no_grad()(lambda: layer(images).relu().sum()), layer) == 0


def test_what_saves_its_result_is_let_go_of_when_its_saved_bytes_are_counted() -> None:
    weight = torch.randn(8, requires_grad=True)
    alive = weakref.ref(weight)
    assert memory.saved_bytes((weight * 2).exp, nn.Identity()) > 0
    del weight
    assert alive() is None


@pytest.mark.skipif(not memory.CLEAR.exists(), reason="the system does not tell")
def test_the_peak_is_over_what_was_there_and_sees_what_is_freed() -> None:
    size = 64 << 20
    kept = torch.ones(size, dtype=torch.uint8)

    def act() -> None:
        torch.ones(size, dtype=torch.uint8)

    for _ in range(2):  # the second time too, when the memory may be at hand
        found = memory.peak_of(act, "cpu")
        assert found is not None
        assert 0.99 * size <= found < 1.2 * size
    assert len(kept) == size


class Killed(Ours):
    def make(self) -> nn.Module:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


@pytest.mark.skipif(not memory.CLEAR.exists(), reason="the system does not tell")
def test_a_process_that_is_killed_while_it_is_weighed_is_one_line() -> None:
    with pytest.raises(ConfigError, match="big: what measures its memory was killed; give a smaller batch"):
        memory.peak(Killed("big", {}, Image(4, 1), 0, 0), Form(), CPU)


# ---- equal nets


@pytest.fixture
def timm_tnt() -> Timm:
    args = {
        "patch_size": 4, "first_stride": 2, "inner_dim": 4, "embed_dim": 16, "depth": 2, "num_heads_inner": 2,
        "num_heads_outer": 4,
    }  # fmt: skip
    return Timm("timm", "tnt_s_patch16_224", Image(16, 1), 10, 0.1, tuple(args.items()))


def test_equal_nets_are_raced_and_weighed(tiny: Tiny, timm_tnt: Timm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "peak", lambda *_: 3 << 20)
    ours = Ours.of(tiny())
    assert timm_tnt.cost() == ours.cost()
    made = compare.make([timm_tnt, ours], strict=True)
    assert (made.equal, made.notes) == ({"timm", ours.name}, [])
    entries = [compare.Entry(timm_tnt), compare.Entry(timm_tnt, Form(channels_last=True)), compare.Entry(ours)]
    for mode in ("inference", "training"):
        found = compare.compare(entries, made, Setting(mode, "float32", 2, 1, "cpu"), 1, "tiny")
        assert [timing.name for timing in found.timings] == ["timm", "timm, channels_last", ours.name]
        assert found.title == f"tiny: {mode}, float32, 1 thread"
        for timing in found.timings:
            assert timing.extra["Δ logits"] <= 1e-4
            assert timing.extra["peak MiB"] == 3
            assert ("saved MiB/image" in timing.extra) == (mode == "training")


def test_a_net_in_a_script_of_its_own(tiny: Tiny, timm_tnt: Timm) -> None:
    made = compare.make([timm_tnt, Ours.of(tiny())], strict=True)
    for mode in ("inference", "training"):
        at = Setting(mode, "float32", 2, 1, "cpu")
        entries = [compare.Entry(timm_tnt, alone=True), compare.Entry(timm_tnt)]
        there, here = compare.compare(entries, made, at, 1, weigh=False).timings
        assert there.name == "timm, in a script of its own"
        assert there.rival
        assert len(there.seconds) == 1
        assert there.seconds[0] > 0
        assert there.extra["Δ logits"] == here.extra["Δ logits"] == 0.0
    assert not multiprocessing.active_children()


def test_a_script_that_fails_is_one_line() -> None:
    with pytest.raises(ConfigError, match="big: the process that ran it was killed; give a smaller batch"):
        script.Script(Killed("big", {}, Image(4, 1), 0, 0), Form(), CPU)
    with pytest.raises(BuildError, match="--against: timm has no net 'resnet18x'"):
        script.Script(Timm("timm", "resnet18x", Image(32, 3), 10), Form(), CPU)


def test_a_net_of_timm_that_does_not_take_the_image_is_one_line() -> None:
    says = (
        r"--against: timm's vit_tiny_patch16_224 does not run at 8 px with 1 channel\(s\): .* 8\).*; name another net"
    )
    with pytest.raises(BuildError, match=says) as caught:
        Timm("timm", "vit_tiny_patch16_224", Image(8, 1), 10).cost()
    assert "\n" not in str(caught.value)


def test_bfloat16_is_autocast_or_everything(tiny: Tiny, timm_tnt: Timm) -> None:
    made = compare.make([timm_tnt, Ours.of(tiny())], strict=True)
    entries = [compare.Entry(timm_tnt), compare.Entry(timm_tnt, Form(low=True))]
    at = Setting("inference", "bfloat16", 2, 1, "cpu")
    plain, low = compare.compare(entries, made, at, 1, weigh=False).timings
    assert 1e-5 < plain.extra["Δ logits"] < 0.1
    assert 1e-5 < low.extra["Δ logits"] < 0.1
    assert low.name == "timm, all in bfloat16"


def test_a_net_that_computes_something_else_is_refused(tiny: Tiny, timm_tnt: Timm) -> None:
    """The weights fit, but the heads are others."""
    ours = Ours.of(tiny(model__backbone__blocks__tnt__outer__mixer__heads=2))
    made = compare.make([timm_tnt, ours], strict=True)
    with pytest.raises(equal.Unequal, match=r"with the same weights their logits differ by .* in float32.*not timed"):
        compare.compare([compare.Entry(timm_tnt), compare.Entry(ours)], made, CPU, 1)


def test_a_net_that_cannot_have_the_weights_is_refused_or_told_of(tiny: Tiny, timm_tnt: Timm) -> None:
    ours = Ours.of(tiny(model__backbone__dim=32))
    with pytest.raises(equal.Unequal, match=r"cannot have the same weights.*another shape"):
        compare.make([timm_tnt, ours], strict=True)
    made = compare.make([timm_tnt, ours])
    assert made.equal == {"timm"}
    assert "are different nets, each with weights of its own: weights: they do not fit" in made.notes[0]


def test_two_of_ours_with_the_same_weights_may_differ(tiny: Tiny) -> None:
    nets_ = [Ours.of(tiny(name="a")), Ours.of(tiny(name="b", model__backbone__blocks__tnt__outer__mixer__heads=2))]
    made = compare.make(nets_)
    assert made.equal == {"a"}
    assert "b and a have the same weights and are different nets: logits differ by" in made.notes[0]
    assert compare.make([nets_[0], Ours.of(tiny(name="same"))]).equal == {"a", "same"}


def test_logits_that_are_no_numbers_are_not_equal() -> None:
    logits = torch.tensor([1.0, 2.0])
    assert equal.difference(logits, logits) == 0
    assert equal.difference(10 * logits + 1e-4, 10 * logits) == pytest.approx(1e-4 / 20, rel=0.1)
    assert equal.difference(logits * torch.nan, logits) == float("inf")
    assert equal.difference(logits[None], logits) == float("inf")


def test_a_step_of_training_moves_the_weights_and_keeps_no_gradients(tiny: Tiny) -> None:
    ours, setting = Ours.of(tiny()), Setting("training", "float32", 4, 1, "cpu")
    net = nets.formed(ours.make(), Form(), setting)
    before: dict[str, Tensor] = {name: p.detach().clone() for name, p in net.named_parameters()}
    value = nets.step(net, Form(), setting, ours.image)()
    assert value.ndim == 0
    assert torch.isfinite(value)
    assert all(p.grad is None for p in net.parameters())
    assert any(not torch.equal(before[name], p) for name, p in net.named_parameters())


# ---- the command


@pytest.fixture
def config(tiny: Tiny, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(dump(tiny(name="tiny")))
    return path


def bench(*words: object) -> int:
    return main(["bench", *map(str, words)])


def test_the_command_writes_what_it_measured(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "peak", lambda *_: 3 << 20)
    other, target = tmp_path / "other.yaml", tmp_path / "found.json"
    other.write_text(config.read_text().replace("name: tiny", "name: other").replace("dim: 16", "dim: 32"))
    words = ["--rounds=1", "--threads=1", "--batch=1,2", "--device=cpu", "--model.backbone.pattern=tnt"]
    assert bench("--config", config, "--against", other, *words, "--json", target) == 0
    text = capsys.readouterr().out
    for part in ("tiny: 4,826 parameters, ", "inference, float32, 1 thread", "training, float32",
                 "latency of tiny at batch 1", "different nets"):  # fmt: skip
        assert part in text
    found = json.loads(target.read_text())
    assert found["nets"]["tiny"]["params"] == 4826
    assert [(part["mode"], part["batch"]) for part in found["results"]] == [
        ("inference", 1), ("inference", 2), ("training", 1), ("training", 2)
    ]  # fmt: skip
    for part in found["results"]:
        assert [row["name"] for row in part["candidates"]] == ["other", "tiny"]
        for row in part["candidates"]:
            assert len(row["rounds"]) == 1
            assert row["peak MiB"] == 3
            assert row["GMAC/s"] > 0
    assert len(found["results"][0]["latency"]["tiny"]) == compare.LATENCY
    assert "latency" not in found["results"][1]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["--against", "timm:tnt_s_patch16_22"],
            ["--against: timm has no net", "did you mean timm:tnt_s_patch16_224?"],
        ),
        (["--against", "resnet50"], ["--against: got 'resnet50'", "timm:NAME"]),
        (["--against", "nowhere.yaml"], ["nowhere.yaml: no such file"]),
        (["--batch", "8,x"], ["--batch: got 'x'", "1,8"]),
        (["--batch", "0"], ["--batch: got '0'"]),
        (["--threads", "100000"], ["--threads: got 100000", "cores"]),
        (["--rounds", "0"], ["--rounds: got 0, must be at least 1"]),
        (["--rounds", "many"], ["--rounds", "many"]),
        (["--mode", "train"], ["--mode: got 'train'", "did you mean 'training'?"]),
        (["--dtype", "float16"], ["--dtype: got 'float16'", "bfloat16"]),
        (["--json", "/nowhere/x.json"], ["--json: no such folder: /nowhere"]),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], parts: list[str], config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--config", config, *words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    for part in parts:
        assert part in lines[0]


def test_what_is_stopped_keeps_what_it_has(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = compare.compare

    def stopped(entries: Any, made: Any, setting: Setting, *args: Any, **more: Any) -> Section:
        if setting.batch == 2:
            raise KeyboardInterrupt
        return real(entries, made, setting, *args, **more, weigh=False)

    monkeypatch.setattr(compare, "compare", stopped)
    target = tmp_path / "found.json"
    words = ["--rounds=1", "--threads=1", "--batch=1,2", "--device=cpu", "--mode=training"]
    assert bench("--config", config, *words, "--json", target) == 130
    said = capsys.readouterr()
    assert "training, float32, 1 thread" in said.out
    assert said.err.splitlines() == ["1 of 2: training, float32, 1 thread, batch 1", "interrupted"]
    assert [part["batch"] for part in json.loads(target.read_text())["results"]] == [1]


def test_a_batch_that_does_not_fit_is_one_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--config", config, "--batch", 10**12, "--threads=1", "--device=cpu") == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: --batch {10**12}: out of memory; give a smaller batch"


def test_no_gpu_is_one_line(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench("--config", config, "--device=cuda") == 2
    assert capsys.readouterr().err == "error: --device: there is no CUDA device here\n"


def test_the_options_have_defaults() -> None:
    args = parser().parse_args(["bench", "--config", str(CONFIG)])
    assert (args.mode, args.dtype, args.rounds, args.compile, args.device) == ("both", "float32", 10, False, "auto")
