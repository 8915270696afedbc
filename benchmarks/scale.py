"""What a million shards cost: the driver's time and memory, segments of the ledger, resume, manifest, status, loader.

Workers are replaced by ones that answer at once with the commit record of a shard of 10,000 images; messages are
pickled as on their way from another process.  All else is what a job does: plan, lease, ledger and manifest on this
disk.  One shard in a thousand fails, and the driver is interrupted near the end, so that there is something to resume.
No token files are made: the driver never looks at them, and what sweeping would list is left out.

    python -m benchmarks.scale [--shards 1000000] [--folder DIR]"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import pickle
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import jobs.start
from jobs.runner import Death
from pipeline.dataset_files import ledger_folder, read_ledger, read_manifest
from pipeline.messages import Activity, Assignment, Heartbeat, Message, ShardCommitted, ShardFailed
from pipeline.storage import open_storage
from pipeline.storage.local_folder import LocalFolder
from schemas.errors import Interrupted, MediaTruncated
from schemas.failures import Failure, serialise_failures
from schemas.jobspec import parse_spec
from schemas.ledger import Commit, FileRecord, SourceRecord, StageSeconds

WORKERS = 128
FAILING = 1000
"""One shard in so many fails."""
DAMAGED = 200
"""One shard in so many has a failed sample, and a failure table."""
IMAGES = 10_000
TOKENS = 1024
ROW_GROUPS = [1024] * 9 + [784]
OFFSETS = [4 + 2_400_000 * number for number in range(10)]
_FAILURE = Failure.of_sample(MediaTruncated("it ends early"), key="x", position=7, member="x.jpg", source_offset=512)
_TABLE = serialise_failures([_FAILURE], {})
_TABLE_SHA256 = hashlib.sha256(_TABLE).hexdigest()


class InstantWorker:
    """A worker that has tokenized a shard when it is given it."""

    seconds = cpu_seconds = 0.0
    """Spent on what a real worker would do, by all of them."""

    def __init__(self, number: int, out: str, on_commit: Callable[[], None]) -> None:
        self._out = Path(out)
        self.name = f"node{number // 8:03d}/gpu{number % 8}"
        self._on_commit = on_commit
        self._sent: list[bytes] = []
        self._count = 0
        self._drained = False

    def assign(self, assignment: Assignment) -> None:
        began, cpu = time.perf_counter(), time.process_time()
        self._count += 1
        self._sent.append(pickle.dumps(self._answer(assignment.shard, assignment.attempt)))
        InstantWorker.seconds += time.perf_counter() - began
        InstantWorker.cpu_seconds += time.process_time() - cpu

    def take_messages(self) -> list[Message]:
        sent, self._sent = self._sent, []
        messages: list[Message] = [pickle.loads(data) for data in sent]
        for _ in messages:
            self._on_commit()
        return messages

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(
            progress=self._count,
            busy=True,
            rows=self._count * IMAGES,
            tokens=self._count * IMAGES * TOKENS,
            samples=self._count * IMAGES,
            seconds=time.monotonic(),
            device_wait_seconds=0.0,
            num_lanes=1,
            decode_wait_seconds=0.0,
            num_decoders=1,
            waiting_bytes=0,
            activities={},
        )

    def activities(self) -> dict[str, Activity]:
        return {}

    def death(self) -> Death | None:
        return Death("drained") if self._drained else None

    def drain(self) -> None:
        self._drained = True

    def kill(self) -> None:
        self._drained = True

    def _answer(self, shard: int, attempt: int) -> Message:
        if shard % FAILING == FAILING - 1:
            url = f"s3://corpus/photos-{shard:07d}.tar"
            return ShardFailed(shard, attempt, "open", "ShardNotFound", f"{url}: there is no such shard.", False)
        sha256 = hashlib.sha256(shard.to_bytes(8, "little")).hexdigest()
        failures = None
        if shard % DAMAGED == 0:
            file = f"failures/{shard // 1000:04d}/{shard:07d}-{_TABLE_SHA256[:8]}.parquet"
            path = self._out / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_TABLE)
            failures = FileRecord(file=file, bytes=len(_TABLE), sha256=_TABLE_SHA256)
        commit = Commit(
            shard=shard,
            attempt=attempt,
            file=f"tokens/{shard // 1000:04d}/{shard:07d}-{sha256[:8]}.parquet",
            bytes=23_117_824,
            sha256=sha256,
            rows=IMAGES,
            tokens=IMAGES * TOKENS,
            samples=IMAGES + bool(failures),
            failed=bool(failures),
            warnings=0,
            partial=False,
            min_frames=1,
            max_frames=1,
            min_key=f"{shard:07d}{0:04d}",
            max_key=f"{shard:07d}{9999:04d}",
            row_groups=ROW_GROUPS,
            tokens_offset=OFFSETS,
            failures=failures,
            source=SourceRecord(bytes=1_219_840_000 + shard, etag=sha256[:32]),
            arithmetic="a1b2c3d4",
            seconds=StageSeconds(read=31.0, decode=88.2, encode=70.1, write=0.4, wall=74.9),
            worker=self.name,
            at="2026-11-21T12:00:00+00:00",
        )
        return ShardCommitted(commit, {"device": "simulated"})


class InstantRunner:
    """Workers that answer at once.  After `stop_after` shards it interrupts its own process, as a terminal would."""

    def __init__(self, out: str, stop_after: int | None) -> None:
        self.num_workers = WORKERS
        self._out = out
        self._left = stop_after

    def start_worker(self, number: int) -> InstantWorker:
        return InstantWorker(number, self._out, self._count)

    def wait(self, timeout_seconds: float) -> None:
        return

    def close(self) -> None:
        return

    def _count(self) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def instant_workers(out: str, stop_after: int | None = None) -> Iterator[None]:
    """Give every job of this process workers that answer at once."""
    before = jobs.start.make_runner
    jobs.start.make_runner = lambda *_: InstantRunner(out, stop_after)  # type: ignore[assignment]
    try:
        yield
    finally:
        jobs.start.make_runner = before


def begin(out: str, num_shards: int, stop_after: int | None = None) -> None:
    """Run a simulated job in this process, to its end or until it is interrupted."""
    values = {
        "shards": [f"s3://corpus/photos-{{{0:07d}..{num_shards - 1:07d}}}.tar"],
        "out": out,
        "tokenizer": "stub",
        "device": "cpu",
        "run": {"cpus_per_worker": 1},
    }
    with instant_workers(out, stop_after), contextlib.suppress(Interrupted):
        jobs.start.start_job(parse_spec(values, source="benchmark"), runner="local")


def phase_begin(out: str, num_shards: int) -> dict[str, Any]:
    most_segments = 0
    publish = LocalFolder.create_only

    def counting(storage: LocalFolder, name: str, data: bytes, **settings: Any) -> bool:
        nonlocal most_segments
        won = publish(storage, name, data, **settings)
        if name.startswith("ledger/"):
            most_segments = max(most_segments, len(os.listdir(f"{out}/{ledger_folder(0)}")))  # noqa: PTH208
        return won

    LocalFolder.create_only = counting  # type: ignore[method-assign]
    began, cpu = time.perf_counter(), time.process_time()
    num_run = num_shards - num_shards // 100
    begin(out, num_shards, stop_after=num_run)
    seconds = time.perf_counter() - began - InstantWorker.seconds
    return {
        "seconds": seconds,
        "per_shard_ms": 1000 * seconds / num_run,
        "cpu_per_shard_ms": 1000 * (time.process_time() - cpu - InstantWorker.cpu_seconds) / num_run,
        "most_segments": most_segments,
    }


def phase_scan(out: str, num_shards: int) -> dict[str, Any]:
    began, cpu = time.perf_counter(), time.process_time()
    state = read_ledger(open_storage(out), 0, keep_commits=False)
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "committed": len(state.committed),
        "segments": len(state.segments),
        "ledger_bytes": sum(path.stat().st_size for path in Path(out, ledger_folder(0)).iterdir()),
    }


def phase_resume(out: str, num_shards: int) -> dict[str, Any]:
    write_manifest = jobs.start.write_manifest
    manifest_seconds = manifest_cpu_seconds = 0.0

    def timed(*arguments: Any) -> Any:
        nonlocal manifest_seconds, manifest_cpu_seconds
        began, cpu = time.perf_counter(), time.process_time()
        summary = write_manifest(*arguments)
        manifest_seconds, manifest_cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        return summary

    jobs.start.write_manifest = timed
    began = time.perf_counter()
    with instant_workers(out):
        outcome = jobs.start.resume_job(out, runner="local")
    return {
        "seconds": time.perf_counter() - began,
        "manifest_seconds": manifest_seconds,
        "manifest_cpu_seconds": manifest_cpu_seconds,
        "committed": outcome.progress.committed,
        "failed": outcome.progress.failed_shards,
    }


def phase_manifest(out: str, num_shards: int) -> dict[str, Any]:
    began, cpu = time.perf_counter(), time.process_time()
    manifest = read_manifest(open_storage(out))
    assert manifest is not None
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    shards = manifest.table["shard"].to_numpy()
    first_rows = manifest.table["first_row"].to_numpy()
    assert len(shards) == num_shards - num_shards // FAILING, len(shards)
    assert (shards[1:] > shards[:-1]).all() and (first_rows == IMAGES * np.arange(len(shards))).all()
    size = Path(out, "manifest", "0000.parquet").stat().st_size
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "rows": len(shards), "bytes": size}


def phase_load(out: str, num_shards: int) -> dict[str, Any]:
    # Not above: the memory of the driver does not hold it.
    from pipeline.dataset import TokenDataset

    began, cpu = time.perf_counter(), time.process_time()
    dataset = TokenDataset(out, allow_partial=True)
    plan = dataset.plan_epoch(0, 0, shuffle=True, window_rows=32_768)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "samples": len(dataset), "windows": plan.num_windows}


PHASES = {
    "begin": phase_begin,
    "scan": phase_scan,
    "resume": phase_resume,
    "manifest": phase_manifest,
    "load": phase_load,
}


def run_phase(name: str, out: str, num_shards: int) -> dict[str, Any]:
    """Run one phase in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.scale", "--phase", name, "--folder", out, "--shards", str(num_shards)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_status(out: str) -> tuple[float, str]:
    began = time.perf_counter()
    command = [sys.executable, "-c", "from jobs.entry import main; main()", "status", out]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - began, done.stdout.splitlines()[0].rpartition(": ")[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--folder", default=None, help="where the output goes; left out: a temporary folder")
    parser.add_argument("--phase", choices=PHASES, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.phase:
        found = PHASES[arguments.phase](arguments.folder, arguments.shards)
        print(json.dumps(found | {"rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bsq-scale-") as folder:
        out, count = f"{folder}/out", arguments.shards
        print(f"{count:,} shards, {platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} CPUs\n")
        first = run_phase("begin", out, count)
        scan = run_phase("scan", out, count)
        interrupted, interrupted_state = run_status(out)
        resume = run_phase("resume", out, count)
        manifest = run_phase("manifest", out, count)
        finished, finished_state = run_status(out)
        load = run_phase("load", out, count)
    both = [resume["manifest_seconds"] + manifest["seconds"], resume["manifest_cpu_seconds"] + manifest["cpu_seconds"]]
    rows = [
        ("driver, per shard", f"{first['per_shard_ms']:.3f} ms", f"{first['cpu_per_shard_ms']:.3f} ms", "1 ms"),
        ("driver, peak memory", f"{first['rss_mb']:,.0f} MB", "", "2,000 MB"),
        ("segments of the ledger, most at any time", f"{first['most_segments']:,}", "", "5,000"),
        ("ledger", f"{scan['ledger_bytes'] / 1e6:,.0f} MB in {scan['segments']:,} segments", "", ""),
        ("scan of the ledger", f"{scan['seconds']:.1f} s", f"{scan['cpu_seconds']:.1f} s", "30 s"),
        ("scan of the ledger, peak memory", f"{scan['rss_mb']:,.0f} MB", "", "2,000 MB"),
        (f"bsq status, {interrupted_state}", f"{interrupted:.1f} s", "", ""),
        ("resume to the end, all of it", f"{resume['seconds']:.1f} s", "", ""),
        ("resume, peak memory", f"{resume['rss_mb']:,.0f} MB", "", "2,000 MB"),
        ("manifest written and read back", f"{both[0]:.1f} s", f"{both[1]:.1f} s", "60 s"),
        ("manifest", f"{manifest['bytes'] / 1e6:,.0f} MB", "", ""),
        (f"bsq status, {finished_state}", f"{finished:.1f} s", "", ""),
        ("loader opened, an epoch planned", f"{load['seconds']:.1f} s", f"{load['cpu_seconds']:.1f} s", ""),
        ("loader, peak memory", f"{load['rss_mb']:,.0f} MB", "", ""),
    ]
    print("| what | measured | CPU time | bound |\n|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(f"\n{resume['committed']:,} shards committed, {resume['failed']:,} failed.")


if __name__ == "__main__":
    main()
