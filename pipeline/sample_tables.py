"""How many samples the tables of an MP4, MOV or AVI file declare, before a demuxer takes memory for them.

FFmpeg expands its tables when it opens a file, to tens of bytes for each sample, and twelve bytes can declare billions
of samples.  Standard library only.
"""

from __future__ import annotations

import re
import struct
import sys
import zlib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator

from schemas.errors import MediaCorrupt, VideoTooLong
from schemas.jobspec import LimitsSpec

MAX_OTHER_SAMPLES = 4_000_000
"""Of the tracks beside the film, together: a day of compressed sound."""
MAX_PCM_SAMPLES = 1 << 31
"""Of one track of uncompressed sound: three hours at 192 kHz."""
MAX_HEADER_BYTES = 16 << 20
"""Of a header that is stored compressed."""
MAX_AVI_TRACKS = 16
"""For each of them FFmpeg may make half a million entries from one of 16 bytes."""

_FIRST_BOXES = frozenset(
    b"ftyp moov mdat moof free skip wide styp sidx mfra meta uuid pnot PICT udta junk hoov prft emsg".split()
)
# Looked for by name and not by place: FFmpeg reads a table in nearly every box.
_TABLE = re.compile(rb"stsz|stz2|stts|ctts|trun|elst")
_SEGMENT_INDEX = re.compile(rb"sidx")
_COMPRESSED_HEADER = re.compile(rb"cmvd")
_NOT_IN_HEADER = re.compile(rb"cmvd|sidx")
_PCM_NAMES = re.compile(rb"stsz|stz2|stts|stsc|stco|co64")
_HANDLER_TYPES = re.compile(rb"(?=hdlr.{8}(.{4}))", re.DOTALL)
_HANDLERS_OF_SOUND = frozenset((b"soun", b"url ", b"alis", b"rsrc"))
# A hostile file can hold a hundred thousand empty boxes in each MB.
_MAX_BOXES = 100_000
# Each edit may repeat all samples of its track; usually there are one or two.
_USUAL_EDITS = 4


def is_iso(payload: bytes) -> bool:
    """Whether a file begins as MP4, MOV and their relatives do."""
    return payload[4:8] in _FIRST_BOXES


def check_sample_tables(payload: bytes, limits: LimitsSpec) -> None:
    """Look at every table of an ISO file that makes a demuxer take memory for what it declares.

    Raises VideoTooLong for more samples than `limits` and MAX_OTHER_SAMPLES allow, MediaCorrupt for tables that
    overlap and for an index that points into the data."""
    boxes = list(_boxes(payload, 0, len(payload)))
    spans = _outside_data(boxes, len(payload))
    _check_segment_indexes(payload, spans, boxes)
    _check_declared(payload, spans, limits)
    for header in _inflated_headers(payload, spans):
        _check_declared(header, [(0, len(header))], limits)


def check_avi_tracks(payload: bytes) -> None:
    """Raise MediaCorrupt for an AVI file of more tracks than any has."""
    tracks = payload.count(b"strh")
    if tracks > MAX_AVI_TRACKS:
        raise MediaCorrupt(f"the AVI has {tracks:,} tracks; at most {MAX_AVI_TRACKS} are read. Replace the file.")


def _check_declared(content: bytes, spans: list[tuple[int, int]], limits: LimitsSpec) -> None:
    most = limits.max_video_frames + MAX_OTHER_SAMPLES
    declared = _count_samples(content, spans, frozenset())
    if declared > most:
        declared = _count_samples(content, spans, frozenset(_pcm_tables(content)))
    if declared > most:
        raise VideoTooLong(
            f"the tables of the video declare {declared:,} samples, over limits.max_video_frames "
            f"({limits.max_video_frames:,}) and {MAX_OTHER_SAMPLES:,} for other tracks."
        )


