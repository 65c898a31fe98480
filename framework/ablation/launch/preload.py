"""What every run of a study needs and takes seconds to import: the fork server imports it once for all."""

from importlib import import_module

from framework.process import imports

# This program comes first, as it makes the others import faster; scikit-learn comes last, as only the digits need it.
MODULES = ("framework.run", "torch.utils.tensorboard", "torch._dynamo", "sklearn.datasets", "sklearn.model_selection")

with imports():
    for name in MODULES:
        import_module(name)
