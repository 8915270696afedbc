"""The first samples of a shard, as a small shard on this disk: what a plan measures with."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from pipeline.byte_stream import open_shard
from pipeline.group import group_samples
from pipeline.tar import read_members
from schemas.errors import ArchiveError, ShardError
from schemas.jobspec import LimitsSpec

PIECE_BYTES = 4 << 20
CHECK_BYTES = 16 << 20
"""After so many bytes each time it is counted how many samples there are."""
MAX_EXCERPT_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Excerpt:
    """The beginning of a shard."""

    path: Path
    is_whole: bool
    """Nothing was cut off."""
    num_samples: int
    """Samples in it, the one that was cut in two not counted."""
    stored_bytes: int
    """Bytes that storage sent for it."""
    shard_bytes: int
    """Bytes of the whole shard, as stored."""
    seconds: float
    """What reading it took, from opening to its last byte."""

    @property
    def shard_samples(self) -> float:
        """How many samples the whole shard has, if the rest is like its beginning."""
        if self.is_whole:
            return self.num_samples
        # On average half a sample was cut off.
        return (self.num_samples + 0.5) * self.shard_bytes / self.stored_bytes


def cut_excerpt(
    url: str, path: Path, *, min_samples: int, limits: LimitsSpec, storage_options: Mapping[str, Any] | None = None
) -> Excerpt:
    """Copy the first bytes of a shard, decompressed, to `path`: `min_samples` samples or somewhat more.

    Fewer where the shard ends before, or after 256 MiB.  Damage is copied as it is, and ends the copy.  Raises
    ShardError when the shard cannot be opened or read."""
    began = time.monotonic()
    num_bytes = num_samples = 0
    is_whole = False
    reading_seconds = 0.0
    with open_shard(url, storage_options) as stream, path.open("wb") as file:
        while num_bytes < MAX_EXCERPT_BYTES and num_samples < min_samples and not is_whole:
            check_at = min(num_bytes + CHECK_BYTES, MAX_EXCERPT_BYTES)
            while num_bytes < check_at:
                try:
                    piece = stream.read(min(PIECE_BYTES, check_at - num_bytes))
                except ArchiveError:
                    piece = b""
                file.write(piece)
                num_bytes += len(piece)
                if not piece:
                    is_whole = True
                    break
            reading_seconds += time.monotonic() - began
            file.flush()
            num_samples = _count_samples(path, limits)
            began = time.monotonic()
        stored = stream.bytes_read if stream.compression else num_bytes
        return Excerpt(path, is_whole, num_samples, stored, stream.size, reading_seconds)


def stored_size(url: str, storage_options: Mapping[str, Any] | None = None) -> int | None:
    """Bytes of a shard as stored; None where storage does not say, or it is not there."""
    try:
        filesystem, path = url_to_fs(url, **dict(storage_options or {}))
        size: int | None = filesystem.size(path)
    except Exception:  # noqa: BLE001 - storage libraries raise what they like; a plan can do without
        return None
    return size


def _count_samples(path: Path, limits: LimitsSpec) -> int:
    count = 0
    with contextlib.suppress(ArchiveError, ShardError), open_shard(str(path)) as stream:
        for sample in group_samples(read_members(stream, limits), limits):
            # The last one may have been cut in two; it comes with the error that ends this.
            count += sample.failure is None or sample.failure.error != "SampleCutOff"
    return count
