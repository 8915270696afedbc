"""The driver against workers that only pretend: what is handed out, tried again, given up and recorded."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

import jobs.attempts
import jobs.driver
from jobs.lease import take_lease
from pipeline.messages import Assignment, WorkerBroken
from schemas.errors import CircuitBreakerOpen, Interrupted, LeaseLost, OutputFull
from tests.jobs.fake_workers import FakeWorker, Job, commit


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.attempts, "BACKOFF_SECONDS", 0.002)
    monkeypatch.setattr(jobs.driver, "DRAIN_SECONDS", 0.3)


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
    assert outcome.lines[0] == "shard 1 failed (ShardUnreadable): reason 3"
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


# ---- circuit breaker


def test_twenty_shards_failed_in_a_row_stop_the_job(tmp_path: Path) -> None:
    job = Job(tmp_path, 100)

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        if assignment.shard == 5:
            worker.commit(assignment)
        else:
            # Messages name their shard, so no two are alike.
            error, reason = (
                ("ShardNotFound", "not there") if assignment.shard % 4 == 0 else ("ShardForbidden", "denied")
            )
            worker.fail(assignment, f"{assignment.url}: {reason}", error=error, again=False)

    reason = r"20 shards failed in a row.*\(ShardForbidden, 18 of 25\): .*shard-001\.tar: denied"
    with pytest.raises(CircuitBreakerOpen, match=reason) as raised:
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
