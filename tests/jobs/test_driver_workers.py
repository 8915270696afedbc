"""The driver against workers that die, hang, break or never come up, all of them only pretending."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

import jobs.attempts
import jobs.driver
from pipeline.messages import Activity, Assignment, WorkerBroken
from schemas.errors import BsqError, OutputFull
from tests.jobs.fake_workers import FakeRunner, FakeWorker, Job, commit, heartbeat


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.attempts, "BACKOFF_SECONDS", 0.002)
    monkeypatch.setattr(jobs.driver, "DRAIN_SECONDS", 0.3)


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
    dead = next(worker for worker in job.workers if worker.ended is not None)
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
    assert all(len(attempts) < 2 for shard, attempts in job.ledger.failed_attempts.items() if shard != 5)


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

    runner = StillBorn(commit)
    with pytest.raises(BsqError, match=r"exit code 1.*3 times in a row"):
        job.run(runner)
    assert len(runner.workers) == 3
    assert job.ledger.given_up == {}
    assert job.ledger.failed_attempts == {}
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


# ---- places for workers


def test_a_worker_that_is_not_up_holds_no_shard(tmp_path: Path) -> None:
    job = Job(tmp_path, 6)

    class SlowStart(FakeRunner):
        def start_worker(self, number: int) -> FakeWorker:
            worker = super().start_worker(number)
            if number == 1:
                worker.beat = None
            return worker

    assert job.run(SlowStart(commit, num_workers=2)).exit_code == 0
    assert [len(worker.assigned) for worker in job.workers] == [6, 0]


def test_a_place_in_which_nobody_comes_up_is_left_empty_and_the_others_go_on(tmp_path: Path) -> None:
    job = Job(tmp_path, 40)

    class BadPlace(FakeRunner):
        def start_worker(self, number: int) -> FakeWorker:
            worker = super().start_worker(number)
            if number == 1:
                worker.beat = None
                worker.die("worker cpu1 ended with exit code 1")
            return worker

    assert job.run(BadPlace(commit, num_workers=2)).exit_code == 0
    assert [worker.name for worker in job.workers].count("cpu1") == 3
    assert any("nobody takes its place" in line for line in job.said)
    assert job.ledger.failed_attempts == {}


def test_workers_are_started_when_there_is_room_for_more_and_not_again_when_there_is_less(tmp_path: Path) -> None:
    job = Job(tmp_path, 60)

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        if assignment.shard == 10:
            runner.num_workers = 3
        if assignment.shard == 30 and worker is not runner.workers[0] and runner.num_workers == 3:
            runner.num_workers = 2
            worker.die("its node has died", counts=False)
        else:
            worker.commit(assignment)

    runner = FakeRunner(behave)
    assert job.run(runner).exit_code == 0
    assert len(runner.workers) in (3, 4), "one at first, two more later"
    assert all(worker.assigned for worker in runner.workers[:3])


@pytest.mark.parametrize("bad", [{0}, {1}, {0, 1}])
def test_a_place_that_was_left_empty_is_not_missed_when_its_node_has_gone(tmp_path: Path, bad: set[int]) -> None:
    job = Job(tmp_path, 20)

    class BadNode(FakeRunner):
        def start_worker(self, number: int) -> FakeWorker:
            worker = super().start_worker(number)
            if number in bad and self.num_workers == 3:
                worker.beat = None
                worker.die("worker ended with exit code 1")
            return worker

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        left_empty = sum("nobody takes its place" in line for line in job.said)
        if left_empty < len(bad):
            return
        if runner.num_workers == 3:
            runner.num_workers = 1
            for other in runner.workers:
                other.die("its node has died", counts=False)
        else:
            worker.commit(assignment)

    runner = BadNode(behave, num_workers=3)
    assert job.run(runner).exit_code == 0


def test_a_place_above_those_that_were_left_empty_is_filled_again(tmp_path: Path) -> None:
    job = Job(tmp_path, 20)

    class BadPlaces(FakeRunner):
        def start_worker(self, number: int) -> FakeWorker:
            worker = super().start_worker(number)
            if number < 2:
                worker.beat = None
                worker.die("worker ended with exit code 1")
            return worker

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        left_empty = sum("nobody takes its place" in line for line in job.said)
        if left_empty < 2:
            return
        if worker is next(worker for worker in runner.workers if worker.name == "cpu2"):
            worker.die("killed by SIGKILL")
        else:
            worker.commit(assignment)

    runner = BadPlaces(behave, num_workers=3)
    assert job.run(runner).exit_code == 0


def test_a_job_without_any_worker_ends_instead_of_waiting_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs.driver, "START_SECONDS", 0.05)
    job = Job(tmp_path, 2)
    with pytest.raises(BsqError, match="no worker has been up"):
        job.run(FakeRunner(commit, num_workers=0))
    assert job.run(commit).exit_code == 0


# ---- attempts that do not count


def test_attempts_lost_with_their_node_do_not_count(tmp_path: Path) -> None:
    job = Job(tmp_path, 3, max_attempts=2)

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        if assignment.shard == 1 and assignment.attempt <= 5:
            worker.die("worker cpu0 is gone (the actor died because its node has died)", counts=False)
        else:
            worker.commit(assignment)

    assert job.run(behave).exit_code == 0
    attempts = job.ledger.failed_attempts[1]
    assert [(item.attempt, item.counts) for item in attempts] == [(number, False) for number in range(1, 6)]
    assert job.ledger.commits[1, 0].attempt == 6
    assert not any(item.suspects or item.contained for item in job.assigned), "nobody is blamed for a lost node"


def test_a_shard_that_is_lost_again_and_again_is_given_up_in_the_end(tmp_path: Path) -> None:
    job = Job(tmp_path, 2)

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        if assignment.shard == 1:
            worker.die("its node has died", counts=False)
        else:
            worker.commit(assignment)

    assert job.run(behave).exit_code == 3
    assert len(job.ledger.failed_attempts[1]) == jobs.attempts.MAX_LOSSES + 1


# ---- samples under suspicion


def test_keys_in_flight_in_two_deaths_are_suspects_and_the_last_attempt_trusts_no_sample(tmp_path: Path) -> None:
    job = Job(tmp_path, 3, max_attempts=4)

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        if assignment.shard == 1 and assignment.attempt < 4:
            worker.does(Activity("decode", 1, "poison"), Activity("decode", 1, f"other-{assignment.attempt}"))
            worker.die("worker cpu0 was killed by SIGSEGV")
        else:
            worker.commit(assignment)

    assert job.run(behave).exit_code == 0
    tries = [(item.attempt, item.suspects, item.contained) for item in job.assigned if item.shard == 1]
    assert tries == [
        (1, frozenset(), False),
        (2, frozenset(), False),
        (3, frozenset({"poison"}), False),
        (4, frozenset({"poison"}), True),
    ]
    assert job.ledger.failed_attempts[1][1].keys_in_flight == ["poison", "other-2"]


def test_suspects_outlive_the_driver(tmp_path: Path) -> None:
    job = Job(tmp_path, 2, max_attempts=5)

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        if assignment.attempt > 2:
            worker.messages.append(WorkerBroken(OutputFull("the disk is full.")))
        elif assignment.shard == 1:
            worker.does(Activity("decode", 1, "poison"))
            worker.die()
        else:
            worker.commit(assignment)

    with pytest.raises(OutputFull):
        job.run(behave)
    job.run(commit)
    (again,) = (item for item in job.assigned if item.shard == 1)
    assert (again.attempt, again.suspects) == (3, frozenset({"poison"}))
    worker = next(worker for worker in job.workers if again in worker.assigned)
    assert worker.most_in_flight == 1 or worker.assigned == [again], "a suspect shard is tried by itself"


def test_a_sample_that_decodes_for_too_long_is_a_suspect_at_once_and_costs_no_other_shard(tmp_path: Path) -> None:
    job = Job(tmp_path, 4)

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        if assignment.shard == 1 and assignment.attempt == 1 and len(worker.in_flight) == 2:
            # Others make progress all the same, which must not hide it.
            worker.does(Activity("decode", 1, "endless", 200.0), Activity("decode", 1, "quick", 0.1))
        else:
            worker.commit(assignment)

    assert job.run(behave).exit_code == 0
    (attempt,) = job.ledger.failed_attempts[1]
    assert (attempt.error, attempt.keys_in_flight, attempt.counts) == ("DecodeHung", ["endless"], True)
    assert "decode of shard 1, key 'endless'" in attempt.message
    (neighbour,) = (items[0] for shard, items in job.ledger.failed_attempts.items() if shard != 1)
    assert not neighbour.counts and neighbour.keys_in_flight == []
    (again,) = (item for item in job.assigned if item.shard == 1 and item.attempt == 2)
    assert again.suspects == {"endless"} and not again.contained


def test_decoding_in_a_child_is_left_to_the_watchdog_there(tmp_path: Path) -> None:
    job = Job(tmp_path, 1)
    began = time.monotonic()

    def behave(worker: FakeWorker, assignment: Assignment) -> None:
        worker.does(Activity("decode in a child", 0, "slow", 500.0))
        if time.monotonic() - began > 0.3:
            worker.commit(assignment)

    assert job.run(behave).exit_code == 0
    assert len(job.workers) == 1 and not job.workers[0].killed
