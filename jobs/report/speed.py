"""Where the time of a job went, from its commit records alone: rate over time, stages, storages, workers, slow shards.

Seconds of a stage are summed over threads, so they add up to more than the clock shows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from jobs.commit_table import CommitTable

Floats = npt.NDArray[np.float64]

STAGES = ("read", "decode", "encode", "write")
MAX_RATE_BINS = 160
LEAST_BIN_SECONDS = 2.0
"""Commits are dated to the second."""
LEAST_PAUSE_SECONDS = 30.0
PAUSE_SHARE = 0.05
"""A pause is cut out of the time axis when it is longer than this share of the working time."""
LEAST_READ_SECONDS = 0.0005
SLOW_STORAGE_FACTOR = 4.0
SLOW_STORAGE_SHARE = 0.1
"""Slow reading is worth naming when it is at least this share of the time spent on the shards of that storage."""
SLOW_SHARD_FACTOR = 3.0
SLOW_SHARD_DEVIATIONS = 6.0
SLOW_WORKER_FACTOR = 1.7
LEAST_COMPARED = 4
"""Shards below which nothing is called slow: there is nothing to compare with."""
LEAST_WORKER_SHARDS = 3
MAX_NAMED = 5


@dataclass(frozen=True, slots=True)
class Rate:
    """Samples per second over the working time."""

    edges: Floats
    """Seconds of working time at the edges of the bins, one more than there are bins; pauses are left out."""
    per_second: Floats
    began: float
    """Seconds since the epoch."""
    ended: float
    pauses: list[tuple[float, float]]
    """(working seconds before it, its length in seconds)."""

    @property
    def working_seconds(self) -> float:
        return float(self.edges[-1])


@dataclass(frozen=True, slots=True)
class Stage:
    """The time of one stage over all shards."""

    name: str
    seconds: float
    share: float
    """Of all stages."""
    per_frame: float
    """Seconds."""
    median: float
    """Seconds per frame of the median shard."""
    highest: float
    """Seconds per frame of the slowest shard."""
    highest_shard: int


@dataclass(frozen=True, slots=True)
class StorageSpeed:
    """How quickly one storage delivered its shards."""

    name: str
    shards: int
    bytes: int
    bytes_per_second: float
    """While reading, of one reader."""
    read_share: float
    """Of the time spent on its shards."""
    elsewhere: float | None = None
    """Bytes per second of all other storages, where this one is slow."""

    @property
    def slow(self) -> bool:
        return self.elsewhere is not None


@dataclass(frozen=True, slots=True)
class SlowShard:
    """A shard that took far longer for a frame than the others."""

    shard: int
    url: str
    per_frame: float
    factor: float
    """Of the median."""
    stage: str
    """Where most of the excess arose."""
    stage_factor: float


@dataclass(frozen=True, slots=True)
class WorkerSpeed:
    """What one worker did."""

    name: str
    shards: int
    samples: int
    per_frame: float
    """Median over its shards of the seconds that decoding and encoding a frame took."""
    factor: float
    """Of the median over all workers."""

    @property
    def slow(self) -> bool:
        return self.factor >= SLOW_WORKER_FACTOR and self.shards >= LEAST_WORKER_SHARDS


@dataclass(slots=True)
class Speed:
    """Everything about time."""

    rate: Rate | None
    stages: list[Stage]
    storages: list[StorageSpeed]
    slow_shards: list[SlowShard]
    workers: list[WorkerSpeed]
    """The slowest first."""
    shards: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Shards of which the times are known."""
    per_frame: Floats = field(default_factory=lambda: np.zeros(0))
    """Seconds of all stages for one frame of each of those shards."""
    unknown: int = 0
    """Token files of which the times are not known: an earlier worker had published them."""


