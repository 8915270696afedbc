"""What a worker and its supervisor say to each other.  Small, picklable, and free of torch: a driver that has nothing
to run must not pay for loading it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from schemas.errors import BsqError
from schemas.job import Job
from schemas.ledger import Commit


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSetup:
    """What a worker must know; travels to its process by pickle."""

    name: str
    out: str
    job: Job
    num_cpus: int
    batch: int
    decode_bytes: int
    device: str
    decode_processes: int = 0
    """Children that decode; 0 for threads, and children only for samples that are not trusted."""
    storage_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EarlierParts:
    """What is committed of a shard, so that only what it lacks is made."""

    files: tuple[str, ...]
    """Its token files."""
    failures: str | None
    """The failure table that counts: that of its last part."""
    samples: int
    """Samples that the shard had then."""
    with_rest: bool
    """Make what comes after the damage of its archive too."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """One shard to tokenize."""

    shard: int
    attempt: int
    url: str
    adopt: bool = False
    """Look first for a published file that no record names: an earlier worker may have died after writing it."""
    part: int = 0
    """The part of the shard that is made: 0 for the whole of it."""
    earlier: EarlierParts | None = None
    """What the shard has; None where the whole of it is made."""
    suspects: frozenset[str] = frozenset()
    """Keys that may have ended a worker: decoded in a child process."""
    contained: bool = False
    """Decode the whole shard in child processes."""


@dataclass(frozen=True, slots=True)
class ShardCommitted:
    """The files of a shard are published; the ledger shall record `commit`."""

    commit: Commit
    arithmetic: dict[str, Any]
    failures: dict[str, int] = field(default_factory=dict)
    """Rows of its failure table by class, without warnings; empty for a file that was found published."""


@dataclass(frozen=True, slots=True)
class ShardFailed:
    """An attempt at a shard failed."""

    shard: int
    attempt: int
    stage: str
    error: str
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class WorkerBroken:
    """The worker cannot go on."""

    error: BsqError
    stops_job: bool = True
    """No other worker could do better: the output refuses, or the tokenizer does not load."""


Message = ShardCommitted | ShardFailed | WorkerBroken


@dataclass(frozen=True, slots=True)
class Activity:
    """What one thread is doing."""

    stage: str
    shard: int
    key: str
    seconds: float = 0.0
    """Since it began."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Counters since the worker began, and what each thread does now."""

    progress: int
    """Grows with everything that is finished; a worker whose number stands still hangs."""
    busy: bool
    rows: int
    tokens: int
    samples: int
    seconds: float
    device_wait_seconds: float
    """Summed over `num_lanes` encode lanes."""
    num_lanes: int
    decode_wait_seconds: float
    """Summed over `num_decoders` decoders."""
    num_decoders: int
    waiting_bytes: int
    """Members that wait for a decoder."""
    activities: dict[str, Activity]
    batched_bytes: int = 0
    """Frames in whole batches that wait for the device."""
