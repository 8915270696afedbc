"""Pictures and clips through other codecs at a given number of bytes, to compare a tokenizer with.

A JPEG file of 128 px is half tables and header, which a format of fixed pictures would not store; so bytes are counted
in two ways.  `payload_bytes` are those that carry the picture: a JPEG's scans, the packets of a JPEG 2000 codestream,
the bitstream chunk of a WebP, the media data of an AVIF, the slices of an H.264 stream.  `file_bytes` are all.

Shape letters: T frames, H W pixels."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any, Literal

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, features

Frames = npt.NDArray[np.uint8]
"""[T, H, W, 3]"""
CountedBytes = Literal["payload", "file"]

NEIGHBOURS = 2
"""Settings tried on either side of where the bytes cross the target: they do not always grow with the quality."""


@dataclass(frozen=True, slots=True)
class Coded:
    """Frames after a codec, and what they cost."""

    frames_THWC: Frames
    payload_bytes: int
    file_bytes: int
    setting: float
    """Quality, compression ratio or rate factor, as the codec counts."""

    def num_bytes(self, counted: CountedBytes) -> int:
        """Payload or file."""
        return self.payload_bytes if counted == "payload" else self.file_bytes


@dataclass(frozen=True, slots=True)
class Codec:
    """A codec and how it is used."""

    name: str
    description: str
    """Format, encoder and settings, for a report."""
    settings: Sequence[float]
    """From few bytes to many."""
    encode: Callable[[Frames, float], bytes]
    decode: Callable[[bytes], Frames]
    payload_bytes: Callable[[bytes], int]


def picture_codecs() -> list[Codec]:
    """The codecs for single pictures that this Pillow has."""
    qualities = range(101)
    codecs = {
        "jpg": _pillow("jpeg", "JPEG, optimised Huffman tables, 4:2:0", range(1, 101), _jpeg, jpeg_payload_bytes),
        "jpg_2000": _pillow("jpeg2000", "JPEG 2000, irreversible", _ratios(), _jpeg2000, jpeg2000_payload_bytes),
        "webp": _pillow("webp", "WebP, method 6", qualities, _webp, webp_payload_bytes),
        "avif": _pillow("avif", "AVIF, speed 4, 4:2:0", qualities, _avif, avif_payload_bytes),
    }
    # A feature that an older Pillow does not know is not in its list.
    return [codec for feature, codec in codecs.items() if feature in features.get_supported()]


def clip_codecs() -> list[Codec]:
    """The codecs for clips that this PyAV has."""
    if "libx264" not in av.codecs_available:
        return []
    name = "H.264, x264 veryslow, one group of pictures, 4:2:0"
    return [Codec("x264", name, _RATE_FACTORS, _encode_h264, _decode_h264, h264_payload_bytes)]


def h265_codecs() -> list[Codec]:
    """H.265, where this PyAV has it; it takes several times as long as H.264."""
    if "libx265" not in av.codecs_available:
        return []
    name = "H.265, x265 slow, one group of pictures, 4:2:0"
    return [Codec("x265", name, _RATE_FACTORS, _encode_h265, _decode_h265, h265_payload_bytes)]


_RATE_FACTORS = [51 - number / 4 for number in range(4 * 51 + 1)]


def code_nearest(
    codec: Codec, frames_THWC: Frames, num_bytes: int, counted: Sequence[CountedBytes] = ("payload", "file")
) -> list[Coded]:
    """Code uint8 frames so that payload, and file, come nearest to a number of bytes; one result for each of `counted`.

    The smallest there is where even that is larger, which a file's header often is."""

    @cache
    def coded(index: int) -> Coded:
        setting = codec.settings[index]
        data = codec.encode(frames_THWC, setting)
        height, width = frames_THWC.shape[1:3]
        decoded = codec.decode(data)[:, :height, :width]
        return Coded(decoded, codec.payload_bytes(data), len(data), setting)

    return [_nearest(coded, len(codec.settings), num_bytes, way) for way in counted]


def _nearest(coded: Callable[[int], Coded], count: int, num_bytes: int, counted: CountedBytes) -> Coded:
    low, high = 0, count - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if coded(middle).num_bytes(counted) >= num_bytes else (middle + 1, high)
    near = range(max(0, low - NEIGHBOURS), min(count, low + NEIGHBOURS))
    return min(map(coded, near), key=lambda each: abs(each.num_bytes(counted) - num_bytes))


# --- pictures

Options = Callable[[Any, int], dict[str, Any]]
"""What Pillow is told, of a setting and the shorter side of the picture."""


def _jpeg(quality: Any, side: int) -> dict[str, Any]:
    return {"quality": quality, "optimize": True, "subsampling": "4:2:0"}


def _jpeg2000(ratio: Any, side: int) -> dict[str, Any]:
    rate = {"quality_mode": "rates", "quality_layers": [ratio]}
    # The codestream alone, without the boxes of a JP2 file; each resolution halves the side.
    return {**rate, "no_jp2": True, "irreversible": True, "mct": 1, "num_resolutions": min(6, side.bit_length())}


def _webp(quality: Any, side: int) -> dict[str, Any]:
    return {"quality": quality, "method": 6}


def _avif(quality: Any, side: int) -> dict[str, Any]:
    return {"quality": quality, "speed": 4, "max_threads": 1}


def _ratios() -> list[float]:
    """Compression ratios of JPEG 2000, a hundredth apart."""
    return [1000 / 1.01**number for number in range(695)]


