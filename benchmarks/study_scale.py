"""What a study costs beside its training: planning and reporting 2,000 runs, starting a run, and runs side by side.

    uv run python benchmarks/study_scale.py

Prints a table and writes it as JSON under benchmarks/results. "Planned" is the whole of `plan --no-probe` from a
composed document: every distinct net is built on the meta device. "Reported" is the whole of `report` on a study
whose runs are all finished. A run that does nothing shows what a launcher adds to each; short trainings one at a time
and n at a time, interleaved in one go, show what running side by side brings on this machine.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from framework.ablation import forms, tables, view
from framework.ablation.grid import Ablation, cells
from framework.ablation.launch.local import Local
from framework.ablation.state import Status, prepare, write_status
from framework.ablation.study import plan, run_study

SEEDS = [0, 1, 2, 3, 4]
ROUNDS = 3


def study(widths: int, depths: int, seeds: list[int]) -> dict:
    """A document of widths × depths distinct nets."""
    from framework.config import compose

    document = compose(["experiments/base/tnt_digits.yaml"], {"trainer.max_epochs": 1})
    axes = {
        "width": {str(48 + 4 * i): {"model.backbone.dim": 48 + 4 * i} for i in range(widths)},
        "mlp": {
            str(i): {"model.backbone.blocks.tnt.outer.mlp": {"class_path": "Mlp", "init_args": {"ratio": 1 + i / 4}}}
            for i in range(depths)
        },
    }
    document["ablation"] = {"name": "scale", "axes": axes, "seeds": seeds}
    return document


def timed(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        act()
    return time.perf_counter() - start


def nothing(folder: Path) -> None:
    write_status(folder, Status("finished", 1, 1, {"val/acc1": 0.5}))


def start_of_a_run(document: dict, root: Path, processes: int, count: int) -> float:
    """Seconds that a run which does nothing takes, with the fork server up and its modules loaded."""
    from framework.config import dump, override

    launcher = Local(processes)
    runs = cells(document, override)[: count + 1]
    folders = prepare(root, Ablation.read(document), runs, {run.group: {"params": 0, "macs": 0} for run in runs}, dump)
    launcher.run(folders[:1], nothing, lambda left: None)  # starts the fork server
    return timed(lambda: launcher.run(folders[1:], nothing, lambda left: None)) / count


def main() -> None:
    from framework.bench import report
    from framework.config import dump, override
    from framework.run import fit_folder
    from framework.run import planned as measure

    before = report.circumstances()
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temp:
        root = Path(temp)
        big = study(20, 20, SEEDS)
        found["planned, 400 nets × 5 seeds (s)"] = timed(lambda: plan(big, root, override, measure, dump))
        runs = cells(big, override)
        costs = {run.group: {"params": 100_000, "macs": 2_000_000} for run in runs}
        folders: list[Path] = []
        found["2,000 folders written (s)"] = timed(
            lambda: folders.extend(prepare(root / "scale", Ablation.read(big), runs, costs, dump))
        )
        for i, folder in enumerate(folders):
            metrics = {"val/acc1": 0.9 + (i * 7919 % 1000) / 1e5, "val/loss": 0.3}
            write_status(folder, Status("finished", 1, 1, metrics, {"seconds": 10.0}))

        def reported() -> None:
            table = tables.collect(root / "scale")
            view.show(root / "scale", table)

        found["reported: table of 2,000 runs (s)"] = timed(reported)
        table = tables.collect(root / "scale")
        found["reported: all files and figures (s)"] = timed(lambda: forms.write(root / "scale", table))

        cores = os.cpu_count() or 1
        small = study(4, 1, [0])
        found["start of a run, one at a time (s)"] = start_of_a_run(study(20, 1, [0]), root / "one", 1, 10)
        found[f"start of a run, {cores} at a time (s)"] = start_of_a_run(study(20, 1, [0]), root / "n", cores, 10)
        ratios = []
        for i in range(ROUNDS):
            times = {}
            for n in (1, cores) if i % 2 else (cores, 1):
                times[n] = timed(
                    lambda n=n, i=i: run_study(small, root / f"{n}-{i}", Local(n), fit_folder, override, measure, dump)
                )
            ratios.append(times[1] / times[cores])
        found[f"4 short trainings: one at a time / {cores} at a time (median of {ROUNDS})"] = statistics.median(ratios)
    for name, value in found.items():
        print(f"{name:64} {value:8.2f}")
    print(report.write(report.where("study_scale"), "study_scale", found, **before))


if __name__ == "__main__":
    main()
