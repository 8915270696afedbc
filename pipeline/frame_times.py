"""When each frame of a video is shown, and which frames a rate picks: integer arithmetic on the stream's own ticks."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from schemas.errors import FrameTimesMissing, SampleError

_DEFAULT_RATE = Fraction(25)
_DEFAULT_TICK = Fraction(1, 90_000)


class FrameClock:
    """Frame times in whole ticks of the stream, made up from its rate where they are missing or run backwards."""

    def __init__(self, stream: VideoStream, fps: float | Literal["source"]) -> None:
        self._tick = stream.time_base or _DEFAULT_TICK
        rate = stream.average_rate or stream.guessed_rate or _DEFAULT_RATE
        self._step = max(1, round(1 / (rate * self._tick)))
        self._offset = 0
        self._warned = False
        self._last: int | None = None
        self._first = 0
        # The decimal that the user wrote, not its binary neighbour: 29.97 is 2997/100.
        self._slots_per_half_tick = None if fps == "source" else self._tick * Fraction(repr(float(fps))) / 2

    def read(self, frame: VideoFrame, warnings: list[SampleError]) -> int:
        """Return the time of the next frame in ticks, always after the one before."""
        last = self._last
        if frame.pts is None:
            tick = 0 if last is None else last + self._step
        else:
            tick = frame.pts + self._offset
            if last is not None and tick <= last:  # the clock restarts: what follows counts from here
                tick = last + self._step
                self._offset = tick - frame.pts
        if (frame.pts is None or self._offset) and not self._warned:
            self._warned = True
            state = "no time" if frame.pts is None else "a time that is not after the one before"
            warnings.append(
                FrameTimesMissing(
                    f"a frame has {state}: times from {self.seconds(tick):.3f} s on are made up from the rate of the "
                    f"stream, one frame in {float(self._step * self._tick):.4f} s."
                )
            )
        if last is None:
            self._first = tick
        self._last = tick
        return tick

    def seconds(self, tick: int) -> float:
        return float(tick * self._tick)

    def since_start(self, tick: int) -> float:
        return float((tick - self._first) * self._tick)

    def duration(self, frame: VideoFrame) -> int:
        """Return how long a frame is shown, in ticks."""
        duration = frame.duration
        return duration if duration and duration > 0 else self._step

    def slot(self, tick: int) -> int:
        """Return the first k with start + k / fps >= this time.  A frame is picked if the next one's is larger.

        Stored times are rounded to ticks, so half a tick is taken off: else 30 fps from a film of 30 fps whose times
        are whole milliseconds would lose every third frame."""
        if self._slots_per_half_tick is None:
            return tick
        return math.ceil((2 * (tick - self._first) - 1) * self._slots_per_half_tick)
