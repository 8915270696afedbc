"""One media member -> its clip views, lazily.  This is the whole of a decoding thread's work on a sample."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from pipeline import colour
from pipeline.image import Picture, decode_picture
from pipeline.media import media_kind_of_extension, sniff_media
from pipeline.preprocess import (
    Box,
    View,
    check_engine,
    choose_view,
    resize_box,
    stored_box,
    turn_upright,
    upright_size,
)
from pipeline.sample import ClipView, Member, UnresizedFrame
from pipeline.steps import decoding
from pipeline.video import Deadline, PickedFrame, VideoInfo, pick_frames, to_rgb
from schemas.errors import MediaCorrupt, MediaUnsupported, NoFrames, SampleError, SpecError
from schemas.jobspec import ClipSpec, LimitsSpec, PreprocessSpec

Pixels = npt.NDArray[np.uint8]


@dataclass(slots=True)
class _KeptFrame:
    seconds: float
    views: list[torch.Tensor]
    """One uint8 [3, S, S] for each view."""


class Decoder:
    """Turns media members into clip views.  Holds no state between samples: threads share one."""

    def __init__(self, preprocess: PreprocessSpec, clips: ClipSpec, limits: LimitsSpec) -> None:
        """Raises SpecError for a spec that is not resolved, or a filter that this torch cannot do."""
        if not isinstance(preprocess.size, int) or not isinstance(clips.clip_frames, int):
            raise SpecError(
                "decoding needs numbers for preprocess.size and clips.clip_frames; take them from the tokenizer first."
            )
        check_engine(preprocess.filter, preprocess.engine)
        self._preprocess = preprocess
        self._size = (preprocess.size, preprocess.size)
        self._clips = clips
        self._clip_frames = clips.clip_frames
        self._stride = clips.clip_frames if clips.stride == "clip" else clips.stride
        self._limits = limits

    def views(self, key: str, media: Member) -> Iterator[ClipView]:
        """Yield the views of each clip in order: clip, then view.  A video streams, one clip in memory.

        Raises a SampleError when it cannot go on, with `member` and, for a video, `clip` set to the first clip that is
        not there; the clips yielded before stay good."""
        decoding(key)
        payload = _payload(media)
        try:
            if media_kind(media) == "image":
                yield from self._image_views(key, payload)
            else:
                yield from self._video_views(key, payload)
        except SampleError as error:
            error.member = media.name
            raise

    def upright(self, media: Member) -> Pixels:
        """Return the whole picture, or the first frame of a video, upright in sRGB: uint8 [height, width, 3].

        The same decoding and policies as `views`, without box and resize."""
        for _, pixels_HWC in self.upright_frames(media, "source"):
            return pixels_HWC
        raise AssertionError("pick_frames yields a frame or raises")

    def upright_frames(self, media: Member, fps: float | Literal["source"]) -> Iterator[tuple[float, Pixels]]:
        """Yield the seconds and the whole of each frame, as `upright` gives it; a picture is one frame at 0."""
        payload = _payload(media)
        if media_kind(media) == "image":
            picture = self._decode_picture(payload)
            pixels_HWC = _upright(picture.pixels_HWC, picture.orientation)
            yield 0.0, colour.apply_transform(picture.to_srgb, pixels_HWC) if picture.to_srgb else pixels_HWC
            return
        deadline = Deadline(self._limits.decode_timeout_seconds)
        for picked in pick_frames(payload, fps, self._limits, deadline):
            frame_HWC = _upright(self._square_pixels(picked), picked.info.orientation)
            with deadline.paused():
                yield picked.seconds, frame_HWC

    def _decode_picture(self, payload: bytes) -> Picture:
        return decode_picture(payload, self._limits, keep_truncated=self._preprocess.truncated == "keep")

    def _image_views(self, key: str, payload: bytes) -> Iterator[ClipView]:
        picture = self._decode_picture(payload)
        height, width = picture.pixels_HWC.shape[:2]
        size = upright_size(width, height, picture.orientation)
        for number in range(self._preprocess.views):
            view = choose_view(*size, self._preprocess, key, number)
            warnings = picture.warnings if number == 0 else []
            pixels = self._picture_pixels(picture, view)
            yield ClipView(0, number, pixels, *size, _plain(view.box), view.flipped, warnings=warnings)

    def _picture_pixels(self, picture: Picture, view: View) -> torch.Tensor | UnresizedFrame:
        if picture.orientation == 1 and picture.to_srgb is None and not view.flipped:
            spec = self._preprocess
            return UnresizedFrame(picture.pixels_HWC, view.box, self._size, spec.filter, spec.engine)
        frame_CHW = self._crop(picture.pixels_HWC, view, picture.orientation)
        if picture.to_srgb is not None:
            converted = colour.apply_transform(picture.to_srgb, frame_CHW.permute(1, 2, 0).numpy())
            frame_CHW = torch.from_numpy(converted).permute(2, 0, 1).contiguous()
        return frame_CHW.unsqueeze(0)

    def _video_views(self, key: str, payload: bytes) -> Iterator[ClipView]:
        deadline = Deadline(self._limits.decode_timeout_seconds)
        kept: deque[_KeptFrame] = deque()
        info: VideoInfo | None = None
        boxes: list[View] = []
        clip = num_picked = 0
        try:
            for picked in pick_frames(payload, self._clips.fps, self._limits, deadline):
                if info is None:
                    info = picked.info
                    boxes = [
                        choose_view(*info.upright_size, self._preprocess, key, number)
                        for number in range(self._preprocess.views)
                    ]
                num_picked += 1
                if num_picked <= clip * self._stride:  # in the gap between two clips
                    continue
                pixels_HWC = self._square_pixels(picked)
                views = [self._crop(pixels_HWC, view, info.orientation) for view in boxes]
                kept.append(_KeptFrame(picked.seconds, views))
                if len(kept) == self._clip_frames:
                    with deadline.paused():
                        yield from _clip_views(clip, kept, info, boxes)
                    clip += 1
                    for _ in range(min(self._stride, self._clip_frames)):
                        kept.popleft()
            # A short clip is worth a row only for frames that no clip before it holds.
            num_held = (clip - 1) * self._stride + self._clip_frames if clip else 0
            if info is not None and kept and num_picked > num_held and self._clips.short_clips == "keep":
                yield from _clip_views(clip, kept, info, boxes)
            elif clip == 0:
                raise NoFrames(
                    f"the video gives {num_picked} frames at clips.fps {self._clips.fps}, fewer than one clip of "
                    f"{self._clip_frames}, and clips.short_clips drops short ones. Set it to 'keep'."
                )
        except SampleError as error:
            error.clip = clip
            raise

    def _square_pixels(self, picked: PickedFrame) -> Pixels:
        pixels_HWC = to_rgb(picked)
        if picked.info.square_size == picked.info.stored_size:
            return pixels_HWC
        whole = Box(0, 0, *picked.info.stored_size)
        spec = self._preprocess
        stretched = resize_box(pixels_HWC, whole, picked.info.square_size, spec.filter, spec.engine)
        return np.ascontiguousarray(stretched.permute(1, 2, 0).numpy())

    def _crop(self, pixels_HWC: Pixels, view: View, orientation: int) -> torch.Tensor:
        """Return one view of a stored frame, upright: uint8 [3, S, S], planar."""
        height, width = pixels_HWC.shape[:2]
        box = stored_box(view.box, width, height, orientation)
        frame_CHW = resize_box(pixels_HWC, box, self._size, self._preprocess.filter, self._preprocess.engine)
        if orientation != 1:
            frame_CHW = turn_upright(frame_CHW, orientation)
        return frame_CHW.flip(-1) if view.flipped else frame_CHW


def gave_up(error: Exception) -> MediaCorrupt:
    """What is said of a sample for which the decoder raised something unforeseen."""
    return MediaCorrupt(f"the decoder gave up: {type(error).__name__}: {error}")


def media_kind(media: Member) -> str:
    """Return "image" or "video": by content, and by extension where the content leaves it open."""
    kind = sniff_media(media.payload or b"")
    if kind is None:
        kind = media_kind_of_extension(media.name.rpartition("/")[2])
    if kind is None:
        raise MediaUnsupported(f"neither a picture nor a video; it begins with {(media.payload or b'')[:12]!r}.")
    return kind


def _payload(media: Member) -> bytes:
    assert media.payload is not None, f"{media.name} was never read"
    return media.payload


def _upright(pixels_HWC: Pixels, orientation: int) -> Pixels:
    frame_CHW = torch.from_numpy(np.array(pixels_HWC)).permute(2, 0, 1)
    return np.ascontiguousarray(turn_upright(frame_CHW, orientation).permute(1, 2, 0).numpy())


def _plain(box: Box) -> tuple[int, int, int, int]:
    return box.x, box.y, box.width, box.height


def _clip_views(clip: int, kept: deque[_KeptFrame], info: VideoInfo, views: list[View]) -> Iterator[ClipView]:
    start = kept[0].seconds
    for number, view in enumerate(views):
        warnings = []
        if number == 0 and info.warnings:
            warnings, info.warnings = info.warnings, []
        yield ClipView(
            clip=clip,
            view=number,
            pixels=torch.stack([frame.views[number] for frame in kept]),
            width=info.upright_size[0],
            height=info.upright_size[1],
            crop=_plain(view.box),
            flipped=view.flipped,
            start=start,
            frame_times=tuple(frame.seconds - start for frame in kept),
            warnings=warnings,
        )
