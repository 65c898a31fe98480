"""Starting from weights: into a net of another image size or number of classes, with a report of what was done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.positions import PositionTable, RelativeBiasTable, resize_grid
from framework.errors import ConfigError
from framework.weights import convert, has_head, read

TIMM = "timm:"
OURS = ("backbone.", "head.")


@dataclass
class Report:
    """What became of each key: loaded as it was, resized to another grid, or left fresh (parts of a head)."""

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        parts += [f"resized to this image: {', '.join(self.resized)}"] if self.resized else []
        parts += [f"new, not there or for other classes: {', '.join(self.fresh)}"] if self.fresh else []
        return "; ".join(parts)


def source(weights: str) -> dict[str, Tensor]:
    """The tensors of a file, ours or published, or of `timm:NAME`, which may use a network.

    Raises:
        ConfigError: there is no such file or net, or it cannot be read.
    """
    if not weights.startswith(TIMM):
        return read(weights)
    import timm

    name = weights.removeprefix(TIMM)
    if not timm.is_model(name):
        raise ConfigError(f"weights: timm has no net {name!r}")
    try:
        return dict(timm.create_model(name, pretrained=True).state_dict())
    except Exception as error:  # no network, no such file on the hub
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"weights: timm cannot fetch {name}: {type(error).__name__}: {reason}") from error


def start_from(task: nn.Module, state: Mapping[str, Tensor]) -> Report:
    """Loads published weights, or our own, into a task's backbone and head.

    Tables of positions are resized in two dimensions (bicubic, corners not aligned, no antialias); a head for another
    number of classes keeps its fresh weights, and so does the whole head where the weights have none, as those of
    self-supervised backbones.

    Args:
        task: the task; its net is left as it was where this raises.
        state: tensors under our keys, or official or timm keys of a family that has an importer.

    Raises:
        ConfigError: keys that are missing, or that the net has no place for, or tensors of a shape that nothing here
            explains.
    """
    own = {key: value for key, value in task.state_dict().items() if key.startswith(OURS)}
    if any(key.startswith("backbone.") for key in state):
        found = {key: value for key, value in state.items() if key.startswith(OURS)}
    else:
        found = convert(state, {key: value.shape for key, value in own.items()}, head=has_head(state), shapes=False)
    report, fitted = Report(), {}
    missing = [key for key in own if key not in found]
    if not any(key.startswith("head.") for key in found):
        report.fresh = [key for key in missing if key.startswith("head.")]
        missing = [key for key in missing if key not in report.fresh]
    unexpected = [key for key in found if key not in own]
    modules = dict(task.named_modules())
    wrong = []
    for key, value in found.items():
        if key in unexpected:
            continue
        if value.shape == own[key].shape:
            report.loaded.append(key)
        elif key.startswith("head.") and value.shape[1:] == own[key].shape[1:]:
            report.fresh.append(key)
            continue
        elif (resized := _resized(modules[key.rpartition(".")[0]], value, own[key])) is not None:
            value = resized
            report.resized.append(key)
        else:
            wrong.append(f"{key} {tuple(value.shape)} (net: {tuple(own[key].shape)})")
        fitted[key] = value
    problems = [
        f"{what}: {', '.join(keys[:4])}{f' and {len(keys) - 4} more' if len(keys) > 4 else ''}"
        for what, keys in (("missing", missing), ("no place for", unexpected), ("another shape", wrong))
        if keys
    ]
    if problems:
        raise ConfigError(f"weights: they do not fit this net: {'; '.join(problems)}")
    if not any(value.is_meta for value in own.values()):  # of such a net the question was whether they would fit
        task.load_state_dict(fitted, strict=False)
    return report


def _resized(module: nn.Module, value: Tensor, own: Tensor) -> Tensor | None:
    """A table of positions on the grid of `module`; None where the tensor is no such table, or its grid no square."""
    if isinstance(module, PositionTable) and value.ndim == 3 and value.shape[2] == own.shape[2]:
        count = value.shape[1] - module.prefix
        side = round(max(count, 0) ** 0.5)
        if side < 1 or side * side != count:
            return None
        prefix, table = value[:, : module.prefix], value[:, module.prefix :]
        table = resize_grid(table.float(), (side, side), module.grid, module.resize)
        return torch.cat([prefix, table.to(value.dtype)], dim=1)
    if isinstance(module, RelativeBiasTable) and value.ndim == 3 and value.shape[0] == own.shape[0]:
        return F.interpolate(value[None].float(), size=own.shape[1:], mode="bicubic", align_corners=False)[0].to(
            value.dtype
        )
    return None


def write_weights(path: Path, task: nn.Module, card: Mapping[str, Any]) -> None:
    """Backbone and head as safetensors under our keys, with its model card in the file's metadata and beside it.

    Args:
        path: the file, `.safetensors`.
        task: whose weights.
        card: source, config, licence, published accuracy: what a reader of the file needs to know.
    """
    tensors = {key: value.contiguous() for key, value in task.state_dict().items() if key.startswith(OURS)}
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in card.items() if value}
    save_file(tensors, path, metadata=text)
    card_path = path.with_suffix(".md")
    card_path.write_text(
        f"# {path.stem}\n\n" + "".join(f"- {key}: {value}\n" for key, value in text.items() if key != "config")
        + (f"\n```yaml\n{text['config']}```\n" if "config" in text else ""),
        encoding="utf-8",
    )  # fmt: skip
    shutil.copymode(card_path, path)  # safetensors leaves it to its owner alone, whatever the umask
