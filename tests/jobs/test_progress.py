from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import jobs.progress
from jobs.lease import take_lease
from jobs.progress import ProgressMeter, read_status
from jobs.start import start_job
from pipeline.dataset_files import LedgerState
from pipeline.storage import open_storage
from pipeline.worker import Heartbeat
from schemas.errors import SpecError
from schemas.jobspec import parse_spec
from schemas.lease import Progress
from tests.jobs.slow_server import slow_server
from tests.tiny_corpus import jpeg, photo_members, write_tar

Write = Callable[..., Any]


def heartbeat(seconds: float, samples: int, *, device_wait: float = 0.0, decode_wait: float = 0.0) -> Heartbeat:
    return Heartbeat(
        progress=samples,
        busy=True,
        rows=samples,
        tokens=64 * samples,
        samples=samples,
        seconds=seconds,
        device_wait_seconds=device_wait,
        num_lanes=1,
        decode_wait_seconds=decode_wait,
        num_decoders=2,
        waiting_bytes=0,
        activities={},
    )


# ---- status


def test_where_there_is_no_dataset_status_says_so(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="there is no dataset here"):
        read_status(str(tmp_path))


def test_a_running_job_is_described_from_the_lease_alone(write_dataset: Write) -> None:
    dataset = write_dataset(finished=False)
    lease = take_lease(dataset.storage)
    lease.renew(Progress(shards=3, committed=2, rows=8, samples=10, samples_per_second=7.5, eta_seconds=4000))
    # What the lease says is enough: a ledger of millions of records is not read.
    for path in Path(dataset.url).glob("ledger/*/*"):
        path.unlink()
    status = read_status(dataset.url)
    assert (status.state, status.progress.committed, status.progress.rows) == ("running", 2, 8)
    assert str(os.getpid()) in (status.driver or "")
    text = status.describe()
    assert "2 of 3 committed" in text and "7.5 samples/s" in text and "1 h 6 min left" in text


def test_a_job_that_has_just_begun_knows_how_many_shards_it_has(write_dataset: Write) -> None:
    dataset = write_dataset(finished=False)
    take_lease(dataset.storage)
    assert read_status(dataset.url).progress.shards == 3


def test_an_interrupted_job_is_described_from_its_ledger_with_the_command_that_goes_on(write_dataset: Write) -> None:
    dataset = write_dataset(finished=False, num_shards=4, given_up=(1,))
    status = read_status(dataset.url)
    assert (status.state, status.driver) == ("interrupted", None)
    progress = status.progress
    assert (progress.shards, progress.committed, progress.failed_shards) == (4, 3, 1)
    assert (progress.rows, progress.samples, progress.failed_samples, progress.warnings) == (12, 15, 3, 3)
    assert f"bsq resume {dataset.url}" in status.describe()


@pytest.mark.parametrize("how", ["past its time to live", "its process is gone"])
def test_a_job_whose_driver_is_gone_is_interrupted(write_dataset: Write, how: str) -> None:
    dataset = write_dataset(finished=False)
    take_lease(dataset.storage)
    if how == "its process is gone":
        lease = json.loads(dataset.storage.read_bytes("lease.json"))
        dataset.storage.publish("lease.json", json.dumps(lease | {"process_started": "1"}).encode())
    else:
        os.utime(dataset.path("lease.json"), (time.time() - 3600, time.time() - 3600))
    assert read_status(dataset.url).state == "interrupted"


def test_a_complete_dataset_is_described_from_its_manifest(write_dataset: Write) -> None:
    dataset = write_dataset()
    for path in Path(dataset.url).glob("ledger/*/*"):
        path.unlink()
    status = read_status(dataset.url)
    assert (status.state, status.progress.committed, status.progress.rows) == ("complete", 3, 12)
    assert "speed" not in status.describe() and "go on" not in status.describe()


def test_a_dataset_with_shards_given_up_is_finished_but_not_complete(write_dataset: Write) -> None:
    status = read_status(write_dataset(given_up=(2,)).url)
    assert (status.state, status.progress.failed_shards, status.progress.shards) == ("incomplete", 1, 3)
    assert "1 failed" in status.describe()


def test_status_is_json_for_programs(write_dataset: Write) -> None:
    status = json.loads(read_status(write_dataset().url).to_json())
    assert status["state"] == "complete"
    assert status["progress"]["rows"] == 12


