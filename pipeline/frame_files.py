"""Writes held frames as JPEG within a number of bytes; `tokenizer.jpeg_frames` says what lies in the file.

Shape letters: N items, T frames, H W pixels."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.training_batches import usable_cpus
from schemas.errors import SpecError

QUALITIES = (95, 93, 90, 87, 84, 80, 75)
"""Tried from the best on; below the last a tokenizer would learn the codec's faults."""
HEADER_BYTES = 4096
"""Of an .npz file besides its arrays, at most."""

Frames = npt.NDArray[np.uint8]
"""[N, T, H, W, 3]"""


def write_jpeg_frames(frames: Mapping[Path, Frames], most_bytes: int) -> tuple[int, int]:
    """Write each array to its .npz file, at the best quality with which all fit; returns the quality and all bytes.

    Raises SpecError where they do not fit even at the lowest."""
    distinct = {path: _distinct(array) for path, array in frames.items()}
    num_bytes = 0
    for quality in QUALITIES:
        coded = {path: _encoded(pictures, quality) for path, (pictures, _) in distinct.items()}
        num_bytes = sum(
            HEADER_BYTES + sum(map(len, pictures)) + 8 * (len(pictures) + distinct[path][1].size)
            for path, pictures in coded.items()
        )
        if num_bytes <= most_bytes:
            break
    else:
        raise SpecError(
            f"The frames take {num_bytes:,} bytes as JPEG of quality {QUALITIES[-1]}, and {max(0, most_bytes):,} are "
            "left for them. Lower data.hold_views, data.hold_scale or data.clips_per_video, or allow more."
        )
    written = 0
    for path, pictures in coded.items():
        np.savez(
            path,
            shape=np.array(frames[path].shape, np.int64),
            jpeg=np.frombuffer(b"".join(pictures), np.uint8),
            ends=np.cumsum([len(picture) for picture in pictures], dtype=np.int64),
            index=distinct[path][1],
        )
        written += path.stat().st_size
    return quality, written


def _distinct(frames_NTHWC: Frames) -> tuple[list[Frames], npt.NDArray[np.int64]]:
    """The different frames, in order, and the number among them of each frame, [N, T]."""
    numbers: dict[bytes, int] = {}
    pictures: list[Frames] = []
    index = np.empty(frames_NTHWC.shape[:2], np.int64)
    for place in np.ndindex(*index.shape):
        digest = hashlib.blake2b(np.ascontiguousarray(frames_NTHWC[place]).data, digest_size=16).digest()
        if digest not in numbers:
            numbers[digest] = len(pictures)
            pictures.append(frames_NTHWC[place])
        index[place] = numbers[digest]
    return pictures, index


def _encoded(pictures: list[Frames], quality: int) -> list[bytes]:
    def encode(picture_HWC: Frames) -> bytes:
        sink = io.BytesIO()
        Image.fromarray(picture_HWC).save(sink, "JPEG", quality=quality, optimize=True)
        return sink.getvalue()

    with ThreadPoolExecutor(usable_cpus()) as pool:
        return list(pool.map(encode, pictures))
