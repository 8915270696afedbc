"""What a job would take: a worker tokenizes the first samples of some shards, and the rest is multiplication.

Reading is timed by itself, through one stream, as each worker has one.  The worker then runs on local copies, so its
rate is that of decoding and encoding together; the slower of the two is the rate of a worker."""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from jobs.begin import resolve, write_beginning
from jobs.local_runner import ChildRunner
from jobs.placement import find_nodes, place_workers
from pipeline.excerpt import Excerpt, cut_excerpt, stored_size
from pipeline.messages import Assignment, Heartbeat, ShardCommitted, ShardFailed, WorkerBroken, WorkerSetup
from pipeline.storage import open_storage
from schemas.errors import BsqError, ShardError, SpecError
from schemas.jobspec import JobSpec
from schemas.ledger import Commit

MEASURED_SHARDS = 8
SIZED_SHARDS = 256
"""Shards whose size is asked for; the others are taken for as large on average."""
MIN_SAMPLES = 32
"""Of each measured shard, where it has so many."""
IN_FLIGHT = 3
"""Excerpts in the worker's hands, so that its device never waits for the next."""
MOST_SECONDS = 900.0
"""After which a worker that has not finished one excerpt is given up."""
_OF_THE_CUT = ("TarTruncated", "SampleCutOff")

Limit = Literal["storage", "decoding", "the device"]


@dataclass(frozen=True, slots=True)
class JobPlan:
    """What a job is expected to take and to give."""

    shards: int
    source_bytes: int
    samples: int
    clips: int
    """Clips and images that become tokens."""
    rows: int
    """Views of them."""
    tokens: int
    output_bytes: int
    failures: dict[str, int]
    """Failed samples by class, as many as there would be if all shards were like the measured ones."""
    unreadable_shards: int
    workers: int
    seconds: float
    limit: Limit
    storage_rate: float
    """Samples per second and worker, if nothing but reading took time."""
    worker_rate: float
    """Samples per second and worker, from local copies."""
    device_wait: float
    decode_wait: float
    start_seconds: float
    measured_shards: int
    measured_samples: int
    measured_on: str
    reasons: list[str] = field(default_factory=list)
    """Why measured shards could not be read."""

    @property
    def device_hours(self) -> float:
        return self.seconds * self.workers / 3600

    def to_json_dict(self) -> dict[str, Any]:
        return asdict(self) | {"device_hours": self.device_hours}

    def describe(self) -> str:
        """A few lines for people."""
        failed = sum(self.failures.values())
        share = failed / self.samples if self.samples else 0.0
        classes = ", ".join(f"{count:,} {name}" for name, count in sorted(self.failures.items(), key=lambda i: -i[1]))
        bound = 3 / self.measured_samples if self.measured_samples else 1.0
        lines = [
            f"shards    {self.shards:,}, {_size(self.source_bytes)}"
            + (f"; about {self.unreadable_shards:,} cannot be read" if self.unreadable_shards else ""),
            f"samples   about {self.samples:,}, giving {self.clips:,} clips and images, {self.rows:,} rows",
            f"failures  about {failed:,} ({share:.2%}): {classes}"
            if failed
            else f"failures  none among those measured: likely under {bound:.2%}",
            f"output    about {_size(self.output_bytes)}, {self.tokens:,} tokens",
            f"time      about {_hours(self.seconds)} with {self.workers} worker{'s' * (self.workers > 1)}, "
            f"{self.device_hours:,.3g} device-hours",
            f"limit     {self.limit}: a worker reads {self.storage_rate:,.1f} samples/s, and decodes and encodes "
            f"{self.worker_rate:,.1f} (its device waits {self.device_wait:.0%} of its time, its decoders "
            f"{self.decode_wait:.0%})",
            f"measured  {self.measured_samples:,} samples of {self.measured_shards} shards on {self.measured_on}",
        ]
        return "\n".join(lines + [f"          {reason}" for reason in self.reasons])


