"""A job killed at any named point of the commit protocol, or at random, and resumed, leaves what an undisturbed one
leaves: the same bytes, nothing twice, nothing half-written."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.dataset_files import read_ledger, read_manifest
from pipeline.steps import STEPS
from pipeline.storage import Storage
from tests.tiny_corpus import BSQ, RunBsq, bsq_environment, dataset_files, temporaries

PATIENCE_SECONDS = 60.0


@pytest.fixture(scope="module")
def undisturbed(small_shards: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    job = start(small_shards, out)
    assert job.wait(PATIENCE_SECONDS) == 0
    return dataset_files(out)


def start(
    shards: list[Path], out: Path, hold_at: str = "", workers: int = 1, stderr: int = subprocess.DEVNULL
) -> subprocess.Popen[str]:
    """Begin a job with spawned workers; `hold_at` is STEP:FOLDER."""
    arguments = ["tokenize", *map(str, shards), "--out", str(out), "--tokenizer", "stub", "--size", "64", "--no-ray"]
    return subprocess.Popen(
        [*BSQ, *arguments, "--workers", str(workers)],
        env=bsq_environment({"BSQTOK_HOLD_AT": hold_at}),
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Whatever a test starts is gone when it ends, held children included."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        process.wait()


def wait_for_marker(folder: Path, step: str) -> int:
    """The pid of the process that stands at `step`."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        for marker in folder.glob(f"{step}.*"):
            return int(marker.suffix[1:])
        time.sleep(0.01)
    raise AssertionError(f"nothing reached {step}")


def assert_whole(out: Path, undisturbed: dict[str, str]) -> None:
    """Everything that must hold once a job has ended, whatever happened to it."""
    assert dataset_files(out) == undisturbed
    assert temporaries(out) == []
    assert not (out / "lease.json").exists()
    storage = Storage(str(out))
    ledger = read_ledger(storage, 0)
    manifest = read_manifest(storage)
    assert manifest is not None and manifest.summary.complete
    assert manifest.table["file"].to_pylist() == [ledger.commits[key].file for key in sorted(ledger.commits)]
    assert set(manifest.table["file"].to_pylist()) <= set(undisturbed)
    assert manifest.summary.rows == sum(manifest.table["rows"].to_pylist()) == 6 * 8 + 2


# What must be on disk when the process stands at the step: (token files, temporaries, segments, manifests), where
# "some" is at least one.
STATE_AT = {
    "before_failures": (0, 0, 0, 0),
    "before_tokens": (0, 0, 0, 0),
    "after_temp": (0, "some", 0, 0),
    "after_publish": ("some", 0, 0, 0),
    "before_ledger": ("some", 0, 0, 0),
    "after_ledger": ("some", 0, "some", 0),
    "before_manifest": (6, 0, "some", 0),
    "after_manifest": (6, 0, "some", 1),
}


def state(out: Path) -> tuple[int, int, int, int]:
    tokens = [name for name in dataset_files(out) if name.endswith(".parquet") and name.startswith("tokens/")]
    segments = list((out / "ledger").rglob("*.jsonl"))
    return len(tokens), len(temporaries(out)), len(segments), len(list((out / "manifest").glob("*.json")))


@pytest.mark.parametrize("victim", ["driver", "worker"])
@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_a_named_step_leaves_a_dataset_that_resume_completes(
    step: str,
    victim: str,
    small_shards: list[Path],
    undisturbed: dict[str, str],
    tmp_path: Path,
    bsq: RunBsq,
    processes: list[subprocess.Popen[str]],
) -> None:
    out, markers = tmp_path / "out", tmp_path / "markers"
    markers.mkdir()
    job = start(small_shards, out, f"{step}:{markers}")
    processes.append(job)
    pid = wait_for_marker(markers, step)
    in_worker = pid != job.pid
    assert in_worker == (step in STEPS[:4])
    if victim == "worker" and not in_worker:
        pytest.skip("this step is the driver's")
    for found, expected in zip(state(out), STATE_AT[step], strict=True):
        assert found == expected or (expected == "some" and found > 0), (state(out), STATE_AT[step])

    if victim == "driver":
        os.kill(job.pid, signal.SIGKILL)
        job.wait()
        # The worker waits at its step for ever; without a driver it must not finish it.
        os.killpg(job.pid, signal.SIGKILL)
        resumed = bsq("resume", out, "--no-ray")
        assert resumed.returncode == 0, resumed.stderr
    else:
        # The driver lives: it starts another worker, which must not be held again.
        for marker in markers.iterdir():
            marker.unlink()
        os.kill(pid, signal.SIGKILL)
        release_all(job, markers)
        assert job.wait(PATIENCE_SECONDS) == 0
    assert_whole(out, undisturbed)


