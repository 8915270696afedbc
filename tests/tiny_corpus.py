"""Tiny shards of real files, the command line, and what a dataset folder holds."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import av
import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
BSQ = [sys.executable, "-c", "from jobs.entry import main; main()"]


def jpeg(seed: int, width: int = 96, height: int = 80) -> bytes:
    """A JPEG of smooth random colours, different for each seed."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    sink = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=92)
    return sink.getvalue()


def mp4(seed: int, num_frames: int, *, width: int = 96, height: int = 80, rate: int = 8) -> bytes:
    """An H.264 clip in which a light square moves over random colours."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 200, (4, 4, 3), dtype=np.uint8))
    ground = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "18", "preset": "ultrafast"}
        for number in range(num_frames):
            frame = ground.copy()
            left = 4 * number % (width - 16)
            frame[20:36, left : left + 16] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return sink.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Write a ustar archive with fixed metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, payload in members:
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))
    return path


def photo_members(first: int, count: int) -> list[tuple[str, bytes]]:
    """Members of `count` samples: a JPEG, a caption, a label and a json each."""
    members = []
    for number in range(first, first + count):
        key = f"{number:06d}"
        members += [
            (f"{key}.jpg", jpeg(number)),
            (f"{key}.txt", f"picture {number}".encode()),
            (f"{key}.cls", str(number % 7).encode()),
            (f"{key}.json", json.dumps({"number": number}).encode()),
        ]
    return members


RunBsq = Callable[..., subprocess.CompletedProcess[str]]


def bsq_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200", **(extra or {})}


def dataset_files(out: Path) -> dict[str, str]:
    """SHA-256 of every token file and failure table, by name."""
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("tokens", "failures")
        for path in sorted((out / folder).rglob("*"))
        if path.is_file()
    }


def temporaries(out: Path) -> list[str]:
    """Temporary files anywhere in the dataset."""
    return [path.name for path in out.rglob("*") if path.name.endswith(".tmp")]
