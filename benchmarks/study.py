"""The whole job: a study of ours against a plain loop over timm's TNT, from the command to the last number.

    uv run python benchmarks/study.py                  # experiments/ablation_pos.yaml as it is, once
    uv run python benchmarks/study.py --epochs 2       # shorter; start-up then weighs more

Both train the same cells with the same data, epochs, batch, optimizer, schedule and clipping, in as many processes at a
time, and validate after each epoch. The plain loop is what a researcher writes in an evening: timm's model, a
DataLoader over tensors, torch's optimizer and schedule, a pool of processes; it keeps no checkpoints, curves or tables,
ours does. Wall time of the commands: this needs a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STUDY = "experiments/ablation_pos.yaml"
EPOCHS, BATCH, RATE, DECAY, CLIP = 30, 64, 8e-3, 0.05, 1.0
CELLS = [(sentence, word) for sentence in (False, True) for word in (False, True)]
SEEDS = [0, 1, 2]
SPLITS = ("train", "val")
PLAIN = "plain.json"


def train(job: tuple[tuple[bool, bool], int, int, Path]) -> float:
    """One run of the plain loop: the accuracy on the validation images behind its last epoch."""
    (sentence, word), seed, epochs, folder = job
    import timm
    import torch
    from torch.nn import functional as F
    from torch.utils.data import DataLoader, TensorDataset

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    sets = {name: TensorDataset(*torch.load(folder / f"{name}.pt", weights_only=True)) for name in SPLITS}
    loader = DataLoader(sets["train"], BATCH, shuffle=True, drop_last=True)
    validation = DataLoader(sets["val"], BATCH)
    model = timm.create_model(
        "tnt_s_patch16_224", img_size=8, patch_size=2, first_stride=1, in_chans=1, num_classes=10, inner_dim=12,
        embed_dim=48, depth=3, num_heads_inner=2, num_heads_outer=4,
    )  # fmt: skip
    for table, there in ((model.patch_pos, sentence), (model.pixel_pos, word)):
        if not there:
            torch.nn.init.zeros_(table).requires_grad_(False)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=epochs * len(loader), cycle_momentum=False
    )
    accuracy = 0.0
    for _ in range(epochs):
        model.train()
        for images, targets in loader:
            loss = F.cross_entropy(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, CLIP)
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            right = [(model(images).argmax(1) == targets).float().sum() for images, targets in validation]
        accuracy = float(sum(right)) / len(sets["val"])
    return accuracy


def write_digits(folder: Path) -> None:
    """The images that the study trains and validates on, normalised, for those who shall not import its code."""
    import torch

    from framework.data import Digits

    data = Digits(size=8)
    for name in SPLITS:
        images = data.split(name)
        torch.save(images.__getitems__(list(range(len(images)))), folder / f"{name}.pt")


def plain(processes: int, epochs: int, folder: Path) -> None:
    """All cells and seeds in a pool of processes, with the images of a folder, which gets the accuracies."""
    jobs = [(cell, seed, epochs, folder) for cell in CELLS for seed in SEEDS]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        (folder / PLAIN).write_text(json.dumps(pool.map(train, jobs, chunksize=1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help=f"of each run (default: {EPOCHS})")
    parser.add_argument("--processes", type=int, default=0, metavar="N", help="at a time (default: all cores)")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="how often each is timed (default: 1)")
    parser.add_argument("--plain", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    processes = args.processes or len(os.sched_getaffinity(0))
    if args.plain:
        plain(processes, args.epochs, Path(args.plain))
        return

    from framework.bench import report
    from framework.bench.harness import Candidate, Section, race, wall_time

    before = report.circumstances()
    accuracies: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_digits(root)
        common = [f"--epochs={args.epochs}", f"--processes={processes}"]

        def loop() -> None:
            done(sys.executable, __file__, f"--plain={root}", *common)
            accuracies["plain loop over timm's TNT"] = json.loads((root / PLAIN).read_text())

        def study() -> None:
            runs = Path(tempfile.mkdtemp(dir=root))
            words = [f"--config={STUDY}", f"--runs={runs}", f"--trainer.max_epochs={args.epochs}"]
            words += ["--launcher=Local", f"--launcher.processes={processes}"]
            done(sys.executable, "cli.py", "fit", *words)
            states = [json.loads(path.read_text()) for path in sorted(runs.glob("pos/*/*/status.json"))]
            assert len(states) == len(CELLS) * len(SEEDS), f"{len(states)} runs"
            assert all(state["state"] == "finished" for state in states), states
            accuracies["ours"] = [state["metrics"]["val/acc1"] for state in states]

        candidates = [Candidate("plain loop over timm's TNT", loop), Candidate("ours", study)]
        timings = race(candidates, wall_time, args.rounds, warm_up=0, least=0)
    for timing in timings:
        found = accuracies[timing.name]
        timing.extra["mean accuracy"] = sum(found) / len(found)
    title = f"{STUDY}: {len(CELLS) * len(SEEDS)} runs of {args.epochs} epochs, {processes} at a time"
    section = Section(title, "wall time of the command", timings)
    report.show([section])
    print(report.write(report.where("study"), "study", report.sections([section]), vars(args), **before))


def done(*words: str) -> None:
    """Runs a command, whose output is only shown where it fails."""
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{' '.join(words)} ended with {ended.returncode}:\n{ended.stdout[-2000:]}{ended.stderr[-4000:]}")


if __name__ == "__main__":
    main()
