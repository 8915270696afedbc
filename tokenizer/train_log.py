"""What a run leaves for people: a line of JSON for every log interval, and pictures.  Standard library and NumPy."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

GAP_PX = 4
_PAPER = 255


@dataclass(frozen=True, slots=True)
class TrainReport:
    """Something that happened in a run: new numbers, a line, a picture, or several of them."""

    step: int
    """Updates done."""
    steps: int
    """Updates of the whole run."""
    values: Mapping[str, float] = field(default_factory=dict)
    eta_seconds: float | None = None
    line: str | None = None
    """Something to tell at once."""
    picture: Path | None = None


SHOWN = (
    "loss", "psnr", "least_channel_bits", "code_usage", "grad_norm", "samples_per_second", "val_psnr", "val_bits",
)  # fmt: skip
"""Values of which people are told, in this order."""

Observer = Callable[[TrainReport], None]


def describe_report(report: TrainReport) -> str:
    """The numbers of a report in one line."""
    numbers = ", ".join(f"{name} {report.values[name]:.4g}" for name in SHOWN if name in report.values)
    return f"step {report.step:,} of {report.steps:,}: {numbers}"


class StepLog:
    """log.jsonl of a run; what a resumed run does again stands in it once."""

    def __init__(self, path: Path, step: int) -> None:
        """Open a log of a run that stands at `step`; lines after it are dropped."""
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if (number := _step_of(line)) is not None and number <= step]
        if kept != lines:
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            temporary.replace(path)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None  # the line that was being written when the run was killed


def picture_grid(originals: Sequence[Pixels], reconstructions: Sequence[Pixels]) -> Pixels:
    """Pictures of one size, uint8 [H, W, 3], in two rows: originals above their reconstructions."""
    height, width = originals[0].shape[:2]
    shape = (2 * height + GAP_PX, len(originals) * (width + GAP_PX) - GAP_PX, 3)
    grid = np.full(shape, _PAPER, np.uint8)
    for row, pictures in enumerate((originals, reconstructions)):
        for column, picture in enumerate(pictures):
            top, left = row * (height + GAP_PX), column * (width + GAP_PX)
            grid[top : top + height, left : left + width] = picture
    return grid


def write_png(path: Path, pixels: Pixels) -> None:
    """Write uint8 [H, W, 3] as a PNG, whole or not at all; needs no image library."""
    height, width = pixels.shape[:2]
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 6)), (b"IEND", b""))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, payload in chunks:
            file.write(struct.pack(">I", len(payload)) + name + payload)
            file.write(struct.pack(">I", zlib.crc32(name + payload)))
    temporary.replace(path)
