"""Bytes of a video -> the frames that the clip rule picks, with their times, not yet converted or resized.

Everything that a container says is doubted: its format, sizes, counts, lengths, rotation and times.
"""

from __future__ import annotations

import io
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import av
import av.error
import av.logging
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from pipeline.containers import missing_bytes
from pipeline.frame_times import FrameClock
from pipeline.image import check_size
from pipeline.preprocess import upright_size
from pipeline.sample_tables import check_avi_tracks, check_sample_tables, is_iso
from schemas.errors import (
    DecodeTimeout,
    MediaCorrupt,
    MediaTruncated,
    MediaUnsupported,
    NoFrames,
    SampleError,
    VideoTooLong,
)
from schemas.jobspec import LimitsSpec

Pixels = npt.NDArray[np.uint8]

# Log lines from codec threads take the GIL, which has hung decoders; the failure rows say what matters.
av.logging.set_level(None)

# Containers that hold their own frames.  Playlists and scripts (concat, hls, dash, sdp) open what they name.
_ISO_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2"
_AVI_MAGIC = (b"RIFF", b"ON2 ")
_OTHER_FORMATS = "matroska,webm,avi,mpegts,gif,h264,hevc"
_MICROSECONDS = 1_000_000

# libavutil's AVColorSpace and AVColorRange.
_BT709, _MATRIX_UNSPECIFIED, _BT601 = 1, 2, 5
_LIMITED_RANGE, _FULL_RANGE = 1, 2

# Where a display matrix (a, b, c, d) sends the axes -> EXIF orientation.
_ORIENTATIONS = {
    (1, 0, 0, 1): 1,
    (-1, 0, 0, 1): 2,
    (-1, 0, 0, -1): 3,
    (1, 0, 0, -1): 4,
    (0, 1, 1, 0): 5,
    (0, 1, -1, 0): 6,
    (0, -1, -1, 0): 7,
    (0, -1, 1, 0): 8,
}


class Deadline:
    """The decoding time of one sample; what its consumer takes does not count."""

    def __init__(self, limit_seconds: float) -> None:
        self._limit_seconds = limit_seconds
        self._started = time.monotonic()

    def check(self) -> None:
        """Raise DecodeTimeout when the time is used up."""
        if time.monotonic() - self._started > self._limit_seconds:
            raise DecodeTimeout(
                f"decoding took longer than limits.decode_timeout_seconds ({self._limit_seconds:g}). "
                "Raise the limit, or make the video shorter or smaller."
            )

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = time.monotonic()
        try:
            yield
        finally:
            self._started += time.monotonic() - before


@dataclass(slots=True)
class VideoInfo:
    """What holds for every frame of one video."""

    stored_size: tuple[int, int]
    square_size: tuple[int, int]
    """Width and height as stored, once the pixels are stretched to be square."""
    orientation: int
    """EXIF orientation, 1 to 8, that the display matrix amounts to."""
    has_alpha: bool
    warnings: list[SampleError] = field(default_factory=list)

    @property
    def upright_size(self) -> tuple[int, int]:
        return upright_size(*self.square_size, self.orientation)


@dataclass(slots=True)
class PickedFrame:
    seconds: float
    """In the container's own clock."""
    frame: VideoFrame
    info: VideoInfo


def pick_frames(
    payload: bytes, fps: float | Literal["source"], limits: LimitsSpec, deadline: Deadline
) -> Iterator[PickedFrame]:
    """Yield the picked frames of the first film in a container, in order of time.

    Frame k is the last one with a time <= start + k / fps, never the same one twice; "source" picks every frame.
    A DecodeError or LimitError may follow after any number of frames: these stay good."""
    missing = missing_bytes(payload)
    with _open(payload, missing, limits) as container:
        stream = _film(container, missing, limits)
        clock = FrameClock(stream, fps)
        info: VideoInfo | None = None
        waiting: tuple[int, VideoFrame] | None = None
        for frame in _decode(container, stream, missing, limits, deadline):
            if info is None:
                info = _describe(frame, stream, limits)
            tick = clock.read(frame, info.warnings)
            _check_frame(frame, info, clock, tick, limits)
            if waiting is not None and clock.slot(waiting[0]) < clock.slot(tick):
                yield PickedFrame(clock.seconds(waiting[0]), waiting[1], info)
            waiting = tick, frame
        if info is None or waiting is None:
            raise NoFrames("the container opens but not one frame comes out. Replace the file.")
        tick, frame = waiting
        if clock.slot(tick) < clock.slot(tick + clock.duration(frame)):
            yield PickedFrame(clock.seconds(tick), frame, info)


