"""One run: a folder with its own config, trained, measured, interrupted, gone on with."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from framework.ablation.state import differences, read_study, write_text
from framework.callbacks import Bar, Checkpoints, Keep, Last, RandomState, Record, RunState
from framework.checkpoints import Kept, WholeFiles, read_checkpoint
from framework.config import compose, dump, load_plugins
from framework.construct import Workbench, complete
from framework.data import splits
from framework.errors import ConfigError, suggest
from framework.loop import Unprofiled, passed_over, validate_last
from framework.measure import Cost, cost, meta_model
from framework.provenance import write_provenance
from framework.tasks.base import Task
from framework.weights.transfer import source, start_from

HANDED = "TESSERA_RUN_FOLDER"
JOB = ("SLURM_JOB_ID", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")

# What Lightning needs beside weights to go on.
GOES_ON = ("optimizer_states", "lr_schedulers", "loops", "epoch", "global_step", "pytorch-lightning_version")

# What makes a run what it is, and what of it may change where it goes on.
GIVEN = ("model", "data", "seed", "name")
MAY_MOVE = ("data.path", "data.workers")

CONFIG, RESOLVED, LAST, BEST = "config.yaml", "resolved.yaml", "checkpoints/last.ckpt", "checkpoints/best.ckpt"

for _name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_name).setLevel(logging.WARNING)


def new_folder(root: Path, name: str) -> Path:
    """`<root>/<name>/<n>` with the first free n: a run never stops because another one is there."""
    parent = root / name
    parent.mkdir(parents=True, exist_ok=True)
    n = 0
    while True:
        try:
            (parent / str(n)).mkdir()
        except FileExistsError:
            n += 1
        else:
            return parent / str(n)


def rank() -> int:
    """Which of the processes of one run this is; 0 where it is the only one."""
    return int(next((os.environ[key] for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if key in os.environ), 0))


@contextmanager
def shared_folder(root: Path, name: str) -> Iterator[Path]:
    """A new folder, the same one for all processes of a run: those that Lightning starts, torchrun or srun.

    Raises:
        ConfigError: the first process of the run makes none within a minute.
    """
    if HANDED in os.environ:  # Lightning starts the others with this process's environment
        yield Path(os.environ[HANDED])
        return
    job = re.sub(r"[^\w.-]", "_", "-".join(os.environ[key] for key in JOB if key in os.environ))
    note = root / name / f".{job}"
    if rank() == 0:
        os.environ[HANDED] = str(new_folder(root, name))
        if job:
            write_text(note, os.environ[HANDED])
        try:
            yield Path(os.environ[HANDED])
        finally:
            del os.environ[HANDED]
            note.unlink(missing_ok=True) if job else None
        return
    limit = time.monotonic() + 60
    while not note.is_file():
        if time.monotonic() > limit:
            raise ConfigError(f"{root / name}: the first process of this run made no folder there within a minute")
        time.sleep(0.1)
    yield Path(note.read_text(encoding="utf-8"))


def run_folder_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint lies in, or None."""
    folder = checkpoint.resolve().parent.parent
    return folder if (folder / CONFIG).is_file() and checkpoint.parent.name == "checkpoints" else None


def existing(checkpoint: str) -> Path:
    """The path of a checkpoint. Raises ConfigError where there is none."""
    path = Path(checkpoint)
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        raise ConfigError(f"--ckpt_path: no such file: {path}" + (f"; there are {', '.join(near)}" if near else ""))
    return path


def flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value of a document by its dotted path, as users write it (without `init_args`)."""
    found: dict[str, Any] = {}
    for key, value in document.items():
        path = prefix if key in ("init_args", "class_path") else f"{prefix}.{key}".lstrip(".")
        if isinstance(value, Mapping):
            found |= flat(value, path)
        else:
            found[path] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


# With 0 of these the Trainer trains or validates nothing, or ends in the midst of a run.
ABOVE_0 = ("accumulate_grad_batches", "check_val_every_n_epoch", "limit_train_batches", "val_check_interval")

# A study is planned on a machine that may lack what its runs will have.
ANYWHERE: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "precision": None,
    "plugins": None,
}


def check_validated(given: Mapping[str, Any]) -> None:
    """Raises ConfigError where these arguments of a Trainer leave the last epoch, whose metrics count, unvalidated."""
    epochs, every = given.get("max_epochs") or 0, given.get("check_val_every_n_epoch") or 1
    if epochs > 0 and epochs % every and not given.get("fast_dev_run"):
        raise ConfigError(
            f"trainer.check_val_every_n_epoch: got {every}, which does not divide trainer.max_epochs: {epochs}, so "
            f"the last epoch is not validated; give a divisor of {epochs}, or max_epochs: {-(-epochs // every) * every}"
        )


def check(
    document: Mapping[str, Any], checkpoint: Path | None = None, metrics: Sequence[str] = (), **machine: Any
) -> Cost:
    """Raises what `train` would raise before its first step, as far as that can be known without data.

    Args:
        document: a composed document without an ablation.
        checkpoint: what it goes on from.
        metrics: what will be compared.
        machine: what the Trainer is told in place of the document's.

    Returns:
        What its net costs.
    """
    given = document["trainer"]
    if not given.get("fast_dev_run") and max(given.get("max_epochs") or 0, given.get("max_steps") or 0) < 1:
        raise ConfigError("trainer.max_epochs: nothing says how long to train; set it, as --trainer.max_epochs=300")
    for name in (*ABOVE_0, "gradient_clip_val"):
        value = given.get(name)
        if isinstance(value, int | float) and (value < 0 or (value == 0 and name in ABOVE_0)):
            raise ConfigError(f"trainer.{name}: got {value}, must be {'above' if name in ABOVE_0 else 'at least'} 0")
    check_validated(given)
    model = meta_model(document)
    if checkpoint:
        found = read_checkpoint(checkpoint)
        check_weights(model, found["state_dict"], checkpoint)
        if missing := [key for key in GOES_ON if key not in found]:
            raise ConfigError(
                f"--ckpt_path: {checkpoint} has no {missing[0]}, so nothing goes on from it; "
                f"start from its weights: --weights={checkpoint}"
            )
        check_goes_on(document, checkpoint)
        done = found["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        if 0 <= (given.get("max_epochs") or -1) < done:
            raise ConfigError(f"trainer.max_epochs: got {given['max_epochs']}, but {checkpoint} has {done} behind it")
    elif document.get("weights"):
        start_from(model, source(document["weights"]))
    bench = Workbench(complete(document))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    check_watched(bench.make_trainer(**quiet, **machine), model)
    model.check_values()
    if model.logged and not given.get("callbacks"):  # those may log what they like
        for name in metrics:
            if name not in model.logged:
                raise ConfigError(f"ablation.metric: nothing logs {name!r} ({suggest(name, model.logged)})")
    return cost(model)


def check_goes_on(document: Mapping[str, Any], checkpoint: Path) -> None:
    """Raises ConfigError where a run would go on in its folder as another one than it began.

    Its Trainer may be another one, and its data may lie elsewhere.
    """
    folder = run_folder_of(checkpoint)
    if folder is None:
        return
    pair = (load_document(folder / CONFIG), document)
    was, now = (flat({key: each[key] for key in GIVEN if key in each}) for each in pair)
    if found := [each for each in differences(was, now) if each.partition(":")[0] not in MAY_MOVE]:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ConfigError(
            f"--ckpt_path: {folder} was made with another config: {', '.join(found[:3])}{more}; "
            f"start another run from its weights: --weights={checkpoint}"
        )


def planned(document: Mapping[str, Any], metrics: Sequence[str] = ()) -> dict[str, int]:
    """Trainable parameters and MACs of a run that is to be trained, perhaps elsewhere: `{params, macs}`.

    Runs in a fresh process too.

    Args:
        document, metrics: as of `check`, which raises for them.
    """
    load_plugins(document.get("plugins", []))
    found = check(document, metrics=metrics, **ANYWHERE)
    return {"params": found.params, "macs": found.macs}


def check_watched(trainer: Trainer, model: Task) -> None:
    """Raises ConfigError where a callback watches a metric that the model does not log."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        watched = getattr(callback, "monitor", None)
        if model.logged and watched is not None and watched not in model.logged:
            hint = suggest(watched, model.logged)
            raise ConfigError(f"trainer.callbacks: {type(callback).__name__} watches {watched!r} ({hint})")


