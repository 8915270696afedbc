"""How much of a video file is missing, by what its container declares.  Standard library only.

A decoder ends at a cut without a word in some containers (Matroska), and with a vague error in others.
"""

from __future__ import annotations

import struct

_ISO_BOXES = frozenset(
    (b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"styp", b"sidx", b"mfra", b"meta", b"uuid")
)
_EBML_HEADER = 0x1A45DFA3
_SEGMENT = 0x18538067
# A hostile file can hold half a million empty elements in each MB.
_MAX_ELEMENTS = 100_000
_UNKNOWN_RIFF_SIZES = (0, 0xFFFFFFFF)


def missing_bytes(payload: bytes) -> int:
    """Return how many bytes the outermost boxes, chunks or elements promise beyond the end; 0 if none or unknown."""
    if payload[4:8] in _ISO_BOXES:
        return _missing_iso(payload)
    if payload.startswith(b"\x1a\x45\xdf\xa3"):
        return _missing_matroska(payload)
    if payload.startswith(b"RIFF") and len(payload) >= 8:
        declared = int.from_bytes(payload[4:8], "little")
        return 0 if declared in _UNKNOWN_RIFF_SIZES else max(0, 8 + declared - len(payload))
    return 0


def _missing_iso(payload: bytes) -> int:
    position = 0
    for _ in range(_MAX_ELEMENTS):
        if position + 8 > len(payload):
            return 0
        size: int
        size, kind = struct.unpack_from(">I4s", payload, position)
        if kind not in _ISO_BOXES or size == 0:  # junk after the last box, or a box that reaches to the end
            return 0
        if size == 1:
            if position + 16 > len(payload):
                return position + 16 - len(payload)
            (size,) = struct.unpack_from(">Q", payload, position + 8)
        if size < 8:
            return 0
        position += size
        if position > len(payload):
            return position - len(payload)
    return 0


def _missing_matroska(payload: bytes) -> int:
    position = 0
    for _ in range(_MAX_ELEMENTS):
        element, position = _variable_integer(payload, position, keep_marker=True)
        size, position = _variable_integer(payload, position, keep_marker=False)
        if element is None or size is None:
            return 0
        if element == _SEGMENT:  # its children are walked; its own size is unknown in a live stream
            if size >= 0 and position + size > len(payload):
                return position + size - len(payload)
            continue
        if size < 0:
            return 0
        position += size
        if position > len(payload):
            return position - len(payload)
    return 0


def _variable_integer(payload: bytes, position: int, *, keep_marker: bool) -> tuple[int | None, int]:
    """Return an EBML number and the position after it; -1 for an unknown size, None at the end or at junk."""
    if position >= len(payload) or payload[position] == 0:
        return None, position
    length = 9 - payload[position].bit_length()
    raw = payload[position : position + length]
    if len(raw) < length:
        return None, position
    value = int.from_bytes(raw, "big")
    if not keep_marker:
        mask = (1 << 7 * length) - 1
        value = -1 if value & mask == mask else value & mask
    return value, position + length
