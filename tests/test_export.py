"""Exported files: the same logits as the net, for any number of images, with what a reader needs to know of them."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from framework import export as exports
from framework.cli import main
from framework.config import compose, dump
from framework.construct import build_model
from framework.run import LAST
from framework.tasks import Classification
from tests.conftest import CONFIGS, REPO

VIT = {
    "class_path": "Isotropic",
    "init_args": {
        "stem": {"class_path": "PatchStem", "init_args": {"patch": 4}},
        "position": "RoPE",
        "dim": 32,
        "pattern": "enc*2",
        "blocks": {"enc": {"class_path": "Encoder", "init_args": {"mixer": {"heads": 2}}}},
    },
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, _tiny: dict[str, Any]) -> Path:
    """The checkpoint of a TNT, away from its run folder, which is gone."""
    root = tmp_path_factory.mktemp("export")
    (root / "tiny.yaml").write_text(dump({**_tiny, "name": "tiny"}))
    assert main(["fit", "--config", str(root / "tiny.yaml"), "--runs", str(root / "runs")]) == 0
    checkpoint = shutil.copy(root / "runs/tiny/0" / LAST, root / "net.ckpt")
    shutil.rmtree(root / "runs")
    return Path(checkpoint)


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(7))


def check_metadata(found: dict[str, Any], alone: Path) -> None:
    kept = torch.load(alone, weights_only=True)["tessera"]
    assert found["class_names"] == [str(digit) for digit in range(10)]
    assert (found["mean"], found["std"], found["image"]) == (kept["mean"], kept["std"], {"size": 16, "channels": 1})
    assert yaml.safe_load(found["config"]) == kept["config"]


def test_a_checkpoint_alone_as_pt2(alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "net.pt2"
    assert main(["export", "--ckpt_path", str(alone), "--out", str(target)]) == 0
    out = capsys.readouterr().out
    assert "largest difference to the net: " in out
    assert list(tmp_path.iterdir()) == [target]
    extra = {exports.METADATA: ""}
    net = torch.export.load(target, extra_files=extra).module()
    check_metadata(json.loads(extra[exports.METADATA]), alone)
    model = Classification.load_from_checkpoint(alone).eval()
    with torch.no_grad():
        for count in (1, 2, 7):
            torch.testing.assert_close(net(images(count)), model(images(count)), rtol=1e-5, atol=1e-6)
    assert str(REPO).encode() not in target.read_bytes()


def test_a_checkpoint_alone_as_onnx(alone: Path, tmp_path: Path) -> None:
    runtime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    target = tmp_path / "net.onnx"
    assert main(["export", "--ckpt_path", str(alone), "--out", str(target)]) == 0
    assert list(tmp_path.iterdir()) == [target]
    proto = onnx.load(target)
    found = {entry.key: entry.value for entry in proto.metadata_props}
    text = ("config", "name", "interpolation")
    check_metadata({key: value if key in text else json.loads(value) for key, value in found.items()}, alone)
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    session = runtime.InferenceSession(target, providers=["CPUExecutionProvider"])
    model = Classification.load_from_checkpoint(alone).eval()
    for count in (1, 5):
        (got,) = session.run(["logits"], {"images": images(count).numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), model(images(count)), rtol=1e-4, atol=1e-5)
    assert str(REPO).encode() not in target.read_bytes()


@pytest.mark.parametrize("name", ["vit", "next_vit"])
def test_other_families(name: str, tiny, tmp_path: Path) -> None:
    document = tiny(model__backbone=VIT)
    if name == "next_vit":
        short = {"s2.pattern": "ncb", "s3.pattern": "ntb"}
        settings = {f"model.backbone.stages.{path}": pattern for path, pattern in short.items()}
        document = compose([CONFIGS / "pyramid.yaml"], settings)
    torch.manual_seed(0)
    task = build_model(document)
    assert exports.export(task, tmp_path / "net.pt2", {}) <= exports.TOLERANCE
    net = torch.export.load(tmp_path / "net.pt2").module()
    batch = torch.randn_like(task.example(5))
    with torch.no_grad():
        torch.testing.assert_close(net(batch), task(batch), rtol=1e-5, atol=1e-6)


def test_what_differs_is_not_written(alone: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    model = Classification.load_from_checkpoint(alone).eval()
    monkeypatch.setattr(exports, "_program", lambda *rest: None)
    monkeypatch.setattr(exports, "_write_program", lambda *rest: lambda batch: model(batch) * (1 + 1e-3))
    (tmp_path / "net.pt2").write_text("the old one")
    assert main(["export", "--ckpt_path", str(alone), "--out", str(tmp_path / "net.pt2")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: export: .pt2 gives other logits than the net: they differ by 1.0e-03 of the largest")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("net.pt2", "the old one")]
    monkeypatch.setattr(exports, "_write_program", lambda *rest: lambda batch: model(batch) * torch.nan)
    assert main(["export", "--ckpt_path", str(alone), "--out", str(tmp_path / "nan.pt2")]) == 2
    assert not (tmp_path / "nan.pt2").exists()


def test_onnx_without_its_packages_names_them(alone: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export", "--ckpt_path", str(alone), "--out", str(tmp_path / "net.onnx")]) == 2
    assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--out", "net.pt"], "--out: got net.pt; name a file that ends in .pt2 or .onnx"),
        (["--out", "nowhere/net.pt2"], "--out: no such folder: nowhere"),
        (["--out", "net.pt2", "--batch", "0"], "--batch: got 0, must be at least 1"),
        ([], "the following arguments are required: --out"),
    ],
)
def test_a_mistake_is_one_line(alone: Path, tmp_path: Path, monkeypatch, capsys, words: list[str], says: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--ckpt_path", str(alone), *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert says in err


def test_a_config_with_weights_for_a_fixed_number_of_images(alone: Path, tmp_path: Path, capsys) -> None:
    target = tmp_path / "net.pt2"
    words = ["export", "--config", str(CONFIGS / "tnt.yaml"), "--out", str(target), "--batch", "3"]
    assert main(words) == 2
    assert "name the weights with --ckpt_path" in capsys.readouterr().err
    assert main([*words, f"--weights={alone}"]) == 0
    assert f"{alone}: " in capsys.readouterr().out
    model = Classification.load_from_checkpoint(alone).eval()
    net = torch.export.load(target).module()
    with torch.no_grad():
        torch.testing.assert_close(net(images(3)), model(images(3)), rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError, match="images"):
        net(images(2))
