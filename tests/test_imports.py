"""What is imported for what, and that the stand-ins for torch's compiler give way to it."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import REPO

HEAVY = (
    "{'torch._dynamo', 'torch._inductor', 'sympy', 'timm', 'sklearn', 'pandas', 'scipy.signal', 'scipy.stats', "
    "'matplotlib', 'torchvision', 'tensorboard'} & set(sys.modules)"
)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_imports_no_torch() -> None:
    run(
        "import sys; from framework.cli import main\n"
        "try:\n    main(['fit', '--help'])\nexcept SystemExit as left:\n    assert not left.code\n"
        "assert not {'torch', 'numpy', 'lightning'} & set(sys.modules)"
    )


def test_a_mistake_in_a_config_waits_for_no_library_that_it_does_not_need() -> None:
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


def test_the_order_of_imports_does_not_matter() -> None:
    """Lightning alone brings the compiler, which is there already when torchvision comes."""
    run(
        "import lightning, framework, torchvision, sys\n"
        "import torch, torch._dynamo\n"
        "from lightning.fabric.wrappers import OptimizedModule\n"
        "assert isinstance(torch.compile(torch.nn.Linear(2, 2), backend='eager'), OptimizedModule)"
    )


def test_what_torchmetrics_only_names_comes_when_it_is_used() -> None:
    run(
        "import sys, framework, torch, torchmetrics, importlib.resources\n"
        f"found = {HEAVY}\n"
        "assert not found, found\n"
        "assert importlib.resources.files('torchmetrics').joinpath('metric.py').is_file()\n"
        "from torchmetrics.functional.audio import permutation_invariant_training as pit\n"
        "from torchmetrics.functional.audio import signal_noise_ratio as snr\n"
        "mixed = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(0))\n"
        "best, order = pit(mixed[:, [2, 0, 3, 1]], mixed, snr)\n"
        "assert order.tolist() == [[1, 3, 0, 2]] * 2 and 'scipy.optimize' in sys.modules\n"
        "from torchmetrics.functional.detection import intersection_over_union as iou\n"
        "boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[0.0, 0.0, 2.0, 1.0]])\n"
        "assert iou(*boxes) == 0.5 and 'torchvision' in sys.modules\n"
        "from torchmetrics.functional.image.arniqa import resnet50, transforms\n"
        "import torchvision\n"
        "assert isinstance(transforms.Normalize([0.5], [0.5]), torchvision.transforms.Normalize)\n"
        "assert isinstance(resnet50(num_classes=2), torchvision.models.ResNet)\n"
        "import scipy.signal\n"
        "assert scipy.signal.hamming is scipy.signal.windows.hamming\n"
        # and plots of torchmetrics are matplotlib's
        "import os; os.environ['MPLBACKEND'] = 'agg'\n"
        "mean = torchmetrics.MeanMetric(); mean.update(3.0)\n"
        "assert 'matplotlib' not in sys.modules\n"
        "figure, axes = mean.plot()\n"
        "import matplotlib.pyplot as plt\n"
        "assert isinstance(figure, plt.Figure) and isinstance(axes, plt.Axes) and plt.gcf() is figure\n"
        "confusion = torchmetrics.ConfusionMatrix('multiclass', num_classes=2)\n"
        "confusion.update(torch.tensor([0, 1]), torch.tensor([1, 1]))\n"
        "own, _ = plt.subplots()\n"
        "assert confusion.plot(ax=own.axes[0], cmap='Blues')[1] is own.axes[0] and len(own.axes[0].texts) == 4"
    )


def test_what_is_there_already_is_what_torchmetrics_gets() -> None:
    run(
        "import importlib\n"
        "names = ['matplotlib.pyplot', 'scipy.signal', 'torchvision']\n"
        "real = {name: importlib.import_module(name) for name in names}\n"
        "import framework, torchmetrics, sys\n"
        "from torchmetrics.utilities import plot\n"
        "from torchmetrics.functional.detection import iou\n"
        "assert all(sys.modules[name] is real[name] and type(real[name]) is type(sys) for name in real)\n"
        "import scipy.signal, matplotlib.pyplot, torchvision\n"
        "assert scipy.signal.hamming and plot.plt.subplots is matplotlib.pyplot.subplots\n"
        "assert plot.matplotlib.axes.Axes is matplotlib.axes.Axes"
    )
