"""Frames kept as JPEG in an .npz file, so that a corpus can travel to a machine that has Pillow but no video codecs.

The file holds, uncompressed: `shape` int64 [5], that of the frames, uint8 [N, T, H, W, 3]; `jpeg` uint8, all pictures
one after the other; `ends` int64 [M], where each of them ends; `index` int64 [N, T], which of them a frame is.  A
frame that neighbouring clips share is kept once."""

from __future__ import annotations

import io
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.errors import SpecError

KEYS = {"shape", "jpeg", "ends", "index"}

Pixels = npt.NDArray[np.uint8]


def decode_jpeg_frames(stored: Mapping[str, npt.NDArray[Any]], where: str) -> Pixels:
    """Decode to uint8 [N, T, H, W, 3] with Pillow, on all cores.  Raises SpecError for what cannot be decoded."""
    try:
        from PIL import Image
    except ImportError as error:
        raise SpecError(
            f"{where}: its frames are JPEG, and Pillow is not installed. Install it, or write frames without --compact."
        ) from error
    shape, ends, index = (np.asarray(stored[name]) for name in ("shape", "ends", "index"))
    data = stored["jpeg"].tobytes()
    begins = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    if (
        shape.shape != (5,)
        or index.shape != tuple(shape[:2])
        or (index.size and not 0 <= index.min() <= index.max() < len(ends))
        or (np.diff(ends, prepend=0) <= 0).any()
        or (len(ends) and ends[-1] != len(data))
    ):
        raise SpecError(f"{where}: the frames' index does not fit their bytes. Write the file again.")
    pictures = np.empty((len(ends), *shape[2:]), np.uint8)

    def decode(number: int) -> None:
        with Image.open(io.BytesIO(data[begins[number] : ends[number]]), formats=["JPEG"]) as picture:
            pictures[number] = np.asarray(picture.convert("RGB"))

    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(decode, range(len(ends))))
    except (OSError, ValueError) as error:
        raise SpecError(f"{where}: a frame is damaged ({error}). Write the file again.") from error
    frames: Pixels = pictures[index]
    return frames
