"""A sample that crashes or hangs its decoder, for real, costs itself: not its shard, its neighbours, or the job."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.dataset_files import LedgerState, read_ledger
from pipeline.storage import open_storage
from tests.running_jobs import STUB, StartJob
from tests.tiny_corpus import RunBsq, dataset_files, photo_members, write_tar

KEYS = [f"{number:06d}" for number in range(12)]


@pytest.fixture
def poisoned(tmp_path: Path) -> list[Path]:
    """A shard in which two samples are bad, and one that is in flight beside it."""
    return [
        write_tar(tmp_path / "poisoned.tar", photo_members(0, 12)),
        write_tar(tmp_path / "innocent.tar", photo_members(100, 12)),
    ]


def failures(out: Path) -> list[tuple[str, str, str]]:
    """Key, stage and class of every failure row."""
    rows = [row for path in sorted((out / "failures").rglob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return [(row["key"], row["stage"], row["error"]) for row in rows]


def tokenized(out: Path) -> set[str]:
    """Keys that have a row."""
    return {key for path in (out / "tokens").rglob("*.parquet") for key in pq.read_table(path)["key"].to_pylist()}


def ledger(out: Path) -> LedgerState:
    return read_ledger(open_storage(str(out)), 0)


@pytest.mark.long
def test_samples_that_abort_their_process_become_failures_and_all_others_are_tokenized(
    poisoned: list[Path], tmp_path: Path, bsq: RunBsq
) -> None:
    out = tmp_path / "out"
    arguments = ["tokenize", *poisoned, "--out", out, *STUB, "--no-ray", "--cpus-per-worker", 2]
    fault = {"BSQTOK_DECODE_FAULT": f"abort:{KEYS[3]},slow:{KEYS[4]},abort:{KEYS[9]}"}
    job = bsq(*arguments, "--max-failed-fraction", 0.5, env=fault)
    assert job.returncode == 0, job.stderr
    assert failures(out) == [(KEYS[3], "decode", "WorkerCrash"), (KEYS[9], "decode", "WorkerCrash")]
    assert tokenized(out) == {*KEYS, *(f"{number:06d}" for number in range(100, 112))} - {KEYS[3], KEYS[9]}
    state = ledger(out)
    deaths = state.failed_attempts[0]
    assert [attempt.error for attempt in deaths] == ["WorkerDied", "WorkerDied"]
    assert all("SIGABRT" in attempt.message and KEYS[3] in attempt.keys_in_flight for attempt in deaths)
    assert state.commits[0, 0].attempt == 3
    assert len(state.failed_attempts.get(1, [])) <= 1, "the shard beside it is tried by itself after the first death"
    assert "SIGABRT" in job.stderr and "Traceback" not in job.stderr
    status = bsq("status", out).stdout
    assert "2 of them failed (2 ended or hung their decoder)" in status
    assert f"shard 0, key '{KEYS[3]}': WorkerCrash" in status and KEYS[9] in status


@pytest.mark.longest
def test_decoding_in_children_from_the_start_gives_the_same_files_without_losing_a_worker(
    poisoned: list[Path], tmp_path: Path, bsq: RunBsq
) -> None:
    fault = {"BSQTOK_DECODE_FAULT": f"abort:{KEYS[3]}"}
    outputs = []
    for name, options in {"threads": [], "children": ["--set", "run.decode_processes=2"]}.items():
        out = tmp_path / name
        job = bsq(
            "tokenize", *poisoned, "--out", out, *STUB, "--no-ray", *options, "--max-failed-fraction", 0.5, env=fault
        )
        assert job.returncode == 0, job.stderr
        outputs.append(dataset_files(out))
    assert outputs[0] == outputs[1] and len(outputs[0]) == 3
    assert ledger(tmp_path / "children").failed_attempts == {}
    assert ledger(tmp_path / "threads").failed_attempts != {}


@pytest.mark.longest
def test_suspicion_outlives_a_driver_that_is_killed(
    poisoned: list[Path], tmp_path: Path, bsq: RunBsq, start: StartJob
) -> None:
    out, faults = tmp_path / "out", [f"abort:{KEYS[5]}"]
    job = start("tokenize", *poisoned, "--out", out, *STUB, "--no-ray", hold_at="after_ledger", faults=faults)
    # The ledger is written when five seconds have passed: by then a worker has died, perhaps two.
    job.wait_until_standing()
    job.kill()
    before = len(ledger(out).failed_attempts.get(0, []))
    assert before >= 1 and (0, 0) not in ledger(out).commits
    resumed = bsq("resume", out, "--no-ray", env={"BSQTOK_DECODE_FAULT": faults[0]})
    assert resumed.returncode == 3, "more failed than is allowed"
    assert failures(out) == [(KEYS[5], "decode", "WorkerCrash")]
    assert len(tokenized(out)) == 23
    assert len(ledger(out).failed_attempts[0]) == 2, "what the first driver saw counts"


@pytest.mark.parametrize("fault", ["hang", pytest.param("freeze", marks=pytest.mark.longest)])
@pytest.mark.long
def test_samples_that_hang_are_found_killed_and_told(
    fault: str, poisoned: list[Path], tmp_path: Path, bsq: RunBsq
) -> None:
    out = tmp_path / "out"
    limits = ["--set", "limits.decode_timeout_seconds=1", "--set", "run.hang_timeout_seconds=15"]
    job = bsq(
        "tokenize", *poisoned, "--out", out, *STUB, "--no-ray", "--cpus-per-worker", 2, *limits,
        "--max-failed-fraction", 0.5, env={"BSQTOK_DECODE_FAULT": f"{fault}:{KEYS[3]}"},
    )  # fmt: skip
    assert job.returncode == 0, job.stderr
    assert failures(out) == [(KEYS[3], "decode", "DecodeTimeout")]
    assert len(tokenized(out)) == 23
    attempts = ledger(out).failed_attempts[0]
    assert all("of shard 0, key '000003'" in attempt.message for attempt in attempts), "shard and key are named"
    assert all(KEYS[3] in attempt.keys_in_flight for attempt in attempts)
    assert {attempt.error for attempt in attempts} == {"DecodeHung"}
    assert len(attempts) == 1, "the key is known, so one worker is enough"