def _pillow(
    name: str,
    description: str,
    settings: Sequence[float],
    options: Options,
    payload_bytes: Callable[[bytes], int],
) -> Codec:
    format = name.upper()

    def encode(frames_THWC: Frames, setting: float) -> bytes:
        (picture_HWC,) = frames_THWC
        sink = io.BytesIO()
        Image.fromarray(picture_HWC).save(sink, format, **options(setting, min(picture_HWC.shape[:2])))
        return sink.getvalue()

    def decode(data: bytes) -> Frames:
        with Image.open(io.BytesIO(data)) as picture:
            return np.array(picture.convert("RGB"))[np.newaxis]

    return Codec(name, f"{description} (Pillow)", settings, encode, decode, payload_bytes)


_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7]", re.DOTALL)
"""A marker that is neither a stuffed byte nor a restart inside the scan."""


def jpeg_payload_bytes(data: bytes) -> int:
    """Entropy-coded bytes of all scans of a JPEG, with stuffed zeros and restart markers."""
    position, payload = 2, 0
    while position + 4 <= len(data):
        marker = data[position + 1]
        if marker == 0xD9:
            break
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xDA:
            found = _SCAN_END.search(data, position)
            end = found.start() if found else len(data)
            payload += end - position
            position = end
    return payload


def jpeg2000_payload_bytes(data: bytes) -> int:
    """Packet bytes of all tile parts of a JPEG 2000 codestream: what follows each SOD marker."""
    position, payload = 2, 0
    while position + 4 <= len(data):
        marker, length = struct.unpack_from(">HH", data, position)
        if marker != 0xFF90:
            position += 2 + length
            continue
        (part_bytes,) = struct.unpack_from(">I", data, position + 6)
        end = position + part_bytes if part_bytes else len(data) - 2
        position += 2 + length
        while data[position : position + 2] != b"\xff\x93":
            position += 2 + struct.unpack_from(">H", data, position + 2)[0]
        payload += end - position - 2
        position = end
    return payload


def webp_payload_bytes(data: bytes) -> int:
    """Bytes of the chunks of a WebP that hold bitstreams, without their headers."""
    position, payload = 12, 0
    while position + 8 <= len(data):
        (length,) = struct.unpack_from("<I", data, position + 4)
        if data[position : position + 4] in (b"VP8 ", b"VP8L", b"ALPH"):
            payload += length
        position += 8 + length + length % 2
    return payload


def avif_payload_bytes(data: bytes) -> int:
    """Content bytes of the media data boxes of an AVIF."""
    position, payload = 0, 0
    while position + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        header = 8
        if size == 1:
            (size,), header = struct.unpack_from(">Q", data, position + 8), 16
        size = size or len(data) - position
        if kind == b"mdat":
            payload += size - header
        position += size
    return payload


# --- clips


def _encode_h264(frames_THWC: Frames, rate_factor: float) -> bytes:
    return _encode_clip("libx264", frames_THWC, {"crf": str(rate_factor), "preset": "veryslow"})


def _encode_h265(frames_THWC: Frames, rate_factor: float) -> bytes:
    params = f"keyint={len(frames_THWC)}:min-keyint={len(frames_THWC)}:scenecut=0:pools=none:frame-threads=1"
    options = {"crf": str(rate_factor), "preset": "slow", "x265-params": f"{params}:log-level=none:info=0"}
    return _encode_clip("libx265", frames_THWC, options)


def _encode_clip(encoder: str, frames_THWC: Frames, options: dict[str, str]) -> bytes:
    num_frames, height, width = frames_THWC.shape[:3]
    even_THWC = np.pad(frames_THWC, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    context = av.CodecContext.create(encoder, "w")
    assert isinstance(context, av.VideoCodecContext)
    context.height, context.width = even_THWC.shape[1:3]
    context.pix_fmt, context.framerate, context.time_base = "yuv420p", Fraction(25), Fraction(1, 25)
    context.gop_size, context.thread_count = num_frames, 1
    context.options = options
    packets = []
    for number, frame_HWC in enumerate(even_THWC):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24").reformat(format="yuv420p")
        frame.pts = number
        packets += context.encode(frame)
    packets += context.encode(None)
    return b"".join(bytes(packet) for packet in packets)


def _decode_h264(data: bytes) -> Frames:
    return _decode_clip("h264", data)


def _decode_h265(data: bytes) -> Frames:
    return _decode_clip("hevc", data)


def _decode_clip(decoder: str, data: bytes) -> Frames:
    context = av.CodecContext.create(decoder, "r")
    assert isinstance(context, av.VideoCodecContext)
    context.thread_count = 1
    frames = [frame for packet in [*context.parse(data), *context.parse()] for frame in context.decode(packet)]
    frames += context.decode(None)
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


def h264_payload_bytes(data: bytes) -> int:
    """Bytes of the slices of an H.264 stream (Annex B), without start codes, parameter sets and messages."""
    payload = 0
    for unit in data.split(b"\x00\x00\x01")[1:]:
        if 1 <= unit[0] & 31 <= 5:
            # A start code of four bytes, and the padding that may follow a unit, leave zeros at the end.
            payload += len(unit.rstrip(b"\x00"))
    return payload


def h265_payload_bytes(data: bytes) -> int:
    """Bytes of the slices of an H.265 stream (Annex B), without start codes, parameter sets and messages."""
    payload = 0
    for unit in data.split(b"\x00\x00\x01")[1:]:
        if unit[0] >> 1 & 63 < 32:
            payload += len(unit.rstrip(b"\x00"))
    return payload
