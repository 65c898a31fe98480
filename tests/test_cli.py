"""The command line: what each command prints, and that a mistake is one line which tells how to mend it."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from framework.cli import main
from framework.config import compose, dump
from tests.conftest import CONFIGS, EXPERIMENTS, REPO

TNT, NEXT_VIT, POS = CONFIGS / "tnt.yaml", CONFIGS / "pyramid.yaml", CONFIGS / "study.yaml"
RESNET = EXPERIMENTS / "zoo/timm_resnet50.yaml"


@dataclass
class Result:
    """What a command ended with."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a mistake."""
        assert self.code == 2, f"exit code {self.code}: {self.out}"
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in lines[0] + self.out
        assert len(lines[0]) < 500
        return lines[0]


Cli = Callable[..., Result]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    def run(*words: str | Path) -> Result:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return Result(code, *capfd.readouterr())

    return run


@pytest.fixture
def tiny_file(tiny: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(dump(tiny(name="tiny")))
    return path


# ---- mistakes

MISTAKES: dict[str, tuple[str, list[Any], list[str]]] = {
    "misspelt block": ("describe", [TNT, "--model.backbone.blocks.tnt=TMT"],
        ["model.backbone.blocks.tnt: ", "'TMT'", "did you mean 'TNT'?"]),
    "misspelt stem": ("describe", [TNT, "--model.backbone.stem=SentenceSteam"],
        ["model.backbone.stem: ", "did you mean 'SentenceStem'?"]),
    "misspelt argument": ("describe", [TNT, "--model.backbone.dmi=96"],
        ["model.backbone.dmi: Isotropic ", "did you mean 'dim'?"]),
    "misspelt argument in a stage": ("describe", [NEXT_VIT, "--model.backbone.stages.s3.strid=1"],
        ["model.backbone.stages.s3.strid: Stage ", "did you mean 'stride'?"]),
    "misspelt argument of a stage's block": ("describe", [NEXT_VIT, "--model.backbone.stages.s3.blocks.ntb.sr_rati=1"],
        ["model.backbone.stages.s3.blocks.ntb.sr_rati: NTB ", "did you mean 'sr_ratio'?"]),
    "misspelt argument in a slot": ("describe", [TNT, "--model.backbone.blocks.tnt.inner.mixer.hads=2"],
        ["model.backbone.blocks.tnt.inner.mixer.hads: Attention ", "did you mean 'heads'?"]),
    "misspelt section": ("describe", [TNT, "--modle.backbone.dim=96"], ["did you mean --model.backbone.dim?"]),
    "unknown pattern name": ("describe", [NEXT_VIT, "--model.backbone.stages.s3.pattern=ncb*3 nbt"],
        ["model.backbone.stages.s3.pattern: ", "'nbt'", "did you mean 'ntb'?", "column 7 of 'ncb*3 nbt'"]),
    "open group": ("describe", [TNT, "--model.backbone.pattern=(tnt*2"], ["model.backbone.pattern: '('", "column 1"]),
    "wrong type": ("describe", [TNT, "--model.backbone.dim=wide"],
        ["model.backbone.dim: expected a whole number, got 'wide'"]),
    "negative width": ("describe", [TNT, "--model.backbone.dim=-4"],
        ["model.backbone.dim: got -4, must be at least 1"]),
    "width and heads": ("describe", [TNT, "--model.backbone.blocks.tnt.outer.mixer.heads=5"],
        ["model.backbone.blocks.tnt.outer.mixer: ", "cannot split width", "heads: 5", "near values that fit: "]),
    "missing words": ("describe", [TNT, "--model.backbone.stem=PatchStem", "--model.backbone.stem.patch=2"],
        ["model.backbone.blocks.tnt: TNT needs words", "stem: SentenceStem", "MakeWords"]),
    "image and patch": ("describe", [TNT, "--data.size=30", "--model.backbone.stem.patch=4"],
        ["model.backbone.stem: SentenceStem", "30×30", "patches of 4", "28 or 32"]),
    "head without token": ("describe", [NEXT_VIT, "--model.head=ClassTokenHead"],
        ["model.head: ClassTokenHead", "ClassToken", "AveragePoolHead"]),
    "dropout rate": ("describe", [NEXT_VIT, "--model.head.drop=1.5"],
        ["model: ValueError: dropout", "heads.py, line "]),
    "drop path": ("describe", [NEXT_VIT, "--model.backbone.drop_path=1.5"], ["model.backbone.drop_path: got 1.5"]),
    "missing file": ("describe", [TNT.with_name("tnnt.yaml")],
        ["tnnt.yaml: no such file", "did you mean", "tests/configs/tnt.yaml?"]),
    "folder": ("describe", [EXPERIMENTS], ["is a folder, not a file"]),
    "no config": ("describe", [], ["name a config, for example --config experiments/"]),
    "no model": ("describe", [EXPERIMENTS / "base/imagenet.yaml"], ["model: is missing"]),
    "unknown option": ("describe", [TNT, "--jsn"], ["--jsn", "did you mean --json?"]),
    "unknown word": ("describe", [TNT, "json"], ["unexpected 'json'"]),
    "option without value": ("describe", [TNT, "--model.backbone.dim"], ["--model.backbone.dim needs a value"]),
    "option before another": ("describe", [TNT, "--name", "--seed=1"], ["--name needs a value: --name=…"]),
    "option twice": ("describe", [TNT, "--seed=1", "--seed", "2"], ["--seed is given twice"]),
    "unreadable value": ("describe", [TNT, "--model.backbone={a: 1"], ["--model.backbone: not readable as YAML"]),
    "unknown command": ("descrbe", [], ["'descrbe'", "did you mean 'describe'?", "allowed: bench, blocks, convert, data, "]),
