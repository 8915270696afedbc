"""Training data from shards, through the reading and decoding that tokenization uses.

A small corpus is decoded once and held (`hold_frames`); a large one is decoded while training (`StreamedFrames`).
Order and crops are functions of (seed, epoch), never of threads or timing."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.byte_stream import open_shard
from pipeline.credentials import printable_url
from pipeline.decode import Decoder, media_kind
from pipeline.group import group_samples
from pipeline.preprocess import SplitMix64, view_seed
from pipeline.sample import Sample
from pipeline.tar import read_members
from schemas.errors import ArchiveError, MediaUnsupported, SampleError, ShardError, SpecError
from schemas.jobspec import ClipSpec, LimitsSpec, PreprocessSpec
from tokenizer.colour_detail import NUM_DRAWS, sharpen_colours
from tokenizer.train_config import OptimizerPart, SamplingPart

Kind = Literal["image", "video"]

SHUFFLE_BYTES = 1 << 30
"""Undecoded bytes that wait to be shuffled, at most; long videos reach it before their number does."""
MAX_MENTIONED = 5
"""Bad samples that are told one by one."""


@dataclass(frozen=True, kw_only=True)
class ShardSource:
    """Shards of one kind of media and how they are decoded."""

    urls: Sequence[str]
    kind: Kind
    preprocess: PreprocessSpec
    clips: ClipSpec
    limits: LimitsSpec = field(default_factory=LimitsSpec)
    clips_per_video: int = 16
    num_threads: int = 1
    storage_options: Mapping[str, Any] | None = None


class Complaints:
    """Tells of bad samples and shards as they are met: the first few, then how many."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self.num_failed = 0

    def add(self, where: str, error: Exception) -> None:
        """Count one failure, and tell of it if it is among the first."""
        self.num_failed += 1
        if self.num_failed <= MAX_MENTIONED:
            self._tell(f"{where}: left out: {error}")
        elif self.num_failed & (self.num_failed - 1) == 0:
            self._tell(f"{self.num_failed:,} samples or shards left out so far.")


def hold_frames(source: ShardSource, complaints: Complaints, *, most: int | None = None) -> Tensor:
    """Decode all views of all samples, in order: uint8 [N, T, S, S, 3].

    Raises SpecError where no sample of this kind could be decoded."""
    decoder = Decoder(source.preprocess, source.clips, source.limits)

    def decode(sample: Sample) -> list[Tensor]:
        return _decode_all(decoder, sample, source.clips_per_video)

    found: list[Tensor] = []
    with ThreadPoolExecutor(source.num_threads, thread_name_prefix="train-decode") as pool:
        samples = _of_kind(read_samples(source, source.urls, complaints), source.kind)
        for sample, frames in decode_in_order(pool, samples, decode, 4 * source.num_threads):
            if isinstance(frames, SampleError):
                complaints.add(sample.key, frames)
            else:
                found += frames
            if most is not None and len(found) >= most:
                break
    if not found:
        raise SpecError(
            f"{printable_url(source.urls[0])}: no {source.kind} of {len(source.urls):,} shards could be used. Look at "
            "the lines above, and at data.images and data.clips."
        )
    return torch.stack(found[:most]).permute(0, 1, 3, 4, 2)


