"""timm's RandAugment for a batch of uint8 images on whatever device holds them: each has steps of its own.

Operations and arguments are drawn on the host, one image at a time (`augment.noted`). What is done here gives the
pixels of Pillow up to their rounding. Images with operations of one kind go together: those that look up every value
in a table, those that move pixels, and two blends. Nothing makes the host wait for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Fill = tuple[int, ...]

# What timm's `rand-…` chooses from, without the word that makes strengths increase. A step names one by its place.
NAMES = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip

NONE = -1  # in the place of an operation: the image stays


def rand_augment_batch(images: Tensor, steps: Tensor, fill: Fill) -> Tensor:
    """The images, each after its own steps; they are changed in place.

    Args:
        images: uint8 `(B, C, H, W)`, C 1 or 3.
        steps: float64 `(B, layers, 2)` on the host: an operation of `NAMES`, and its argument as timm has it.
        fill: of each channel: what comes in from outside of an image.
    """
    for layer in steps.unbind(1):
        numbers = layer[:, 0].int().tolist()
        for act, names in GROUPS.items():
            at = [place for place, number in enumerate(numbers) if number != NONE and NAMES[number] in names]
            if at:
                there = torch.tensor(at).to(images.device, non_blocking=True)
                chosen = [NAMES[numbers[place]] for place in at]
                images.index_copy_(0, there, act(images.index_select(0, there), chosen, layer[at, 1], fill))
    return images


def blend(low: Tensor, high: Tensor, factor: Tensor) -> Tensor:
    """`low` at 0, `high` at 1 and on behind it, cut off to uint8 as Pillow does."""
    return (low + factor * (high - low)).clamp(0, 255).to(torch.uint8)


def grey(images: Tensor) -> Tensor:
    """Luminance as Pillow rounds it, int32 `(B, 1, H, W)`."""
    values = images.int()
    if images.shape[1] == 1:
        return values
    red, green, blue = values.split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def counts(images: Tensor) -> Tensor:
    """How often each channel has each value, int64 `(B, C, 256)`."""
    values = images.flatten(2).flatten(0, 1).long()
    places = values + 256 * torch.arange(len(values), device=values.device)[:, None]
    # Not bincount: it makes the host wait for the largest value.
    found = torch.zeros(256 * len(values), dtype=torch.int64, device=values.device)
    found.scatter_add_(0, places.flatten(), torch.ones_like(places).flatten())
    return found.view(*images.shape[:2], 256)


def fixed(name: str, arguments: Tensor) -> Tensor:
    """Tables of an operation that looks at no image: `(B, 256)` for float64 `(B, 1)`."""
    values = torch.arange(256)
    match name:
        case "Invert":
            return (255 - values).expand(len(arguments), -1)
        case "Posterize":
            return values & (256 - (1 << (8 - arguments.long())))
        case "Solarize":
            return torch.where(values < arguments, values, 255 - values)
        case "SolarizeAdd":
            return torch.where(values < 128, (values + arguments.long()).clamp(max=255), values)
    return blend(torch.tensor(0.0), values.float(), arguments.float())  # Brightness


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    mean = (grey(images).double().mean((1, 2, 3)) + 0.5).floor().float()[:, None, None]
    return blend(mean, torch.arange(256.0, device=images.device), factors.float()[:, :, None])


def auto_contrast(images: Tensor, _: Tensor) -> Tensor:
    low, high = (values.double()[..., None] for values in images.flatten(2).aminmax(dim=2))
    values = torch.arange(256.0, dtype=torch.float64, device=images.device)
    scale = 255.0 / (high - low)
    stretched = (values * scale - low * scale).clamp(0, 255)
    return torch.where(high > low, stretched, values).to(torch.uint8)


def equalize(images: Tensor, _: Tensor) -> Tensor:
    found = counts(images)
    values = torch.arange(256, device=images.device)
    last = found.gather(2, images.flatten(2).amax(2, keepdim=True).long())
    step = (found.sum(2, keepdim=True) - last) // 255
    before = found.cumsum(2) - found
    return torch.where(step > 0, (step // 2 + before) // step.clamp(min=1), values).clamp(max=255).to(torch.uint8)


MEASURED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Contrast": contrast,
}


def look_up(images: Tensor, names: list[str], arguments: Tensor, _: Fill) -> Tensor:
    tables = torch.empty(*images.shape[:2], 256, dtype=torch.uint8, device=images.device)
    for name in sorted(set(names)):
        at = [place for place, other in enumerate(names) if other == name]
        there = torch.tensor(at).to(images.device, non_blocking=True)
        given = arguments[at, None]
        if name in MEASURED:
            made = MEASURED[name](images.index_select(0, there), given.to(images.device, non_blocking=True))
        else:
            made = fixed(name, given).to(torch.uint8)[:, None].to(images.device, non_blocking=True)
        tables.index_copy_(0, there, made.expand(-1, images.shape[1], -1))
    return tables.gather(2, images.flatten(2).long()).view_as(images)


def matrix(name: str, argument: float, size: int) -> tuple[float, ...]:
    """Where pixels come from, as `Image.transform` has it."""
    match name:
        case "ShearX":
            return 1, argument, 0, 0, 1, 0
        case "ShearY":
            return 1, 0, 0, argument, 1, 0
        case "TranslateXRel":
            return 1, 0, argument * size, 0, 1, 0
        case "TranslateYRel":
            return 1, 0, 0, 0, 1, argument * size
    angle = -math.radians(argument % 360)  # Rotate, as in Image.rotate
    cos, sin, centre = round(math.cos(angle), 15), round(math.sin(angle), 15), size / 2
    across, down = -centre * cos - centre * sin + centre, centre * sin - centre * cos + centre
    return cos, sin, across, -sin, cos, down


def cubic(values: list[Tensor], part: Tensor) -> Tensor:
    """Pillow's bicubic filter between the second and the third of four values; that of torch is another one."""
    one, two, three, four = values
    inner = 2 * (one - two) + three - four + part * (two - one - three + four)
    return two + part * (three - one + part * inner)


