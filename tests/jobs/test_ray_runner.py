"""Real Ray: few sessions, because each takes seconds to start."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.dataset_files import read_ledger, read_manifest
from pipeline.storage import Storage
from tests.tiny_corpus import BSQ, RunBsq, bsq_environment, dataset_files

PATIENCE_SECONDS = 120.0
STUB = ["--tokenizer", "stub", "--size", "64"]


@pytest.fixture(scope="module")
def local_files(small_shards: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the same job leaves without Ray on a local disk."""
    out = tmp_path_factory.mktemp("without-ray") / "out"
    arguments = ["tokenize", *map(str, small_shards), "--out", str(out), *STUB, "--in-process"]
    subprocess.run([*BSQ, *arguments], check=True, capture_output=True, env=bsq_environment())
    return dataset_files(out)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Begin a job on Ray whose workers wait at a step; whatever it starts is gone when the test ends."""
    jobs: list[subprocess.Popen[str]] = []

    def begin(*arguments: object, hold_at: str) -> subprocess.Popen[str]:
        (tmp_path / "markers").mkdir()
        job = subprocess.Popen(
            [*BSQ, *map(str, arguments)],
            env=bsq_environment({"BSQTOK_HOLD_AT": f"{hold_at}:{tmp_path / 'markers'}"}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        jobs.append(job)
        return job

    yield begin
    for job in jobs:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
        job.communicate()


def wait_until(condition: Callable[[], bool], what: str, job: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        assert job is None or job.poll() is None, job and job.communicate()
        time.sleep(0.02)


def standing(markers: Path) -> set[int]:
    """Processes that wait at the step."""
    return {int(marker.suffix[1:]) for marker in markers.iterdir()}


def let_go(markers: Path, pid: int) -> None:
    for marker in markers.glob(f"*.{pid}"):
        marker.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_an_actor_that_is_killed_with_shards_in_flight_while_another_commits_costs_nothing(
    small_shards: list[Path],
    local_files: dict[str, str],
    object_store: Any,
    tmp_path: Path,
    bsq: RunBsq,
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    out = f"{object_store.url}/out"
    options = [f"{name}={value}" for name, value in object_store.storage_options.items()]
    storage_options = [word for option in options for word in ("--storage-option", option)]
    job = start(
        "tokenize", *small_shards, "--out", out, *STUB, "--workers", 2, *storage_options, hold_at="before_tokens"
    )
    markers = tmp_path / "markers"
    wait_until(lambda: len(standing(markers)) == 2, "both actors stand before their first token file", job)
    victim, survivor = sorted(standing(markers))
    assert {victim, survivor}.isdisjoint({job.pid}), "actors are processes of their own"
    storage = Storage(out, object_store.storage_options)
    assert storage.list("tokens", recursive=True) == []

    def survivor_has_committed() -> bool:
        let_go(markers, survivor)
        return len(read_ledger(storage, 0).commits) >= 2

    wait_until(survivor_has_committed, "the other actor has committed", job)
    assert victim in standing(markers)
    os.kill(victim, signal.SIGKILL)

    def ended() -> bool:
        for pid in standing(markers):
            let_go(markers, pid)
        return job.poll() is not None

    wait_until(ended, "the job ends")
    stdout, stderr = job.communicate()
    assert job.returncode == 0, stderr
    assert "Traceback" not in stdout + stderr
    assert "is gone" in stderr, "the death is told"
    ledger = read_ledger(storage, 0)
    died = [attempt for attempts in ledger.failed_attempts.values() for attempt in attempts]
    assert len(died) == 2, "two shards were in flight"
    assert {attempt.error for attempt in died} == {"WorkerDied"}
    assert all(ledger.commits[attempt.shard, 0].attempt == 2 for attempt in died)
    manifest = read_manifest(storage)
    assert manifest is not None and manifest.summary.complete
    names = [f"tokens/{name}" for name in storage.list("tokens", recursive=True)]
    assert manifest.table["file"].to_pylist() == names
    assert dict(zip(names, manifest.table["sha256"].to_pylist(), strict=True)) == local_files
    assert not storage.exists("lease.json")
    verified = bsq("verify", out, *storage_options)
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_a_driver_on_ray_that_is_killed_leaves_no_process_and_its_job_goes_on(
    small_shards: list[Path],
    local_files: dict[str, str],
    tmp_path: Path,
    bsq: RunBsq,
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    out = tmp_path / "out"
    job = start("tokenize", *small_shards, "--out", out, *STUB, hold_at="after_publish")
    markers = tmp_path / "markers"
    wait_until(lambda: len(standing(markers)) == 1, "the actor stands behind its first token file", job)
    (actor,) = standing(markers)
    assert [name for name in dataset_files(out) if name.startswith("tokens/")] != []
    os.kill(job.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(actor), "the actor is gone too")
    resumed = bsq("resume", out, "--in-process")
    assert resumed.returncode == 0, resumed.stderr
    assert dataset_files(out) == local_files


def test_control_c_on_ray_keeps_what_was_read_and_names_the_command_that_goes_on(
    small_shards: list[Path],
    local_files: dict[str, str],
    tmp_path: Path,
    bsq: RunBsq,
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    out = tmp_path / "out"
    job = start("tokenize", *small_shards, "--out", out, *STUB, hold_at="after_publish")
    markers = tmp_path / "markers"
    wait_until(lambda: len(standing(markers)) == 1, "the actor stands behind its first token file", job)
    # A terminal sends it to every process of the group, those of Ray among them.
    os.killpg(job.pid, signal.SIGINT)

    def ended() -> bool:
        for pid in standing(markers):
            let_go(markers, pid)
        return job.poll() is not None

    wait_until(ended, "the job ends")
    stdout, stderr = job.communicate()
    assert job.returncode == 130, stderr
    assert "Traceback" not in stdout + stderr
    assert f"bsq resume {out}" in stderr
    assert not (out / "lease.json").exists()
    ledger = read_ledger(Storage(str(out)), 0)
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
