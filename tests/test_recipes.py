"""The recipes over nets of the zoo: the numbers of their sources, and real steps on a few small photos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from PIL import Image

from framework import run as runs
from framework.config import compose, resolve
from framework.measure import meta_model
from tests.conftest import EXPERIMENTS

RECIPES = sorted(path.stem for path in (EXPERIMENTS / "recipes").glob("*.yaml"))
EMA = "lightning.pytorch.callbacks.EMAWeightAveraging"

# Peak rate, weight decay, drop path, warm-up, last rate, epochs, batch of a device, repeats, erasing, EMA, clipping.
VALUES: dict[str, tuple[Any, ...]] = {
    "cct_cifar10": (5e-4, 0.05, 0.1, 10, 1e-5, 1510, 128, 1, 0.25, None, None),
    "deit": (1e-3, 0.05, 0.1, 5, 1e-5, 300, 128, 3, 0.25, 0.99996, None),
    "finetune_384": (5e-6, 1e-8, 0.1, 5, 5e-6, 30, 64, 3, 0.25, 0.99996, None),
    "linear_probe": (4e-3, 0.0, 0.1, 0, 0.0, 100, 128, 1, 0.0, None, None),
    "next_vit": (2e-3, 0.1, 0.1, 20, 1e-5, 300, 256, 1, 0.25, None, 5.0),
    "small": (1e-3, 0.05, 0.1, 1.5, 1e-5, 30, 128, 1, 0.0, None, None),
    "t2t_vit": (5e-4, 0.05, 0.1, 10, 1e-5, 310, 64, 1, 0.25, 0.99996, None),
    "tnt": (1e-3, 0.05, 0.1, 5, 1e-5, 310, 128, 3, 0.25, 0.99996, None),
}
COOL = ("cct_cifar10", "t2t_vit", "tnt")  # ten epochs at the last rate
NETS = {
    "cct_cifar10": "cct_7_3x1_32",
    "deit": "deit_ti",
    "finetune_384": "deit_s",
    "linear_probe": "deit_s",
    "next_vit": "next_vit_s",
    "small": "deit_ti",
    "t2t_vit": "t2t_vit_14",
    "tnt": "tnt_s",
}
TINY: dict[str, dict[str, Any]] = {
    "cct_7_3x1_32": {"dim": 24, "pattern": "enc*2", "stem.layers": 2},
    "deit_ti": {"dim": 24, "pattern": "enc*2", "stem.patch": 8},
    "deit_s": {"dim": 24, "pattern": "enc*2", "stem.patch": 8},
    "t2t_vit_14": {"dim": 24, "pattern": "enc*2", "stem.token_dim": 8},
    "tnt_s": {"dim": 24, "pattern": "tnt*2", "stem": {"patch": 8, "words": 4, "word_dim": 4}},
    "next_vit_s": {"stages.s1.pattern": "ncb", "stages.s2.pattern": "ncb ntb", "stages.s3": None, "stages.s4": None},
}


def composed(recipe: str, net: str, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    return compose([EXPERIMENTS / f"zoo/{net}.yaml", EXPERIMENTS / f"recipes/{recipe}.yaml"], settings or {})


def test_every_recipe_is_in_the_table() -> None:
    assert set(RECIPES) == set(VALUES)


@pytest.mark.parametrize("name", VALUES)
def test_a_recipe_has_the_numbers_of_its_source(name: str) -> None:
    document = resolve(composed(name, NETS[name]))
    model, data, trainer = document["model"]["init_args"], document["data"]["init_args"], document["trainer"]
    optimizer, schedule = model["optimizer"]["init_args"], model["schedule"]["init_args"]
    callbacks = trainer.get("callbacks") or []
    assert [callback["class_path"] for callback in callbacks] in ([], [EMA])
    assert (
        optimizer["lr"], optimizer["weight_decay"], model["backbone"]["init_args"]["drop_path"],
        schedule["warmup_epochs"], schedule["min_lr"], trainer["max_epochs"], data["batch_size"],
        data.get("repeats", 1), data.get("erase_prob", 0.0),
        callbacks[0]["init_args"]["decay"] if callbacks else None, trainer.get("gradient_clip_val"),
    ) == VALUES[name]  # fmt: skip
    if name == "small":
        assert (data["dataset"], data["size"]) == ("CIFAR10", 32)
        return
    if name == "linear_probe":
        assert (model["freeze"], optimizer["momentum"], optimizer["nesterov"]) == ("backbone", 0.9, False)
        assert (schedule["shifted"], data.get("auto_augment", ""), "mix" in model) == (False, "", False)
        return
    assert data["auto_augment"] == "rand-m9-mstd0.5-inc1"
    assert data["size"] == {"finetune_384": 384, "cct_cifar10": 32}.get(name, 224)
    mix = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 1.0, "switch_prob": 0.5, "label_smoothing": 0.1}
    assert model["mix"]["init_args"] == mix
    assert (schedule["shifted"], schedule.get("cooldown", 0)) == ((False, 10) if name in COOL else (True, 0))


@pytest.mark.parametrize(
    "net", ["deit_s_distilled", "next_vit_l", "timm_resnet50", "t2t_vit_14", "tnt_s_se", "vit_b_32"]
)
@pytest.mark.parametrize("recipe", ["deit", "tnt", "next_vit"])
def test_any_net_takes_any_recipe(recipe: str, net: str) -> None:
    meta_model(composed(recipe, net))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of 3 classes."""
    root = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 2)):
        for name in "abc":
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (80, 90, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


class Watch(Callback):
    """The weights before the first step, and what a net sees."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.before = {name: value.clone() for name, value in pl_module.named_parameters()}
        self.shapes: list[tuple[int, ...]] = []
        pl_module.backbone.register_forward_pre_hook(lambda net, args: self.shapes.append(tuple(args[0].shape)))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.after = {name: value.clone() for name, value in pl_module.named_parameters()}


@pytest.mark.parametrize("name", VALUES)
def test_a_recipe_takes_steps(name: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 32 if name in ("small", "cct_cifar10") else 72
    settings = {
        **{f"model.backbone.{key}": value for key, value in TINY[NETS[name]].items()},
        **{f"data.{key}": value for key, value in {"dataset": "ImageFolder", "root": str(photos)}.items()},
        "data.size": size,
        "data.batch_size": 12,
        "data.workers": 0,
        "trainer.max_epochs": 12 if name in COOL else 2,
        "trainer.max_steps": 6,
        "trainer.precision": "32-true",
        "trainer.accelerator": "cpu",
    }
    document, watch, made = composed(name, NETS[name], settings), Watch(), runs.Workbench.make_trainer
    monkeypatch.setattr(
        runs.Workbench,
        "make_trainer",
        lambda self, **kw: made(self, **{**kw, "callbacks": [watch, *kw.get("callbacks", [])]}),
    )
    trainer = runs.train(tmp_path, document, bar=False)
    assert trainer.global_step == 6
    assert set(watch.shapes) == {(12, 3, size, size), (6, 3, size, size)}, "to train and to evaluate"
    moved = [name for name, value in watch.before.items() if not torch.equal(value, watch.after[name])]
    learns = [key for key in watch.before if name != "linear_probe" or key.startswith("head.")]
    assert len(moved) > 0.9 * len(learns)
    assert set(moved) <= set(learns)
    assert trainer.callback_metrics["train/loss"].isfinite()
    assert 0 <= trainer.callback_metrics["val/acc1"] <= 1