class StreamedFrames:
    """Batches that are read, shuffled and decoded while training; a batch is of images or of clips.

    Ranks share out the shards, or the samples where there are fewer shards than ranks.  A resumed run reads what it
    had drawn of its epoch again, without decoding it."""

    def __init__(
        self,
        sources: Sequence[ShardSource],
        *,
        sampling: SamplingPart,
        optimizer: OptimizerPart,
        seed: int,
        shuffle_samples: int,
        complaints: Complaints,
        rank: int = 0,
        num_ranks: int = 1,
        pin: bool = False,
    ) -> None:
        self._seed, self._pin = seed, pin
        self._streams = {
            source.kind: _Stream(source, seed, shuffle_samples, complaints, rank, num_ranks) for source in sources
        }
        self._sizes = {"image": optimizer.batch_images, "video": optimizer.batch_clips}
        only: Kind = sources[0].kind
        self._rank, self._num_ranks, self._colour_detail = rank, num_ranks, sampling.colour_detail
        self._clip_share = sampling.clip_share if len(self._streams) == 2 else float(only == "video")
        self._num_batches = 0

    def next_batch(self) -> Tensor:
        """uint8 [B, T, S, S, 3]."""
        draw = np.random.default_rng([self._seed, 0, self._num_batches]).random()
        kind: Kind = "video" if draw < self._clip_share else "image"
        frames_BTCHW = torch.stack([self._streams[kind].next_frames() for _ in range(self._sizes[kind])])
        details = np.random.default_rng([self._seed, 1, self._num_batches, self._rank])
        self._num_batches += 1
        sharper_BTHWC = sharpen_colours(
            frames_BTCHW.permute(0, 1, 3, 4, 2), details.random((len(frames_BTCHW), NUM_DRAWS)), self._colour_detail
        )
        frames_BTCHW = sharper_BTHWC.permute(0, 1, 4, 2, 3)
        return (frames_BTCHW.pin_memory() if self._pin else frames_BTCHW).permute(0, 1, 3, 4, 2)

    def state(self) -> dict[str, Any]:
        """Where the next batch begins."""
        positions = {kind: list(stream.position) for kind, stream in self._streams.items()}
        shards = {kind: len(stream.source.urls) for kind, stream in self._streams.items()}
        return {
            "batches": self._num_batches, "shards": shards, "positions": positions, "num_ranks": self._num_ranks,
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state()`.  Raises SpecError where the shards or the number of ranks are others."""
        if state.get("shards") != self.state()["shards"]:
            raise SpecError(
                f"The run was begun with shards {state.get('shards')}, now there are {self.state()['shards']}. "
                "Give the same shards, or start a new run with model.init_from."
            )
        if state.get("num_ranks", self._num_ranks) != self._num_ranks:
            raise SpecError(
                f"The run was begun with {state['num_ranks']} processes that share out streamed data, now there are "
                f"{self._num_ranks}. Resume with the same number of processes, or start a new run with "
                "model.init_from."
            )
        self._num_batches = int(state["batches"])
        for kind, stream in self._streams.items():
            epoch, drawn = state["positions"][kind]
            stream.seek(int(epoch), int(drawn))


class _Stream:
    """An endless shuffled stream of decoded clips of one kind."""

    def __init__(
        self, source: ShardSource, seed: int, shuffle: int, complaints: Complaints, rank: int, num_ranks: int
    ) -> None:
        self.source, self.position = source, (0, 0)
        self._seed, self._shuffle, self._complaints = seed, shuffle, complaints
        self._rank, self._num_ranks = rank, num_ranks
        self._pool = ThreadPoolExecutor(source.num_threads, thread_name_prefix=f"train-{source.kind}")
        self._items = self._all_items(0, 0)

    def seek(self, epoch: int, drawn: int) -> None:
        self.position = (epoch, drawn)
        self._items = self._all_items(epoch, drawn)

    def next_frames(self) -> Tensor:
        """uint8 [T, 3, S, S]."""
        self.position, frames = next(self._items)
        return frames

    def _all_items(self, epoch: int, skipped: int) -> Iterator[tuple[tuple[int, int], Tensor]]:
        while True:
            # Crops differ from epoch to epoch, and come back in a resumed run.
            seed = SplitMix64(view_seed(self._seed, "epoch", epoch)).next_uint64() >> 1
            decoder = Decoder(
                self.source.preprocess.model_copy(update={"seed": seed}), self.source.clips, self.source.limits
            )
            samples = self._shuffled(epoch)
            for _ in range(skipped):
                next(samples, None)
            number = skipped
            decode = partial(_decode_one, decoder, seed=seed, most=self.source.clips_per_video)
            decoded = decode_in_order(self._pool, samples, decode, 4 * self.source.num_threads)
            any_good = skipped > 0
            for sample, frames in decoded:
                number += 1
                if isinstance(frames, SampleError):
                    self._complaints.add(sample.key, frames)
                else:
                    any_good = True
                    yield (epoch, number), frames[0]
            if not any_good:
                raise SpecError(
                    f"{printable_url(self.source.urls[0])}: no {self.source.kind} of {len(self.source.urls):,} shards "
                    "could be used. Look at the lines above, and at data.images and data.clips."
                )
            epoch, skipped = epoch + 1, 0

    def _shuffled(self, epoch: int) -> Iterator[Sample]:
        """This rank's samples of an epoch: shards in random order, then samples drawn from a bounded store."""
        order = np.random.default_rng([self._seed, 1, epoch]).permutation(len(self.source.urls))
        urls = [self.source.urls[number] for number in order]
        by_shard = len(urls) >= self._num_ranks
        mine = urls[self._rank :: self._num_ranks] if by_shard else urls
        samples: Iterator[Sample] = _of_kind(read_samples(self.source, mine, self._complaints), self.source.kind)
        if not by_shard:
            samples = (each for number, each in enumerate(samples) if number % self._num_ranks == self._rank)
        draws = np.random.default_rng([self._seed, 2, epoch, self._rank])
        waiting: list[Sample] = []
        num_bytes = 0
        for sample in samples:
            waiting.append(sample)
            num_bytes += sample.num_bytes
            while len(waiting) > self._shuffle or (num_bytes > SHUFFLE_BYTES and len(waiting) > 1):
                drawn = _take(waiting, draws)
                num_bytes -= drawn.num_bytes
                yield drawn
        while waiting:
            yield _take(waiting, draws)


def read_samples(source: ShardSource, urls: Sequence[str], complaints: Complaints) -> Iterator[Sample]:
    """The samples of shards in order; what is damaged or missing is told and left out."""
    for url in urls:
        try:
            with open_shard(url, source.storage_options) as stream:
                for sample in group_samples(read_members(stream, source.limits), source.limits):
                    if sample.failure is not None:
                        complaints.add(f"{printable_url(url)}: {sample.key}", sample.failure)
                    else:
                        yield sample
        except (ShardError, ArchiveError) as error:
            complaints.add(printable_url(url), error)


def decode_in_order(
    pool: ThreadPoolExecutor, samples: Iterator[Sample], decode: Callable[[Sample], list[Tensor]], ahead: int
) -> Iterator[tuple[Sample, list[Tensor] | SampleError]]:
    """Each sample with its frames, or with why there are none; in the order of `samples` for any number of threads."""
    pending: deque[tuple[Sample, Future[list[Tensor]]]] = deque()
    try:
        while True:
            while len(pending) <= ahead and (sample := next(samples, None)) is not None:
                pending.append((sample, pool.submit(decode, sample)))
            if not pending:
                return
            sample, future = pending.popleft()
            try:
                yield sample, future.result()
            except SampleError as error:
                yield sample, error
    finally:
        for _, future in pending:
            future.cancel()


def usable_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def held_source(source: ShardSource, *, scale: float) -> ShardSource:
    """The source with frames larger by `scale`, not mirrored: crops and mirroring follow when batches are drawn."""
    assert isinstance(source.preprocess.size, int)
    size = round(source.preprocess.size * scale)
    return replace(source, preprocess=source.preprocess.model_copy(update={"size": size, "flip": 0.0}))


def _of_kind(samples: Iterator[Sample], kind: Kind) -> Iterator[Sample]:
    for sample in samples:
        assert sample.media is not None
        try:
            if media_kind(sample.media) == kind:
                yield sample
        except MediaUnsupported:
            continue  # neither of the two


def _decode_all(decoder: Decoder, sample: Sample, most: int) -> list[Tensor]:
    assert sample.media is not None
    frames = []
    for view in decoder.views(sample.key, sample.media):
        if view.clip >= most:
            break
        frames.append(view.frames_TCHW)
    return frames


def _decode_one(decoder: Decoder, sample: Sample, *, seed: int, most: int) -> list[Tensor]:
    """One view of one clip of a sample, each clip as likely as any other."""
    assert sample.media is not None
    draws = SplitMix64(view_seed(seed, sample.key, 1 << 32))
    chosen: Tensor | None = None
    for view in decoder.views(sample.key, sample.media):
        if view.clip >= most:
            break
        if draws.next_unit() * (view.clip + 1) < 1:
            chosen = view.frames_TCHW
    assert chosen is not None, "a decoder yields a view or raises"
    return [chosen]


def _take(waiting: list[Sample], draws: np.random.Generator) -> Sample:
    number = int(draws.integers(len(waiting)))
    waiting[number], waiting[-1] = waiting[-1], waiting[number]
    return waiting.pop()
