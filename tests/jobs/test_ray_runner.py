"""Real Ray: few sessions, because each takes seconds to start."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.dataset_files import read_ledger, read_manifest
from pipeline.storage import open_storage
from tests.running_jobs import STUB, StartJob, is_alive, wait_until
from tests.tiny_corpus import BSQ, RunBsq, bsq_environment, dataset_files


@pytest.fixture(scope="module")
def local_files(small_shards: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the same job leaves without Ray on a local disk."""
    out = tmp_path_factory.mktemp("without-ray") / "out"
    arguments = ["tokenize", *map(str, small_shards), "--out", str(out), *STUB, "--in-process"]
    subprocess.run([*BSQ, *arguments], check=True, capture_output=True, env=bsq_environment())
    return dataset_files(out)


@pytest.mark.long
def test_an_actor_that_is_killed_with_shards_in_flight_while_another_commits_costs_nothing(
    small_shards: list[Path],
    local_files: dict[str, str],
    object_store: Any,
    bsq: RunBsq,
    start: StartJob,
) -> None:
    out, options = f"{object_store.url}/out", object_store.arguments
    job = start("tokenize", *small_shards, "--out", out, *STUB, "--workers", 2, *options, hold_at="before_tokens")
    victim, survivor = job.wait_until_standing(2)
    assert job.pid not in (victim, survivor), "actors are processes of their own"
    storage = open_storage(out, object_store.storage_options)
    assert storage.list("tokens", recursive=True) == []

    def survivor_has_committed() -> bool:
        job.let_go(survivor)
        return len(read_ledger(storage, 0).commits) >= 2

    wait_until(survivor_has_committed, "the other actor has committed", job)
    assert victim in job.standing()
    job.kill(victim)
    assert job.end() == 0, job.said
    assert "Traceback" not in "".join(job.said)
    assert "is gone" in job.said[1], "the death is told"
    ledger = read_ledger(storage, 0)
    died = [attempt for attempts in ledger.failed_attempts.values() for attempt in attempts]
    assert len(died) == 2, "two shards were in flight"
    assert {(attempt.error, attempt.counts) for attempt in died} == {("WorkerDied", True)}
    assert all(ledger.commits[attempt.shard, 0].attempt == 2 for attempt in died)
    manifest = read_manifest(storage)
    assert manifest is not None and manifest.summary.complete
    names = [f"tokens/{name}" for name in storage.list("tokens", recursive=True)]
    assert manifest.table["file"].to_pylist() == names
    assert dict(zip(names, manifest.table["sha256"].to_pylist(), strict=True)) == local_files
    assert not storage.exists("lease.json")
    verified = bsq("verify", out, *options)
    assert verified.returncode == 0, verified.stdout + verified.stderr


@pytest.mark.longest
def test_a_sample_that_aborts_its_actor_costs_itself(small_shards: list[Path], tmp_path: Path, bsq: RunBsq) -> None:
    out = tmp_path / "out"
    fault = {"BSQTOK_DECODE_FAULT": "abort:000003,hang:000105"}
    limits = ["--set", "limits.decode_timeout_seconds=1", "--max-failed-fraction", 0.5]
    job = bsq("tokenize", *small_shards[:2], "--out", out, *STUB, *limits, env=fault, timeout=300)
    assert job.returncode == 0, job.stderr
    tables = sorted((out / "failures").rglob("*.parquet"))
    rows = [row for path in tables for row in pq.read_table(path).to_pylist()]
    assert [(row["key"], row["error"]) for row in rows] == [("000003", "WorkerCrash"), ("000105", "DecodeTimeout")]
    ledger = read_ledger(open_storage(str(out)), 0)
    assert sum(commit.rows for commit in ledger.commits.values()) == 14
    assert ledger.totals.poison == 2


@pytest.mark.longest
def test_a_driver_on_ray_that_is_killed_leaves_no_process_and_its_job_goes_on(
    small_shards: list[Path], local_files: dict[str, str], tmp_path: Path, bsq: RunBsq, start: StartJob
) -> None:
    out = tmp_path / "out"
    job = start("tokenize", *small_shards, "--out", out, *STUB, hold_at="after_publish")
    (actor,) = job.wait_until_standing()
    assert [name for name in dataset_files(out) if name.startswith("tokens/")] != []
    job.kill(job.pid)
    wait_until(lambda: not is_alive(actor), "the actor is gone too")
    resumed = bsq("resume", out, "--in-process")
    assert resumed.returncode == 0, resumed.stderr
    assert dataset_files(out) == local_files


@pytest.mark.long
def test_control_c_on_ray_keeps_what_was_read_and_names_the_command_that_goes_on(
    small_shards: list[Path], local_files: dict[str, str], tmp_path: Path, bsq: RunBsq, start: StartJob
) -> None:
    out = tmp_path / "out"
    job = start("tokenize", *small_shards, "--out", out, *STUB, hold_at="after_publish")
    job.wait_until_standing()
    # A terminal sends it to every process of the group, those of Ray among them.
    os.killpg(job.pid, signal.SIGINT)
    assert job.end() == 130, job.said
    assert "Traceback" not in "".join(job.said)
    assert f"bsq resume {out}" in job.said[1]
    assert not (out / "lease.json").exists()
    ledger = read_ledger(open_storage(str(out)), 0)
    assert 0 < len(ledger.commits) < 6
    assert ledger.failed_attempts == {}, "what was put down did not fail"
    assert bsq("resume", out, "--in-process").returncode == 0
    assert dataset_files(out) == local_files


def test_more_than_the_cluster_has_is_refused_in_one_line(
    small_shards: list[Path], tmp_path: Path, bsq: RunBsq
) -> None:
    arguments = ["tokenize", *small_shards, "--out", tmp_path / "out", *STUB, "--workers", 6]
    refused = bsq(*arguments, "--cpus-per-worker", 1000)
    assert refused.returncode == 2
    (line,) = refused.stderr.strip().splitlines()
    assert "6 workers of 0 GPU and 1000 CPU each" in line and "Ask for fewer" in line
    assert not (tmp_path / "out").exists(), "nothing was written"


def test_a_gpu_where_there_is_none_is_refused_in_one_line(
    small_shards: list[Path], tmp_path: Path, bsq: RunBsq
) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU")
    refused = bsq("tokenize", *small_shards, "--out", tmp_path / "out", *STUB, "--device", "cuda")
    assert refused.returncode == 2
    (line,) = refused.stderr.strip().splitlines()
    assert "no GPU" in line
    assert not (tmp_path / "out").exists()


def test_a_cluster_that_does_not_answer_is_refused_in_one_line(
    small_shards: list[Path], tmp_path: Path, bsq: RunBsq
) -> None:
    refused = bsq(
        "tokenize", *small_shards, "--out", tmp_path / "out", *STUB, "--device", "cpu", "--ray-address", "127.0.0.1:9"
    )
    assert refused.returncode == 2, refused.stderr
    (line,) = refused.stderr.strip().splitlines()
    assert "127.0.0.1:9" in line and "--no-ray" in line
