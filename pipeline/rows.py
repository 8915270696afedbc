"""Results of one shard, brought back into source order whatever order they were finished in."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyarrow as pa

from schemas.errors import ArchiveError, SampleError
from schemas.failures import Failure
from schemas.tokenfile import token_schema

if TYPE_CHECKING:
    from pipeline.missing import MissingSamples
    from pipeline.sample import ClipView, Sample
    from pipeline.sidecars import Sidecars


@dataclass(slots=True)
class Row:
    """One clip view on its way through the device."""

    shard: ShardRows
    key: str
    position: int
    source_offset: int
    sidecars: Sidecars
    clip: int
    view: int
    num_frames: int
    width: int
    height: int
    crop: tuple[int, int, int, int]
    flipped: bool
    start: float | None
    frame_times: tuple[float, ...] | None
    tokens: bytes = b""
    spoiled: bool = False
    """Its pixels could not be written; what was said about that is a failure of the sample."""

    @classmethod
    def of(cls, shard: ShardRows, sample: Sample, sidecars: Sidecars, view: ClipView) -> Row:
        """The row of `view`, without its pixels."""
        assert sample.media is not None
        return cls(
            shard=shard,
            key=sample.key,
            position=sample.position,
            source_offset=sample.media.offset,
            sidecars=sidecars,
            clip=view.clip,
            view=view.view,
            num_frames=view.num_frames,
            width=view.width,
            height=view.height,
            crop=view.crop,
            flipped=view.flipped,
            start=view.start,
            frame_times=view.frame_times,
        )


@dataclass(slots=True)
class Seconds:
    """Where the time of one shard went, summed over threads."""

    read: float = 0.0
    decode: float = 0.0
    encode: float = 0.0


@dataclass(slots=True)
class ShardRows:
    """Collects rows and failures of one shard attempt until nothing of it is in flight any more.

    Every stage that takes over something of the shard holds one count; the shard is complete when the last is
    released.  The reader holds one from the beginning."""

    shard: int
    attempt: int
    url: str
    part: int = 0
    missing: MissingSamples | None = None
    """What the shard lacks, where only that is made."""
    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    num_samples: int = 0
    source_bytes: int = 0
    source_etag: str = ""
    num_retries: int = 0
    """Requests for the source that had to be repeated."""
    partial: bool = False
    aborted: bool = False
    """The attempt has failed; what is still in flight is thrown away."""
    suspects: frozenset[str] = frozenset()
    """Keys that are decoded in a child process."""
    contained: bool = False
    """Every sample is."""
    seconds: Seconds = field(default_factory=Seconds)
    began: float = field(default_factory=time.monotonic)
    _in_flight: int = 1
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def hold(self) -> None:
        """Count one more thing in flight."""
        with self._lock:
            self._in_flight += 1

    def release(self, count: int = 1) -> bool:
        """Count so many things less; True for the call that completes the shard."""
        with self._lock:
            self._in_flight -= count
            return self._in_flight == 0

    def add_rows(self, rows: Iterable[Row]) -> None:
        """Take encoded rows."""
        with self._lock:
            self.rows.extend(rows)

    def add_seconds(self, *, decode: float = 0.0, encode: float = 0.0) -> None:
        with self._lock:
            self.seconds.decode += decode
            self.seconds.encode += encode

    def fail_sample(self, sample: Sample, error: SampleError) -> None:
        """Take a failure or warning of `sample`."""
        media = sample.media
        failure = Failure.of_sample(
            error,
            key=sample.key,
            position=sample.position,
            member=media.name if media else None,
            source_offset=media.offset if media else None,
        )
        with self._lock:
            self.failures.append(failure)

    def fail_row(self, row: Row, error: SampleError) -> None:
        """Take a failure of one encoded row; its clip is dropped with all its views."""
        error.clip = row.clip
        failure = Failure.of_sample(
            error, key=row.key, position=row.position, member=None, source_offset=row.source_offset
        )
        with self._lock:
            self.failures.append(failure)

    def fail_archive(self, error: ArchiveError) -> None:
        """Take the damage that ended the archive early."""
        with self._lock:
            self.failures.append(Failure.of_archive(error))
            self.partial = True

    def keep_failures(self, failures: Iterable[Failure]) -> None:
        """Take rows of the shard's earlier failure table that stay true."""
        kept = list(failures)
        with self._lock:
            self.failures += kept
            self.partial = self.partial or any(item.key is None for item in kept)

    def has_clip(self, row: Row) -> bool:
        """Whether an earlier part of the shard holds the clip of `row`."""
        return self.missing is not None and self.missing.has_clip(row.position, row.clip)

    def ordered_rows(self) -> list[Row]:
        """Rows by position, clip and view, without clips of which a view failed."""
        bad = {(item.position, item.clip) for item in self.failures if item.stage == "encode"}
        good = [row for row in self.rows if (row.position, row.clip) not in bad]
        return sorted(good, key=lambda row: (row.position, row.clip, row.view))

    def ordered_failures(self) -> list[Failure]:
        """Failures by position, clip and class, each once; the archive's last."""
        last = (1 << 62, 0)
        unique = {(item.position, item.clip, item.error, item.member): item for item in self.failures}
        return sorted(
            unique.values(),
            key=lambda item: (
                last if item.position is None else (item.position, -1 if item.clip is None else item.clip),
                item.error,
                item.member or "",
            ),
        )


def rows_to_table(rows: Sequence[Row], carry: Sequence[str]) -> pa.Table:
    """Build the columns of a token file, in the order of `rows`."""
    schema = token_schema(carry)
    columns: dict[str, Sequence[object]] = {
        "key": [row.key for row in rows],
        "clip": [row.clip for row in rows],
        "view": [row.view for row in rows],
        "frames": [row.num_frames for row in rows],
        "tokens": [row.tokens for row in rows],
        "width": [row.width for row in rows],
        "height": [row.height for row in rows],
        "crop": [row.crop for row in rows],
        "flipped": [row.flipped for row in rows],
        "start": [row.start for row in rows],
        "frame_times": [row.frame_times for row in rows],
        "position": [row.position for row in rows],
        "source_offset": [row.source_offset for row in rows],
        "caption": [row.sidecars.caption for row in rows],
        "label": [row.sidecars.label for row in rows],
        "metadata": [row.sidecars.metadata for row in rows],
    }
    return pa.Table.from_arrays([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
