"""Fine-tuning at another image size, from a checkpoint of ours: what is resized in each family, and that it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from framework import run as runs
from framework.config import compose, override
from framework.construct import build_model
from framework.weights import read
from framework.weights.transfer import source, start_from
from tests.conftest import CONFIGS

VIT = {
    "model.backbone.stem": {"class_path": "PatchStem", "init_args": {"patch": 4}},
    "model.backbone.blocks": {"enc": {"class_path": "Encoder", "init_args": {"mixer": {"heads": 4}}}},
    "model.backbone.pattern": "enc*2",
    "model.backbone.word_position": "NoPosition",
}
TABLE = "backbone.stem.position.table"
BIAS = [f"backbone.blocks.{i}.mixer.position.table" for i in range(2)]

# Config, settings, and the tables that another size resizes.
NETS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "tnt": ("tnt", {}, [TABLE]),
    "vit": ("tnt", VIT, [TABLE]),
    "distilled": ("tnt", {**VIT, "model.backbone.stem.prefix": 2, "model.head": "DistilledHead"}, [TABLE]),
    "relative_bias": ("tnt", {**VIT, "model.backbone.position": "RelativeBias"}, BIAS),
    "next_vit": ("pyramid", {}, []),
}
TRAINER = {"accelerator": "cpu", "max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1, "logger": False}


def document(net: str, size: int = 16, **settings: Any) -> dict[str, Any]:
    config, own, _ = NETS[net]
    trainer = {f"trainer.{key}": value for key, value in TRAINER.items()}
    return override(compose([CONFIGS / f"{config}.yaml"]), {**own, **trainer, "data.size": size, **settings})


@pytest.fixture(scope="module", params=list(NETS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The last.ckpt of a step at 16 px, as Lightning writes it."""
    folder = tmp_path_factory.mktemp(request.param)
    runs.train(folder, document(request.param), bar=False)
    return request.param, folder / runs.LAST


def test_a_checkpoint_at_its_own_size_is_the_same_net(checkpoint: tuple[str, Path]) -> None:
    net, path = checkpoint
    saved = torch.load(path, weights_only=True)["state_dict"]
    one, two = build_model(document(net)).eval(), build_model(document(net)).eval()
    one.load_state_dict(saved)
    report = start_from(two, source(str(path)))
    assert (report.resized, report.fresh) == ([], [])
    images = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(one(images), two(images))


def test_a_step_at_twice_the_size(
    checkpoint: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, path = checkpoint
    resized = NETS[net][2]
    large = {
        **document(net, 32, **{"model.optimizer.lr": 1e-30, "model.optimizer.weight_decay": 0.0}),
        "weights": str(path),
    }
    trainer = runs.train(tmp_path, large, bar=False)
    assert (trainer.global_step, trainer.callback_metrics["train/loss"].isfinite()) == (1, True)
    said = capsys.readouterr().out
    assert ("resized to this image" in said) == bool(resized)
    assert all(key in said for key in resized)
    before, after = read(path), torch.load(tmp_path / runs.LAST, weights_only=True)["state_dict"]
    for key, value in after.items():
        if "running_" in key or "num_batches" in key:
            continue  # a training step moves them
        old = before[key]
        if key not in resized:
            torch.testing.assert_close(value, old, atol=1e-6, rtol=1e-6, msg=key)
        elif key == TABLE:
            prefix = old.shape[1] - 16
            grid = old[:, prefix:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
            want = F.interpolate(grid, size=(8, 8), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
            torch.testing.assert_close(value, torch.cat([old[:, :prefix], want], dim=1), atol=1e-6, rtol=1e-6)
        else:
            assert (old.shape, value.shape) == ((4, 7, 7), (4, 15, 15))
            want = F.interpolate(old[None], size=(15, 15), mode="bicubic", align_corners=False)[0]
            torch.testing.assert_close(value, want, atol=1e-6, rtol=1e-6)