def move(images: Tensor, names: list[str], arguments: Tensor, fill: Fill) -> Tensor:
    channels, size = images.shape[1:3]
    device = images.device
    rows = [matrix(name, argument, size) for name, argument in zip(names, arguments.tolist(), strict=True)]
    parts = torch.tensor(rows, dtype=torch.float64).to(device, non_blocking=True)
    # In float64: what is a hair outside in Pillow's arithmetic is outside here.
    line = torch.arange(size, device=device) + torch.tensor(0.5, dtype=torch.float64)
    a, b, c, d, e, f = parts[:, :, None, None].unbind(1)
    x, y = a * line + b * line[:, None] + c, d * line + e * line[:, None] + f
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    x, y = x - 0.5, y - 0.5
    left, top = x.floor(), y.floor()
    across, down = ((each - whole).float().flatten(1)[:, None] for each, whole in ((x, left), (y, top)))
    columns = [(left + step).clamp(0, size - 1).long().flatten(1) for step in (-1, 0, 1, 2)]
    flat = images.flatten(2)
    lines = []
    for step in (-1, 0, 1, 2):
        start = (top + step).clamp(0, size - 1).long().flatten(1) * size
        taps = [flat.gather(2, (start + column)[:, None].expand(-1, channels, -1)).float() for column in columns]
        lines.append(cubic(taps, across))
    moved = cubic(lines, down).clamp(0, 255).to(torch.uint8).view_as(images)
    outside = torch.tensor(fill, dtype=torch.uint8).to(device, non_blocking=True)
    return torch.where(inside[:, None], moved, outside[:, None, None])


def saturate(images: Tensor, _: list[str], factors: Tensor, __: Fill) -> Tensor:
    return blend(grey(images).float(), images.float(), _factors(factors, images))


def sharpen(images: Tensor, _: list[str], factors: Tensor, __: Fill) -> Tensor:
    values = images.float()
    rows = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    inner = ((around + 4 * values[:, :, 1:-1, 1:-1]) / 13 + 0.5).floor()
    smooth = values.clone()  # with the border as it is
    smooth[:, :, 1:-1, 1:-1] = inner
    return blend(smooth, values, _factors(factors, images))


def _factors(factors: Tensor, images: Tensor) -> Tensor:
    return factors.float().to(images.device, non_blocking=True)[:, None, None, None]


GROUPS: dict[Callable[[Tensor, list[str], Tensor, Fill], Tensor], tuple[str, ...]] = {
    look_up: ("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd", "Contrast", "Brightness"),
    move: ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
    saturate: ("Color",),
    sharpen: ("Sharpness",),
}
