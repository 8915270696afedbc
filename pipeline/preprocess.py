"""From a decoded frame to a square: which box of it, in which orientation, resized to exactly size x size.

A box is whole pixels of the *upright* source.  Frames stay in memory as they are stored and are turned after the
resize, when they are small; so the box is mapped into the stored frame first.

Shapes: `H W` as stored, `S` side of the square, `C` = 3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from schemas.errors import SpecError
from schemas.jobspec import Engine, Filter, PreprocessSpec

Pixels = npt.NDArray[np.uint8]

_MASK64 = (1 << 64) - 1
_PILLOW_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}

# EXIF orientations, which a video's display matrix is translated to: how the stored frame becomes upright.
_MIRRORED_IN_X = frozenset((2, 3, 7, 8))
_MIRRORED_IN_Y = frozenset((3, 4, 6, 7))
_FIRST_TRANSPOSED = 5


class Box(NamedTuple):
    """Whole pixels: left, top, width, height."""

    x: int
    y: int
    width: int
    height: int


class View(NamedTuple):
    """One crop of an upright source."""

    box: Box
    flipped: bool


class SplitMix64:
    """The generator of Steele, Lea and Flood (2014): 64 bits of state, and the same numbers in any language."""

    def __init__(self, state: int) -> None:
        self._state = state & _MASK64

    def next_uint64(self) -> int:
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK64
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
        return z ^ (z >> 31)

    def next_unit(self) -> float:
        """Return a double in [0, 1): the upper 53 bits, so exact."""
        return (self.next_uint64() >> 11) * 2.0**-53


def view_seed(seed: int, key: str, view: int) -> int:
    """Return the 64-bit seed of one view, a function of these three alone: never of order, worker or Python version.

    FNV-1a of the key's UTF-8, then two rounds of SplitMix64 that fold in the job's seed and the view number."""
    key_hash = 0xCBF29CE484222325
    for byte in key.encode("utf-8", "surrogateescape"):
        key_hash = ((key_hash ^ byte) * 0x100000001B3) & _MASK64
    mixed = SplitMix64(seed).next_uint64() ^ key_hash
    return SplitMix64(mixed).next_uint64() ^ SplitMix64(view).next_uint64()


def choose_view(width: int, height: int, spec: PreprocessSpec, key: str, view: int) -> View:
    """Return the box of a view in an upright source of `width` x `height`, and whether it is mirrored."""
    if spec.crop != "random" and spec.flip == 0:
        return View(choose_box(width, height, spec.crop), False)
    # Four draws in a fixed order: scale, x, y, flip.  A spec without random crop uses the fourth all the same, so
    # that the mirrored views do not depend on the kind of crop.
    draws = SplitMix64(view_seed(spec.seed, key, view))
    scale, along_x, along_y, flip = (draws.next_unit() for _ in range(4))
    low, high = spec.random_scale
    box = choose_box(width, height, spec.crop, scale=low + (high - low) * scale, along_x=along_x, along_y=along_y)
    return View(box, flip < spec.flip)


def choose_box(
    width: int, height: int, crop: str, *, scale: float = 1.0, along_x: float = 0.5, along_y: float = 0.5
) -> Box:
    """Return the box of a crop ("center", "random", "exact") in an upright source.

    Only "random" looks at `scale`, the side as a share of the short side, and at the place, in [0, 1) of the room that
    is left.  An odd rest of a centred crop goes to the right and the bottom."""
    if crop == "exact":
        return Box(0, 0, width, height)
    short = min(width, height)
    if crop == "center":
        return Box((width - short) // 2, (height - short) // 2, short, short)
    side = min(short, max(1, round(short * scale)))
    return Box(int(along_x * (width - side + 1)), int(along_y * (height - side + 1)), side, side)


def upright_size(width: int, height: int, orientation: int) -> tuple[int, int]:
    """Return width and height of a stored frame once it is upright."""
    return (height, width) if orientation >= _FIRST_TRANSPOSED else (width, height)


def stored_box(box: Box, width: int, height: int, orientation: int) -> Box:
    """Return where a box of the upright source lies in the stored frame of `width` x `height`."""
    x, y, box_width, box_height = box
    if orientation >= _FIRST_TRANSPOSED:
        x, y, box_width, box_height = y, x, box_height, box_width
    if orientation in _MIRRORED_IN_X:
        x = width - x - box_width
    if orientation in _MIRRORED_IN_Y:
        y = height - y - box_height
    return Box(x, y, box_width, box_height)


def turn_upright(frame_CHW: torch.Tensor, orientation: int) -> torch.Tensor:
    """Return a stored frame shown upright, contiguous."""
    mirrored = [
        dim for dim, members in ((-1, _MIRRORED_IN_X), (-2, _MIRRORED_IN_Y)) if orientation in members
    ]  # fmt: skip
    if mirrored:
        frame_CHW = frame_CHW.flip(mirrored)
    if orientation >= _FIRST_TRANSPOSED:
        frame_CHW = frame_CHW.transpose(-1, -2)
    return frame_CHW.contiguous()


def resize_box(
    pixels_HWC: Pixels,
    box: Box,
    size: tuple[int, int],
    filter: Filter,
    engine: Engine,
    out_1CHW: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return one box of a stored frame resized to exactly `size` (width, height), antialiased.

    Nothing outside of the box is looked at.  Returns uint8 [3, height, width], planar; where `out_1CHW` is given, that,
    filled: uint8 [1, 3, height, width]."""
    width, height = size
    region_HWC = pixels_HWC[box.y : box.y + box.height, box.x : box.x + box.width]
    if engine == "pillow":
        resized = Image.fromarray(region_HWC).resize((width, height), _PILLOW_FILTERS[filter])
        frame_CHW = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        return frame_CHW.contiguous() if out_1CHW is None else out_1CHW.copy_(frame_CHW)
    # Interleaved pixels seen as channels-last take torch's fast path, and the result is planar.
    # The axes are turned in numpy, whose views, unlike torch's, never let go of the interpreter's lock.
    region_1CHW = torch.from_numpy(region_HWC.transpose(2, 0, 1)[None])
    if out_1CHW is None:
        return F.interpolate(region_1CHW, (height, width), mode=filter, antialias=True)[0].contiguous()
    if (operator := _operator_with_out(filter)) is None:
        return out_1CHW.copy_(F.interpolate(region_1CHW, (height, width), mode=filter, antialias=True))
    operator(region_1CHW, (height, width), False, None, None, out=out_1CHW)
    return out_1CHW


@functools.cache
def _operator_with_out(filter: Filter) -> Callable[..., torch.Tensor] | None:
    """What `F.interpolate` calls, in the form that writes into given memory; None where this torch has none."""
    operator = getattr(torch.ops.aten, f"_upsample_{filter}2d_aa", None)
    return getattr(operator, "out", None)


def check_engine(filter: Filter, engine: Engine) -> None:
    """Raise SpecError if the installed torch cannot resize bytes with `filter`; never switch silently."""
    if engine == "pillow":
        return
    try:
        resize_box(np.zeros((8, 8, 3), np.uint8), Box(0, 0, 8, 8), (4, 4), filter, engine)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise SpecError(
            f"preprocess.filter: torch {torch.__version__} cannot resize 8-bit pixels with {filter!r}. "
            "Set preprocess.engine to 'pillow' or preprocess.filter to 'bicubic' (either makes other bits), or install "
            "torch 2.13 or newer."
        ) from error
