"""Workers that are children of the driver: how they end when it does."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tiny_corpus import BSQ, RunBsq, bsq_environment

PATIENCE_SECONDS = 60.0


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(small_shards: list[Path], tmp_path: Path) -> Iterator[Start]:
    """Begin a job with two workers in a process group of its own, as a shell would."""
    jobs: list[subprocess.Popen[str]] = []

    def begin(hold_at: str = "") -> subprocess.Popen[str]:
        settings = ["--out", str(tmp_path / "out"), "--tokenizer", "stub", "--size", "64", "--no-ray", "--workers", "2"]
        job = subprocess.Popen(
            [*BSQ, "tokenize", *map(str, small_shards), *settings],
            env=bsq_environment({"BSQTOK_HOLD_AT": f"{hold_at}:{tmp_path}"}),
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


def children(pid: int) -> set[int]:
    """The workers that a driver has started, up or not."""
    found = set()
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in listing.read_text().split():
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.add(int(child))
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_control_c_while_workers_start_ends_the_job_without_a_traceback(
    start: Start, tmp_path: Path, bsq: RunBsq
) -> None:
    job = start()
    wait_until(lambda: len(children(job.pid)) == 2)
    workers = children(job.pid)
    # A terminal sends it to every process of the group.
    os.killpg(job.pid, signal.SIGINT)
    stdout, stderr = job.communicate(timeout=PATIENCE_SECONDS)
    assert job.returncode == 130
    assert "Traceback" not in stdout + stderr and "KeyboardInterrupt" not in stdout + stderr
    assert f"bsq resume {tmp_path / 'out'}" in stderr
    assert not any(is_alive(pid) for pid in workers)
    assert not (tmp_path / "out" / "lease.json").exists()
    assert bsq("resume", tmp_path / "out", "--in-process").returncode == 0


def test_workers_end_when_their_driver_is_killed(start: Start, tmp_path: Path) -> None:
    job = start("before_tokens")
    wait_until(lambda: len(list(tmp_path.glob("before_tokens.*"))) == 2)
    workers = children(job.pid)
    assert len(workers) == 2
    os.kill(job.pid, signal.SIGKILL)
    wait_until(lambda: not any(is_alive(pid) for pid in workers))
    assert not (tmp_path / "out" / "tokens").exists(), "nobody publishes what no driver would record"
