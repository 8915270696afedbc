"""Where the dataset lies: object stores that falter, a disk that is full, an output that may not be written."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow.parquet as pq
import pytest

from pipeline.dataset_files import read_ledger, read_manifest
from pipeline.storage import Storage, open_storage
from tests.conftest import ObjectStore
from tests.faults.conftest import LENIENT
from tests.faults.faulty_store import Faults, faulty
from tests.faults.kill_matrix import assert_consistent, assert_whole
from tests.running_jobs import PATIENCE_SECONDS, STUB, StartJob
from tests.tiny_corpus import BSQ, RunBsq, bsq_environment, dataset_files, photo_members, temporaries, write_tar

SMALL = ["--tokenizer", "stub", "--size", "64", *LENIENT]


@pytest.fixture(scope="module")
def local_out(shards: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("local") / "out"
    arguments = ["tokenize", *map(str, shards), "--out", str(out), *SMALL, "--in-process"]
    subprocess.run([*BSQ, *arguments], check=True, capture_output=True, env=bsq_environment())
    return out


def rows_of(storage: Storage) -> list[dict[str, Any]]:
    manifest = read_manifest(storage)
    assert manifest is not None and manifest.summary.complete
    files = manifest.table["file"].to_pylist()
    return [row for file in files for row in pq.read_table(storage.url_of(file)).to_pylist()]


def copy(store: ObjectStore, name: str, folder: Path) -> Path:
    """Bring a dataset in an object store here, file by file."""
    storage = open_storage(f"{store.url}/{name}", store.storage_options)
    for file in storage.list("", recursive=True):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(storage.read_bytes(file))
    return folder


def upload(store: ObjectStore, shards: list[Path]) -> str:
    """Put shards into the store; return the pattern that names them."""
    source = open_storage(f"{store.url}/shards", store.storage_options)
    for shard in shards:
        source.publish(shard.name, shard.read_bytes())
    return f"{store.url}/shards/shard-{{00..05}}.tar"


@pytest.mark.long
def test_a_job_from_store_to_store_is_killed_resumed_and_holds_what_a_local_one_holds(
    shards: list[Path], local_out: Path, object_store: ObjectStore, tmp_path: Path, bsq: RunBsq, start: StartJob
) -> None:
    out, options = f"{object_store.url}/deep/out", object_store.arguments
    storage = open_storage(out, object_store.storage_options)
    sources = upload(object_store, shards)
    job = start("tokenize", sources, "--out", out, *SMALL, "--no-ray", *options, hold_at="after_ledger")
    job.wait_until_standing()
    job.kill()
    before = read_ledger(storage, 0)
    assert before.commits
    assert storage.exists("lease.json")
    assert "interrupted" in bsq("status", out, *options).stdout

    resumed = bsq("resume", out, "--no-ray", *options)
    assert resumed.returncode == 0, resumed.stderr
    assert "s3cr3t" not in resumed.stderr + resumed.stdout
    after = read_ledger(storage, 0)
    assert {key: after.commits[key] for key in before.commits} == before.commits
    assert not storage.exists("lease.json")
    folder = copy(object_store, "deep/out", tmp_path / "copy")
    assert rows_of(open_storage(str(folder))) == rows_of(open_storage(str(local_out)))
    named = {commit.file for commit in after.commits.values()}
    assert named == {f"tokens/{name}" for name in storage.list("tokens", recursive=True)}, "strays are swept"
    for path in folder.rglob("*"):
        assert path.is_dir() or b"s3cr3t" not in path.read_bytes(), f"credentials in {path.name}"
    verified = bsq("verify", out, *options)
    assert verified.returncode == 0, verified.stdout


def test_local_shards_written_to_a_store_give_the_bytes_of_a_local_dataset(
    shards: list[Path], local_out: Path, object_store: ObjectStore, tmp_path: Path, bsq: RunBsq
) -> None:
    out, options = f"{object_store.url}/out", object_store.arguments
    assert bsq("tokenize", *shards, "--out", out, *SMALL, "--in-process", *options).returncode == 0
    assert dataset_files(copy(object_store, "out", tmp_path / "copy")) == dataset_files(local_out)
    again = bsq("tokenize", *shards, "--out", out, *SMALL, "--in-process", *options)
    assert again.returncode == 0, "a finished job is finished"
    refused = bsq("tokenize", *shards, "--out", out, *SMALL, "--in-process", *options, "--crop", "exact")
    assert refused.returncode == 4 and "crop" in refused.stderr


def test_a_bucket_that_is_not_there_is_told_in_one_line(
    shards: list[Path], object_store: ObjectStore, bsq: RunBsq
) -> None:
    out = "s3://no-such-bucket/out"
    refused = bsq("tokenize", *shards, "--out", out, *STUB, "--in-process", *object_store.arguments)
    assert refused.returncode == 4, refused.stderr
    (line,) = refused.stderr.strip().splitlines()
    assert "no-such-bucket" in line and "bucket" in line


# ---- stores that falter


@pytest.fixture
def faulty_store(object_store: ObjectStore) -> Iterator[tuple[ObjectStore, Faults]]:
    with faulty(object_store) as found:
        yield found


@pytest.mark.long
def test_errors_broken_bodies_and_lost_answers_cost_requests_and_nothing_else(
    shards: list[Path],
    local_out: Path,
    object_store: ObjectStore,
    faulty_store: tuple[ObjectStore, Faults],
    tmp_path: Path,
    bsq: RunBsq,
) -> None:
    store, faults = faulty_store
    sources = upload(object_store, shards)
    faults.error_share, faults.broken_share, faults.lost_share = 0.1, 0.15, 0.2
    job = bsq("tokenize", sources, "--out", f"{store.url}/out", *SMALL, "--no-ray", *store.arguments, timeout=300)
    assert job.returncode == 0, job.stderr
    assert min(faults.struck[name] for name in ("error", "broken", "lost")) >= 1, faults.struck
    folder = copy(object_store, "out", tmp_path / "copy")
    assert rows_of(open_storage(str(folder))) == rows_of(open_storage(str(local_out)))
    assert len(dataset_files(folder)) == len(dataset_files(local_out)), "no strays"
    ledger = read_ledger(open_storage(str(folder)), 0)
    assert ledger.given_up == {} and ledger.ignored == []
    assert sorted(ledger.commits) == [(shard, 0) for shard in range(6)]
    assert not (folder / "lease.json").exists()


@pytest.mark.long
def test_repeated_requests_for_a_source_are_recorded(
    shards: list[Path], object_store: ObjectStore, faulty_store: tuple[ObjectStore, Faults], tmp_path: Path, bsq: RunBsq
) -> None:
    store, faults = faulty_store
    upload(object_store, shards)
    keys = {"aws_access_key_id": store.storage_options["key"], "aws_secret_access_key": store.storage_options["secret"]}
    client = boto3.client("s3", endpoint_url=store.storage_options["endpoint_url"], region_name="us-east-1", **keys)
    for shard in shards:
        client.put_object_acl(Bucket="bucket", Key=f"shards/{shard.name}", ACL="public-read")
    faults.broken_share = 0.4
    out = tmp_path / "out"
    # By plain HTTP: the client for S3 repeats most requests by itself, and says nothing of it.
    sources = f"{store.storage_options['endpoint_url']}/bucket/shards/shard-{{00..05}}.tar"
    job = bsq("tokenize", sources, "--out", out, *SMALL, "--in-process", timeout=300)
    assert job.returncode == 0, job.stderr
    commits = read_ledger(open_storage(str(out)), 0).commits.values()
    assert faults.struck["broken"] >= 2
    assert sum(commit.source.num_retries for commit in commits) >= 1


@pytest.mark.long
def test_a_listing_that_lags_hides_no_commit_from_the_driver_that_takes_over(
    shards: list[Path],
    local_out: Path,
    object_store: ObjectStore,
    faulty_store: tuple[ObjectStore, Faults],
    tmp_path: Path,
    bsq: RunBsq,
    start: StartJob,
) -> None:
    store, faults = faulty_store
    faults.lag_seconds = 600.0
    out = f"{store.url}/out"
    job = start("tokenize", *shards, "--out", out, *SMALL, "--no-ray", *store.arguments, hold_at="after_ledger")
    job.wait_until_standing()
    job.kill()
    storage = open_storage(out, store.storage_options)
    assert storage.list("ledger/0000") == [], "nothing of it is listed yet"
    before = read_ledger(storage, 0)
    assert before.commits, "but it is read"
    resumed = bsq("resume", out, "--no-ray", *store.arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert faults.struck["lag"] > 0
    folder = copy(object_store, "out", tmp_path / "copy")
    ledger = read_ledger(open_storage(str(folder)), 0)
    assert ledger.ignored == [], "nothing is committed twice"
    assert {key: ledger.commits[key] for key in before.commits} == before.commits
    # What the first driver left may not be listed when strays are swept; what is committed is the same bytes.
    assert dataset_files(local_out).items() <= dataset_files(folder).items()


@pytest.mark.longest
def test_slow_reads_take_their_time(
    shards: list[Path], local_out: Path, object_store: ObjectStore, faulty_store: tuple[ObjectStore, Faults],
    tmp_path: Path, bsq: RunBsq,
) -> None:  # fmt: skip
    store, faults = faulty_store
    sources = upload(object_store, shards)
    faults.bytes_per_second = 30_000.0
    out = tmp_path / "out"
    # Bytes that come are progress, so a watchdog that waits for less than a shard takes must not bite.
    slow = ["--set", "run.hang_timeout_seconds=5"]
    job = bsq("tokenize", sources, "--out", out, *SMALL, "--no-ray", *slow, *store.arguments, timeout=300)
    assert job.returncode == 0, job.stderr
    assert rows_of(open_storage(str(out))) == rows_of(open_storage(str(local_out)))
    assert read_ledger(open_storage(str(out)), 0).failed_attempts == {}


@pytest.mark.long
def test_a_store_that_takes_nothing_any_more_stops_the_job_in_one_line_with_nothing_half_written(
    shards: list[Path],
    local_out: Path,
    object_store: ObjectStore,
    faulty_store: tuple[ObjectStore, Faults],
    tmp_path: Path,
    bsq: RunBsq,
    start: StartJob,
) -> None:
    store, faults = faulty_store
    out = f"{store.url}/out"
    job = start("tokenize", *shards, "--out", out, *SMALL, "--no-ray", *store.arguments, hold_at="before_tokens")
    job.wait_until_standing()
    faults.is_read_only = True
    assert job.end() == 4, job.said
    lines = [line for line in job.said[1].splitlines() if not line[:2].isdigit()]
    assert len(lines) == 1 and lines[0].startswith("OutputNotWritable: "), job.said
    faults.is_read_only = False
    written = dataset_files(copy(object_store, "out", tmp_path / "copy"))
    assert written.items() <= dataset_files(local_out).items()
    assert bsq("resume", out, "--in-process", "--force", *store.arguments).returncode == 0
    assert dataset_files(copy(object_store, "out", tmp_path / "whole")) == dataset_files(local_out)


# ---- disks


def test_a_full_disk_stops_the_job_in_one_line_and_the_job_goes_on_when_there_is_room(
    tmp_path: Path, bsq: RunBsq
) -> None:
    sizes = [2, 2, 40, 2]
    shards = [
        write_tar(tmp_path / f"{number}.tar", photo_members(100 * number, size)) for number, size in enumerate(sizes)
    ]
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    # At 256 pixels a picture has 2 kB of tokens.
    settings = ["--tokenizer", "stub"]
    assert bsq("tokenize", *shards, "--out", undisturbed, *settings, "--in-process").returncode == 0
    lengths = {name: (undisturbed / name).stat().st_size for name in dataset_files(undisturbed)}
    limit = 24 << 10
    assert sum(length > limit for length in lengths.values()) == 1

    arguments = ["tokenize", *map(str, shards), "--out", str(out), *settings, "--no-ray"]
    with (tmp_path / "stderr").open("w+") as stderr:
        job = subprocess.Popen([*BSQ, *arguments], env=bsq_environment(), stdout=subprocess.DEVNULL, stderr=stderr)
        # Workers inherit the limit: nobody can write a longer file, as on a disk without room.
        resource.prlimit(job.pid, resource.RLIMIT_FSIZE, (limit, limit))
        assert job.wait(PATIENCE_SECONDS) == 4
        stderr.seek(0)
        said = stderr.read()
    lines = [line for line in said.splitlines() if not line[:2].isdigit()]
    assert len(lines) == 1, said
    assert lines[0].startswith("OutputFull: ") and str(out) in lines[0] and "Make room" in lines[0]
    assert "Traceback" not in said
    assert temporaries(out) == []
    assert not (out / "lease.json").exists()
    written = dataset_files(out)
    assert written.items() <= dataset_files(undisturbed).items(), "nothing is half-written"
    assert len(read_ledger(open_storage(str(out)), 0).commits) >= 1, "what was committed is kept"

    resumed = bsq("resume", out, "--in-process")
    assert resumed.returncode == 0, resumed.stderr
    assert dataset_files(out) == dataset_files(undisturbed)


FILLED = """
import ctypes, json, shutil, subprocess, sys
out, copies, *commands = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x00020000) or libc.mount(None, b"/", None, 0x44000, None):  # a mount namespace of its own
    sys.exit(99)
