"""Sheets of images with captions, to look at: small images are enlarged pixel by pixel, large ones are reduced."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

# In pixels: at most how large images are shown, the least distance between them, and that of strips.
LARGEST, GAP, MARGIN = 128, 2, 16
INK, PALE = "#222222", "#777777"


@dataclass(frozen=True)
class Strip:
    """Images side by side under a caption.

    Args:
        images: uint8 `(N, C, H, W)`, C 1 or 3.
        caption: lines over them; what is too long is cut.
    """

    images: Tensor
    caption: tuple[str, ...]


def sheet(
    strips: list[Strip],
    header: tuple[str, ...] = (),
    across: int = 0,
    rows: tuple[str, ...] = (),
    smallest: int = 64,
) -> Image:
    """Strips in reading order, column by column where nothing says how many are side by side.

    Args:
        strips: all with the same number of images and of caption lines.
        header: a name for each image of a strip; it stands over every column of strips. The first image is set apart.
        across: strips side by side, in rows then; 0 for columns that make a sheet about as wide as high.
        rows: a name for each row of strips.
        smallest: how large images are at least, in pixels.
    """
    from PIL import Image as Pictures
    from PIL import ImageDraw

    count, _, _, size = strips[0].images.shape
    tile = size * ceil(smallest / size) if size < smallest else min(size, LARGEST)
    font = _font(max(11, tile // 9))
    step = int(font.size) + 3
    lines = len(strips[0].caption) * step
    places = [place * (tile + GAP) + (MARGIN // 2 if place and header else 0) for place in range(count)]
    width, height = places[-1] + tile + MARGIN, lines + tile + MARGIN // 2
    by_row = across > 0
    across = across or max(1, round(sqrt(len(strips) * height / width)))
    down = ceil(len(strips) / across)
    across = across if by_row else ceil(len(strips) / down)
    left = MARGIN + max((ceil(font.getlength(name)) + MARGIN for name in rows), default=0)
    top = MARGIN + (step if header else 0)
    made = Pictures.new("RGB", (left + across * width, top + down * height + MARGIN // 2), "white")
    draw = ImageDraw.Draw(made)
    for column in range(across):
        for place, name in zip(places, header, strict=False):
            draw.text((left + column * width + place, MARGIN // 2), _cut(name, tile, font), fill=PALE, font=font)
    for number, name in enumerate(rows):
        draw.text((MARGIN, top + number * height + lines), name, fill=PALE, font=font)
    for number, strip in enumerate(strips):
        row, column = divmod(number, across) if by_row else divmod(number, down)[::-1]
        x, y = left + column * width, top + row * height
        for line, text in enumerate(strip.caption):
            draw.text((x, y + line * step), _cut(text, width - MARGIN, font), fill=INK, font=font)
        for place, image in zip(places, strip.images, strict=True):
            made.paste(_picture(image, tile), (x + place, y + lines))
    return made


def _picture(image: Tensor, tile: int) -> Image:
    from PIL import Image as Pictures

    pixels = image.permute(1, 2, 0).numpy()
    picture = Pictures.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
    how = Pictures.Resampling.LANCZOS if tile < picture.width else Pictures.Resampling.NEAREST
    return picture.resize((tile, tile), how)


def _font(size: int) -> FreeTypeFont:
    """Matplotlib's own, which has more than Latin letters and is there on every machine."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _cut(text: str, width: int, font: FreeTypeFont) -> str:
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
