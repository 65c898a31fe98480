"""Starting from weights: the convert command, --weights, other image sizes and classes, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from framework.cli import main
from framework.config import compose
from framework.construct import build_model
from framework.errors import ConfigError
from framework.weights.transfer import source, start_from
from tests.vectors import load

NET = {
    "data": {
        "class_path": "Torchvision",
        "init_args": {"dataset": "FakeData", "size": 64, "args": {"num_classes": 10}},
    },
    "model.backbone.stem.patch": 16,
    "model.backbone.stem.words": 16,
    "model.backbone.stem.word_dim": 8,
    "model.backbone.pattern": "tnt*2",
    "model.backbone.blocks.tnt.outer.mixer.heads": 3,
}
CONFIG = "experiments/base/tnt_digits.yaml"


def net(**settings):
    torch.manual_seed(1)
    return build_model(compose([CONFIG], {**NET, **{key.replace("__", "."): v for key, v in settings.items()}})).eval()


def official() -> dict:
    return {key: value.float() for key, value in load("tnt_m16_basic").state.items()}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """The official state dict of a small TNT, as its authors' code saves it."""
    path = tmp_path_factory.mktemp("published") / "tnt.pth"
    torch.save({"state_dict": official()}, path)
    return path


def overrides(settings: dict) -> list[str]:
    import json

    return [f"--{key}={json.dumps(value)}" for key, value in settings.items()]


def test_convert_writes_weights_and_card_that_give_the_published_logits(published, tmp_path, capsys) -> None:
    out = tmp_path / "tnt.safetensors"
    command = ["convert", str(published), "--config", CONFIG, "--out", str(out), "--licence", "Apache-2.0"]
    assert main([*command, "--origin", "the authors", "--accuracy", "81.5 % top-1", *overrides(NET)]) == 0
    assert "tensors loaded" in capsys.readouterr().out
    plain = tmp_path / "plain"
    plain.touch()
    assert [path.stat().st_mode for path in (out, out.with_suffix(".md"))] == [plain.stat().st_mode] * 2
    card = out.with_suffix(".md").read_text()
    assert all(text in card for text in ("the authors", "Apache-2.0", "81.5 % top-1", "SentenceStem"))
    vector, model = load("tnt_m16_basic"), net()
    report = start_from(model, source(str(out)))
    assert not report.resized
    assert not report.fresh
    logits = model.double()(vector["input"])
    assert torch.allclose(logits, vector["logits"], atol=1e-9)


def test_positions_are_resized_and_the_head_is_new_for_other_classes(published) -> None:
    model = net(data__size=96, data__args={"num_classes": 4})
    head = model.head.fc.weight.clone()
    report = start_from(model, source(str(published)))
    assert report.resized == ["backbone.stem.position.table"]
    assert report.fresh == ["head.fc.weight", "head.fc.bias"]
    assert torch.equal(head, model.head.fc.weight)
    old = official()["outer_pos"]
    grid = old[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    want = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    table = model.backbone.stem.position.table
    assert torch.allclose(table[:, 1:], want, atol=1e-6)
    assert torch.equal(table[:, :1], old[:, :1])


@pytest.mark.parametrize("ours", [False, True], ids=["published", "ours"])
def test_a_backbone_without_a_head_is_loaded_and_its_head_starts_fresh(ours: bool) -> None:
    """As self-supervised backbones are published."""
    model, other = net(), net()
    state = {key: value for key, value in official().items() if not key.startswith("head.")}
    if ours:
        start_from(other, official())
        state = {key: value for key, value in other.state_dict().items() if key.startswith("backbone.")}
    head = model.head.fc.weight.clone()
    report = start_from(model, state)
    assert report.fresh == ["head.fc.weight", "head.fc.bias"]
    assert torch.equal(model.head.fc.weight, head)
    assert torch.equal(model.backbone.norm.weight, official()["norm.weight"])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda s: {k: v for k, v in s.items() if k != "blocks.1.outer_attn.v.weight"},
            "blocks.1.outer.mixer.qkv.weight",
        ),
        (lambda s: {**s, "blocks.7.outer_attn.v.weight": torch.zeros(2)}, "blocks.7.outer_attn.v.weight"),
        (lambda s: {**s, "norm.weight": torch.zeros(7)}, "norm.weight (7,)"),
        (lambda s: {"a": torch.zeros(1)}, "no importer knows"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(change, text: str) -> None:
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        start_from(model, change(official()))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_fit_starts_from_weights_and_its_folder_says_which(published, tmp_path, capsys) -> None:
    small = {**NET, "data.batch_size": 2, "trainer.limit_train_batches": 1, "trainer.limit_val_batches": 1}
    small |= {"trainer.max_epochs": 1, "trainer.accelerator": "cpu", "model.optimizer.lr": 1e-30, "data.workers": 0}
    small["data"]["init_args"]["args"] = {"num_classes": 10, "size": 20}
    small["model.optimizer.weight_decay"] = 0.0
    assert main(["fit", "--config", CONFIG, "--runs", str(tmp_path), f"--weights={published}", *overrides(small)]) == 0
    assert "tensors loaded" in capsys.readouterr().out
    folder = tmp_path / "tnt_digits" / "0"
    assert str(published) in (folder / "config.yaml").read_text()
    saved = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    want = official()["norm.weight"]
    assert torch.allclose(saved["backbone.norm.weight"], want, atol=1e-6)


class Hostile:
    def __reduce__(self):
        return (print, ("a pickle ran code",))


@pytest.mark.parametrize("kind", ["hostile", "truncated", "missing", "truncated safetensors"])
def test_bad_files_are_one_line(kind: str, published, tmp_path, capsys) -> None:
    path = tmp_path / ("weights.safetensors" if "safetensors" in kind else "weights.pth")
    if kind == "hostile":
        torch.save({"state_dict": Hostile()}, path)
    elif kind == "truncated":
        path.write_bytes(published.read_bytes()[:5000])
    elif kind == "truncated safetensors":
        save_file({"a": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:500])
    code = main(["fit", "--config", CONFIG, "--runs", str(tmp_path / "runs"), f"--weights={path}"])
    shown = capsys.readouterr()
    assert code == 2
    assert len(shown.err.strip().splitlines()) == 1
    assert "weights" in shown.err
    assert "a pickle ran code" not in shown.out + shown.err
    assert not (tmp_path / "runs").exists()


def test_converted_files_hold_nothing_but_backbone_and_head(published, tmp_path) -> None:
    out = tmp_path / "tnt.safetensors"
    assert main(["convert", str(published), "--config", CONFIG, "--out", str(out), *overrides(NET)]) == 0
    assert all(key.startswith(("backbone.", "head.")) for key in load_file(out))
