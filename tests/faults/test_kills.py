"""A job killed at any named point of the commit protocol, or at random, and resumed, leaves what an undisturbed one
leaves: the same bytes, nothing twice, nothing half-written.

`pytest tests/faults/test_kills.py -m long --kills 200 -s` runs longer and prints a table."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from pipeline.dataset_files import read_ledger
from pipeline.steps import STEPS, WORKER_STEPS
from pipeline.storage import open_storage
from tests.faults.conftest import LENIENT
from tests.faults.kill_matrix import KillMatrix, assert_consistent, assert_whole, state
from tests.running_jobs import STUB, StartJob, wait_until
from tests.tiny_corpus import RunBsq

# What must have come about on disk when a process stands at the step, beyond what was there when the job was begun or
# resumed: (token files, temporaries, segments, manifests), where None is anything.
CHANGES: dict[str, tuple[int | None, int | None, int | None, int | None]] = {
    "before_job": (0, 0, 0, 0),
    "before_plan": (0, 0, 0, 0),
    "before_failures": (0, 0, 0, 0),
    "before_tokens": (0, 0, 0, 0),
    "after_temp": (0, 1, 0, 0),
    "after_publish": (1, 0, 0, 0),
    "before_ledger": (None, None, 0, 0),
    "in_ledger": (None, 1, 0, 0),
    "after_ledger": (None, None, 1, 0),
    "before_manifest": (None, 0, None, 0),
    "after_manifest": (None, 0, None, 1),
}


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(["before_job", "before_plan", "after_temp", "in_ledger", "after_manifest"], id="some-steps"),
        pytest.param(STEPS, id="every-step", marks=pytest.mark.longest),
    ],
)
def test_a_driver_killed_at_one_step_after_another_leaves_a_dataset_that_resume_completes(
    steps: list[str], shards: list[Path], undisturbed: dict[str, str], tmp_path: Path, bsq: RunBsq, start: StartJob
) -> None:
    out = tmp_path / "out"
    command: list[object] = ["tokenize", *shards, "--out", out, *STUB, *LENIENT]
    for step in steps:
        before = state(out)
        job = start(*command, "--no-ray", hold_at=step)
        (held,) = job.wait_until_standing()
        assert (held == job.pid) == (step not in WORKER_STEPS)
        for found, known, change in zip(state(out), before, CHANGES[step], strict=True):
            # Temporaries and strays of the kill before are swept when a job is resumed.
            assert change is None or (found >= 1 if change else found <= known), (step, before, state(out))
        job.kill(job.pid)
        job.kill()
        assert_consistent(out, undisturbed)
        if (out / "job.json").exists():
            command = ["resume", out]
    resumed = bsq(*command, "--no-ray")
    assert resumed.returncode == 0, resumed.stderr
    assert_whole(out, undisturbed)


def test_a_worker_killed_at_every_step_is_replaced_and_loses_nothing(
    shards: list[Path], undisturbed: dict[str, str], tmp_path: Path, start: StartJob
) -> None:
    out = tmp_path / "out"
    job = start(
        "tokenize", *shards, "--out", out, *STUB, *LENIENT, "--no-ray", "--set", "run.max_attempts=9",
        hold_at="+".join(WORKER_STEPS),
    )  # fmt: skip
    num_temporaries = 0
    for step in WORKER_STEPS:
        (worker,) = job.wait_until_standing()
        while not (job.markers / f"{step}.{worker}").exists():
            job.let_go(worker)
            (worker,) = job.wait_until_standing()
        # What a killed worker was writing stays until the job ends.
        num_temporaries += step == "after_temp"
        num_tokens, *_ = found = state(out)
        assert found[1] == num_temporaries, "the kill strikes inside of the step"
        assert num_tokens >= (step == "after_publish")
        job.kill(worker)
        job.let_go(worker)
        assert_consistent(out, undisturbed)
    assert job.end() == 0, job.said
    assert_whole(out, undisturbed)
    ledger = read_ledger(open_storage(str(out)), 0)
    assert sum(attempt.counts for attempts in ledger.failed_attempts.values() for attempt in attempts) >= 4


@pytest.mark.long
def test_kills_of_anybody_at_any_moment_leave_a_dataset_that_resume_completes(
    shards: list[Path], undisturbed: dict[str, str], tmp_path: Path, start: StartJob, request: pytest.FixtureRequest
) -> None:
    matrix = KillMatrix(shards, undisturbed, tmp_path, start)
    try:
        matrix.run(request.config.getoption("--kills"))
    finally:
        print(f"\n{matrix.table()}")
    assert matrix.num_struck >= request.config.getoption("--kills")


def test_an_interrupt_keeps_what_is_committed_and_names_the_command_that_goes_on(
    shards: list[Path], undisturbed: dict[str, str], tmp_path: Path, bsq: RunBsq, start: StartJob
) -> None:
    out = tmp_path / "out"
    job = start("tokenize", *shards, "--out", out, *STUB, *LENIENT, "--no-ray", hold_at="after_publish")
    job.wait_until_standing()
    os.kill(job.pid, signal.SIGINT)
    assert job.end() == 130
    assert f"bsq resume {out}" in job.said[1]
    assert "Traceback" not in job.said[1]
    assert not (out / "lease.json").exists()
    ledger = read_ledger(open_storage(str(out)), 0)
    assert 0 < len(ledger.commits) < 6
    assert bsq("resume", out, "--in-process").returncode == 0
    assert_whole(out, undisturbed)


def test_resume_with_nothing_left_loads_no_model_and_starts_no_worker(
    shards: list[Path], tmp_path: Path, bsq: RunBsq
) -> None:
    out = tmp_path / "out"
    tiny = ["--tokenizer", "untrained:vit-tiny-32-l18", "--no-ray", *LENIENT]
    assert bsq("tokenize", *shards, "--out", out, *tiny).returncode == 0
    manifest = (out / "manifest" / "0000.json").read_bytes()
    # As if the driver had been killed between the last record and the manifest.
    (out / "manifest" / "0000.json").unlink()
    for weights in (out / "tokenizer").rglob("model.safetensors"):
        weights.unlink()
    resumed = bsq("resume", out)
    assert resumed.returncode == 0, resumed.stderr
    assert (out / "manifest" / "0000.json").read_bytes() == manifest
    assert not (out / "logs" / "ray").exists()


def test_a_lease_that_is_held_refuses_a_second_driver_until_its_holder_is_dead(
    shards: list[Path], undisturbed: dict[str, str], tmp_path: Path, bsq: RunBsq, start: StartJob
) -> None:
    out = tmp_path / "out"
    job = start("tokenize", *shards, "--out", out, *STUB, *LENIENT, "--no-ray", hold_at="after_publish")
    job.wait_until_standing()
    refused = bsq("resume", out, "--no-ray")
    assert refused.returncode == 4
    assert str(job.pid) in refused.stderr and "--force" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) <= 2
    running = bsq("status", out)
    assert "running" in running.stdout and str(job.pid) in running.stdout
    job.kill()
    assert "interrupted" in bsq("status", out).stdout
    assert bsq("resume", out, "--in-process").returncode == 0
    assert_whole(out, undisturbed)


@pytest.mark.longest
def test_a_lease_is_kept_while_a_manifest_is_written(
    shards: list[Path], undisturbed: dict[str, str], tmp_path: Path, bsq: RunBsq, start: StartJob
) -> None:
    out = tmp_path / "out"
    job = start("tokenize", *shards, "--out", out, *STUB, *LENIENT, "--no-ray", hold_at="before_manifest")
    job.wait_until_standing()
    # As if the manifest of very many shards had taken an hour so far.
    os.utime(out / "lease.json", (time.time() - 3600, time.time() - 3600))
    wait_until(lambda: time.time() - (out / "lease.json").stat().st_mtime < 60, "the lease is renewed", job)
    assert bsq("resume", out, "--no-ray").returncode == 4
    assert job.end() == 0, job.said
    assert_whole(out, undisturbed)


@pytest.mark.long
def test_a_driver_that_slept_past_its_lease_stops_without_touching_what_the_second_committed(
    shards: list[Path], undisturbed: dict[str, str], tmp_path: Path, bsq: RunBsq, start: StartJob
) -> None:
    out = tmp_path / "out"
    sleeper = start("tokenize", *shards, "--out", out, *STUB, *LENIENT, "--no-ray", hold_at="before_ledger")
    sleeper.wait_until_standing()
    os.kill(sleeper.pid, signal.SIGSTOP)
    # Past its time to live: the file's time is what counts, and moving it back is quicker than waiting.
    os.utime(out / "lease.json", (time.time() - 3600, time.time() - 3600))
    second = bsq("resume", out, "--no-ray")
    assert second.returncode == 0, second.stderr
    assert_whole(out, undisturbed)
    os.kill(sleeper.pid, signal.SIGCONT)
    assert sleeper.end() == 4
    assert "another driver" in sleeper.said[1] and "Traceback" not in sleeper.said[1]
    assert_whole(out, undisturbed)
