"""Small videos whose frames tell their number, and what is picked of them."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np

from pipeline.video import Deadline, pick_frames, to_rgb
from schemas.jobspec import LimitsSpec

LIMITS = LimitsSpec()
TICK = Fraction(1, 12800)


def level(number: int) -> int:
    """Grey level that tells which frame this is."""
    return 20 + 5 * number


def make_video(
    frames: int | list[np.ndarray] = 20,
    *,
    rate: Fraction = Fraction(25),
    times: list[Fraction] | None = None,
    container: str = "mp4",
    codec: str = "libx264",
    pixels: str = "yuv420p",
    size: tuple[int, int] = (64, 48),
    rotation: int = 0,
    aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    movflags: str = "",
) -> bytes:
    """A video of flat grey frames, or of the given RGB arrays, at a constant rate or at the given seconds."""
    if isinstance(frames, int):
        frames = [np.full((size[1], size[0], 3), level(number), np.uint8) for number in range(frames)]
    file = io.BytesIO()
    with av.open(file, "w", format=container, options={"movflags": movflags} if movflags else {}) as output:
        stream = output.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height = frames[0].shape[1], frames[0].shape[0]
        stream.pix_fmt = pixels
        if codec != "mpeg2video" and codec != "mpeg4":
            stream.codec_context.time_base = TICK
        if codec == "libx264":
            stream.options = {"crf": "4", "g": "8", "bf": "0", "threads": "1", **(options or {})}
        if aspect is not None:
            stream.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        for number, pixels_HWC in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")
            seconds = times[number] if times is not None else number / Fraction(rate)
            frame.pts, frame.time_base = round(seconds / TICK), TICK
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def pick(payload: bytes, fps="source", limits: LimitsSpec = LIMITS) -> list:
    return list(pick_frames(payload, fps, limits, Deadline(limits.decode_timeout_seconds)))


def numbers(picked) -> list[int]:
    return [round((float(to_rgb(frame).mean()) - 20) / 5) for frame in picked]
