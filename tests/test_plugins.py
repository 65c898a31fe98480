"""Plug-ins: by import path, file and entry point, with arguments of many types."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from framework.config import compose, dump
from framework.construct import build_model
from tests.conftest import REPO, Write
from tests.test_config import NEXT_VIT, TNT, Tiny, at, refusal

# ---- plug-ins

PLUGIN = """
from blocks.base import Block, Features, Site


class {name}(Block):
    '''A block from outside.

    Args:
        factor: what the map is multiplied with.
    '''

    def __init__(self, site: Site, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.out = site.inp

    def forward(self, features: Features) -> Features:
        return features.replace(map=features.map * self.factor)
"""


def uses(name: str) -> dict[str, Any]:
    block = {"class_path": name, "init_args": {"factor": 2.0}}
    return {"model.backbone.blocks.own": block, "model.backbone.pattern": "tnt own"}


def test_a_plug_in_by_import_path(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(write("tessera_by_path.py", PLUGIN.format(name="ByPath")).parent)
    document = compose([TNT], uses("tessera_by_path.ByPath"))
    assert build_model(document).backbone.blocks[1].factor == 2.0
    assert at(compose([TNT], uses("ByPath")), "model.backbone.blocks.own")["class_path"] == "ByPath"  # known by now
    message = refusal(lambda: compose([TNT], {"model.backbone.blocks.own": {"class_path": "ByPath", "init_args": {
        "facto": 1}}}))  # fmt: skip
    assert (
        message
        == "model.backbone.blocks.own.facto: ByPath has no such argument (did you mean 'factor'?; allowed: factor)"
    )


def test_a_plug_in_by_entry_point(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write("tessera_by_entry.py", PLUGIN.format(name="ByEntry")).parent
    write("tessera_by_entry-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tessera_by_entry\nVersion: 1.0\n")
    write("tessera_by_entry-1.0.dist-info/entry_points.txt", "[tessera.plugins]\nmine = tessera_by_entry\n")
    monkeypatch.syspath_prepend(folder)
    assert build_model(compose([TNT], uses("ByEntry"))).backbone.blocks[1].factor == 2.0


def test_an_entry_point_that_fails_is_one_line(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write("tessera_broken_entry.py", "raise ValueError('a\\nb')").parent
    write("tessera_broken-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tessera_broken\nVersion: 1.0\n")
    write("tessera_broken-1.0.dist-info/entry_points.txt", "[tessera.plugins]\nmine = tessera_broken_entry\n")
    monkeypatch.syspath_prepend(folder)
    assert refusal(lambda: compose([TNT])) == (
        "plugins: plug-in tessera_broken_entry fails: ValueError: a b (tessera_broken_entry.py, line 1)"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def f(:", "SyntaxError: invalid syntax (tessera_broken_0.py, line 1)"),
        ("import nopackage", "ModuleNotFoundError: No module named 'nopackage' (tessera_broken_0.py, line 1)"),
        ("raise ValueError('a\\nb')", "ValueError: a b (tessera_broken_0.py, line 1)"),
        ("raise SystemExit(3)", "SystemExit: 3 (tessera_broken_0.py, line 1)"),
        ("a = {}\na['foo']", "KeyError: 'foo' (tessera_broken_0.py, line 2)"),
        ("\n[][3]", "IndexError: list index out of range (tessera_broken_0.py, line 2)"),
        (
            "import json\njson.loads('')",
            "JSONDecodeError: Expecting value: line 1 column 1 (char 0) (tessera_broken_0.py, line 2)",
        ),
    ],
)
def test_a_plug_in_that_fails_is_one_line(write: Write, text: str, says: str) -> None:
    path = write("tessera_broken_0.py", text)
    assert refusal(lambda: compose([TNT], plugins=[str(path)])) == f"plugins: plug-in {path} fails: {says}"


def test_a_block_without_forward_is_told_so(write: Write) -> None:
    path = write("tessera_foward.py", PLUGIN.format(name="NoForward").replace("def forward", "def foward"))
    for name in ("NoForward", "tessera_foward.NoForward"):
        message = refusal(lambda name=name: compose([TNT], uses(name), [str(path)]))  # type: ignore[misc]
        assert message.startswith("model.backbone.blocks.own: ")
        assert "tessera_foward.NoForward" in message
        assert " lacks forward" in message
        assert "did you mean" not in message


def test_a_plug_in_that_is_not_there_is_named(write: Write) -> None:
    assert refusal(lambda: compose([TNT], plugins=["nope.py"])) == "plugins: no such file: nope.py"
    assert "No module named 'nope'" in refusal(lambda: compose([TNT], plugins=["nope"]))
    assert refusal(lambda: compose([TNT], plugins=[""])) == (
        "plugins: got '', must be a Python file (.py) or an import path"
    )
    path = write("torch.py", "")
    assert refusal(lambda: compose([TNT], plugins=[str(path)])).endswith("is loaded already; rename the file")


@pytest.mark.parametrize("spec", ["tessera_folder", "./tessera_folder", "tessera_folder/", "tessera_folder.py", ".."])
@pytest.mark.parametrize("importable", [False, True])
def test_a_folder_is_no_plug_in(spec: str, importable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tessera_folder", "tessera_folder.py"):
        (tmp_path / "here" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delitem(sys.modules, "tessera_folder", raising=False)
    if importable:
        monkeypatch.syspath_prepend(tmp_path / "here")
    says = f"plugins: {spec}: is a folder, not a file; name a Python file in it, or an import path"
    assert refusal(lambda: compose([TNT], plugins=[spec])) == says


def test_a_plug_in_file_goes_with_the_run_folder(
    write: Write, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative in the config, absolute in the saved one, which a fresh process runs from anywhere."""
    write("own/tessera_by_file.py", PLUGIN.format(name="ByFile"))
    write("base.yaml", dump(tiny()))
    model = "{backbone: {blocks: {own: ByFile}, pattern: own tnt}}"
    text = f"{{extends: ../base.yaml, plugins: [tessera_by_file.py], model: {model}}}"
    document = compose([write("own/net.yaml", text)])
    assert document["plugins"] == [str(tmp_path / "own/tessera_by_file.py")]
    saved = write("run/config.yaml", dump(document))
    monkeypatch.chdir("/")
    assert compose([saved]) == document
    command = [sys.executable, str(REPO / "cli.py"), "describe", "--config", str(saved)]
    found = subprocess.run(command, cwd="/", capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert found.returncode == 0, found.stderr
    assert "ByFile" in found.stdout


MANY = """
from enum import Enum
from typing import Any, Literal

from blocks.base import GateFactory, NormFactory, Site
from blocks.gates import NoGate
from blocks.nextvit import NCB
from blocks.structure import Identity

Speed = Enum("Speed", "FAST SLOW")


class Choosy(Identity):
    def __init__(
        self, site: Site, speed: Speed = Speed.FAST, kind: Literal["a", 3] = "a", norm: NormFactory | None = None,
        gate: GateFactory | None = NoGate, either: int | str = 1, anything: Any = None, untyped=3,
    ) -> None:
        super().__init__(site)
        self.got = {"speed": speed.name, "kind": kind, "either": either, "anything": anything, "untyped": untyped}
        self.norm, self.gate = norm and norm(8), gate and gate(8)


class Wider(NCB):
    def __init__(self, here: Site, own: int = 1, **kwargs) -> None:
        super().__init__(here, **kwargs)
        self.own = own


class Lazy(Identity):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)


class NoSite(Identity):
    def __init__(self, dim: int = 3) -> None:
        pass


class NoArguments(NCB):
    def __init__(self) -> None:
        pass
"""


@pytest.fixture(scope="session")  # a file is loaded once in a process
def many(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("many") / "tessera_many.py"
    path.write_text(MANY)
    return [str(path)]


def built(many: list[str], name: str, **args: Any) -> Any:
    """The block `name` of the plug-in, made from a config."""
    settings = {"model.backbone.blocks.ncb": {"class_path": name, "init_args": args}}
    return build_model(compose([NEXT_VIT], settings, many)).backbone.stages["s1"].blocks[0]


def test_arguments_of_many_types(many: list[str]) -> None:
    given = {"speed": "SLOW", "kind": 3, "either": "x", "anything": {"a": [1, None]}, "untyped": "y"}
    block = built(many, "Choosy", **given, norm={"class_path": "LayerNorm", "init_args": {"eps": 1e-3}}, gate=None)
    assert block.got == given
    assert (block.norm.eps, block.gate) == (1e-3, None)
    assert type(built(many, "Choosy", norm="RMSNorm").norm).__name__ == "RMSNorm"


def test_arguments_that_a_class_passes_on(many: list[str]) -> None:
    block = built(many, "Wider", own=2, mlp_ratio=2.0, norm="LayerNorm", mixer_residual={"scale": 0.5})
    assert (block.own, type(block.norm).__name__, block.mixer_residual.scale) == (2, "LayerNorm", 0.5)
    assert type(built(many, "Lazy")).__name__ == "Lazy"


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("Choosy", {"speed": "NONE"}, "model.backbone.blocks.speed: Expected a member of <enum 'Speed'>: {FAST,SLOW}"),
        ("Choosy", {"kind": "b"}, "model.backbone.blocks.ncb.kind: got 'b' (allowed: 3, a)"),
        ("Choosy", {"norm": "GELU"}, "model.backbone.blocks.ncb.norm: unknown Norm 'GELU' (allowed: BatchNorm"),
        ("Choosy", {"gate": {"ratio": 1}}, "model.backbone.blocks.ncb.gate.ratio: NoGate has no such argument"),
        ("Choosy", {"either": 1.5}, "model.backbone.blocks.ncb.either: expected int | str, got 1.5"),
        ("Wider", {"norm": "GELU"}, "model.backbone.blocks.ncb.norm: unknown Norm 'GELU'"),
        ("Wider", {"wrong": 1}, "model.backbone.blocks: Option 'wrong' is not accepted"),
        ("NoArguments", {}, "model.backbone.blocks.ncb: NoArguments does not fit here: its constructor must take"),
        (
            "NoSite",
            {},
            "model.backbone.blocks.ncb: NoSite does not fit here: its argument 1, dim, must be Site, not int",
        ),
    ],
)
def test_a_wrong_argument_of_a_class_from_outside(many: list[str], name: str, args: dict[str, Any], says: str) -> None:
    assert refusal(lambda: built(many, name, **args)).startswith(says)


def test_plug_ins_of_layers_and_options_add_up(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = write("tessera_one.py", ""), write("tessera_two.py", "")
    write("a.yaml", "plugins: tessera_one.py")
    path = write("b.yaml", "{extends: a.yaml, plugins: [tessera_one.py]}")
    monkeypatch.chdir(two.parent)
    assert compose([path], plugins=["tessera_two.py"])["plugins"] == [str(one), str(two)]