def _boxes(content: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind, first byte of content, and end of each box between two positions."""
    for _ in range(_MAX_BOXES):
        if start + 8 > end:
            return
        size: int
        size, kind = struct.unpack_from(">I4s", content, start)
        head = 8
        if size == 1 and start + 16 <= end:
            (size,) = struct.unpack_from(">Q", content, start + 8)
            head = 16
        elif size == 0:
            size = end - start
        if size < head:
            return
        yield kind, start + head, min(start + size, end)
        start += size


def _outside_data(boxes: list[tuple[bytes, int, int]], num_bytes: int) -> list[tuple[int, int]]:
    """Return the spans of a file that hold no film: where its tables are."""
    spans = []
    start = 0
    for kind, first, end in boxes:
        if kind == b"mdat":
            spans.append((start, first))
            start = end
    return [*spans, (start, num_bytes)]


def _find(pattern: re.Pattern[bytes], content: bytes, spans: list[tuple[int, int]]) -> Iterator[tuple[bytes, int]]:
    """Yield each name found, and the position after it and the box's long size, if it has one."""
    for start, end in spans:
        for found in pattern.finditer(content, start, end):
            is_long = content[max(0, found.start() - 4) : found.start()] == b"\0\0\0\1"
            yield found.group(), found.end() + 8 * is_long


def _count_samples(content: bytes, spans: list[tuple[int, int]], passed_over: frozenset[int]) -> int:
    """Return the largest sum over the tables of one kind, without those that begin at `passed_over`."""
    sums: Counter[bytes] = Counter()
    most_edits = 1
    bytes_left = len(content)
    for kind, position in _find(_TABLE, content, spans):
        if position in passed_over:
            continue
        count = _number(content, position + 4)
        if kind in (b"stsz", b"stz2"):
            sums[b"stsz"] += _number(content, position + 8)
        elif kind == b"trun":
            sums[kind] += count
        elif kind == b"elst":
            most_edits = max(most_edits, min(count, (len(content) - position) // 12))
        else:
            runs = content[position + 8 : position + 8 + 8 * count]
            bytes_left -= len(runs)
            if bytes_left < 0:
                raise MediaCorrupt("the tables of the video overlap each other. Replace the file.")
            sums[kind] += _sum_of_counts(runs)
    return max(sums.values(), default=0) * max(1, most_edits // _USUAL_EDITS)


def _number(content: bytes, position: int) -> int:
    return int.from_bytes(content[position : position + 4], "big")


def _sum_of_counts(runs: bytes) -> int:
    """Return the sum of the counts of runs: pairs of a count and a value, of 32 bits each."""
    numbers = array("I", runs[: len(runs) // 8 * 8])
    if sys.byteorder == "little":
        numbers.byteswap()
    return sum(numbers[::2])


def _check_segment_indexes(payload: bytes, spans: list[tuple[int, int]], boxes: list[tuple[bytes, int, int]]) -> None:
    """Refuse an index that sends the demuxer into the data, where no tables are looked for."""
    data = [(first, end) for kind, first, end in boxes if kind == b"mdat"]
    known = {first for kind, first, _ in boxes if kind == b"sidx"}
    for first, end in (box[1:] for box in boxes if box[0] == b"sidx"):
        is_wide = payload[first : first + 1] != b"\0"
        entries = first + (32 if is_wide else 24)
        if entries > end:
            continue
        target = end + struct.unpack_from(">q" if is_wide else ">I", payload, first + (20 if is_wide else 16))[0]
        last = entries + 12 * int.from_bytes(payload[entries - 2 : entries], "big")
        if last > end:
            raise _misplaced_index()
        for size, _, _ in struct.iter_unpack(">III", payload[entries:last]):
            box = bisect_right(data, (target, len(payload))) - 1
            if box >= 0 and target < data[box][1]:
                raise _misplaced_index()
            target += size & 0x7FFFFFFF
    if any(position not in known for _, position in _find(_SEGMENT_INDEX, payload, spans)):
        raise _misplaced_index()


def _misplaced_index() -> MediaCorrupt:
    return MediaCorrupt("the segment index of the video stands or points where none can be. Replace the file.")


def _inflated_headers(payload: bytes, spans: list[tuple[int, int]]) -> Iterator[bytes]:
    """Yield the header of a file that stores it compressed, as old QuickTime does."""
    found = [match.end() for start, end in spans for match in _COMPRESSED_HEADER.finditer(payload, start, end)]
    if len(found) > 1:
        raise MediaCorrupt("the video has more than one compressed header. Replace the file.")
    for position in found:
        inflater = zlib.decompressobj()
        try:
            header = inflater.decompress(memoryview(payload)[position + 4 :], MAX_HEADER_BYTES)
        except zlib.error:
            return
        if inflater.unconsumed_tail or _NOT_IN_HEADER.search(header):
            raise MediaCorrupt("the compressed header of the video is none that can be trusted. Replace the file.")
        yield header


def _pcm_tables(content: bytes) -> Iterator[int]:
    """Yield where the names of tables end that count the samples of uncompressed sound.

    FFmpeg makes packets of them that hold up to 1,024, and takes memory for those only."""
    for kind, first, end in _boxes(content, 0, len(content)):
        if kind == b"moov":
            for inner, start, stop in _boxes(content, first, end):
                if inner == b"trak":
                    yield from _pcm_tables_of_track(content, start, stop)


def _pcm_tables_of_track(content: bytes, start: int, end: int) -> Iterator[int]:
    handler = _box_at(content, start, end, b"mdia", b"hdlr")
    table = (b"mdia", b"minf", b"stbl")
    tables = [_box_at(content, start, end, *table, kind) for kind in (b"stsz", b"stts", b"stsc")]
    chunks = max(_box_at(content, start, end, *table, kind) for kind in (b"stco", b"co64"))
    if handler < 0 or chunks < 0 or min(tables) < 0 or content[handler + 8 : handler + 12] != b"soun":
        return
    # Whatever else could change what the track is or has, wherever it stands, keeps its tables from being passed over.
    names = Counter(_PCM_NAMES.findall(content, start, end))
    if max(names.values()) > 1 or not _HANDLERS_OF_SOUND.issuperset(_HANDLER_TYPES.findall(content, start, end)):
        return
    sizes, times, runs = tables
    if content[times + 4 : times + 8] + content[times + 12 : times + 16] != b"\0\0\0\1" * 2:
        return
    num_runs = min(_number(content, runs + 4), (end - runs) // 12)
    most = max((run[1] for run in struct.iter_unpack(">III", content[runs + 8 : runs + 8 + 12 * num_runs])), default=0)
    if most * min(_number(content, chunks + 4), (end - chunks) // 4) <= MAX_PCM_SAMPLES:
        yield from (sizes, times)


def _box_at(content: bytes, start: int, end: int, *path: bytes) -> int:
    """Return the first byte of what the first box at a path holds, -1 where there is none."""
    for name in path:
        found = next(((first, last) for kind, first, last in _boxes(content, start, end) if kind == name), None)
        if found is None:
            return -1
        start, end = found
    return start
