"""Study folders with numbers in them, for tests of tables and figures."""

from __future__ import annotations

import json

from framework.ablation.state import Status, write_status
from framework.ablation.tables import columns

# none: mean .94, std .02; learned: mean .955, over seeds 0 and 1 above none by .03 and .02; odd|1_%: one seed, .02
# below; last: no seed, one of two failed
VALUES = {"none": [0.92, 0.94, 0.96], "learned": [0.95, 0.96], "odd|1_%": [0.9], "last": []}

PAPER = {"source": "TNT, table 6", "metric": "top-1", "rows": {"none": 80.5, "learned": 81}}
READ = (
    "Δ: mean difference to the baseline over the seeds that both have, with its 95 % t-interval. p flip: exact "
    "sign-flip test, p t: t-test, both paired by seed, two-sided, after Holm's correction over 2 comparisons."
)
REACH = (
    "With 2 paired seeds the sign-flip test cannot give a p below 2/2^2 = 0.5 (1 after Holm's correction over 2 "
    "comparisons), so by it no difference can be significant at 0.05, however large; it takes 6 seeds, and 7 after "
    "the correction."
)


def write_study(folder, metric="val/acc1", values=VALUES, published=PAPER, measures=(), **changes):
    data = {
        "name": "pos",
        "metric": metric,
        "axes": {"word": list(values)},
        "seeds": [0, 1, 2],
        "baseline": {"word": "none"},
        "published": published,
        "cells": [
            {"folder": f"word={place}", "choices": {"word": name}, "params": 23_760_000, "macs": 5_217_000_000}
            for place, name in enumerate(values)
        ],
        **changes,
    }
    for place, numbers in enumerate(values.values()):
        for seed, number in enumerate(numbers):
            run = folder / f"word={place}" / f"seed={seed}"
            run.mkdir(parents=True)
            metrics = {metric: number} if isinstance(metric, str) else dict(zip(metric, number, strict=True))
            write_status(run, Status("finished", metrics=metrics, measures=dict(measures)))
    (folder / "study.json").write_text(json.dumps(data))
    return folder


def study_with_a_failure(root):
    study = write_study(root)
    broken = study / "word=3" / "seed=1"
    broken.mkdir(parents=True)
    write_status(broken, Status("failed", error="exit code 1: ValueError: shapes 4x8 and 16x32 do not fit"))
    return study


def texts(table, head):
    return next(column.texts for column in columns(table) if column.head == head)