def hparams(folder: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of TensorBoard's hparams table: a study's axes and the seed; for a single run its whole config."""
    try:
        cells = read_study(folder.parent.parent)["cells"]
    except ConfigError:
        return flat({key: document[key] for key in ("model", "data", "seed")})
    choices: dict[str, Any] = next((cell["choices"] for cell in cells if cell["folder"] == folder.parent.name), {})
    return {**choices, "seed": document["seed"]}


def train(
    folder: Path, document: Mapping[str, Any], checkpoint: Path | None = None, bar: bool = True, begins: bool = True
) -> Trainer:
    """Trains `document` in `folder`, from its checkpoint where one is given, and keeps the folder's status.

    Args:
        folder: the run folder; it exists.
        document: a composed document without an ablation.
        checkpoint: what to go on from.
        bar: whether to show a progress bar, where there is a terminal.
        begins: whether the document is to be the folder's, which has none yet, or that of a shorter training.

    Raises:
        ConfigError, BuildError: the document cannot be built.
        KeyboardInterrupt: it was interrupted; the folder holds a checkpoint to go on from.
    """
    finished = complete(document)
    seed_everything(int(document.get("seed", 0)), workers=True, verbose=False)
    if not torch.cuda.is_available():
        # Lightning sets it, so that processes can be forked after CUDA was looked for. Where there is none, torch's
        # optimizers look for its library in each step then.
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    bench = Workbench(finished)
    data, model = bench.make_data(), bench.make_model()
    if document.get("weights") and not checkpoint:
        print(f"{document['weights']}: {start_from(model, source(document['weights']))}")
    for split in ("train", "val"):
        data.split(split)  # what is missing or empty says so before the first step
    if checkpoint and run_folder_of(checkpoint) == folder.resolve():
        splits.compare(folder, data)
    elif rank() == 0:
        splits.store(folder, data)
    last = folder / LAST
    whole: dict[str, Any] = {"dirpath": last.parent, "enable_version_counter": False}
    best = ModelCheckpoint(filename="best", monitor="val/acc1", mode="max", **whole)
    callbacks: list[Callback] = [
        RandomState(),
        Keep(Kept.of(document, data)),
        RunState(folder, {"params": sum(p.numel() for p in model.parameters() if p.requires_grad)}),
        Checkpoints(last),
        Record(hparams(folder, finished)),
        best,
        Last(best, filename="last", save_on_train_epoch_end=True, **whole),
    ]
    shown = bar and sys.stdout.isatty()
    if shown:
        callbacks.append(Bar())
    given = finished.get("trainer", {})
    defaults: dict[str, Any] = {
        "default_root_dir": folder,
        "enable_progress_bar": shown,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 10,
        "profiler": Unprofiled(),
    }
    arguments = {key: value for key, value in defaults.items() if key not in given}
    if given.get("logger") in (None, True):
        arguments["logger"] = TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False)
    trainer = bench.make_trainer(callbacks=callbacks, **arguments)
    check_watched(trainer, model)
    validate_last(trainer)
    if rank() == 0:  # now that nothing is wrong with it
        if begins:
            write_text(folder / CONFIG, dump(document))
        write_text(folder / RESOLVED, dump(finished))
        write_provenance(folder, int(document.get("seed", 0)))
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeFiles()
    try:
        with passed_over(trainer, model, data):
            trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    except SystemExit:  # Lightning's way out of Ctrl-C
        raise KeyboardInterrupt from None
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # else a process may abort on its way out
    return trainer


def fit_folder(folder: Path) -> None:
    """Trains the run of a folder from its `config.yaml`, from the last checkpoint where there is one."""
    last = folder / LAST
    train(folder, load_document(folder / CONFIG), last if last.is_file() else None, bar=False, begins=False)


def load_document(path: Path) -> dict[str, Any]:
    """The composed document of a run folder's `config.yaml`."""
    return compose([path])


def evaluate(document: Mapping[str, Any], checkpoint: Path, stage: str) -> dict[str, float]:
    """Metrics of a checkpoint on the validation or test set: `validate` or `test`."""
    bench = Workbench(complete(document))
    data, model = bench.make_data(), bench.make_model()
    load_weights(model, checkpoint)
    trainer = bench.make_trainer(logger=False, enable_model_summary=False, enable_checkpointing=False,
                                 enable_progress_bar=sys.stdout.isatty())  # fmt: skip
    found = getattr(trainer, stage)(model, datamodule=data, verbose=False)
    return {name: float(value) for name, value in found[0].items()}


def load_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """Loads a checkpoint's weights into a net that must be the same. Raises ConfigError where it is not."""
    state = read_checkpoint(checkpoint)["state_dict"]
    check_weights(model, state, checkpoint)
    model.load_state_dict(state)


def check_weights(model: torch.nn.Module, state: Mapping[str, torch.Tensor], checkpoint: Path) -> None:
    """Raises ConfigError where weights are not those of the model."""
    own = model.state_dict()
    wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
    wrong += [key for key in state if key not in own]
    if wrong:
        raise ConfigError(
            f"--ckpt_path: {checkpoint} holds another net than the config; {len(wrong)} weights differ: {wrong[0]}, …"
        )
