"""The driver: what is left, who does it, when it is done.  Read this file first.

It holds a bitmap over shards and what is in flight, and nothing per sample.  Every decision follows from the ledger,
so a driver that is killed at any moment is replaced by the next."""

from __future__ import annotations

import collections
import contextlib
import heapq
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from jobs.begin import recognise, resolve, write_beginning
from jobs.commit import LedgerWriter
from jobs.finish import is_finished, sweep, write_manifest
from jobs.generation import Generation, first_generation, open_generation
from jobs.lease import HeldLease, take_lease
from jobs.outcome import JobOutcome, describe_outcome
from jobs.placement import Placement, find_nodes, find_placement
from jobs.progress import ProgressMeter
from jobs.runner import Runner, WorkerHandle
from pipeline.dataset_files import LedgerState, read_job, read_ledger, read_manifest_summary
from pipeline.generations import list_begun
from pipeline.messages import Assignment, ShardCommitted, ShardFailed, WorkerBroken, WorkerSetup
from pipeline.storage import Storage, printable_url
from schemas.errors import (
    BsqError,
    CircuitBreakerOpen,
    Interrupted,
    LeaseLost,
    SpecError,
)
from schemas.job import Job
from schemas.jobspec import JobSpec
from schemas.lease import Progress
from schemas.ledger import Attempt, GivenUp

if TYPE_CHECKING:
    from jobs.metrics import JobMetrics

RunnerKind = Literal["ray", "local", "in-process"]
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


def start_job(
    spec: JobSpec,
    *,
    runner: RunnerKind = "ray",
    ray_address: str | None = None,
    force: bool = False,
    observer: Observer | None = None,
    storage_options: dict[str, Any] | None = None,
) -> JobOutcome:
    """Begin the job that `spec` describes and run it to its end; go on with it where the output holds it already.

    Raises BsqError: SpecError and CheckpointError before anything is written, Refused when the output is not this
    job's, CircuitBreakerOpen and Interrupted with everything committed kept."""
    options = storage_options or {}
    if not spec.out:
        raise SpecError("no output is given. Name a folder or URL with --out.")
    if not spec.shards:
        raise SpecError("no shards are given. Name tar files or URLs, such as photos-{000..127}.tar.")
    gpus = any(node.gpus for node in find_nodes(spec.device, ray_address))
    beginning = resolve(spec, gpus=gpus, storage_options=options)
    run = Execution(spec, runner, ray_address, options)
    run.place(len(beginning.urls))
    storage = Storage(spec.out, options)
    recognise(storage, beginning)
    with holding_lease(storage, force=force) as lease:
        # Another driver may have begun or finished the job between the first look and the lease.
        job = recognise(storage, beginning)
        if job is None:
            write_beginning(storage, beginning)
            job = beginning.job
            generation = first_generation(job, beginning.urls)
        else:
            generation = open_generation(storage, job, list_begun(storage)[-1], given=beginning.urls)
        return run_generation(storage, job, generation, lease, run, observer)


def resume_job(
    out: str,
    *,
    runner: RunnerKind = "ray",
    ray_address: str | None = None,
    force: bool = False,
    workers: int | None = None,
    batch: int | None = None,
    observer: Observer | None = None,
    storage_options: dict[str, Any] | None = None,
) -> JobOutcome:
    """Go on with the job in `out`.  Loads no model and starts no worker when nothing is left.

    Raises SpecError when there is no job, LeaseHeld when another driver may be alive."""
    options = storage_options or {}
    storage = Storage(out, options)
    job = read_job(storage)
    if job is None:
        raise SpecError(f"{storage.url}: there is no job here to resume. Begin one with `bsq tokenize`.")
    changes = {name: value for name, value in (("workers", workers), ("batch", batch)) if value is not None}
    with holding_lease(storage, force=force) as lease:
        generation = open_generation(storage, job, list_begun(storage)[-1])
        spec = generation.record.spec
        spec = spec.model_copy(update={"out": out, "run": spec.run.model_copy(update=changes)})
        run = Execution(spec, runner, ray_address, options)
        return run_generation(storage, job, generation, lease, run, observer)


@dataclass(frozen=True, slots=True)
class Execution:
    """How workers are to be run, and the command that says so."""

    spec: JobSpec
    kind: RunnerKind
    ray_address: str | None
    storage_options: dict[str, Any]

    def place(self, num_shards: int) -> Placement:
        """Where the workers for so many shards go.  Raises SpecError when there is no room for them."""
        uses_ray = self.kind == "ray"
        return find_placement(self.spec, uses_ray=uses_ray, ray_address=self.ray_address, num_shards=num_shards)

    def command(self, name: str, switch: str = "") -> str:
        """What a person types to run `bsq NAME` on this output in the same way."""
        where = printable_url(self.spec.out)
        words = [f"bsq {name}", where if "://" in where else str(Path(where).absolute())]
        words += [switch] if switch else []
        words += {"ray": [], "local": ["--no-ray"], "in-process": ["--in-process"]}[self.kind]
        words += [f"--ray-address {self.ray_address}"] if self.ray_address else []
        # Values may be secrets, and this line goes into logs.
        words += [f"--storage-option {name}=..." for name in self.storage_options]
        return " ".join(words)


