"""Samples of shards as decoded clips, in order and once: what a tokenizer is measured on.

Reading, decoding and refusals are those of tokenization."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch

from pipeline.byte_stream import open_shard
from pipeline.credentials import printable_url
from pipeline.decode import Decoder, media_kind
from pipeline.group import group_samples
from pipeline.sample import Sample
from pipeline.tar import read_members
from pipeline.training_batches import Complaints, decode_in_order
from schemas.errors import ArchiveError, SampleError, ShardError
from schemas.jobspec import ClipSpec, LimitsSpec, PreprocessSpec

Kind = Literal["image", "video"]


@dataclass(frozen=True, slots=True)
class DecodedClip:
    """A picture, or one clip of a video."""

    shard: int
    """Number of its shard."""
    position: int
    """Number of its sample in the shard."""
    key: str
    clip: int
    kind: Kind
    frames_TCHW: torch.Tensor
    """uint8 [T, 3, S, S]"""
    share_read: float
    """Of all shards, by the time it was read; 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class ClipReader:
    """Reads shards and decodes their first view; order does not depend on threads."""

    urls: Sequence[str]
    preprocess: PreprocessSpec
    clips: ClipSpec
    limits: LimitsSpec = field(default_factory=LimitsSpec)
    clips_per_video: int = 1
    most: int | None = None
    """Pictures that are read, and videos; None: all."""
    num_threads: int = 1
    storage_options: Mapping[str, Any] | None = None

    def read(
        self, complaints: Complaints, *, only: Mapping[int, Collection[int]] | None = None
    ) -> Iterator[DecodedClip]:
        """Yield the clips of all good samples; `only` names shards and positions of samples, and reads no others."""
        decoder = Decoder(self.preprocess, self.clips, self.limits)

        def decode(sample: Sample) -> list[torch.Tensor]:
            assert sample.media is not None
            return [view.frames_TCHW for view in islice(decoder.views(sample.key, sample.media), self.clips_per_video)]

        left: dict[Kind, float] = dict.fromkeys(("image", "video"), math.inf if self.most is None else self.most)
        with ThreadPoolExecutor(self.num_threads, thread_name_prefix="decode") as pool:
            for number, url in enumerate(self.urls):
                if only is not None and number not in only:
                    continue
                shard = _Shard(url, self, complaints, None if only is None else only[number], left)
                for sample, frames in decode_in_order(pool, shard.samples(), decode, 4 * self.num_threads):
                    if isinstance(frames, SampleError):
                        complaints.add(f"{printable_url(url)}: {sample.key}", frames)
                        continue
                    share = (number + shard.share_read) / len(self.urls)
                    kind = _kind(sample)
                    for clip, frames_TCHW in enumerate(frames):
                        yield DecodedClip(number, sample.position, sample.key, clip, kind, frames_TCHW, share)


class _Shard:
    """One pass over a shard; what is damaged or missing is told and left out."""

    def __init__(
        self,
        url: str,
        reader: ClipReader,
        complaints: Complaints,
        positions: Collection[int] | None,
        left: dict[Kind, float],
    ) -> None:
        self.share_read = 0.0
        self._url, self._reader, self._complaints = url, reader, complaints
        self._positions, self._left = positions, left

    def samples(self) -> Iterator[Sample]:
        limits, wanted = self._reader.limits, None if self._positions is None else set(self._positions)
        try:
            with open_shard(self._url, self._reader.storage_options) as stream:
                for sample in group_samples(read_members(stream, limits), limits):
                    self.share_read = min(1.0, stream.bytes_read / stream.size) if stream.size else 0.0
                    if wanted is not None and sample.position not in wanted:
                        continue
                    if self._is_taken(sample):
                        yield sample
                    if wanted is not None:
                        wanted.discard(sample.position)
                        if not wanted:
                            break
        except (ShardError, ArchiveError) as error:
            self._complaints.add(printable_url(self._url), error)

    def _is_taken(self, sample: Sample) -> bool:
        try:
            if sample.failure is not None:
                raise sample.failure
            kind = _kind(sample)
        except SampleError as error:
            self._complaints.add(f"{printable_url(self._url)}: {sample.key}", error)
            return False
        self._left[kind] -= 1
        return self._left[kind] >= 0


def _kind(sample: Sample) -> Kind:
    assert sample.media is not None
    return "image" if media_kind(sample.media) == "image" else "video"
