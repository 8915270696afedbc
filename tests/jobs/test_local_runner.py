"""Workers that are children of the driver: how they end when it does."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from pipeline.dataset_files import read_ledger
from pipeline.storage import open_storage
from tests.running_jobs import STUB, StartJob, is_alive, wait_until
from tests.tiny_corpus import RunBsq


def test_control_c_while_workers_start_ends_the_job_without_a_traceback(
    small_shards: list[Path], start: StartJob, tmp_path: Path, bsq: RunBsq
) -> None:
    out = tmp_path / "out"
    job = start("tokenize", *small_shards, "--out", out, *STUB, "--no-ray", "--workers", 2)
    wait_until(lambda: len(job.workers()) == 2, "two workers are on their way", job)
    workers = job.workers()
    # A terminal sends it to every process of the group.
    os.killpg(job.pid, signal.SIGINT)
    assert job.end() == 130
    assert "Traceback" not in "".join(job.said) and "KeyboardInterrupt" not in "".join(job.said)
    assert f"bsq resume {out}" in job.said[1]
    assert not any(is_alive(pid) for pid in workers)
    assert not (out / "lease.json").exists()
    assert bsq("resume", out, "--in-process").returncode == 0


def test_workers_end_when_their_driver_is_killed(small_shards: list[Path], start: StartJob, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = start("tokenize", *small_shards, "--out", out, *STUB, "--no-ray", "--workers", 2, hold_at="before_tokens")
    workers = job.wait_until_standing(2)
    job.kill(job.pid)
    wait_until(lambda: not any(is_alive(pid) for pid in workers), "they have ended")
    assert not (out / "tokens").exists(), "nobody publishes what no driver would record"


@pytest.mark.parametrize(("number", "counts"), [(signal.SIGKILL, True), (signal.SIGTERM, False)])
def test_a_worker_that_was_asked_to_go_costs_no_attempt(
    number: signal.Signals, counts: bool, small_shards: list[Path], start: StartJob, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    job = start("tokenize", *small_shards, "--out", out, *STUB, "--no-ray", hold_at="before_tokens")
    (worker,) = job.wait_until_standing()
    os.kill(worker, number)
    assert job.end() == 0, job.said
    ledger = read_ledger(open_storage(str(out)), 0)
    attempts = [attempt for attempts in ledger.failed_attempts.values() for attempt in attempts]
    assert len(attempts) == 2 and {attempt.counts for attempt in attempts} == {counts}
    assert all(number.name in attempt.message for attempt in attempts)
    assert len(ledger.commits) == 6
