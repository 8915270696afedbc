"""How far a job is: measured while it runs, and read back from anywhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from jobs.display import describe_bytes, describe_seconds, shortened_text
from jobs.existing_job import existing_job
from jobs.lease import is_dead, read_lease
from pipeline.dataset_files import (
    LedgerState,
    StoredFile,
    iter_commits,
    manifest_table_name,
    read_ledger,
    read_manifest_summary,
    read_plan,
)
from pipeline.generations import command_of, list_begun, read_generation
from pipeline.messages import Heartbeat
from pipeline.parquet import PARQUET_ERRORS, read_parquet
from pipeline.storage import Storage, open_storage
from schemas.errors import BsqError
from schemas.failures import POISON
from schemas.job import GenerationKind
from schemas.lease import Lease, Progress
from schemas.ledger import Commit
from schemas.manifest import ManifestSummary, latest_parts

RATE_WINDOW_SECONDS = 60.0
SHOWN_FAILURES = 5
SHOWN_CHARS = 160
SEARCHED_TABLES = 8
"""Failure tables that are read for samples to show."""


class ProgressMeter:
    """Adds up commits and heartbeats into `Progress`."""

    def __init__(self, num_shards: int, ledger: LedgerState) -> None:
        self._num_shards = num_shards
        self._totals = ledger.totals
        self._committed = len(ledger.committed)
        self._failed_shards = len(ledger.given_up)
        self._began = time.monotonic()
        self._done_before = self._committed + self._failed_shards
        self._heartbeats: dict[int, Heartbeat] = {}
        self._samples_before: dict[int, tuple[int, int]] = {}
        self._before = (self._totals.samples, self._totals.tokens)
        self._history: deque[tuple[float, int, int]] = deque()
        self._num_busy_beats = self._num_beats_without_input = 0

    def committed(self, commit: Commit) -> None:
        self._committed += 1
        self._totals.add(commit)

    def gave_up(self) -> None:
        self._failed_shards += 1

    def heard(self, worker: int, heartbeat: Heartbeat) -> None:
        """Take the heartbeat of a worker; one whose counters went back is a new process in its place."""
        previous = self._heartbeats.get(worker)
        if previous is not None and heartbeat.seconds < previous.seconds:
            samples, tokens = self._samples_before.get(worker, (0, 0))
            self._samples_before[worker] = (samples + previous.samples, tokens + previous.tokens)
        if heartbeat.busy and (previous is None or heartbeat.seconds != previous.seconds):
            self._num_busy_beats += 1
            self._num_beats_without_input += heartbeat.waiting_bytes == 0
        self._heartbeats[worker] = heartbeat
        now = time.monotonic()
        if not self._history or now - self._history[-1][0] > 0.5:
            self._history.append((now, *self._encoded()))
            while now - self._history[0][0] > RATE_WINDOW_SECONDS and len(self._history) > 2:
                self._history.popleft()

    def progress(self, *, whole_run: bool = False) -> Progress:
        """How far the job is; speeds are those of the last minute, or of the whole run."""
        now = time.monotonic()
        if whole_run or len(self._history) < 2:
            first: tuple[float, int, int] = (self._began, *self._before)
            last = (now, self._totals.samples, self._totals.tokens)
        else:
            first, last = self._history[0], self._history[-1]
        span = max(last[0] - first[0], 1e-9)
        done = self._committed + self._failed_shards
        seconds = now - self._began
        finished = done - self._done_before
        beats = list(self._heartbeats.values())
        device_seconds = sum(beat.seconds * beat.num_lanes for beat in beats) or 1.0
        decoder_seconds = sum(beat.seconds * beat.num_decoders for beat in beats) or 1.0
        return Progress(
            shards=self._num_shards,
            committed=self._committed,
            failed_shards=self._failed_shards,
            partial_shards=self._totals.partial,
            samples=self._totals.samples,
            failed_samples=self._totals.failed,
            poison_samples=self._totals.poison,
            warnings=self._totals.warnings,
            rows=self._totals.rows,
            tokens=self._totals.tokens,
            bytes=self._totals.bytes,
            seconds=seconds,
            samples_per_second=(last[1] - first[1]) / span,
            tokens_per_second=(last[2] - first[2]) / span,
            eta_seconds=seconds / finished * (self._num_shards - done) if finished else None,
            workers=len(beats),
            device_wait=min(1.0, sum(beat.device_wait_seconds for beat in beats) / device_seconds),
            decode_wait=min(1.0, sum(beat.decode_wait_seconds for beat in beats) / decoder_seconds),
            read_wait=self._num_beats_without_input / max(1, self._num_busy_beats),
        )

    def _encoded(self) -> tuple[int, int]:
        samples = sum(beat.samples for beat in self._heartbeats.values())
        tokens = sum(beat.tokens for beat in self._heartbeats.values())
        return (
            samples + sum(before[0] for before in self._samples_before.values()),
            tokens + sum(before[1] for before in self._samples_before.values()),
        )


class FailedShard(BaseModel):
    """A shard that was given up."""

    model_config = ConfigDict(frozen=True)

    shard: int
    error: str | None = None
    """Class and message are in the ledger, which is not read for a finished dataset."""
    message: str | None = None

    def describe(self) -> str:
        return f"shard {self.shard}" + (f": {self.error}: {self.message}" if self.error else "")


class FailedSample(BaseModel):
    """A sample without rows, or without all of them."""

    model_config = ConfigDict(frozen=True)

    shard: int
    key: str
    error: str
    message: str

    def describe(self) -> str:
        return f"shard {self.shard}, key {self.key!r}: {self.error}: {self.message}"


class Status(BaseModel):
    """What `bsq status` says of a dataset."""

    model_config = ConfigDict(frozen=True)

    url: str
    state: str
    """running, interrupted, complete, or incomplete (finished, but shards failed)."""
    generation: int
    """The newest generation that was begun."""
    kind: GenerationKind
    """What it does."""
    progress: Progress
    """Of that generation; of the whole dataset where it is finished."""
    driver: str | None = None
    """Who drives it, if anybody."""
    failed_shards: list[FailedShard] = []
    """The first few; empty while a driver is at work."""
    failed_samples: list[FailedSample] = []
    """A few, those that end their decoder first; empty while a driver is at work."""

    def to_json(self) -> str:
        return self.model_dump_json(indent=1)

    def describe(self) -> str:
        """A few lines for people."""
        p = self.progress
        which = f", generation {self.generation} (`{command_of(self.kind)}`)" if self.generation else ""
        lines = [
            f"{self.url}: {self.state}{which}" + (f", driven by {self.driver}" if self.driver else ""),
            f"  shards    {p.committed:,} of {p.shards:,} committed"
            + (f", {p.failed_shards:,} failed" if p.failed_shards else "")
            + (f", {p.partial_shards:,} partial" if p.partial_shards else ""),
            f"  samples   {p.samples:,}, {p.failed_samples:,} of them failed"
            + (f" ({p.poison_samples:,} ended or hung their decoder)" if p.poison_samples else "")
            + f", {p.warnings:,} warnings",
            f"  tokens    {p.tokens:,} in {p.rows:,} rows, {describe_bytes(p.bytes)}",
        ]
        if self.state == "running":
            eta = f", about {describe_seconds(p.eta_seconds)} left" if p.eta_seconds is not None else ""
            lines.append(f"  speed     {p.samples_per_second:,.1f} samples/s, {p.tokens_per_second:,.0f} tokens/s{eta}")
            lines.append(
                f"  waiting   device {p.device_wait:.0%} of its time for batches, "
                f"decoders {p.decode_wait:.0%} for the device; nothing to decode {p.read_wait:.0%} of the time"
            )
        failures: list[FailedShard | FailedSample] = [*self.failed_shards, *self.failed_samples]
        lines += [f"  failed    {shortened_text(failure.describe(), SHOWN_CHARS)}" for failure in failures]
        if self.state == "interrupted":
            lines.append(f"  go on     bsq resume {self.url}")
        elif self.state != "running":
            lines += [f"  try again bsq retry {self.url}{switch}" for switch in self._switches()]
        return "\n".join(lines)

    def _switches(self) -> list[str]:
        p = self.progress
        counts = (p.failed_shards, ""), (p.failed_samples, " --samples"), (p.partial_shards, " --damaged")
        return [switch for count, switch in counts if count]


def progress_of(summary: ManifestSummary) -> Progress:
    """What a finished dataset holds."""
    committed = summary.files - summary.parts
    return Progress(
        shards=committed + summary.failed_shards,
        committed=committed,
        failed_shards=summary.failed_shards,
        partial_shards=summary.partial_shards,
        samples=summary.samples,
        failed_samples=summary.failed,
        poison_samples=sum(summary.poison.values()),
        warnings=summary.warnings,
        rows=summary.rows,
        tokens=summary.tokens,
        bytes=summary.bytes,
    )


def read_status(out: str, storage_options: dict[str, Any] | None = None) -> Status:
    """How far the job in `out` is, read from the lease while it runs and from ledger or manifest otherwise.

    Raises SpecError when there is no job."""
    storage = open_storage(out, storage_options)
    job = existing_job(storage)
    generation = list_begun(storage)[-1]
    status = Status(
        url=storage.url,
        state="running",
        generation=generation,
        kind=read_generation(storage, job, generation).kind,
        progress=Progress(),
    )
    held = read_lease(storage)
    if held is not None:
        lease, age = held
        if age < lease.ttl_seconds and not is_dead(lease):
            progress = _with_shards(storage, lease, generation)
            return status.model_copy(update={"progress": progress, "driver": _name_of(lease)})
    try:
        summary = read_manifest_summary(storage, generation)
    except FileNotFoundError:
        return status.model_copy(update=_read_unfinished(storage, generation))
    return status.model_copy(
        update={
            "state": "complete" if summary.complete else "incomplete",
            "progress": progress_of(summary),
            "failed_shards": [FailedShard(shard=shard) for shard in summary.first_failed_shards[:SHOWN_FAILURES]],
            "failed_samples": _read_failed_samples(storage, summary) if summary.failed else [],
        }
    )


def _read_unfinished(storage: Storage, generation: int) -> dict[str, Any]:
    """What the ledger says of a generation that nobody drives."""
    ledger = read_ledger(storage, generation, keep_commits=False)
    commits: Iterable[Commit] = iter_commits(storage, generation) if ledger.totals.failed else ()
    # Those with poison first, as far as that needs no more than one pass.
    wanted = "poison" if ledger.totals.poison else "failed"
    failed = ((commit.shard, commit.failures.file) for commit in commits if getattr(commit, wanted) and commit.failures)
    return {
        "state": "interrupted",
        "progress": ProgressMeter(len(read_plan(storage, generation)), ledger).progress(),
        "failed_shards": [
            FailedShard(shard=shard, error=record.error, message=record.message)
            for shard, record in sorted(ledger.given_up.items())[:SHOWN_FAILURES]
        ],
        "failed_samples": _first_failed_samples(storage, islice(failed, SEARCHED_TABLES)),
    }


def _read_failed_samples(storage: Storage, summary: ManifestSummary) -> list[FailedSample]:
    """Some failed samples of a finished dataset: four columns of its manifest, and a few failure tables."""
    name = manifest_table_name(summary.generation)
    try:
        columns = ["shard", "part", "failed", "failures_file"]
        table = read_parquet(StoredFile(storage, name), columns)
    except (FileNotFoundError, *PARQUET_ERRORS) as error:
        raise BsqError(f"{storage.printable(name)}: it is gone or damaged. Run `bsq verify {storage.url}`.") from error
    table = table.filter(pa.array(latest_parts(table))).filter(pc.field("failed") > 0)
    has_poison = pc.is_in(table["shard"], pa.array(summary.poison, pa.int64()))
    table = pa.concat_tables([table.filter(has_poison), table.filter(pc.invert(has_poison))])
    rows = table.slice(0, SEARCHED_TABLES).to_pylist()
    return _first_failed_samples(storage, [(row["shard"], row["failures_file"]) for row in rows])


def _first_failed_samples(storage: Storage, tables: Iterable[tuple[int, str]]) -> list[FailedSample]:
    samples = []
    for shard, name in tables:
        try:
            table = read_parquet(StoredFile(storage, name), ["key", "error", "message", "severity"])
        except (FileNotFoundError, *PARQUET_ERRORS) as error:
            raise BsqError(
                f"{storage.printable(name)}: it is gone or damaged. Run `bsq verify {storage.url}`."
            ) from error
        table = table.filter((pc.field("severity") == "failed") & pc.field("key").is_valid())
        rows = table.drop_columns("severity").to_pylist()
        samples += [FailedSample(shard=shard, **row) for row in rows]
    return sorted(samples, key=lambda sample: (sample.error not in POISON, sample.shard))[:SHOWN_FAILURES]


def _with_shards(storage: Storage, lease: Lease, generation: int) -> Progress:
    # The first quarter of a minute has no progress in the lease yet.
    if lease.progress.shards:
        return lease.progress
    return lease.progress.model_copy(update={"shards": len(read_plan(storage, generation))})


def _name_of(lease: Lease) -> str:
    return f"process {lease.pid} on {lease.host}"
