"""The driver: what is left, who does it, when it is done.  Read this file first.

It holds a bitmap over shards and what is in flight, and nothing per sample.  Every decision follows from the ledger,
so a driver that is killed at any moment is replaced by the next.  `jobs/start.py` prepares what it
needs, and ends the generation when it is through."""

from __future__ import annotations

import collections
import contextlib
import heapq
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import FrameType
from typing import TYPE_CHECKING

from jobs.commit import LedgerWriter
from jobs.generation import Generation
from jobs.lease import HeldLease
from jobs.progress import ProgressMeter
from jobs.runner import Runner, WorkerHandle
from pipeline.dataset_files import LedgerState
from pipeline.messages import Assignment, ShardCommitted, ShardFailed, WorkerBroken
from pipeline.storage import Storage
from schemas.errors import BsqError, CircuitBreakerOpen, Interrupted
from schemas.job import Job
from schemas.jobspec import JobSpec
from schemas.lease import Progress
from schemas.ledger import Attempt, GivenUp

if TYPE_CHECKING:
    from jobs.metrics import JobMetrics

Observer = Callable[[Progress, str | None], None]

SHARDS_IN_FLIGHT = 2
BREAKER_SHARDS = 20
"""Shards failed in a row after which the job stops."""
BREAKER_FIRST_SHARDS = 10
"""When more than half of the samples of this many first shards fail, the job stops."""
BACKOFF_SECONDS = 1.0
BACKOFF_MOST_SECONDS = 60.0
MAX_BARREN_DEATHS = 3
"""Deaths of one worker in a row before it came up after which the job stops."""
DRAIN_SECONDS = 20.0
WAIT_SECONDS = 0.25


@dataclass(slots=True)
class _Slot:
    """One worker and what it works on."""

    handle: WorkerHandle
    in_flight: dict[int, Assignment] = field(default_factory=dict)
    last_progress: int = -1
    last_change: float = field(default_factory=time.monotonic)
    barren_deaths: int = 0
    """Deaths in a row of those before this worker, none of which came up."""
    broken: str = ""
    """What the worker said before it was given up."""
    drained: bool = False


