"""What travels between the stages: members of a tar, samples, and decoded clip views."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from pipeline.preprocess import Box, Pixels, resize_box
from schemas.errors import SampleError
from schemas.jobspec import Engine, Filter

MemberKind = Literal["file", "link", "device", "sparse"]


@dataclass(slots=True)
class Member:
    """One entry of a tar archive."""

    name: str
    """Name as stored, valid UTF-8 (other bytes escaped `\\xNN`); never used as a path."""
    kind: MemberKind
    size: int
    """Declared bytes of the payload."""
    offset: int
    """First byte of the payload in the (decompressed) tar."""
    payload: bytes | None
    """The payload; None where it was not read: no plain file, or over the byte limit."""


@dataclass(slots=True)
class Sample:
    """The members of one occurrence of a key."""

    position: int
    """Number of the sample in the shard, counting every occurrence of a key."""
    key: str
    members: dict[str, Member]
    """Members by extension: what follows the first dot of the base name, its case kept."""
    media: Member | None = None
    """The image or video member; None when `failure` is set."""
    failure: SampleError | None = None
    """Why this occurrence cannot be tokenized, found while grouping."""

    @property
    def num_bytes(self) -> int:
        """Bytes that the sample holds in memory."""
        return 1024 + sum(len(member.payload) for member in self.members.values() if member.payload is not None)


@dataclass(slots=True)
class UnresizedFrame:
    """A box of a decoded frame that needs nothing but resizing.

    Resizing it right into its place in a batch saves a pass over its pixels."""

    pixels_HWC: Pixels
    box: Box
    size: tuple[int, int]
    filter: Filter
    engine: Engine

    def resize(self, out_1CHW: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 [3, size, size], planar; where `out_1CHW` is given, that, filled: uint8 [1, 3, size, size]."""
        return resize_box(self.pixels_HWC, self.box, self.size, self.filter, self.engine, out_1CHW)


@dataclass(slots=True)
class ClipView:
    """One crop of one clip, ready for the encoder."""

    clip: int
    view: int
    pixels: torch.Tensor | UnresizedFrame
    """uint8 [T, 3, size, size], planar, on the CPU; or one frame that is resized when its place is known."""
    width: int
    """Width of the upright source in pixels."""
    height: int
    """Height of the upright source in pixels."""
    crop: tuple[int, int, int, int]
    """x, y, width, height of the view's box in the upright source."""
    flipped: bool
    start: float | None = None
    """Seconds of the first frame; None for images."""
    frame_times: tuple[float, ...] | None = None
    """Seconds of each frame after `start`; None for images."""
    warnings: list[SampleError] = field(default_factory=list)
    """What is worth a warning row; on the first view of the first clip it concerns."""

    @property
    def num_frames(self) -> int:
        return self.pixels.shape[0] if isinstance(self.pixels, torch.Tensor) else 1

    @property
    def frames_TCHW(self) -> torch.Tensor:  # noqa: N802 - the letters name the axes
        """uint8 [T, 3, size, size], planar, on the CPU."""
        return self.pixels if isinstance(self.pixels, torch.Tensor) else self.pixels.resize().unsqueeze(0)

    def write_to(self, target_TCHW: torch.Tensor) -> None:
        """Fill `target_TCHW`, uint8 [T or more, 3, size, size], repeating the last frame to its end."""
        length = len(target_TCHW)
        if isinstance(self.pixels, torch.Tensor):
            target_TCHW[: self.num_frames].copy_(self.pixels)
        else:
            self.pixels.resize(target_TCHW if length == 1 else target_TCHW[:1])
        if self.num_frames < length:
            target_TCHW[self.num_frames :] = target_TCHW[self.num_frames - 1].clone()
