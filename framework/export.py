"""A net as one file that runs without this program: torch.export's own form, or ONNX."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from framework.errors import ConfigError, reason
from framework.tasks import Task

METADATA = "metadata.json"

# Of the largest logit: what the file may differ from the net by.
TOLERANCE = 1e-4

Run = Callable[[Tensor], Tensor]


def export(task: Task, target: Path, metadata: Mapping[str, Any], batch: int = 0) -> float:
    """Writes normalised images `(B, C, H, W)` to logits `(B, num_classes)`, reads the file again and compares.

    Args:
        task: what to export; it is left in eval mode, without what it was trained with.
        target: the file: .pt2 for torch.export, .onnx for ONNX. It is written only where it gives what the net gives.
        metadata: what is stored with it, as plain data: in `metadata.json` of a .pt2, each by its key in ONNX.
        batch: how many images it takes; 0 for any number.

    Gives the greatest difference between the file's logits and the net's, as a part of the largest logit.

    Raises:
        ConfigError: a package is missing, the net cannot be exported, or the file gives something else.
    """
    task.eval().requires_grad_(False)
    for name in ("objectives", "metrics"):  # a teacher or a loss with weights is no part of the net
        if isinstance(getattr(task, name, None), nn.Module):
            setattr(task, name, nn.ModuleDict())
    shapes: dict[str, Any] = {"images": {} if batch else {0: torch.export.Dim("batch")}}
    if target.suffix == ".onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            try:
                import_module(name)
            except ImportError as error:
                raise ConfigError(f"--out: .onnx needs {name}: pip install onnx onnxscript onnxruntime") from error
    write = _write_onnx if target.suffix == ".onnx" else _write_program
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as folder:
            part = Path(folder, target.name)  # torch writes the name into the file
            run = write(_program(task, batch, shapes), part, metadata, shapes)
            difference = max(_difference(task, run, size) for size in ([batch] if batch else [1, 3]))
            if not difference <= TOLERANCE:
                raise ConfigError(
                    f"export: {target.suffix} gives other logits than the net: they differ by {difference:.1e} of the "
                    f"largest one, {TOLERANCE:.0e} is allowed; nothing was written"
                )
            os.replace(part, target)
    except (ConfigError, OSError):
        raise
    except Exception as error:  # torch and ONNX raise what they like
        fixed = "" if batch else "; a fixed number of images may be possible: --batch 1"
        raise ConfigError(
            f"export: {type(task.backbone).__name__} as {target.suffix}: {reason(error)}{fixed}"
        ) from error
    return difference


def _difference(task: Task, run: Run, count: int) -> float:
    shape = (count, *task.example().shape[1:])
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = task(images), run(images)
    return float((got - want).abs().max() / want.abs().max().clamp(min=torch.finfo(want.dtype).tiny))


def _program(task: Task, batch: int, shapes: dict[str, Any]) -> torch.export.ExportedProgram:
    program = torch.export.export(task, (task.example(batch or 2),), dynamic_shapes=shapes)
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _write_program(
    program: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, Any], shapes: dict[str, Any]
) -> Run:
    torch.export.save(program, path, extra_files={METADATA: json.dumps(metadata, ensure_ascii=False)})
    return torch.export.load(path).module()


def _write_onnx(
    program: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, Any], shapes: dict[str, Any]
) -> Run:
    import onnxruntime

    made = torch.onnx.export(
        program, dynamo=True, dynamic_shapes=shapes, input_names=["images"], output_names=["logits"], verbose=False
    )
    assert made is not None
    for key, value in metadata.items():
        made.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    made.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