def release_all(job: subprocess.Popen[str], markers: Path) -> None:
    """Let every process that comes to the step go on, until the job ends."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while job.poll() is None and time.monotonic() < deadline:
        for marker in markers.iterdir():
            marker.unlink(missing_ok=True)
        time.sleep(0.02)


@pytest.mark.long
def test_kills_at_random_moments_leave_a_dataset_that_resume_completes(
    small_shards: list[Path],
    undisturbed: dict[str, str],
    tmp_path: Path,
    bsq: RunBsq,
    processes: list[subprocess.Popen[str]],
    request: pytest.FixtureRequest,
) -> None:
    generator = random.Random(20)
    kills = request.config.getoption("--kills")
    for number in range(kills):
        out = tmp_path / f"out-{number}"
        job = start(small_shards, out, workers=2)
        processes.append(job)
        time.sleep(generator.uniform(0.5, 4.5))
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        if (out / "job.json").exists():
            resumed = bsq("resume", out, "--no-ray")
        else:
            arguments = ["--out", out, "--tokenizer", "stub", "--size", "64", "--no-ray"]
            resumed = bsq("tokenize", *small_shards, *arguments)
        assert resumed.returncode == 0, resumed.stderr
        assert_whole(out, undisturbed)


def test_an_interrupt_keeps_what_is_committed_and_names_the_command_that_goes_on(
    small_shards: list[Path],
    undisturbed: dict[str, str],
    tmp_path: Path,
    bsq: RunBsq,
    processes: list[subprocess.Popen[str]],
) -> None:
    out, markers = tmp_path / "out", tmp_path / "markers"
    markers.mkdir()
    job = start(small_shards, out, f"after_publish:{markers}", stderr=subprocess.PIPE)
    processes.append(job)
    wait_for_marker(markers, "after_publish")
    os.kill(job.pid, signal.SIGINT)
    release_all(job, markers)
    _, stderr = job.communicate(timeout=PATIENCE_SECONDS)
    assert job.returncode == 130
    assert f"bsq resume {out}" in stderr
    assert "Traceback" not in stderr
    assert not (out / "lease.json").exists()
    ledger = read_ledger(Storage(str(out)), 0)
    assert 0 < len(ledger.commits) < 6
    assert bsq("resume", out, "--no-ray").returncode == 0
    assert_whole(out, undisturbed)


def test_resume_with_nothing_left_loads_no_model_and_starts_no_worker(
    small_shards: list[Path], tmp_path: Path, bsq: RunBsq
) -> None:
    out = tmp_path / "out"
    tiny = ["--tokenizer", "untrained:vit-tiny-32-l18", "--no-ray"]
    assert bsq("tokenize", *small_shards, "--out", out, *tiny).returncode == 0
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
    small_shards: list[Path],
    undisturbed: dict[str, str],
    tmp_path: Path,
    bsq: RunBsq,
    processes: list[subprocess.Popen[str]],
) -> None:
    out, markers = tmp_path / "out", tmp_path / "markers"
    markers.mkdir()
    job = start(small_shards, out, f"after_publish:{markers}")
    processes.append(job)
    wait_for_marker(markers, "after_publish")
    refused = bsq("resume", out, "--no-ray")
    assert refused.returncode == 4
    assert str(job.pid) in refused.stderr and "--force" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) <= 2
    running = bsq("status", out)
    assert "running" in running.stdout and str(job.pid) in running.stdout
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert "interrupted" in bsq("status", out).stdout
    assert bsq("resume", out, "--no-ray").returncode == 0
    assert_whole(out, undisturbed)


def test_a_driver_that_slept_past_its_lease_stops_without_touching_what_the_second_committed(
    small_shards: list[Path],
    undisturbed: dict[str, str],
    tmp_path: Path,
    bsq: RunBsq,
    processes: list[subprocess.Popen[str]],
) -> None:
    out, markers = tmp_path / "out", tmp_path / "markers"
    markers.mkdir()
    sleeper = start(small_shards, out, f"before_ledger:{markers}", stderr=subprocess.PIPE)
    processes.append(sleeper)
    wait_for_marker(markers, "before_ledger")
    os.kill(sleeper.pid, signal.SIGSTOP)
    # Past its time to live: the file's time is what counts, and moving it back is quicker than waiting.
    os.utime(out / "lease.json", (time.time() - 3600, time.time() - 3600))
    second = bsq("resume", out, "--no-ray")
    assert second.returncode == 0, second.stderr
    assert_whole(out, undisturbed)
    os.kill(sleeper.pid, signal.SIGCONT)
    release_all(sleeper, markers)
    _, stderr = sleeper.communicate(timeout=PATIENCE_SECONDS)
    assert sleeper.returncode == 4
    assert "another driver" in stderr and "Traceback" not in stderr
    assert_whole(out, undisturbed)
