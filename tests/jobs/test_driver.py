"""The driver against workers that only pretend: what is handed out, tried again, given up and recorded."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jobs.driver
from jobs.begin import Beginning, resolve, write_beginning
from jobs.driver import Driver
from jobs.finish import write_manifest
from jobs.generation import first_generation
from jobs.lease import HeldLease, take_lease
from jobs.outcome import JobOutcome, describe_outcome
from pipeline.dataset_files import LedgerState, read_ledger
from pipeline.storage import Storage
from pipeline.worker import Activity, Assignment, Heartbeat, Message, ShardCommitted, ShardFailed, WorkerBroken
from schemas.errors import BsqError, CircuitBreakerOpen, Interrupted, LeaseLost, OutputFull
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
        self.reason: str | None = None
        self.killed = self.drained = False

    # What behaviours do

    def commit(self, assignment: Assignment, **changes: Any) -> None:
        self._finish(assignment)
        self.messages.append(ShardCommitted(a_commit(assignment, **changes), {"device": "fake"}))

    def fail(self, assignment: Assignment, message: str, *, error: str = "ShardUnreadable", again: bool = True) -> None:
        self._finish(assignment)
        self.messages.append(ShardFailed(assignment.shard, assignment.attempt, "open", error, message, again))

    def die(self, reason: str = "worker was killed by SIGKILL") -> None:
        self.reason = reason

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

    def death(self) -> str | None:
        return self.reason

    def drain(self) -> None:
        self.drained = True

    def kill(self) -> None:
        self.killed = True
        self.reason = self.reason or "killed"


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
            if worker.reason is None and worker.in_flight:
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
        self.storage = Storage(str(folder / "out"))
        urls = [f"{folder}/shard-{number:03d}.tar" for number in range(num_shards)]
        values: dict[str, Any] = {"shards": urls, "out": str(folder / "out"), "tokenizer": "stub", "run": run}
        self.spec: JobSpec = parse_spec(values, source="test")
        self.beginning: Beginning = resolve(self.spec, gpus=False, storage_options={})
        write_beginning(self.storage, self.beginning)
        self.lease: HeldLease = take_lease(self.storage)
        self.said: list[str] = []
        self.runner: FakeRunner | None = None

    def run(self, behave: Behaviour, num_workers: int = 1) -> JobOutcome:
        def observe(progress: Progress, line: str | None) -> None:
            if line is not None:
                self.said.append(line)

        before = read_ledger(self.storage, 0)
        generation = first_generation(self.beginning.job, self.beginning.urls, resumed=bool(before.segments))
        driver = Driver(self.storage, self.beginning.job, generation, before, self.lease, self.spec, observe)
        self.runner = FakeRunner(behave, num_workers)
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


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.driver, "BACKOFF_SECONDS", 0.002)
    monkeypatch.setattr(jobs.driver, "DRAIN_SECONDS", 0.3)


def commit(worker: FakeWorker, assignment: Assignment) -> None:
    worker.commit(assignment)


# ---- handing out


def test_every_shard_is_handed_out_once_in_order_and_recorded(tmp_path: Path) -> None:
    job = Job(tmp_path, 9)
    outcome = job.run(commit)
    assert outcome.exit_code == 0 and outcome.lines == []
    assert [assignment.shard for assignment in job.assigned] == list(range(9))
    assert all((assignment.attempt, assignment.adopt) == (1, False) for assignment in job.assigned)
    assert sorted(job.ledger.commits) == [(shard, 0) for shard in range(9)]
    assert job.ledger.arithmetic == {"a1b2c3d4": {"device": "fake"}}
    assert outcome.progress.committed == 9 and outcome.progress.rows == 90


def test_no_worker_ever_has_more_than_two_shards(tmp_path: Path) -> None:
    job = Job(tmp_path, 20)
    job.run(commit, num_workers=3)
    assert len(job.workers) == 3
    assert {worker.most_in_flight for worker in job.workers} == {2}


def test_a_slow_worker_gets_less(tmp_path: Path) -> None:
    job = Job(tmp_path, 30)
    turns: Counter[str] = Counter()

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        turns[worker.name] += 1
        if worker.name == "cpu0" or turns[worker.name] % 5 == 0:
            worker.commit(assignment)

    job.run(behave, num_workers=2)
    fast, slow = (len(worker.assigned) for worker in job.workers)
    assert fast > 2 * slow > 0


def test_no_more_workers_than_shards_are_started(tmp_path: Path) -> None:
    job = Job(tmp_path, 2)
    job.run(commit, num_workers=8)
    assert len(job.workers) == 2


def test_what_the_ledger_holds_already_is_not_handed_out_and_the_rest_may_be_adopted(tmp_path: Path) -> None:
    job = Job(tmp_path, 6, max_attempts=2)

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        if assignment.shard in (0, 2):
            worker.commit(assignment)
        elif assignment.shard == 1:
            worker.fail(assignment, "no such object", error="ShardNotFound", again=False)
        else:
            worker.messages.append(WorkerBroken(OutputFull("the disk is full.")))

    with pytest.raises(OutputFull):
        job.run(behave)
    outcome = job.run(commit)
    assert [assignment.shard for assignment in job.assigned] == [3, 4, 5]
    assert all(assignment.adopt for assignment in job.assigned)
    assert outcome.exit_code == 3, "what was given up before is still missing"
    assert job.run(commit).exit_code == 3
    assert job.assigned == [] and job.workers == []


# ---- shards that fail


def test_a_shard_that_fails_is_tried_again_and_may_then_be_adopted(tmp_path: Path) -> None:
    job = Job(tmp_path, 4)

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        if assignment.shard == 1 and assignment.attempt < 3:
            worker.fail(assignment, f"broken connection {assignment.attempt}")
        else:
            worker.commit(assignment)

    assert job.run(behave).exit_code == 0
    tries = [(item.attempt, item.adopt) for item in job.assigned if item.shard == 1]
    assert tries == [(1, False), (2, True), (3, True)]
    assert [item.message for item in job.ledger.failed_attempts[1]] == ["broken connection 1", "broken connection 2"]
    assert job.ledger.commits[1, 0].attempt == 3
    assert job.ledger.given_up == {}


def test_a_shard_is_given_up_after_the_attempts_allowed_with_the_error_of_each(tmp_path: Path) -> None:
    job = Job(tmp_path, 4, max_attempts=3)

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        if assignment.shard == 1:
            worker.fail(assignment, f"reason {assignment.attempt}")
        else:
            worker.commit(assignment)

    outcome = job.run(behave)
    assert outcome.exit_code == 3
    assert outcome.lines == ["shard 1 failed (ShardUnreadable): reason 3"]
    ledger = job.ledger
    assert [(item.attempt, item.message) for item in ledger.failed_attempts[1]] == [
        (1, "reason 1"),
        (2, "reason 2"),
        (3, "reason 3"),
    ]
    assert (ledger.given_up[1].attempts, ledger.given_up[1].message) == (3, "reason 3")
    assert sorted(ledger.commits) == [(0, 0), (2, 0), (3, 0)], "the job goes on"


def test_what_cannot_get_better_is_not_tried_again(tmp_path: Path) -> None:
    job = Job(tmp_path, 3)

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        if assignment.shard == 0:
            worker.fail(assignment, "no such object", error="ShardNotFound", again=False)
        else:
            worker.commit(assignment)

    assert job.run(behave).exit_code == 3
    assert Counter(assignment.shard for assignment in job.assigned) == {0: 1, 1: 1, 2: 1}
    assert job.ledger.given_up[0].attempts == 1


def test_attempts_of_an_earlier_driver_count(tmp_path: Path) -> None:
    job = Job(tmp_path, 1, max_attempts=3)

    def fail_then_stop(worker: FakeWorker, assignment: Assignment) -> None:
        if assignment.attempt == 1:
            worker.fail(assignment, "first")
        else:
            worker.messages.append(WorkerBroken(OutputFull("full")))

    with pytest.raises(OutputFull):
        job.run(fail_then_stop)
    job.run(lambda worker, assignment: worker.fail(assignment, "again"))
    assert [assignment.attempt for assignment in job.assigned] == [2, 3]
    assert job.ledger.given_up[0].attempts == 3


def test_a_commit_that_comes_twice_counts_once(tmp_path: Path) -> None:
    job = Job(tmp_path, 3)

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        worker.commit(assignment)
        worker.commit(assignment, rows=99)

    outcome = job.run(behave)
    assert outcome.progress.rows == 30
    assert job.ledger.ignored == [] and job.ledger.totals.rows == 30


# ---- workers that fail


def test_the_shards_of_a_worker_that_dies_go_to_others(tmp_path: Path) -> None:
    job = Job(tmp_path, 8)

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        if assignment.shard == 3 and assignment.attempt == 1:
            doing = {"decode-0": Activity("decode", 3, "poison"), "read": Activity("read", 4, "")}
            worker.beat = heartbeat(50, doing)
            worker.die(f"worker {worker.name} was killed by SIGSEGV")
        else:
            worker.commit(assignment)

    assert job.run(behave, num_workers=2).exit_code == 0
    assert len(job.workers) == 3, "another took its place"
    dead = next(worker for worker in job.workers if worker.reason is not None)
    lost = [item.shard for item in dead.in_flight]
    assert len(lost) == 2 and lost[0] == 3
    for shard in lost:
        (attempt,) = job.ledger.failed_attempts[shard]
        assert (attempt.stage, attempt.error, attempt.counts) == ("worker", "WorkerDied", True)
        assert "SIGSEGV" in attempt.message
        assert attempt.keys_in_flight == (["poison"] if shard == 3 else [])
        assert job.ledger.commits[shard, 0].attempt == 2
    assert sum("SIGSEGV" in line for line in job.said) >= 1


def test_what_a_worker_committed_before_it_died_counts(tmp_path: Path) -> None:
    job = Job(tmp_path, 4)

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        worker.commit(assignment)
        if assignment.shard == 0:
            worker.die()

    assert job.run(behave).exit_code == 0
    assert job.ledger.commits[0, 0].attempt == 1
    assert 0 not in job.ledger.failed_attempts


def test_a_shard_that_kills_every_worker_is_given_up_and_the_job_goes_on(tmp_path: Path) -> None:
    job = Job(tmp_path, 3)

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        if assignment.shard == 2:
            worker.beat = heartbeat(0, {"decode-0": Activity("decode", 2, "poison")})
            worker.die("worker cpu0 was killed by SIGABRT")
        else:
            worker.commit(assignment)

    assert job.run(behave).exit_code == 3
    assert job.ledger.given_up[2].attempts == 3
    assert "SIGABRT" in job.ledger.given_up[2].message
    assert sorted(job.ledger.commits) == [(0, 0), (1, 0)]


def test_a_shard_that_kills_workers_costs_no_other_shard_its_attempts(tmp_path: Path) -> None:
    job = Job(tmp_path, 12)

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        if any(item.shard == 5 for item in worker.in_flight):
            worker.die("worker cpu0 was killed by SIGABRT")
        else:
            worker.commit(assignment)

    assert job.run(behave).exit_code == 3
    assert list(job.ledger.given_up) == [5]
    assert len(job.ledger.commits) == 11
    assert all(attempts < 2 for shard, attempts in job.ledger.attempts.items() if shard != 5)


def test_a_worker_that_never_comes_up_stops_the_job_and_costs_no_shard_an_attempt(tmp_path: Path) -> None:
    job = Job(tmp_path, 5)

    class StillBorn(FakeRunner):
        def start_worker(self, number: int) -> FakeWorker:
            worker = super().start_worker(number)
            worker.beat = None
            return worker

        def wait(self, timeout_seconds: float) -> None:
            for worker in self.workers:
                worker.die("worker cpu0 ended with exit code 1")
            super().wait(timeout_seconds)

    ledger = read_ledger(job.storage, 0)
    generation = first_generation(job.beginning.job, job.beginning.urls)
    driver = Driver(
        job.storage, job.beginning.job, generation, ledger, job.lease, job.spec, lambda progress, line: None
    )
    runner = StillBorn(commit)
    with pytest.raises(BsqError, match=r"exit code 1.*3 times in a row"):
        driver.run(runner)
    assert len(runner.workers) == 3
    assert job.ledger.given_up == {}
    assert job.ledger.attempts == {}
    assert job.run(commit).exit_code == 0


def test_a_worker_that_hangs_is_killed_and_what_it_did_is_told(tmp_path: Path) -> None:
    job = Job(tmp_path, 4, hang_timeout_seconds=0.15)

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        if assignment.shard == 1 and assignment.attempt == 1:
            worker.beat = heartbeat(5, {"decode-0": Activity("decode", 1, "endless")})
        else:
            worker.commit(assignment)

    assert job.run(behave).exit_code == 0
    hung = job.workers[0]
    assert hung.killed
    (attempt,) = job.ledger.failed_attempts[1]
    assert "no progress" in attempt.message and "decode of shard 1, key 'endless'" in attempt.message
    assert attempt.keys_in_flight == ["endless"]
    assert job.ledger.commits[1, 0].attempt == 2


def test_a_worker_that_is_slow_but_moves_is_let_alone(tmp_path: Path) -> None:
    job = Job(tmp_path, 1, hang_timeout_seconds=0.15)
    began = time.monotonic()
    progress = itertools.count()

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        worker.beat = heartbeat(next(progress))
        if time.monotonic() - began > 0.5:
            worker.commit(assignment)

    assert job.run(behave).exit_code == 0
    assert len(job.workers) == 1 and not job.workers[0].killed


def test_a_worker_without_work_does_not_hang(tmp_path: Path) -> None:
    job = Job(tmp_path, 3, hang_timeout_seconds=0.15)
    began = time.monotonic()
    progress = itertools.count()

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        if worker.name == "cpu0":
            worker.beat = heartbeat(next(progress))
        if worker.name == "cpu1" or time.monotonic() - began > 0.5:
            worker.commit(assignment)

    assert job.run(behave, num_workers=2).exit_code == 0
    assert not any(worker.killed for worker in job.workers)


def test_a_worker_that_breaks_without_blame_is_replaced(tmp_path: Path) -> None:
    job = Job(tmp_path, 3)
    broken = False

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        nonlocal broken
        if assignment.shard == 1 and not broken:
            broken = True
            worker.messages.append(WorkerBroken(BsqError("thread write failed: KeyError: 1"), stops_job=False))
        else:
            worker.commit(assignment)

    assert job.run(behave).exit_code == 0
    assert job.workers[0].killed and len(job.workers) == 2
    assert "thread write failed" in job.ledger.failed_attempts[1][0].message


def test_an_output_that_refuses_stops_the_job_with_all_commits_recorded(tmp_path: Path) -> None:
    job = Job(tmp_path, 5)

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        if assignment.shard < 2:
            worker.commit(assignment)
        else:
            worker.messages.append(WorkerBroken(OutputFull("no space is left.")))

    with pytest.raises(OutputFull):
        job.run(behave)
    assert sorted(job.ledger.commits) == [(0, 0), (1, 0)]


# ---- circuit breaker


def test_twenty_shards_failed_in_a_row_stop_the_job(tmp_path: Path) -> None:
    job = Job(tmp_path, 100)

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        if assignment.shard == 5:
            worker.commit(assignment)
        else:
            reason = "rare" if assignment.shard % 4 == 0 else "access denied"
            worker.fail(assignment, reason, error="ShardForbidden", again=False)

    with pytest.raises(CircuitBreakerOpen, match=r"20 shards failed in a row.*access denied") as raised:
        job.run(behave)
    assert raised.value.exit_code == 3
    assert len(job.ledger.given_up) == 5 + 20
    assert sorted(job.ledger.commits) == [(5, 0)]


def test_more_than_half_of_the_first_samples_failed_stop_the_job(tmp_path: Path) -> None:
    job = Job(tmp_path, 30)
    with pytest.raises(CircuitBreakerOpen, match="60 of the 100 samples of the first 10 shards"):
        job.run(lambda worker, assignment: worker.commit(assignment, failed=6, rows=4))
    assert len(job.ledger.commits) >= 10


def test_half_of_the_first_samples_failed_do_not(tmp_path: Path) -> None:
    job = Job(tmp_path, 12)
    outcome = job.run(lambda worker, assignment: worker.commit(assignment, failed=5, rows=5))
    assert outcome.exit_code == 3, "but more samples failed than is allowed"
    assert len(job.ledger.commits) == 12


# ---- exit codes


@pytest.mark.parametrize(("failed", "fraction", "exit_code"), [(0, 0.0, 0), (1, 0.1, 0), (2, 0.1, 3), (1, 0.0, 3)])
def test_the_share_of_failed_samples_decides(tmp_path: Path, failed: int, fraction: float, exit_code: int) -> None:
    job = Job(tmp_path, 3, max_failed_fraction=fraction)
    outcome = job.run(lambda worker, assignment: worker.commit(assignment, failed=failed))
    assert outcome.exit_code == exit_code
    assert any("samples failed" in line for line in outcome.lines) == (failed > 0)


def test_a_partial_shard_ends_with_exit_code_3(tmp_path: Path) -> None:
    job = Job(tmp_path, 3)
    outcome = job.run(lambda worker, assignment: worker.commit(assignment, partial=assignment.shard == 1))
    assert outcome.exit_code == 3
    assert any("damaged" in line for line in outcome.lines)
    assert any("shard 1: damaged archive" in line for line in job.said)


# ---- ending early


def test_an_interrupt_drains_the_workers_and_records_what_they_publish(tmp_path: Path) -> None:
    job = Job(tmp_path, 10)
    interrupted = False

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        nonlocal interrupted
        if worker.drained:
            worker.commit(assignment)
            worker.die("stopped")
        elif assignment.shard == 4 and not interrupted:
            interrupted = True
            os.kill(os.getpid(), signal.SIGINT)
        elif not interrupted:
            worker.commit(assignment)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"5 of 10 shards are committed.*bsq resume") as raised:
        job.run(behave)
    assert raised.value.exit_code == 130
    assert sorted(job.ledger.commits) == [(shard, 0) for shard in range(5)]
    assert job.ledger.failed_attempts == {}, "a shard that was put down did not fail"
    assert signal.getsignal(signal.SIGINT) is before
    assert job.run(commit).exit_code == 0
    assert [assignment.shard for assignment in job.assigned] == list(range(5, 10))


def test_a_worker_that_does_not_drain_holds_nobody_up_for_long(tmp_path: Path) -> None:
    job = Job(tmp_path, 3)

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        if not worker.drained:
            os.kill(os.getpid(), signal.SIGTERM)

    began = time.monotonic()
    with pytest.raises(Interrupted):
        job.run(behave)
    assert time.monotonic() - began < 5


def test_a_driver_whose_lease_was_taken_stops(tmp_path: Path) -> None:
    job = Job(tmp_path, 50)

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        if assignment.shard == 2:
            take_lease(job.storage, force=True)
            job.lease._renewed -= 3600
        worker.commit(assignment)

    with pytest.raises(LeaseLost):
        job.run(behave)
    assert len(job.assigned) < 10


def test_a_driver_whose_segment_was_taken_stops_and_touches_nothing(tmp_path: Path) -> None:
    job = Job(tmp_path, 300)
    name = "ledger/0000/000000000.jsonl"

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        if assignment.shard == 2:
            job.storage.create_only(name, b"")
        worker.commit(assignment)

    with pytest.raises(LeaseLost, match="segment 0"):
        job.run(behave)
    assert job.storage.read_bytes(name) == b""
    assert job.storage.list("ledger/0000") == ["000000000.jsonl"]
