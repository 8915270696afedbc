"""Originals beside what their tokens decode to, for a handful of rows, small enough to lie inside a page."""

from __future__ import annotations

import base64
import io
import math
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from jobs.commit_table import CommitTable
from jobs.originals import Frames, read_originals
from jobs.reconstruct import TokenDecoder, psnr
from jobs.sample_rows import choose_rows, read_rows
from pipeline.byte_stream import RetryPolicy
from pipeline.find_rows import FoundRow
from pipeline.queues import Stopped
from pipeline.storage import Storage
from pipeline.stub import STUB_NAME
from schemas.errors import BsqError, InputError
from schemas.job import Job

PICTURES = 8
PICTURES_OF_DRIFTING = 2
"""More, of each of the first drifting shards."""
MAX_DRIFTING = 2
MAX_SIDE_PX = 256
SOURCE_SECONDS = 60.0
"""Sources that have not answered by then count as out of reach."""
MAX_STREAM_BYTES = 256 << 20
"""Of one compressed shard, which can only be read from its beginning."""
MOST_FRAMES = 4
"""Of a clip: attention over a whole one can take minutes on a CPU."""
WEBP_QUALITY = 92


@dataclass(slots=True)
class Pair:
    """One row: its original, if it could be read, and its reconstruction."""

    shard: int
    key: str
    clip: int
    frame: int
    """Shown frame, from 0."""
    frames: int
    """Of the whole clip."""
    decoded: str
    """A data URL."""
    original: str | None = None
    decibels: float | None = None
    """PSNR over the frames that were decoded; infinite for equal ones."""
    missing: str = ""
    """Why there is no original."""
    drifting: bool = False
    """From a shard that drifts."""


@dataclass(slots=True)
class Pictures:
    """What could be shown."""

    pairs: list[Pair] = field(default_factory=list)
    note: str = ""
    """Why there are none, or not all."""
    side_px: int = 0

    @property
    def missing(self) -> Counter[str]:
        """Pairs without an original, by the reason."""
        return Counter(pair.missing for pair in self.pairs if pair.missing)

    @property
    def decibels(self) -> list[float]:
        """PSNR of the pairs of unlike pictures, those of drifting shards left out."""
        known = [each.decibels for each in self.pairs if each.decibels is not None and not each.drifting]
        return [decibels for decibels in known if decibels < math.inf]


def make_pictures(
    storage: Storage,
    job: Job,
    commits: CommitTable,
    drifting: Sequence[int],
    seed: int,
    storage_options: Mapping[str, Any] | None,
) -> Pictures:
    """Decode PICTURES random rows, and some of the shards in `drifting`, and read their originals again."""
    if job.tokenizer.config.get("preset") == STUB_NAME:
        return Pictures(note="Made with the stub of tests and benchmarks, whose tokens cannot be decoded.")
    found = Pictures()
    chosen = set(choose_rows(commits, PICTURES, seed))
    shards = commits.column("shard")
    for shard in drifting[:MAX_DRIFTING]:
        own = np.flatnonzero((shards == shard) & (commits.column("rows") > 0))
        chosen |= _first_rows(commits, int(own[0]))
    rows: list[FoundRow] = []
    for place in sorted(chosen):
        try:
            rows += read_rows(storage, commits, [place])
        except BsqError as error:
            found.note = str(error)
    if not rows:
        found.note = found.note or "The dataset has no rows yet."
        return found
    try:
        decoder = TokenDecoder(storage, job, storage_options)
        decoded = [decoder.frames(row, MOST_FRAMES) for row in rows]
    except BsqError as error:
        return Pictures(note=f"The tokens cannot be decoded: {error}")
    originals = _originals_in_time(rows, job, storage_options)
    is_drifting = set(drifting)
    for number, (row, frames_THWC) in enumerate(zip(rows, decoded, strict=True)):
        last = len(frames_THWC) - 1
        pair = Pair(
            shard=row.source.shard,
            key=row.values["key"],
            clip=row.values["clip"],
            frame=last,
            frames=row.values["frames"],
            decoded=_data_url(frames_THWC[last]),
            drifting=row.source.shard in is_drifting,
        )
        original = originals.get(number)
        if isinstance(original, np.ndarray) and len(original) == pair.frames:
            pair.original = _data_url(original[last])
            pair.decibels = psnr(original[: last + 1], frames_THWC)
        else:
            pair.missing = str(original) if isinstance(original, InputError) else _MISSED
        found.pairs.append(pair)
    found.side_px = min(MAX_SIDE_PX, decoded[0].shape[1])
    return found


_MISSED = f"the source did not answer within {SOURCE_SECONDS:.0f} seconds, or holds another clip now."


def _first_rows(commits: CommitTable, file: int) -> set[tuple[int, int]]:
    rows = int(commits.table["rows"][file].as_py())
    return {(file, rows * number // PICTURES_OF_DRIFTING) for number in range(PICTURES_OF_DRIFTING)}


def _originals_in_time(
    rows: Sequence[FoundRow], job: Job, storage_options: Mapping[str, Any] | None
) -> dict[int, Frames | InputError]:
    stop = threading.Event()
    alarm = threading.Timer(SOURCE_SECONDS, stop.set)
    alarm.daemon = True
    alarm.start()
    found: dict[int, Frames | InputError] = {}
    try:
        found.update(
            read_originals(
                rows,
                job,
                storage_options,
                stop=stop,
                retry=RetryPolicy(attempts=2, first_wait_seconds=0.2),
                max_stream_bytes=MAX_STREAM_BYTES,
            )
        )
    except Stopped:
        pass
    finally:
        alarm.cancel()
    return found


def _data_url(frame_HWC: Frames) -> str:
    picture = Image.fromarray(frame_HWC)
    if max(picture.size) > MAX_SIDE_PX:
        picture.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX), Image.Resampling.LANCZOS)
    sink = io.BytesIO()
    picture.save(sink, "WEBP", quality=WEBP_QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(sink.getvalue()).decode("ascii")
