"""Workers that only pretend, a runner that drives them, and a job that has begun, for tests of the driver."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jobs.begin import Beginning, resolve, write_beginning
from jobs.driver import Driver
from jobs.finish import write_manifest
from jobs.generation import first_generation
from jobs.lease import HeldLease, take_lease
from jobs.outcome import JobOutcome, describe_outcome
from jobs.runner import Death
from pipeline.dataset_files import LedgerState, read_ledger
from pipeline.messages import Activity, Assignment, Heartbeat, Message, ShardCommitted, ShardFailed
from pipeline.storage import open_storage
from schemas.jobspec import JobSpec, parse_spec
from schemas.lease import Progress
from schemas.ledger import Commit, SourceRecord

PATIENCE_SECONDS = 30.0
Behaviour = Callable[["FakeWorker", Assignment], None]


class FakeWorker:
    """A worker that does what its runner's behaviour says, when the driver waits."""

    def __init__(self, name: str, behave: Behaviour) -> None:
        self.name = name
        self.behave = behave
        self.assigned: list[Assignment] = []
        self.in_flight: list[Assignment] = []
        self.most_in_flight = 0
        self.messages: list[Message] = []
        self.beat: Heartbeat | None = heartbeat()
        self.ended: Death | None = None
        self.killed = self.drained = False

    # What behaviours do

    def commit(self, assignment: Assignment, **changes: Any) -> None:
        self._finish(assignment)
        self.messages.append(ShardCommitted(a_commit(assignment, **changes), {"device": "fake"}))

    def fail(self, assignment: Assignment, message: str, *, error: str = "ShardUnreadable", again: bool = True) -> None:
        self._finish(assignment)
        self.messages.append(ShardFailed(assignment.shard, assignment.attempt, "open", error, message, again))

    def die(self, reason: str = "worker was killed by SIGKILL", *, counts: bool = True) -> None:
        self.ended = Death(reason, counts)

    def does(self, *activities: Activity) -> None:
        """Say in the next heartbeat what its threads do; nothing is finished meanwhile."""
        progress = self.beat.progress if self.beat is not None else 0
        self.beat = heartbeat(progress, {f"decode-{number}": item for number, item in enumerate(activities)})

    def _finish(self, assignment: Assignment) -> None:
        if assignment in self.in_flight:
            self.in_flight.remove(assignment)
        if self.beat is not None:
            self.beat = heartbeat(progress=self.beat.progress + 1)

    # What the driver calls

    def assign(self, assignment: Assignment) -> None:
        self.assigned.append(assignment)
        self.in_flight.append(assignment)
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))

    def take_messages(self) -> list[Message]:
        taken, self.messages = self.messages, []
        return taken

    def heartbeat(self) -> Heartbeat | None:
        return self.beat

    def activities(self) -> Mapping[str, Activity]:
        return self.beat.activities if self.beat is not None else {}

    def death(self) -> Death | None:
        return self.ended

    def drain(self) -> None:
        self.drained = True

    def kill(self) -> None:
        self.killed = True
        self.ended = self.ended or Death("killed")


class FakeRunner:
    """Starts fake workers; each time the driver waits, every worker alive deals with its oldest shard."""

    def __init__(self, behave: Behaviour, num_workers: int = 1) -> None:
        self.behave = behave
        self.num_workers = num_workers
        self.workers: list[FakeWorker] = []
        self.deadline = time.monotonic() + PATIENCE_SECONDS

    def start_worker(self, number: int) -> FakeWorker:
        self.workers.append(FakeWorker(f"cpu{number}", self.behave))
        return self.workers[-1]

    def wait(self, timeout_seconds: float) -> None:
        assert time.monotonic() < self.deadline, "the driver does not end"
        time.sleep(0.001)
        for worker in self.workers:
            if worker.ended is None and worker.in_flight:
                worker.behave(worker, worker.in_flight[0])

    def close(self) -> None: ...

    @property
    def assigned(self) -> list[Assignment]:
        return [assignment for worker in self.workers for assignment in worker.assigned]


def heartbeat(progress: int = 0, activities: dict[str, Activity] | None = None) -> Heartbeat:
    return Heartbeat(
        progress=progress,
        busy=True,
        rows=progress,
        tokens=progress,
        samples=progress,
        seconds=1.0 + progress,
        device_wait_seconds=0.0,
        num_lanes=1,
        decode_wait_seconds=0.0,
        num_decoders=1,
        waiting_bytes=0,
        activities=activities or {},
    )


def a_commit(assignment: Assignment, **changes: Any) -> Commit:
    values: dict[str, Any] = {
        "shard": assignment.shard,
        "attempt": assignment.attempt,
        "file": f"tokens/0000/{assignment.shard:07d}-00000000.parquet",
        "bytes": 100,
        "sha256": "0" * 64,
        "rows": 10,
        "tokens": 640,
        "samples": 10,
        "failed": 0,
        "warnings": 0,
        "partial": False,
        "min_frames": 1,
        "max_frames": 1,
        "min_key": "a",
        "max_key": "b",
        "row_groups": [10],
        "tokens_offset": [4],
        "source": SourceRecord(bytes=1000),
        "arithmetic": "a1b2c3d4",
        "worker": "cpu0",
        "at": "2026-01-01T00:00:00+00:00",
    }
    return Commit(**(values | changes))


class Job:
    """A job that has begun, and a driver for it."""

    def __init__(self, folder: Path, num_shards: int, **run: Any) -> None:
        self.storage = open_storage(str(folder / "out"))
        urls = [f"{folder}/shard-{number:03d}.tar" for number in range(num_shards)]
        values: dict[str, Any] = {"shards": urls, "out": str(folder / "out"), "tokenizer": "stub", "run": run}
        self.spec: JobSpec = parse_spec(values, source="test")
        self.beginning: Beginning = resolve(self.spec, gpus=False, storage_options={})
        write_beginning(self.storage, self.beginning)
        self.lease: HeldLease = take_lease(self.storage)
        self.said: list[str] = []
        self.runner: FakeRunner | None = None

    def run(self, behave: Behaviour | FakeRunner, num_workers: int = 1) -> JobOutcome:
        """Let a driver run it to its end, with workers of one behaviour or with those of a runner."""

        def observe(progress: Progress, line: str | None) -> None:
            if line is not None:
                self.said.append(line)

        before = read_ledger(self.storage, 0)
        generation = first_generation(self.beginning.job, self.beginning.urls, resumed=bool(before.segments))
        driver = Driver(self.storage, generation, before, self.lease, self.spec, observe)
        self.runner = behave if isinstance(behave, FakeRunner) else FakeRunner(behave, num_workers)
        driver.run(self.runner)
        return describe_outcome(
            driver.progress,
            self.ledger,
            write_manifest(self.storage, self.beginning.job, 0),
            None,
            max_failed_fraction=self.spec.run.max_failed_fraction,
            retry_command=lambda switch: f"bsq retry {switch}".strip(),
        )

    @property
    def ledger(self) -> LedgerState:
        return read_ledger(self.storage, 0)

    @property
    def workers(self) -> list[FakeWorker]:
        assert self.runner is not None
        return self.runner.workers

    @property
    def assigned(self) -> list[Assignment]:
        assert self.runner is not None
        return self.runner.assigned


def commit(worker: FakeWorker, assignment: Assignment) -> None:
    worker.commit(assignment)