def run_generation(
    storage: Storage,
    job: Job,
    generation: Generation,
    lease: HeldLease,
    execution: Execution,
    observer: Observer | None,
) -> JobOutcome:
    """Run a generation that was begun to its end, and write its manifest."""
    number = generation.number
    # Workers take limits and policies from the job, and they are this generation's.
    job = job.model_copy(update={"spec": generation.record.spec})
    began = time.time()
    storage.sweep_temporaries(older_than=began)
    ledger = read_ledger(storage, number, keep_commits=False)
    command = execution.command("resume")
    driver = Driver(storage, job, generation, ledger, lease, execution.spec, observer, command)
    if driver.has_work:
        runner = make_runner(storage, job, execution, driver.num_left)
        try:
            driver.run(runner, _make_metrics(storage, execution))
        finally:
            runner.close()
            # A lease that was lost means that the temporaries are another driver's.
            if not isinstance(sys.exception(), LeaseLost):
                storage.sweep_temporaries(older_than=time.time())
        ledger = read_ledger(storage, number, keep_commits=False)
    if not is_finished(storage, number):
        write_manifest(storage, job, number)
    if driver.leaves_strays:
        sweep(storage, number)
    return describe_outcome(
        driver.progress,
        ledger,
        read_manifest_summary(storage, number),
        read_manifest_summary(storage, number - 1) if number else None,
        max_failed_fraction=execution.spec.run.max_failed_fraction,
        retry_command=lambda switch: execution.command("retry", switch),
    )


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
        if len(self._first_samples) < BREAKER_FIRST_SHARDS:
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
        if self._failed_in_a_row >= BREAKER_SHARDS:
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


@contextlib.contextmanager
def holding_lease(storage: Storage, *, force: bool) -> Iterator[HeldLease]:
    """Hold the lease of an output.  Raises LeaseHeld."""
    lease = take_lease(storage, force=force)
    try:
        yield lease
    finally:
        with contextlib.suppress(BsqError):
            lease.release()


def make_runner(storage: Storage, job: Job, execution: Execution, num_shards: int) -> Runner:
    """Workers for so many shards.  Raises SpecError when there is no room for them."""
    run = execution.spec.run
    placement = execution.place(num_shards)
    gpus, num_cpus = placement.gpus, placement.cpus_per_worker
    if not gpus and job.spec.dtype == "bfloat16" and execution.spec.device != "cpu":
        raise SpecError(
            "the job computes in bfloat16 on GPUs, and there is no GPU here. Go on with it where there is one, or "
            "begin another with dtype: float32 in another folder."
        )
    setups = [
        WorkerSetup(
            name=f"{'gpu' if gpus else 'cpu'}{number}",
            out=execution.spec.out,
            job=job,
            num_cpus=num_cpus,
            batch=run.batch,
            decode_bytes=run.decode_bytes,
            device=_device_of(number, gpus, execution.kind),
            storage_options=execution.storage_options,
        )
        for number in range(placement.workers)
    ]
    if execution.kind == "ray":
        from jobs.ray_runner import RayRunner

        return RayRunner(
            setups, _log_path(storage), address=execution.ray_address, num_gpus=1.0 if gpus else 0.0, num_cpus=num_cpus
        )
    from jobs.local_runner import ChildRunner, InProcessRunner

    if execution.kind == "in-process":
        return InProcessRunner(setups)
    return ChildRunner(setups, _log_path(storage))


def _make_metrics(storage: Storage, execution: Execution) -> JobMetrics | None:
    if execution.kind != "ray":
        return None
    from jobs.metrics import JobMetrics

    return JobMetrics(storage.url)


def _log_path(storage: Storage) -> str:
    """A local file for tracebacks: in the output where that is a local folder."""
    folder = Path(storage.url_of("logs")) if storage.is_local else Path(tempfile.mkdtemp(prefix="bsqtok-logs-"))
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / "workers.log")


def _device_of(number: int, gpus: int, kind: RunnerKind) -> str:
    if not gpus:
        return "cpu"
    # Ray shows an actor only its own GPU; children of this process see all of them.
    return "cuda" if kind == "ray" else f"cuda:{number}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