def to_rgb(picked: PickedFrame) -> Pixels:
    """Return a frame as full-range RGB, uint8 [H, W, 3] as stored, transparency on white.

    Frames that do not name their matrix are BT.709 from 1280 x 577 on and BT.601 below, as players have it."""
    frame, info = picked.frame, picked.info
    width, height = info.stored_size
    matrix = frame.colorspace
    if matrix == _MATRIX_UNSPECIFIED:
        matrix = _BT709 if width >= 1280 or height > 576 else _BT601
    full = frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj")
    rgb = frame.reformat(
        format="rgba" if info.has_alpha else "rgb24",
        src_colorspace=matrix,
        src_color_range=_FULL_RANGE if full else _LIMITED_RANGE,
        dst_color_range=_FULL_RANGE,
        threads=1,
    )
    channels = 4 if info.has_alpha else 3
    plane = rgb.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)  # type: ignore[call-overload]
    pixels_HWC: Pixels = rows[:, : width * channels].reshape(height, width, channels)
    if not info.has_alpha:
        return pixels_HWC
    alpha_HW1 = pixels_HWC[..., 3:].astype(np.uint16)
    on_white = (pixels_HWC[..., :3] * alpha_HW1 + 255 * (255 - alpha_HW1) + 127) // 255
    return on_white.astype(np.uint8)


def _open(payload: bytes, missing: int, limits: LimitsSpec) -> InputContainer:
    formats = _OTHER_FORMATS
    if is_iso(payload):  # and nothing else is opened as such a file, whatever comes later in it
        check_sample_tables(payload, limits)
        formats = _ISO_FORMATS
    elif payload.startswith(_AVI_MAGIC):
        check_avi_tracks(payload)
    # Opening decodes a frame where the header leaves something open: max_pixels binds that codec too.
    options = {"format_whitelist": formats, "protocol_whitelist": "none", "max_pixels": str(limits.max_pixels)}
    try:
        return av.open(io.BytesIO(payload), mode="r", options=options, metadata_errors="replace")
    except av.error.FFmpegError as error:
        if not payload:
            raise MediaTruncated("the video is empty (0 bytes). Copy it again.") from error
        if missing:
            raise _cut(missing, 0) from error
        if isinstance(error, av.error.InvalidDataError) and payload[4:8] == b"ftyp":
            raise MediaCorrupt("the video container cannot be read. Replace the file.") from error
        raise MediaUnsupported(
            f"no video container that can be read; it begins with {payload[:12]!r}. "
            "Convert it to MP4, MOV, WebM, Matroska, AVI or MPEG-TS."
        ) from error


def _film(container: InputContainer, missing: int, limits: LimitsSpec) -> VideoStream:
    """Return the first video stream that is no cover picture, set to one codec thread."""
    for stream in container.streams.video:
        if stream.disposition & (Disposition.attached_pic | Disposition.timed_thumbnails):
            continue
        if stream.codec_context is None:
            raise MediaUnsupported("the video track has an unknown codec. Convert it to H.264 or VP9.")
        stream.codec_context.thread_count = 1
        stream.codec_context.thread_type = "NONE"
        _check_header(container, stream, limits)
        # A codec that meets a larger picture than the header named refuses it before it takes memory.
        stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}
        return stream
    if missing:
        raise _cut(missing, 0)
    kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "no track at all"
    raise NoFrames(f"the container holds no film ({kinds}). Leave the sample out or replace the file.")


