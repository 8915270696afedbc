"""Draws pictures beside each other with captions, as one picture."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Pixels = npt.NDArray[np.uint8]

MIN_TILE_PX = 160
"""Smaller pictures are enlarged by whole steps, pixel for pixel."""
MAX_TILE_PX = 512
MAX_COLUMNS = 4
GAP_PX = 10
FONT_PX = 14
LINE_PX = 18
_PAPER, _INK, _FAINT = (255, 255, 255), (30, 30, 30), (120, 120, 120)


@dataclass(frozen=True, slots=True)
class Tile:
    """Pictures of one size, drawn one below the other, and the lines under them."""

    pictures: Sequence[Pixels]
    """uint8 [H, W, 3] each."""
    captions: Sequence[str]
    """The first in ink, the others fainter; shortened to the width of the picture."""


def draw_sheet(title: str, tiles: Sequence[Tile], *, columns: int = MAX_COLUMNS) -> Image.Image:
    """Lay out tiles, all with as many pictures of the same size and as many captions, in rows under a title."""
    assert tiles, "a sheet without tiles"
    font = ImageFont.load_default(FONT_PX)
    height, width = tiles[0].pictures[0].shape[:2]
    scale = _scale(max(height, width))
    tile_width, picture_height = round(width * scale), round(height * scale)
    num_pictures, num_lines = len(tiles[0].pictures), max(len(tile.captions) for tile in tiles)
    tile_height = num_pictures * (picture_height + 2) + num_lines * LINE_PX + 4
    columns = min(columns, len(tiles))
    title_lines = _wrap(title, font, columns * (tile_width + GAP_PX) - GAP_PX)
    top = GAP_PX + len(title_lines) * (LINE_PX + 2) + 4
    sheet = Image.new(
        "RGB",
        (
            GAP_PX + columns * (tile_width + GAP_PX),
            top + math.ceil(len(tiles) / columns) * (tile_height + GAP_PX),
        ),
        _PAPER,
    )
    pen = ImageDraw.Draw(sheet)
    for number, words in enumerate(title_lines):
        pen.text((GAP_PX, GAP_PX + number * (LINE_PX + 2)), words, _INK, font)
    for number, tile in enumerate(tiles):
        x = GAP_PX + number % columns * (tile_width + GAP_PX)
        y = top + number // columns * (tile_height + GAP_PX)
        for pixels_HWC in tile.pictures:
            resampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
            picture = Image.fromarray(pixels_HWC).resize((tile_width, picture_height), resampling)
            sheet.paste(picture, (x, y))
            y += picture_height + 2
        for line, caption in enumerate(tile.captions):
            pen.text((x, y + 2 + line * LINE_PX), _fit(caption, font, tile_width), _FAINT if line else _INK, font)
    return sheet


def png_bytes(picture: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    sink = io.BytesIO()
    picture.save(sink, "PNG", optimize=True)
    return sink.getvalue()


def _scale(side: int) -> float:
    return math.ceil(MIN_TILE_PX / side) if side < MIN_TILE_PX else min(1.0, MAX_TILE_PX / side)


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _fit(text: str, font: Font, width: int) -> str:
    """`text`, its middle left out where it is too wide: keys differ at both ends."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    if font.getlength(text) <= width:
        return text
    kept = len(text) - 1
    while kept > 2 and font.getlength(_without_middle(text, kept)) > width:
        kept -= 1
    return _without_middle(text, kept)


def _without_middle(text: str, kept: int) -> str:
    return f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"


def _wrap(text: str, font: Font, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(_fit(word, font, width))
    return lines
