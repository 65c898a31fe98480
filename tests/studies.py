"""Stand-ins for config and measuring, for tests of studies that load no torch."""

from __future__ import annotations

import copy

import yaml

from framework.ablation.grid import Ablation, cells
from framework.ablation.state import prepare
from framework.errors import ConfigError


def document(**changes):
    ablation = {
        "name": "pos",
        "seeds": [0, 1],
        "baseline": {"sentence": "none", "word": "none"},
        "axes": {
            "sentence": {"none": {}, "learned": {"model.position": "LearnedPosition"}},
            "word": {"none": {"model.word": "NoPosition"}, "learned": {"model.word": "LearnedPosition"}},
        },
    }
    return {
        "seed": 7,
        "model": {"position": "NoPosition", "word": "?", "dim": 8},
        "ablation": {**ablation, **changes},
    }


def override(document, settings, where):
    document = copy.deepcopy(document)
    for path, value in settings.items():
        *parents, last = path.split(".")
        part = document
        for parent in parents:
            part = part[parent]
        if last not in part:
            raise ConfigError(f"{where}: there is no {path}")
        part[last] = value
    return document


def measure(document):
    return {"params": 1000 * document["model"]["dim"], "macs": 2_000_000}


def dump(document):
    return yaml.safe_dump(document, sort_keys=False)


def prepared(root, dump=dump, **changes):
    made = document(**changes)
    runs = cells(made, override)
    measures = {run.group: measure(run.document) for run in runs}
    return prepare(root, Ablation.read(made), runs, measures, dump)