class Driver:
    """Hands shards to workers until every one is committed or given up."""

    def __init__(
        self,
        storage: Storage,
        job: Job,
        generation: Generation,
        ledger: LedgerState,
        lease: HeldLease,
        spec: JobSpec,
        observer: Observer | None,
        resume_command: str = "bsq resume",
    ) -> None:
        self._storage, self._job, self._generation, self._lease = storage, job, generation, lease
        self._resume_command = resume_command
        self._run_spec = spec.run
        self._observer = observer or (lambda progress, line: None)
        self._writer = LedgerWriter(storage, ledger.generation, ledger.next_segment, set(ledger.arithmetic))
        self._attempts = dict(ledger.attempts)
        self._resumed = generation.resumed or bool(ledger.segments)
        self._open = [
            shard
            for shard in generation.shards
            if (shard, generation.record.part) not in ledger.committed and shard not in ledger.given_up
        ]
        self.num_left = len(self._open)
        self._next = 0
        self._later: list[tuple[float, int]] = []
        # Shards in flight when a worker died: tried again by themselves, so that one costs no other an attempt.
        self._suspects: set[int] = set()
        self._slots: dict[int, _Slot] = {}
        self._meter = ProgressMeter(len(generation), ledger)
        self._messages: collections.Counter[str] = collections.Counter()
        self._failed_in_a_row = 0
        self._first_samples: list[tuple[int, int]] = []
        # What failed before may well fail again; there is nothing to burn through.
        self._is_retry = generation.record.kind.startswith("retry")
        self._interrupted = threading.Event()
        self._observed = 0.0
        self._metrics: JobMetrics | None = None
        self.leaves_strays = self._resumed

    @property
    def has_work(self) -> bool:
        """Whether a shard is neither committed nor given up."""
        return self.num_left > 0

    @property
    def progress(self) -> Progress:
        """How far the generation is, with the speeds of the whole run."""
        return self._meter.progress(whole_run=True)

    def run(self, runner: Runner, metrics: JobMetrics | None = None) -> None:
        """Run to the end, telling `metrics` on the way.

        Raises CircuitBreakerOpen, Interrupted, LeaseLost, OutputError, or what broke a worker for good; everything
        committed until then is in the ledger."""
        self._metrics = metrics
        with self._signals():
            try:
                for number in range(min(runner.num_workers, self.num_left)):
                    self._slots[number] = _Slot(runner.start_worker(number))
                while self.num_left:
                    if self._interrupted.is_set():
                        self._drain(runner)
                        raise Interrupted(
                            f"{self._meter.progress().committed:,} of {len(self._generation):,} shards are committed. "
                            f"Go on with: {self._resume_command}"
                        )
                    self._hand_out()
                    runner.wait(WAIT_SECONDS)
                    for number in list(self._slots):
                        self._attend(runner, number)
                    self._writer.flush_if_due()
                    self._report()
                    if self._lease.is_due:
                        self._lease.renew(self._meter.progress())
            finally:
                # Whatever ended the loop, what workers have published deserves its record.
                self._writer.flush()
        self._observer(self._meter.progress(), None)

    # ---- handing out

    def _hand_out(self) -> None:
        for slot in self._slots.values():
            while len(slot.in_flight) < SHARDS_IN_FLIGHT and not self._suspects.intersection(slot.in_flight):
                shard = self._next_shard(alone=not slot.in_flight)
                if shard is None:
                    break
                attempt = self._attempts.get(shard, 0) + 1
                url = self._generation.url(shard)
                assignment = Assignment(shard, attempt, url, adopt=self._resumed or attempt > 1)
                assignment = self._generation.complete(assignment)
                if not slot.in_flight:
                    slot.last_change = time.monotonic()
                slot.in_flight[shard] = assignment
                slot.handle.assign(assignment)

    def _next_shard(self, *, alone: bool) -> int | None:
        if self._later:
            due, shard = self._later[0]
            if due <= time.monotonic() and (alone or shard not in self._suspects):
                return heapq.heappop(self._later)[1]
        if self._next < len(self._open):
            self._next += 1
            return self._open[self._next - 1]
        return None

    # ---- listening

    def _attend(self, runner: Runner, number: int) -> None:
        slot = self._slots[number]
        for message in slot.handle.take_messages():
            if isinstance(message, ShardCommitted):
                self._on_commit(slot, message)
            elif isinstance(message, ShardFailed):
                self._on_failed_attempt(slot, message)
            else:
                self._on_broken(slot, message)
        heartbeat = slot.handle.heartbeat()
        if heartbeat is not None:
            self._meter.heard(number, heartbeat)
            if self._metrics:
                self._metrics.heard(slot.handle.name, heartbeat)
            if heartbeat.progress != slot.last_progress or not slot.in_flight:
                slot.last_progress, slot.last_change = heartbeat.progress, time.monotonic()
        death = slot.handle.death()
        if death is None and time.monotonic() - slot.last_change > self._run_spec.hang_timeout_seconds:
            death = self._describe_hang(slot)
            slot.handle.kill()
        if death is not None and not slot.drained:
            self._on_death(runner, number, slot.broken or death)

    def _on_commit(self, slot: _Slot, message: ShardCommitted) -> None:
        commit = message.commit
        if slot.in_flight.pop(commit.shard, None) is None:
            return
        self._writer.add_arithmetic(commit.arithmetic, message.arithmetic)
        self._writer.add(commit)
        self.num_left -= 1
        self._failed_in_a_row = 0
        self._meter.committed(commit)
        if self._metrics:
            self._metrics.committed(message)
        if commit.partial:
            self._say(f"shard {commit.shard}: damaged archive, committed {commit.rows:,} rows read before the damage")
        if not self._is_retry and len(self._first_samples) < BREAKER_FIRST_SHARDS:
            self._first_samples.append((commit.samples, commit.failed))
            samples, failed = (sum(column) for column in zip(*self._first_samples, strict=True))
            if len(self._first_samples) == BREAKER_FIRST_SHARDS and failed * 2 > samples:
                raise CircuitBreakerOpen(
                    f"{self._storage.url}: {failed:,} of the {samples:,} samples of the first {BREAKER_FIRST_SHARDS} "
                    f"shards failed. Look at them with `bsq inspect {self._storage.url}` before `bsq resume`."
                )

    def _on_failed_attempt(self, slot: _Slot, message: ShardFailed) -> None:
        assignment = slot.in_flight.pop(message.shard, None)
        if assignment is None:
            return
        self.leaves_strays = True
        self._fail_attempt(
            assignment,
            stage=message.stage,
            error=message.error,
            message=message.message,
            worker=slot.handle.name,
            retryable=message.retryable,
        )

    def _fail_attempt(
        self,
        assignment: Assignment,
        *,
        stage: str,
        error: str,
        message: str,
        worker: str,
        retryable: bool,
        keys_in_flight: list[str] | None = None,
        counts: bool = True,
    ) -> None:
        shard = assignment.shard
        self._writer.add(
            Attempt(
                shard=shard,
                attempt=assignment.attempt,
                stage=stage,
                error=error,
                message=message,
                keys_in_flight=keys_in_flight or [],
                counts=counts,
                worker=worker,
                at=_now(),
            )
        )
        attempts = self._attempts[shard] = self._attempts.get(shard, 0) + counts
        again = retryable and attempts < self._run_spec.max_attempts
        if self._metrics:
            self._metrics.attempt_failed(error, gave_up=not again)
        if again:
            delay = min(BACKOFF_SECONDS * 2 ** max(0, attempts - 1), BACKOFF_MOST_SECONDS)
            # Jitter keeps shards that failed together from coming back together.
            heapq.heappush(self._later, (time.monotonic() + delay * random.uniform(0.5, 1.0), shard))
            self._say(f"shard {shard}, attempt {assignment.attempt} failed, will be tried again: {message}")
            return
        self._writer.add(GivenUp(shard=shard, attempts=attempts, error=error, message=message, at=_now()))
        self.num_left -= 1
        self._meter.gave_up()
        self._messages[message] += 1
        self._failed_in_a_row += 1
        self._say(f"shard {shard} failed: {message}")
        if not self._is_retry and self._failed_in_a_row >= BREAKER_SHARDS:
            common = self._messages.most_common(1)[0][0]
            raise CircuitBreakerOpen(
                f"{self._storage.url}: {BREAKER_SHARDS} shards failed in a row; the job stops before it burns through "
                f"the rest. The commonest reason: {common}"
            )

    def _on_broken(self, slot: _Slot, message: WorkerBroken) -> None:
        if message.stops_job:
            raise message.error
        slot.broken = f"worker {slot.handle.name}: {message.error}"
        slot.handle.kill()

    def _on_death(self, runner: Runner, number: int, reason: str) -> None:
        slot = self._slots[number]
        self.leaves_strays = True
        self._say(reason)
        heartbeat = slot.handle.heartbeat()
        activities = list(heartbeat.activities.values()) if heartbeat else []
        came_up = heartbeat is not None
        if came_up:
            self._suspects.update(slot.in_flight)
        for assignment in slot.in_flight.values():
            self._fail_attempt(
                assignment,
                stage="worker",
                error="WorkerDied",
                message=reason,
                worker=slot.handle.name,
                retryable=True,
                keys_in_flight=[a.key for a in activities if a.shard == assignment.shard and a.key],
                counts=came_up,
            )
        barren = 0 if came_up else slot.barren_deaths + 1
        if barren >= MAX_BARREN_DEATHS:
            raise BsqError(f"{reason}, {barren} times in a row before it came up. The log in logs/ has the details.")
        if self.num_left:
            self._slots[number] = _Slot(runner.start_worker(number), barren_deaths=barren)

    def _describe_hang(self, slot: _Slot) -> str:
        heartbeat = slot.handle.heartbeat()
        doing = [
            f"{item.stage} of shard {item.shard}" + (f", key {item.key!r}" if item.key else "")
            for item in (heartbeat.activities.values() if heartbeat else [])
        ]
        return (
            f"worker {slot.handle.name} made no progress for {self._run_spec.hang_timeout_seconds:.0f} s and was "
            f"killed ({'; '.join(doing) or 'it never answered'})"
        )

    # ---- ending early

    def _drain(self, runner: Runner) -> None:
        """Let workers finish what they have read, and record what they publish."""
        self._say("stopping: finishing what has been read; interrupt again to stop at once")
        for slot in self._slots.values():
            slot.drained = True
            slot.handle.drain()
        deadline = time.monotonic() + DRAIN_SECONDS
        while time.monotonic() < deadline and any(slot.handle.death() is None for slot in self._slots.values()):
            runner.wait(WAIT_SECONDS)
            for slot in self._slots.values():
                for message in slot.handle.take_messages():
                    if isinstance(message, ShardCommitted):
                        self._on_commit(slot, message)
        self._writer.flush()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """First SIGINT or SIGTERM asks for a clean stop, the second stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def on_signal(number: int, frame: FrameType | None) -> None:
            if self._interrupted.is_set():
                os._exit(Interrupted.exit_code)
            self._interrupted.set()

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # ---- telling

    def _say(self, line: str) -> None:
        self._observer(self._meter.progress(), line)

    def _report(self) -> None:
        if time.monotonic() - self._observed > 0.5:
            self._observed = time.monotonic()
            progress = self._meter.progress()
            if self._metrics:
                self._metrics.progressed(progress)
            self._observer(progress, None)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