for number, (command, flags, size) in enumerate(zip(commands, (0, 0x20), (b"size=40k", b"size=16m"))):  # remounted
    if libc.mount(b"tmpfs", out.encode(), b"tmpfs", flags, size):
        sys.exit(99)
    done = subprocess.run(json.loads(command), capture_output=True, text=True)
    print(json.dumps([done.returncode, done.stderr]))
    shutil.copytree(out, f"{copies}/{number}")
"""


@pytest.mark.long
def test_a_disk_without_a_page_left_keeps_what_was_published_and_the_job_goes_on_when_there_is_room(
    shards: list[Path], undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    # Neither the worker nor, with the records of what it published, the driver finds any room.
    commands = [
        [*BSQ, "tokenize", *map(str, shards), "--out", str(out), *STUB, *LENIENT, "--no-ray"],
        [*BSQ, "resume", str(out), "--in-process"],
    ]
    filled = subprocess.run(
        [sys.executable, "-c", FILLED, out, tmp_path / "copies", *map(json.dumps, commands)],
        capture_output=True, text=True, env=bsq_environment(), check=False,
    )  # fmt: skip
    if filled.returncode == 99:
        pytest.skip("mounting needs the rights of an administrator")
    assert filled.returncode == 0, filled.stderr
    (code, said), resumed = map(json.loads, filled.stdout.splitlines())
    lines = [line for line in said.splitlines() if not line[:2].isdigit()]
    assert code == 4 and len(lines) == 1, said
    assert lines[0].startswith("OutputFull: ") and "No space left" in lines[0]
    left = tmp_path / "copies" / "0"
    assert 0 < len(dataset_files(left)) < len(undisturbed)
    assert_consistent(left, undisturbed)
    assert temporaries(left) == [] and not (left / "lease.json").exists()
    assert resumed[0] == 0, resumed
    assert_whole(tmp_path / "copies" / "1", undisturbed)


READ_ONLY = """
import os, subprocess, sys
from pathlib import Path
out, *command = sys.argv[1:]
libc = __import__("ctypes").CDLL(None, use_errno=True)
if libc.unshare(0x00020000) or libc.mount(None, b"/", None, 0x44000, None):  # a mount namespace of its own
    sys.exit(99)