def measure_speed(commits: CommitTable, tokens_per_frame: int) -> Speed:
    """Work out where the time went.

    Shards are compared by the frames that were encoded, or samples where those are more: a film is not slow because it
    has many frames."""
    stages = {name: commits.column(name) for name in STAGES}
    total: Floats = np.stack([stages[name] for name in STAGES]).sum(0)
    samples = np.where(commits.column("part") == 0, commits.column("samples"), commits.column("rows"))
    frames = np.maximum(commits.column("tokens") / tokens_per_frame, samples)
    known = (total > 0) & (frames > 0)
    places = np.flatnonzero(known)
    shards = commits.column("shard")[places]
    of_frame = {name: stages[name][places] / frames[places] for name in STAGES}
    per_frame = total[places] / frames[places]
    source_bytes = commits.column("source_bytes")[places]
    urls = _urls_of(commits, shards)
    storages = _storages(urls, source_bytes, stages["read"][places], total[places])
    slow_storages = {each.name for each in storages if each.slow}
    behind_slow = np.asarray([storage_of(url) in slow_storages for url in urls], np.bool_)
    return Speed(
        rate=measure_rate(commits.column("at") - commits.column("wall"), commits.column("at"), samples, known),
        stages=_stages({name: stages[name][places] for name in STAGES}, of_frame, shards, frames[places]),
        storages=storages,
        slow_shards=_slow_shards(shards, urls, of_frame, per_frame, behind_slow),
        workers=_workers(commits, places, samples, of_frame["decode"] + of_frame["encode"]),
        shards=shards,
        per_frame=per_frame,
        unknown=int(((total == 0) & (frames > 0)).sum()),
    )


def measure_rate(starts: Floats, ends: Floats, samples: Floats, known: npt.NDArray[np.bool_]) -> Rate | None:
    """Samples per second over time, each shard's spread evenly from its start to its end; None without dates.

    The integral of the rate is exact in each bin, so that bins add up to the samples."""
    known = known & np.isfinite(starts) & np.isfinite(ends)
    if not known.any():
        return None
    ends = ends[known]
    starts = np.minimum(starts[known], ends - 1.0)  # a date stands for a whole second
    slopes = samples[known] / (ends - starts)
    times = np.concatenate([starts, ends])
    order = np.argsort(times, kind="stable")
    times = times[order]
    at_work = np.cumsum(np.concatenate([np.ones_like(starts), -np.ones_like(ends)])[order])
    rate = np.cumsum(np.concatenate([slopes, -slopes])[order])
    steps = np.diff(times)
    done = np.concatenate([[0.0], np.cumsum(rate[:-1] * steps)])

    idle = (at_work[:-1] < 0.5) & (steps > 0)
    working = float(steps[~idle].sum())
    pauses = np.flatnonzero(idle & (steps > max(LEAST_PAUSE_SECONDS, PAUSE_SHARE * working)))
    cut = np.zeros_like(steps)
    cut[pauses] = steps[pauses]
    axis = np.concatenate([[0.0], np.cumsum(steps - cut)])
    num_bins = int(np.clip(axis[-1] / LEAST_BIN_SECONDS, 1, MAX_RATE_BINS))
    edges = np.linspace(0.0, axis[-1], num_bins + 1)
    per_second = np.diff(np.interp(edges, axis, done)) / np.diff(edges)
    return Rate(
        edges=edges,
        per_second=np.maximum(per_second, 0.0),
        began=float(times[0]),
        ended=float(times[-1]),
        pauses=[(float(axis[place]), float(steps[place])) for place in pauses],
    )


def storage_of(url: str) -> str:
    """What serves a shard: the bucket or host of its URL, the folder of a local path."""
    location = url.rpartition("::")[2] if "::" in url else url
    scheme, separator, _ = location.partition("://")
    if separator and scheme not in ("file", "local"):
        return f"{scheme}://{urlsplit(location).netloc}"
    return str(PurePosixPath(location.partition("://")[2] if separator else location).parent)


def _urls_of(commits: CommitTable, shards: npt.NDArray[np.int64]) -> list[str]:
    """The URL of each of `shards`, which are ascending."""
    urls = commits.plan.urls()
    if not urls:
        return [""] * len(shards)
    places = np.clip(np.searchsorted(commits.plan.shards, shards), 0, len(urls) - 1)
    return [urls[place] for place in places.tolist()]


def _stages(
    seconds: dict[str, Floats], of_frame: dict[str, Floats], shards: npt.NDArray[np.int64], frames: Floats
) -> list[Stage]:
    total = sum(float(each.sum()) for each in seconds.values())
    if not total:
        return []
    slowest = {name: int(np.argmax(of_frame[name])) for name in STAGES}
    return [
        Stage(
            name=name,
            seconds=float(seconds[name].sum()),
            share=float(seconds[name].sum()) / total,
            per_frame=float(seconds[name].sum() / frames.sum()),
            median=float(np.median(of_frame[name])),
            highest=float(of_frame[name][slowest[name]]),
            highest_shard=int(shards[slowest[name]]),
        )
        for name in STAGES
    ]