def _check_header(container: InputContainer, stream: VideoStream, limits: LimitsSpec) -> None:
    codec = stream.codec_context
    if codec.width and codec.height:
        check_size(codec.width, codec.height, limits, what="video")
    if stream.frames > limits.max_video_frames:
        raise VideoTooLong(
            f"the video declares {stream.frames:,} frames, over limits.max_video_frames ({limits.max_video_frames:,})."
        )
    seconds = None
    if stream.duration is not None and stream.time_base is not None:
        seconds = float(stream.duration * stream.time_base)
    elif container.duration is not None:
        seconds = container.duration / _MICROSECONDS
    if seconds is not None and seconds > limits.max_video_seconds:
        raise VideoTooLong(
            f"the video declares {seconds:,.1f} seconds, over limits.max_video_seconds ({limits.max_video_seconds:g})."
        )


def _decode(
    container: InputContainer, stream: VideoStream, missing: int, limits: LimitsSpec, deadline: Deadline
) -> Iterator[VideoFrame]:
    """Yield every frame; raise where one is damaged, where the data end early, or where a limit is reached."""
    num_packets = num_frames = 0
    try:
        for packet in container.demux(stream):
            deadline.check()
            num_packets += packet.size > 0
            for frame in packet.decode():
                deadline.check()
                num_frames += 1
                if num_frames > limits.max_video_frames:
                    raise VideoTooLong(f"the video has more frames than limits.max_video_frames ({num_frames - 1:,}).")
                if frame.is_corrupt:
                    raise MediaCorrupt(f"frame {num_frames} is damaged, by its decoder's own word. Replace the file.")
                yield frame
    except (SampleError, MemoryError):
        raise
    except av.error.DecoderNotFoundError as error:
        raise MediaUnsupported("the video has a codec that cannot be decoded. Convert it to H.264 or VP9.") from error
    except Exception as error:  # whatever a codec returns
        if missing:
            raise _cut(missing, num_frames) from error
        reason = str(error).split(":")[0] or type(error).__name__
        raise MediaCorrupt(f"decoding stops after {num_frames:,} frames: {reason}. Replace the file.") from error
    if missing:
        raise _cut(missing, num_frames)
    # Other containers count differently: AVI, for one, counts dropped frames.
    if container.format.name.startswith("mov") and num_packets < stream.frames:
        raise MediaTruncated(
            f"the video declares {stream.frames:,} frames but holds the data of {num_packets:,}. Copy it again."
        )


def _cut(missing: int, num_frames: int) -> MediaTruncated:
    return MediaTruncated(
        f"the video ends {missing:,} bytes before its container says, after {num_frames:,} frames. Copy it again."
    )


def _check_frame(frame: VideoFrame, info: VideoInfo, clock: FrameClock, tick: int, limits: LimitsSpec) -> None:
    if (frame.width, frame.height) != info.stored_size:
        width, height = info.stored_size
        raise MediaUnsupported(
            f"the picture changes from {width} x {height} to {frame.width} x {frame.height} at "
            f"{clock.seconds(tick):.3f} s. Split the video there."
        )
    if clock.since_start(tick) > limits.max_video_seconds:
        raise VideoTooLong(
            f"a frame stands at {clock.since_start(tick):,.1f} seconds, over limits.max_video_seconds "
            f"({limits.max_video_seconds:g})."
        )


def _describe(frame: VideoFrame, stream: VideoStream, limits: LimitsSpec) -> VideoInfo:
    width, height = frame.width, frame.height
    check_size(width, height, limits, what="video")
    aspect = stream.sample_aspect_ratio or Fraction(1)
    square = (width, height)
    if aspect > 1:
        square = (round(width * aspect), height)
    elif 0 < aspect < 1:
        square = (width, round(height / aspect))
    if square != (width, height):
        check_size(*square, limits, what="video with square pixels")
    has_alpha = any(component.is_alpha for component in frame.format.components) or frame.format.name == "pal8"
    return VideoInfo((width, height), square, _orientation(frame), has_alpha)


def _orientation(frame: VideoFrame) -> int:
    """Return the EXIF orientation of the frame's display matrix; 1 where it has none or an oblique one."""
    side_data: Any = frame.side_data  # typed wrongly in PyAV's stubs
    try:
        matrix = side_data[SideDataType.DISPLAYMATRIX]
    except KeyError:
        return 1
    a, b, _, c, d = struct.unpack_from("=5i", bytes(matrix))
    return _ORIENTATIONS.get((_sign(a), _sign(b), _sign(c), _sign(d)), 1)


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)