path = out.encode()
if libc.mount(path, path, None, 0x1000, None) or libc.mount(None, path, None, 0x1021, None):  # bind, then read-only
    sys.exit(99)
sys.exit(subprocess.run(command).returncode)
"""


@pytest.mark.long
def test_an_output_that_became_read_only_is_told_in_one_line_and_left_as_it_is(
    shards: list[Path], local_out: Path, tmp_path: Path, bsq: RunBsq, start: StartJob
) -> None:
    out = tmp_path / "out"
    job = start("tokenize", *shards, "--out", out, *SMALL, "--no-ray", hold_at="after_ledger")
    job.wait_until_standing()
    job.kill()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    refused = subprocess.run(
        [sys.executable, "-c", READ_ONLY, str(out), *BSQ, "resume", str(out), "--in-process"],
        capture_output=True,
        text=True,
        env=bsq_environment(),
        check=False,
    )
    if refused.returncode == 99:
        pytest.skip("mounting needs the rights of an administrator")
    assert refused.returncode == 4, refused.stderr
    (line,) = refused.stderr.strip().splitlines()
    assert line.startswith("OutputNotWritable: ") and str(out) in line and "permissions" in line
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert bsq("resume", out, "--in-process").returncode == 0
    assert dataset_files(out) == dataset_files(local_out)