def _storages(
    urls: Sequence[str], source_bytes: npt.NDArray[np.int64], read: Floats, total: Floats
) -> list[StorageSpeed]:
    # The ledger rounds to milliseconds, and a local shard may take less.
    read = np.maximum(read, LEAST_READ_SECONDS)
    distinct, inverse = _numbered(pa.array([storage_of(url) for url in urls], pa.string()))
    count = len(distinct)
    num_shards = np.bincount(inverse, minlength=count)
    num_bytes = np.bincount(inverse, source_bytes, minlength=count)
    reading = np.bincount(inverse, read, minlength=count)
    spent = np.bincount(inverse, total, minlength=count)
    found = []
    for place, name in enumerate(distinct):
        speed = float(num_bytes[place] / reading[place])
        others_read = float(reading.sum() - reading[place])
        others = float(num_bytes.sum() - num_bytes[place]) / others_read if others_read > 0 else 0.0
        share = min(1.0, float(reading[place] / spent[place]))
        slow = others > SLOW_STORAGE_FACTOR * speed
        found.append(
            StorageSpeed(
                name=name,
                shards=int(num_shards[place]),
                bytes=int(num_bytes[place]),
                bytes_per_second=speed,
                read_share=share,
                elsewhere=others if slow and share >= SLOW_STORAGE_SHARE else None,
            )
        )
    return sorted(found, key=lambda each: (not each.slow, each.bytes_per_second))


def _slow_shards(
    shards: npt.NDArray[np.int64],
    urls: Sequence[str],
    of_frame: dict[str, Floats],
    per_frame: Floats,
    behind_slow: npt.NDArray[np.bool_],
) -> list[SlowShard]:
    """The slowest outliers; those that only share the slowness of their storage are left to it."""
    if len(shards) < LEAST_COMPARED:
        return []
    medians = {name: float(np.median(of_frame[name])) for name in STAGES}
    logs = np.log(per_frame)
    middle = float(np.median(logs))
    spread = 1.4826 * float(np.median(np.abs(logs - middle)))
    is_slow = (logs - middle > np.log(SLOW_SHARD_FACTOR)) & (logs - middle > SLOW_SHARD_DEVIATIONS * spread)
    found = []
    for place in np.flatnonzero(is_slow)[np.argsort(-per_frame[is_slow])].tolist():
        excess = {name: float(of_frame[name][place]) - medians[name] for name in STAGES}
        stage = max(excess, key=lambda name: excess[name])
        if stage == "read" and behind_slow[place]:
            continue
        usual = medians[stage]
        found.append(
            SlowShard(
                shard=int(shards[place]),
                url=urls[place],
                per_frame=float(per_frame[place]),
                factor=float(np.exp(logs[place] - middle)),
                stage=stage,
                stage_factor=float(of_frame[stage][place]) / usual if usual > 0 else np.inf,
            )
        )
        if len(found) == MAX_NAMED:
            break
    return found


def _workers(
    commits: CommitTable, places: npt.NDArray[np.intp], samples: npt.NDArray[Any], seconds: Floats
) -> list[WorkerSpeed]:
    names, inverse = _numbered(commits.table["worker"].take(places).combine_chunks())
    order = np.argsort(inverse, kind="stable")
    bounds = np.searchsorted(inverse[order], np.arange(len(names) + 1))
    groups = [order[first:last] for first, last in itertools.pairwise(bounds)]
    medians = [float(np.median(seconds[group])) for group in groups]
    usual = float(np.median(medians)) if medians else 0.0
    found = [
        WorkerSpeed(name, len(group), int(samples[places[group]].sum()), median, median / usual if usual else 1.0)
        for name, group, median in zip(names, groups, medians, strict=True)
    ]
    return sorted(found, key=lambda each: -each.factor)


def _numbered(names: pa.Array) -> tuple[list[str], npt.NDArray[np.int32]]:
    """The distinct names, and for each of `names` its number among them."""
    encoded = names.combine_chunks() if isinstance(names, pa.ChunkedArray) else names
    encoded = encoded.dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