def plan_job(spec: JobSpec, *, seconds: float = 20.0, storage_options: dict[str, Any] | None = None) -> JobPlan:
    """Measure some samples of the shards of `spec` for about so many seconds, and say what all of them would take.

    Nothing is written but temporary files of this host.  Raises SpecError when no shard could be read or nothing
    tokenized, and what `bsq tokenize` would refuse at its beginning."""
    options = storage_options or {}
    nodes = find_nodes(spec.device, None)
    with tempfile.TemporaryDirectory(prefix="bsq-plan-") as name:
        folder = Path(name)
        beginning = resolve(spec, gpus=any(node.gpus for node in nodes), storage_options=options)
        urls = beginning.urls
        workers = min(spec.run.workers or sum(node.gpus for node in nodes) or 1, len(urls))
        here = place_workers(nodes, workers=1, cpus_per_worker=spec.run.cpus_per_worker, num_shards=1, exclusive=False)
        excerpts, reasons = _cut_excerpts(urls, folder, spec, options)
        if not excerpts:
            raise SpecError(f"none of {len(reasons)} shards could be read. {reasons[0]}")
        measuring = spec.model_copy(
            update={
                "shards": tuple(str(excerpt.path) for excerpt in excerpts),
                "out": str(folder / "out"),
                "damaged_shards": "keep",
            }
        )
        measured = resolve(measuring, gpus=here.gpus > 0, storage_options=options)
        write_beginning(open_storage(measuring.out), measured)
        setup = WorkerSetup(
            name="plan",
            out=measuring.out,
            job=measured.job,
            num_cpus=here.cpus_per_worker,
            batch=spec.run.batch,
            decode_bytes=spec.run.decode_bytes,
            device="cuda:0" if here.gpus else "cpu",
        )
        measurement = _measure(setup, excerpts, seconds, str(folder / "worker.log"))
    where = f"{'one GPU' if here.gpus else 'the CPU'} with {here.cpus_per_worker} CPUs for decoding"
    return _extrapolate(
        urls, options, excerpts, reasons, measurement, workers, measured.job.spec.preprocess.views, where
    )


@dataclass(slots=True)
class _Measurement:
    """What one worker did."""

    beats: list[Heartbeat] = field(default_factory=list)
    committed: dict[int, ShardCommitted] = field(default_factory=dict)
    """Of the first time each excerpt was tokenized."""
    start_seconds: float = 0.0
    reasons: list[str] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """While batches came out: neither loading nor the first batch count."""
        grown = [new for old, new in zip(self.beats, self.beats[1:], strict=False) if new.tokens > old.tokens]
        if len(grown) < 2 or grown[-1].seconds - grown[0].seconds < 1.0:
            last = self.beats[-1]
            return last.tokens / max(last.seconds, 1e-9)
        return (grown[-1].tokens - grown[0].tokens) / (grown[-1].seconds - grown[0].seconds)


def _cut_excerpts(
    urls: Sequence[str], folder: Path, spec: JobSpec, options: dict[str, Any]
) -> tuple[list[Excerpt], list[str]]:
    excerpts, reasons = [], []
    for number in spread(len(urls), MEASURED_SHARDS):
        path = folder / f"{number:07d}.tar"
        try:
            excerpt = cut_excerpt(
                urls[number], path, min_samples=MIN_SAMPLES, limits=spec.limits, storage_options=options
            )
        except ShardError as error:
            reasons.append(f"shard {number}: {error}")
            continue
        excerpts.append(excerpt)
    return excerpts, reasons


def _measure(setup: WorkerSetup, excerpts: Sequence[Excerpt], seconds: float, log_path: str) -> _Measurement:
    found = _Measurement()
    runner = ChildRunner([setup], log_path)
    began = time.monotonic()
    handle = runner.start_worker(0)
    try:
        open_shards: set[int] = set()
        number, passed = 0, 0.0
        while number < len(excerpts) or open_shards or passed < seconds:
            while len(open_shards) < IN_FLIGHT and (number < len(excerpts) or passed < seconds):
                # A quick worker gets the same excerpts again, until there is enough to measure.
                handle.assign(Assignment(number, 1, str(excerpts[number % len(excerpts)].path)))
                open_shards.add(number)
                number += 1
            runner.wait(0.1)
            for message in handle.take_messages():
                if isinstance(message, ShardCommitted):
                    if message.commit.shard < len(excerpts):
                        found.committed[message.commit.shard] = message
                    open_shards.discard(message.commit.shard)
                elif isinstance(message, ShardFailed):
                    if message.shard < len(excerpts):
                        found.reasons.append(f"{message.error}: {message.message}")
                    open_shards.discard(message.shard)
                elif isinstance(message, WorkerBroken):
                    raise message.error
            beat = handle.heartbeat()
            if beat is not None and (not found.beats or beat.seconds > found.beats[-1].seconds):
                found.start_seconds = found.start_seconds or time.monotonic() - began - beat.seconds
                found.beats.append(beat)
            death = handle.death()
            if death is not None:
                raise BsqError(f"{death.reason}, while it measured. `bsq tokenize` would tell more of it.")
            passed = found.beats[-1].seconds if found.beats else 0.0
            if (found.committed and passed > 2 * seconds) or time.monotonic() - began > MOST_SECONDS:
                break
    finally:
        runner.close()
    if not any(message.commit.tokens for message in found.committed.values()):
        reason = found.reasons[0] if found.reasons else "every sample failed, or none was done in time."
        raise SpecError(f"nothing could be tokenized of the samples measured: {reason}")
    return found


