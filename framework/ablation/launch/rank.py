"""The further processes of a run on several devices: Lightning starts them as this file (see `work`)."""

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[3])  # in place of this folder, where ray is not Ray
    folder, task = sys.argv[1:]
    module, _, name = task.partition(":")
    getattr(importlib.import_module(module), name)(Path(folder))
