"""The driver: what is left, who does it, when it is done.  Read this file first.

It holds a bitmap over shards and what is in flight, and nothing per sample.  Every decision follows from the ledger,
so a driver that is killed at any moment is replaced by the next.  `jobs/start.py` begins a job and calls it,
`jobs/attempts.py` remembers what failed."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import FrameType
from typing import TYPE_CHECKING

from jobs.arithmetic import OneArithmetic
from jobs.attempts import DECODE_HUNG, WORKER_DIED, WORKER_HUNG, ShardQueue
from jobs.commit import LedgerWriter
from jobs.generation import Generation
from jobs.lease import HeldLease
from jobs.progress import ProgressMeter
from jobs.runner import Death, Runner, WorkerHandle
from pipeline.dataset_files import LedgerState
from pipeline.messages import Activity, Assignment, ShardCommitted, ShardFailed, WorkerBroken
from pipeline.storage import Storage
from schemas.errors import BsqError, CircuitBreakerOpen, Interrupted
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
START_SECONDS = 600.0
"""For a worker to come up: its weights may come from afar."""
MAX_BARREN_DEATHS = 3
"""Deaths in a row in one worker's place before one came up, after which nobody takes that place until the number of
places changes."""
DECODE_GRACE_SHARE, DECODE_GRACE_SECONDS = 0.25, 5.0
"""Given beyond the time limit of a sample, in which a decoder that still looks at the clock ends by itself."""
DRAIN_SECONDS = 20.0
WAIT_SECONDS = 0.25
WATCH_SECONDS = 0.25
"""Between two looks at what the threads of a worker do: shards may come in faster than that."""


@dataclass(slots=True)
class _Slot:
    """One worker and what it works on."""

    handle: WorkerHandle
    in_flight: dict[int, Assignment] = field(default_factory=dict)
    last_progress: int = -1
    last_change: float = field(default_factory=time.monotonic)
    watched: float = 0.0
    broken: str = ""
    """What the worker said before it was given up."""


class Driver:
    """Hands shards to workers until every one is committed or given up."""

    def __init__(
        self,
        storage: Storage,
        generation: Generation,
        ledger: LedgerState,
        lease: HeldLease,
        spec: JobSpec,
        observer: Observer | None,
        resume_command: str = "bsq resume",
        arithmetic: OneArithmetic | None = None,
    ) -> None:
        self._storage, self._generation, self._lease = storage, generation, lease
        self._resume_command = resume_command
        self._arithmetic = arithmetic
        self._run_spec = spec.run
        decode_seconds = spec.limits.decode_timeout_seconds
        self._decode_seconds = decode_seconds * (1 + DECODE_GRACE_SHARE) + DECODE_GRACE_SECONDS
        self._observer = observer or (lambda progress, line: None)
        self._writer = LedgerWriter(storage, ledger.generation, ledger.next_segment, set(ledger.arithmetic))
        self._resumed = generation.resumed or bool(ledger.segments)
        shards = [
            shard
            for shard in generation.shards
            if (shard, generation.record.part) not in ledger.committed and shard not in ledger.given_up
        ]
        self._queue = ShardQueue(shards, ledger.failed_attempts, max_attempts=spec.run.max_attempts)
        self.num_left = len(shards)
        self._slots: dict[int, _Slot] = {}
        self._barren_deaths: collections.Counter[int] = collections.Counter()
        self._num_places = 0
        self._last_up = time.monotonic()
        self._meter = ProgressMeter(len(generation), ledger)
        self._errors: collections.Counter[str] = collections.Counter()
        self._examples: dict[str, str] = {}
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
                while self.num_left:
                    if self._interrupted.is_set():
                        self._drain(runner)
                        raise Interrupted(
                            f"{self._meter.progress().committed:,} of {len(self._generation):,} shards are committed. "
                            f"Go on with: {self._resume_command}"
                        )
                    self._start_workers(runner)
                    self._hand_out()
                    runner.wait(WAIT_SECONDS)
                    for number in list(self._slots):
                        self._attend(number)
                    self._require_workers()
                    self._writer.flush_if_due()
                    self._report()
                    if self._lease.is_due:
                        self._lease.renew(self._meter.progress())
            finally:
                # Whatever ended the loop, what workers have published deserves its record.
                self._writer.flush()
        self._observer(self._meter.progress(), None)

    # ---- handing out

    def _start_workers(self, runner: Runner) -> None:
        """Fill the places there are: at the beginning, after a death, and when a node has joined."""
        num_places = runner.num_workers
        if num_places != self._num_places:
            # Nodes came or went, perhaps the one on which nobody came up: no place is what it was.
            self._num_places = num_places
            self._barren_deaths.clear()
        places = [number for number in range(num_places) if self._barren_deaths[number] < MAX_BARREN_DEATHS]
        wanted = min(len(places), self.num_left)
        for number in places:
            if len(self._slots) >= wanted:
                return
            if number not in self._slots:
                self._slots[number] = _Slot(runner.start_worker(number))

    def _hand_out(self) -> None:
        for slot in self._slots.values():
            # One that is not up yet may never be; a shard in its hands would wait with it.
            while slot.handle.heartbeat() is not None and len(slot.in_flight) < SHARDS_IN_FLIGHT:
                if any(self._queue.is_suspect(shard) for shard in slot.in_flight):
                    break
                shard = self._queue.take(alone=not slot.in_flight)
                if shard is None:
                    break
                assignment = self._queue.assignment(shard, self._generation.url(shard), adopt=self._resumed)
                if self._arithmetic is not None:
                    # A file that lies there does not say what computed it.
                    assignment = dataclasses.replace(assignment, adopt=False)
                assignment = self._generation.complete(assignment)
                if not slot.in_flight:
                    slot.last_change = time.monotonic()
                slot.in_flight[shard] = assignment
                slot.handle.assign(assignment)

    # ---- listening

    def _attend(self, number: int) -> None:
        slot = self._slots[number]
        for message in slot.handle.take_messages():
            if isinstance(message, ShardCommitted):
                self._on_commit(slot, message)
            elif isinstance(message, ShardFailed):
                self._on_failed_attempt(slot, message)
            else:
                self._on_broken(slot, message)
        now = time.monotonic()
        heartbeat = slot.handle.heartbeat()
        if heartbeat is not None:
            self._last_up = now
            self._barren_deaths.pop(number, None)
            self._meter.heard(number, heartbeat)
            if self._metrics:
                self._metrics.heard(slot.handle.name, heartbeat)
            if heartbeat.progress != slot.last_progress or not slot.in_flight:
                slot.last_progress, slot.last_change = heartbeat.progress, now
        death = slot.handle.death()
        if death is not None:
            self._on_death(number, Death(slot.broken, death.counts) if slot.broken else death)
        else:
            self._watch(number, now)

    def _watch(self, number: int, now: float) -> None:
        """Kill a worker that decodes one sample for too long, or makes no progress at all."""
        slot = self._slots[number]
        if now - slot.watched < WATCH_SECONDS:
            return
        slot.watched = now
        activities = slot.handle.activities()
        overdue = {name: item for name, item in activities.items() if self._is_overdue(item)}
        if overdue and slot.in_flight:
            what = f"decoded one sample for more than {self._decode_seconds:.0f} s"
            self._kill(number, what, overdue, DECODE_HUNG)
            return
        patience = self._run_spec.hang_timeout_seconds if slot.handle.heartbeat() is not None else START_SECONDS
        if now - slot.last_change > patience:
            self._kill(number, f"made no progress for {patience:.0f} s", activities, WORKER_HUNG)

    def _require_workers(self) -> None:
        seconds = MAX_BARREN_DEATHS * START_SECONDS
        if time.monotonic() - self._last_up > seconds:
            raise BsqError(
                f"{self._storage.url}: no worker has been up for {seconds:.0f} s. When there is room for one, go on "
                f"with: {self._resume_command}"
            )

    def _is_overdue(self, activity: Activity) -> bool:
        # Decoding in a child has a watchdog of its own, so it goes by another name.
        return activity.stage == "decode" and activity.seconds > self._decode_seconds

    def _kill(self, number: int, what: str, activities: Mapping[str, Activity], error: str) -> None:
        handle = self._slots[number].handle
        handle.kill()
        doing = "; ".join(_describe(item) for item in activities.values()) or "it never answered"
        self._on_death(number, Death(f"worker {handle.name} {what} and was killed ({doing})"), error, activities)

    def _on_commit(self, slot: _Slot, message: ShardCommitted) -> None:
        commit = message.commit
        if slot.in_flight.pop(commit.shard, None) is None:
            return
        if self._arithmetic is not None:
            self.leaves_strays = True
            worker, dataset = slot.handle.name, self._storage.url
            self._arithmetic.check(commit.arithmetic, message.arithmetic, worker=worker, dataset=dataset)
        self._writer.add_arithmetic(commit.arithmetic, message.arithmetic)
        self._writer.add(commit)
        self.num_left -= 1
        self._queue.forget(commit.shard)
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
        attempt = Attempt(
            shard=message.shard,
            attempt=assignment.attempt,
            stage=message.stage,
            error=message.error,
            message=message.message,
            worker=slot.handle.name,
            at=_now(),
        )
        self._fail(attempt, retryable=message.retryable)

    def _fail(self, attempt: Attempt, *, retryable: bool = True) -> None:
        shard, message = attempt.shard, attempt.message
        self._writer.add(attempt)
        again = self._queue.add_failed(attempt, retryable=retryable)
        if self._metrics:
            self._metrics.attempt_failed(attempt.error, gave_up=not again)
        if again:
            self._say(f"shard {shard}, attempt {attempt.attempt} failed, will be tried again: {message}")
            return
        num_attempts = self._queue.num_counted(shard)
        self._writer.add(GivenUp(shard=shard, attempts=num_attempts, error=attempt.error, message=message, at=_now()))
        self.num_left -= 1
        self._queue.forget(shard)
        self._meter.gave_up()
        # By class: messages name their shard, so hardly one is like another.
        self._errors[attempt.error] += 1
        self._examples.setdefault(attempt.error, message)
        self._failed_in_a_row += 1
        self._say(f"shard {shard} failed: {message}")
        if not self._is_retry and self._failed_in_a_row >= BREAKER_SHARDS:
            error, count = self._errors.most_common(1)[0]
            raise CircuitBreakerOpen(
                f"{self._storage.url}: {BREAKER_SHARDS} shards failed in a row; the job stops before it burns through "
                f"the rest. The commonest reason ({error}, {count:,} of {self._errors.total():,}): "
                f"{self._examples[error]}"
            )

    def _on_broken(self, slot: _Slot, message: WorkerBroken) -> None:
        if message.stops_job:
            raise message.error
        slot.broken = f"worker {slot.handle.name}: {message.error}"
        slot.handle.kill()

    def _on_death(
        self, number: int, death: Death, error: str = WORKER_DIED, activities: Mapping[str, Activity] | None = None
    ) -> None:
        slot = self._slots.pop(number)
        self.leaves_strays = True
        self._say(death.reason)
        decoding = (slot.handle.activities() if activities is None else activities).values()
        for shard, assignment in slot.in_flight.items():
            keys = [item.key for item in decoding if item.shard == shard and "decode" in item.stage and item.key]
            # When it is known which key it was, no other shard is to blame.
            is_guilty = bool(keys) or error != DECODE_HUNG
            attempt = Attempt(
                shard=shard,
                attempt=assignment.attempt,
                stage="worker",
                error=error if is_guilty else WORKER_DIED,
                message=death.reason,
                keys_in_flight=keys,
                counts=death.counts and is_guilty,
                worker=slot.handle.name,
                at=_now(),
            )
            self._fail(attempt)
        if slot.handle.heartbeat() is None:
            self._abandon_place(number, death.reason)

    def _abandon_place(self, number: int, reason: str) -> None:
        """Count a death before the worker came up; after several nobody is started in its place."""
        self._barren_deaths[number] += 1
        if self._barren_deaths[number] < MAX_BARREN_DEATHS:
            return
        if all(slot.handle.heartbeat() is None for slot in self._slots.values()):
            raise BsqError(
                f"{reason}, {MAX_BARREN_DEATHS} times in a row before it came up. The log in logs/ has the details."
            )
        self._say(f"nobody takes its place: {MAX_BARREN_DEATHS} in a row did not come up")

    # ---- ending early

    def _drain(self, runner: Runner) -> None:
        """Let workers finish what they have read, and record what they publish."""
        self._say("stopping: finishing what has been read; interrupt again to stop at once")
        for slot in self._slots.values():
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


def _describe(activity: Activity) -> str:
    return f"{activity.stage} of shard {activity.shard}" + (f", key {activity.key!r}" if activity.key else "")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
