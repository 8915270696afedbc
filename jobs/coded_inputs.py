"""What `bsq compress` takes in: pictures, clips and rows of datasets, as the tokens of clips."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline.dataset import TokenDataset
from pipeline.decode import Decoder, media_kind
from pipeline.sample import Member
from pipeline.tiles import cut_tiles
from schemas.bsqfile import MAX_ITEM_PIXELS, CodedItem
from schemas.errors import SampleError, SpecError, printable
from schemas.jobspec import ClipSpec, LimitsSpec, PreprocessSpec
from tokenizer.bsqvit import BSQViT
from tokenizer.codes import pack_bits, packed_size, unpack_bits

FRAMES_AT_ONCE = 32
"""Frames that the tokenizer is given together."""
ROWS_AT_ONCE = 256

Packed = npt.NDArray[np.uint8]


class PackedClip(NamedTuple):
    """Tokens of one clip, as `pack_bits` lays them down: a quarter of what they take as bits."""

    frames: int
    packed: Packed

    def bits(self, grid: tuple[int, int], bits: int) -> npt.NDArray[np.bool_]:
        """Bool [T, h, w, L]."""
        num_tokens = self.frames * grid[0] * grid[1]
        return unpack_bits(self.packed[np.newaxis], num_tokens, bits).reshape(self.frames, *grid, bits)


class TokenizedItem(NamedTuple):
    """A picture or clip, and its clips of tokens in the order of `BsqFile.clips`."""

    item: CodedItem
    clips: list[PackedClip]


def pack_clip(bits_ThwL: npt.NDArray[np.bool_]) -> PackedClip:
    """The tokens of a clip, packed."""
    return PackedClip(len(bits_ThwL), pack_bits(bits_ThwL.reshape(1, -1, bits_ThwL.shape[-1]))[0])


def read_media(path: Path, limits: LimitsSpec) -> Member:
    """The bytes of a picture or clip.  Raises SpecError, naming the file, where it cannot be read or is too large."""
    shown = printable(str(path))
    try:
        if path.stat().st_size > limits.max_member_bytes:
            raise SpecError(f"{shown}: {path.stat().st_size:,} bytes; at most {limits.max_member_bytes:,}.")
        payload = path.read_bytes()
    except OSError as error:
        advice = f" Name its files: {shown}/*" if path.is_dir() else ""
        raise SpecError(f"{shown}: cannot be read ({error.strerror or type(error).__name__}).{advice}") from error
    return Member(path.name, "file", len(payload), 0, payload)


@dataclass(frozen=True, kw_only=True)
class MediaReader:
    """Reads files of pictures and clips, and tokenizes them tile by tile."""

    model: BSQViT
    clip_frames: int
    """The most frames of one clip of tokens."""
    fps: float | Literal["source"] = "source"
    """Frames per second picked from a video."""
    limits: LimitsSpec = field(default_factory=LimitsSpec)

    def read(self, path: Path) -> TokenizedItem:
        """The tokens of one file.  Raises SpecError, naming it, where it is no picture or clip that can be decoded."""
        shown, media = printable(str(path)), read_media(path, self.limits)
        size = self.model.config.image_size
        decoder = Decoder(PreprocessSpec(size=size), ClipSpec(clip_frames=1), self.limits)
        times: list[float] = []
        clips: list[PackedClip] = []
        pending: list[npt.NDArray[np.uint8]] = []
        height = width = 0
        try:
            is_picture = media_kind(media) == "image"
            for seconds, frame_HWC in decoder.upright_frames(media, self.fps):
                times.append(seconds)
                pending.append(frame_HWC)
                height, width = frame_HWC.shape[:2]
                if height * width * len(times) > MAX_ITEM_PIXELS:
                    raise SpecError(
                        f"{shown}: over {MAX_ITEM_PIXELS:,} pixels in all. Cut it, or pick fewer frames with --fps."
                    )
                if len(pending) == self.clip_frames:
                    clips += self._tokenize(pending)
                    pending = []
        except SampleError as error:
            raise SpecError(f"{shown}: {error}") from error
        if pending:
            clips += self._tokenize(pending)
        step = 0.0 if is_picture or len(times) < 2 else (times[-1] - times[0]) / (len(times) - 1)
        return TokenizedItem(
            CodedItem(width, height, len(times), round(times[0] * 1e3), max(0, round(step * 1e6)), path.stem), clips
        )

    def _tokenize(self, frames: list[npt.NDArray[np.uint8]]) -> Iterator[PackedClip]:
        size = self.model.config.image_size
        tiles_NThwC = torch.from_numpy(cut_tiles(np.stack(frames), (size, size)))
        device = next(self.model.parameters()).device
        for tiles in torch.split(tiles_NThwC, max(1, FRAMES_AT_ONCE // len(frames))):
            yield from map(pack_clip, self.model.encode(tiles.to(device)).cpu().numpy())


def read_rows(dataset: TokenDataset, patch: int, limit: int | None, most_frames: int) -> Iterator[TokenizedItem]:
    """The rows of a dataset that was opened with view="packed" and the columns that name a row.

    `patch` is the side of a token in pixels.  Raises SpecError for a row of more frames than the prior takes."""
    count = len(dataset) if limit is None else min(limit, len(dataset))
    info = dataset.info
    height, width = (side * patch for side in info.grid)
    for first in range(0, count, ROWS_AT_ONCE):
        for row in dataset.__getitems__(range(first, min(count, first + ROWS_AT_ONCE))):
            frames = int(row["frames"])
            name = f"{row['key']}" + "".join(f"-{part}{row[part]}" for part in ("clip", "view") if row[part])
            if frames > most_frames:
                raise SpecError(
                    f"{info.url}: {row['key']!r} has {frames} frames; this prior takes {most_frames}. Train one for "
                    "longer clips, or tokenize shorter ones."
                )
            num_bytes = packed_size(frames * info.grid[0] * info.grid[1], info.bits)
            clip = PackedClip(frames, np.array(row["packed"].numpy().reshape(-1)[:num_bytes]))
            yield TokenizedItem(CodedItem(width, height, frames, name=name), [clip])