def test_reading_the_status_writes_nothing(write_dataset: Write) -> None:
    dataset = write_dataset(finished=False)
    take_lease(dataset.storage)
    before = {path: path.stat().st_mtime_ns for path in Path(dataset.url).rglob("*")}
    read_status(dataset.url)
    assert {path: path.stat().st_mtime_ns for path in Path(dataset.url).rglob("*")} == before


# ---- meter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(jobs.progress.time, "monotonic", lambda: now[0])
    return now


def test_speed_is_that_of_the_last_minute(clock: list[float]) -> None:
    meter = ProgressMeter(10, LedgerState(0))
    for second in range(1, 301):
        clock[0] += 1
        samples = 10 * second if second <= 200 else 2000 + 50 * (second - 200)
        meter.heard(0, heartbeat(second, samples))
    progress = meter.progress()
    assert progress.samples_per_second == pytest.approx(50, rel=0.05)
    assert progress.tokens_per_second == pytest.approx(64 * 50, rel=0.05)


def test_a_worker_that_was_replaced_takes_nothing_away(clock: list[float]) -> None:
    meter = ProgressMeter(10, LedgerState(0))
    for second in range(1, 11):
        clock[0] += 1
        meter.heard(0, heartbeat(second, 10 * second))
    for second in range(1, 11):
        clock[0] += 1
        meter.heard(0, heartbeat(second, 10 * second))
    assert meter.progress().samples_per_second == pytest.approx(10, rel=0.1)


def test_time_left_follows_from_what_this_driver_finished(write_dataset: Write, clock: list[float]) -> None:
    dataset = write_dataset(finished=False, num_shards=4)
    state = LedgerState(0)
    for commit in dataset.commits[:2]:
        state.add(commit)
    meter = ProgressMeter(10, state)
    assert meter.progress().eta_seconds is None
    clock[0] += 30
    meter.committed(dataset.commits[2])
    meter.gave_up()
    progress = meter.progress()
    assert (progress.committed, progress.failed_shards, progress.rows) == (3, 1, 12)
    assert progress.eta_seconds == pytest.approx(30 / 2 * 6)


def test_waiting_is_a_share_of_all_lanes_and_decoders(clock: list[float]) -> None:
    meter = ProgressMeter(10, LedgerState(0))
    meter.heard(0, heartbeat(10, 5, device_wait=5, decode_wait=2))
    meter.heard(1, heartbeat(10, 5, device_wait=1, decode_wait=0))
    progress = meter.progress()
    assert progress.workers == 2
    assert progress.device_wait == pytest.approx(6 / 20)
    assert progress.decode_wait == pytest.approx(2 / 40)


@pytest.mark.parametrize("slow", ["storage", "decoding"])
def test_waiting_for_storage_is_told_from_waiting_for_decoders(slow: str, tmp_path: Path) -> None:
    sink = io.BytesIO()
    with Image.open(io.BytesIO(jpeg(1, 2400, 2000))) as picture:
        picture.save(sink, "PNG", compress_level=1)
    large = [(f"{number:06d}.png", sink.getvalue()) for number in range(12)]
    write_tar(tmp_path / "a.tar", large if slow == "decoding" else photo_members(0, 12))
    with slow_server(tmp_path, bytes_per_second=20_000) as url:
        values = {
            "shards": [f"{url}/a.tar" if slow == "storage" else str(tmp_path / "a.tar")],
            "out": str(tmp_path / "out"),
            "tokenizer": "stub",
            "preprocess": {"size": 64},
            "run": {"cpus_per_worker": 1},
        }
        progress = start_job(parse_spec(values, source="test"), runner="in-process").progress
    assert progress.device_wait > 0.5
    assert (progress.read_wait > 0.5) == (slow == "storage"), progress


def test_status_works_on_an_object_store(object_store: Any, write_dataset: Write) -> None:
    url = f"{object_store.url}/dataset"
    write_dataset(url=url, storage_options=object_store.storage_options, finished=False)
    assert read_status(url, object_store.storage_options).state == "interrupted"
    take_lease(open_storage(url, object_store.storage_options))
    assert read_status(url, object_store.storage_options).state == "running"