def _extrapolate(
    urls: Sequence[str],
    options: dict[str, Any],
    excerpts: Sequence[Excerpt],
    reasons: list[str],
    measurement: _Measurement,
    workers: int,
    views: int,
    where: str,
) -> JobPlan:
    done = [(excerpts[number], message) for number, message in measurement.committed.items()]
    cut = Counter[str]()
    failures = Counter[str]()
    for excerpt, message in done:
        for name, count in message.failures.items():
            (cut if name in _OF_THE_CUT and not excerpt.is_whole else failures)[name] += count
    commits: list[Commit] = [message.commit for _, message in done]
    samples = max(1, sum(commit.samples for commit in commits) - cut["SampleCutOff"])
    tokens, rows = sum(commit.tokens for commit in commits), sum(commit.rows for commit in commits)

    readable = len(excerpts) / (len(excerpts) + len(reasons))
    mean_bytes = sum(excerpt.shard_bytes for excerpt in excerpts) / len(excerpts)
    samples_per_byte = sum(excerpt.shard_samples for excerpt in excerpts) / (mean_bytes * len(excerpts))
    sizes = [stored_size(urls[number], options) for number in spread(len(urls), SIZED_SHARDS)]
    known = [size for size in sizes if size is not None]
    source_bytes = (sum(known) / len(known) if known else mean_bytes) * len(urls) * readable
    all_samples = source_bytes * samples_per_byte

    worker_rate = measurement.tokens_per_second * samples / tokens
    read_rate = sum(excerpt.num_samples for excerpt in excerpts) / max(1e-9, sum(e.seconds for e in excerpts))
    rate = min(worker_rate, read_rate)
    last = measurement.beats[-1]
    device_wait = min(1.0, last.device_wait_seconds / (last.seconds * last.num_lanes))
    decode_wait = min(1.0, last.decode_wait_seconds / (last.seconds * last.num_decoders))
    limit: Limit = "storage" if read_rate < worker_rate else "decoding" if device_wait > decode_wait else "the device"
    # A shard is the work of one worker: few large ones do not divide evenly.
    rounds = math.ceil(len(urls) * readable / workers)
    per_worker = max(all_samples / workers, rounds * all_samples / max(1.0, len(urls) * readable))
    return JobPlan(
        shards=len(urls),
        source_bytes=round(source_bytes),
        samples=round(all_samples),
        clips=round(all_samples * rows / views / samples),
        rows=round(all_samples * rows / samples),
        tokens=round(all_samples * tokens / samples),
        output_bytes=round(all_samples * sum(commit.bytes for commit in commits) / samples),
        failures={name: max(1, round(all_samples * count / samples)) for name, count in failures.items()},
        unreadable_shards=round(len(urls) * (1 - readable)),
        workers=workers,
        seconds=per_worker / rate + measurement.start_seconds,
        limit=limit,
        storage_rate=read_rate,
        worker_rate=worker_rate,
        device_wait=device_wait,
        decode_wait=decode_wait,
        start_seconds=measurement.start_seconds,
        measured_shards=len(done),
        measured_samples=samples,
        measured_on=where,
        reasons=[*reasons, *measurement.reasons],
    )


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, spread evenly over them."""
    if count <= most:
        return list(range(count))
    return [(2 * number + 1) * count // (2 * most) for number in range(most)]


def _size(num_bytes: float) -> str:
    exponent = min(5, int(math.log10(max(1.0, num_bytes)) // 3))
    return f"{num_bytes / 1000**exponent:,.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[exponent]}"


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:,.3g} hours"
