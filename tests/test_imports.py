"""What is imported for what, and that the stand-ins for torch's compiler give way to it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import REPO

HEAVY = "{'torch._dynamo', 'torch._inductor', 'sympy', 'timm', 'sklearn', 'pandas'} & set(sys.modules)"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_mistake_in_a_config_does_not_wait_for_the_compiler() -> None:
    run(
        "import sys; from framework.cli import main\n"
        "code = main(['describe', '--config', 'experiments/base/tnt_digits.yaml', '--model.backbone.dmi=3'])\n"
        "assert code == 2\n"
        f"found = {HEAVY}\n"
        "assert not found, found"
    )


def test_stand_ins_give_way_to_the_compiler() -> None:
    run(
        "import sys, framework, torch, torchvision, lightning.pytorch as L\n"
        "import lightning.fabric.wrappers as wrappers\n"
        "from lightning.pytorch.utilities.compile import from_compiled\n"
        "from torchvision.ops.roi_align import is_compile_supported\n"
        "assert 'torch._dynamo' not in sys.modules and 'torch._dynamo.utils' not in sys.modules\n"
        "module = L.LightningModule(); module.layer = torch.nn.Linear(2, 2)\n"
        "module.forward = lambda x: module.layer(x)\n"
        "assert not isinstance(module, wrappers.OptimizedModule)\n"
        "compiled = torch.compile(module, backend='eager')\n"
        "assert isinstance(compiled, wrappers.OptimizedModule)\n"
        "import torch._dynamo.eval_frame as real\n"
        "assert isinstance(compiled, real.OptimizedModule) and torch._dynamo is sys.modules['torch._dynamo']\n"
        "assert from_compiled(compiled) is module\n"
        "assert is_compile_supported('cpu') in (True, False)\n"
        "assert torch.compile(torch.nn.Linear(2, 2), backend='eager')(torch.ones(1, 2)).shape == (1, 2)"
    )


@pytest.mark.parametrize("first", ["torch._dynamo", "lightning", "torchvision"])
def test_the_order_of_imports_does_not_matter(first: str) -> None:
    run(
        f"import {first}, framework, lightning.pytorch, torchvision, sys\n"
        "import torch, torch._dynamo\n"
        "from lightning.fabric.wrappers import OptimizedModule\n"
        "assert isinstance(torch.compile(torch.nn.Linear(2, 2), backend='eager'), OptimizedModule)"
    )
