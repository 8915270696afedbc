"""Reads the header of a safetensors file and hashes its tensors, without torch: a driver resumes a job with it.

A safetensors file is 8 bytes of header length (little endian), a JSON header, then the tensors' bytes without gaps."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Iterable
from typing import Any, NamedTuple

from schemas.errors import CheckpointError, printable

MAX_HEADER_BYTES = 16 << 20
"""A tensor takes about 100 bytes of header; the largest preset has 300 tensors."""
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class TensorEntry(NamedTuple):
    """Where one tensor lies: bytes [start, end) of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_tensor_entries(buffer: bytes | mmap.mmap, where: str) -> list[TensorEntry]:
    """The tensors of a safetensors file in name order. Raises CheckpointError where it is damaged or inconsistent."""
    size = len(buffer)
    if size < 8:
        raise CheckpointError(f"{where}: {size} bytes are no safetensors file.")
    header_bytes = int.from_bytes(buffer[:8], "little")
    if header_bytes > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(
            f"{where}: the header claims {header_bytes:,} bytes of a file of {size:,}; at most {MAX_HEADER_BYTES:,} "
            "are read. The file is cut off or no safetensors file."
        )
    try:
        header = json.loads(buffer[8 : 8 + header_bytes].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: the safetensors header is not JSON.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{where}: the safetensors header is no object.")
    header.pop("__metadata__", None)
    entries = [_entry(name, value, 8 + header_bytes, where) for name, value in header.items()]

    expected_start = 8 + header_bytes
    for entry in sorted(entries, key=lambda each: (each.start, each.end)):
        if entry.start != expected_start:
            raise CheckpointError(f"{where}: tensor {printable(entry.name)!r} overlaps another or leaves a gap.")
        expected_start = entry.end
    if expected_start != size:
        raise CheckpointError(f"{where}: the tensors end at byte {expected_start:,}, the file at {size:,}.")
    return sorted(entries)


def weight_sha256_of_buffer(buffer: bytes | mmap.mmap, where: str) -> str:
    """Weight hash of a safetensors file in memory: see `hash_tensors`."""
    entries = read_tensor_entries(buffer, where)
    with memoryview(buffer) as view:
        return hash_tensors((each.name, each.dtype, each.shape, view[each.start : each.end]) for each in entries)


def hash_tensors(tensors: Iterable[tuple[str, str, tuple[int, ...], Any]]) -> str:
    """SHA-256 over name, dtype, shape and bytes of tensors that come in name order.

    Each contributes the line [name, dtype, shape] as JSON without spaces, then its little-endian bytes.  The order
    inside a file, its metadata and its alignment have no part in it."""
    digest = hashlib.sha256()
    for name, dtype, shape, buffer in tensors:
        digest.update(json.dumps([name, dtype, list(shape)], separators=(",", ":")).encode() + b"\n")
        digest.update(buffer)
        if isinstance(buffer, memoryview):
            buffer.release()
    return digest.hexdigest()


def _entry(name: str, value: object, base: int, where: str) -> TensorEntry:
    shown = printable(name)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: tensor {shown!r} lacks dtype, shape or data_offsets.")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{where}: tensor {shown!r} has dtype {dtype!r}; known: {', '.join(ITEM_BYTES)}.")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise CheckpointError(f"{where}: tensor {shown!r} has an impossible shape or place.")
    start, end = offsets
    if end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(f"{where}: tensor {shown!r} of shape {shape} does not fill its {end - start:,} bytes.")
    return TensorEntry(name, dtype, tuple(shape), base + start, base + end)


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(each) is int and 0 <= each < 1 << 48 for each in values)
