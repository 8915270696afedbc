"""Reads single samples of a shard again: at their place where the archive is plain, else by streaming up to them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any

from fsspec.core import url_to_fs

from pipeline.byte_stream import RetryPolicy, open_shard
from pipeline.group import group_samples, split_name
from pipeline.queues import POLL_SECONDS, Stopped
from pipeline.sample import Member
from pipeline.tar import BLOCK_BYTES, plain_header, read_members
from schemas.errors import ArchiveError, ShardError, ShardUnreadable, SourceChanged
from schemas.jobspec import LimitsSpec

FIRST_BYTES = 256 << 10
"""Asked for at the place of a sample: its header and, of most pictures, all of it."""


@dataclass(frozen=True, slots=True)
class SamplePlace:
    """Where a row says that its sample lies."""

    key: str
    position: int
    """Number of the sample in the shard."""
    offset: int
    """First byte of its media member in the (decompressed) tar."""


def read_samples(
    url: str,
    places: Mapping[int, SamplePlace],
    limits: LimitsSpec,
    storage_options: Mapping[str, Any] | None = None,
    *,
    stop: threading.Event | None = None,
    retry: RetryPolicy | None = None,
    max_stream_bytes: int | None = None,
) -> Iterator[tuple[int, Member | ShardError | ArchiveError]]:
    """Yield, for each number in `places`, the media member that lies there, or why it cannot be had; in any order.

    A plain tar is asked for the bytes of the samples alone.  A compressed one, and one that holds something else
    where a sample should be, is streamed from its beginning, up to `max_stream_bytes` if given.  Raises Stopped."""
    stop = stop or threading.Event()
    left = dict(places)
    try:
        with open_shard(url, storage_options, stop=stop, range_bytes=FIRST_BYTES, retry=retry) as stream:
            shown, plain = stream.url, not stream.compression
        if plain:
            for number, place in places.items():
                member = _read_in_place(url, place, limits, storage_options, stop)
                if member is not None:
                    del left[number]
                    yield number, member
        yield from _stream_to(url, shown, left, limits, storage_options, stop, retry, max_stream_bytes)
    except ShardError as error:
        for number in left:
            yield number, error


def _read_in_place(
    url: str,
    place: SamplePlace,
    limits: LimitsSpec,
    storage_options: Mapping[str, Any] | None,
    stop: threading.Event,
) -> Member | None:
    """The member at its recorded offset; None where anything is not as expected, so that streaming decides."""
    start = place.offset - BLOCK_BYTES
    if start < 0:
        return None
    first = _ask(url, start, BLOCK_BYTES + FIRST_BYTES, storage_options, stop)
    header = plain_header(first[:BLOCK_BYTES])
    if header is None:
        return None
    name, size = header
    parts = split_name(name)
    if parts is None or parts[0] != place.key or size > limits.max_member_bytes:
        return None
    payload = first[BLOCK_BYTES : BLOCK_BYTES + size]
    if len(payload) < size:
        payload += _ask(url, place.offset + len(payload), size - len(payload), storage_options, stop)
    return Member(name, "file", size, place.offset, payload) if len(payload) == size else None


def _ask(url: str, start: int, length: int, storage_options: Mapping[str, Any] | None, stop: threading.Event) -> bytes:
    """Up to `length` bytes from `start`; none where the storage does not give them, and streaming will say why."""
    answer: Future[bytes] = Future()

    def work() -> None:
        try:
            filesystem, path = url_to_fs(url, **dict(storage_options or {}))
            with filesystem.open(path, "rb", cache_type="none", block_size=FIRST_BYTES) as file:
                file.seek(start)
                answer.set_result(file.read(length))
        except Exception:  # noqa: BLE001 - a server without ranges, a shard cut short: the stream finds out
            answer.set_result(b"")

    # A daemon, because a request that hangs must not keep the process from ending.
    threading.Thread(target=work, name="read-sample", daemon=True).start()
    while not stop.is_set():
        try:
            return answer.result(timeout=POLL_SECONDS)
        except FutureTimeoutError:
            continue
    raise Stopped


def _stream_to(
    url: str,
    shown: str,
    places: dict[int, SamplePlace],
    limits: LimitsSpec,
    storage_options: Mapping[str, Any] | None,
    stop: threading.Event,
    retry: RetryPolicy | None,
    max_stream_bytes: int | None,
) -> Iterator[tuple[int, Member | ShardError | ArchiveError]]:
    """Take the samples out of `places` as the archive passes by; what is left then is not in it."""
    if not places:
        return
    wanted: dict[int, list[int]] = {}
    for number, place in places.items():
        wanted.setdefault(place.position, []).append(number)
    with open_shard(url, storage_options, stop=stop, retry=retry) as stream:
        try:
            for sample in group_samples(read_members(stream, limits), limits):
                for number in wanted.pop(sample.position, ()):
                    place = places.pop(number)
                    if sample.media is None or sample.key != place.key:
                        problem = f"{shown}: sample {place.position} is not {place.key!r} any more."
                        yield number, SourceChanged(problem)
                    else:
                        yield number, sample.media
                if not wanted:
                    return
                if max_stream_bytes is not None and stream.bytes_read > max_stream_bytes:
                    raise ShardUnreadable(
                        f"{shown}: the sample lies more than {max_stream_bytes / 1e6:,.0f} MB into a shard that can "
                        f"only be read from its beginning."
                    )
        except ArchiveError as error:
            for number in list(places):
                del places[number]
                yield number, error
    for number in list(places):
        del places[number]
        yield number, SourceChanged(f"{shown}: it has fewer samples than when its tokens were made.")
