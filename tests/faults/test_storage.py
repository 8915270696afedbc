"""Where the dataset lies: an object store instead of a disk, and a disk that is full."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.dataset_files import read_ledger, read_manifest
from pipeline.storage import Storage
from tests.tiny_corpus import BSQ, RunBsq, bsq_environment, dataset_files, photo_members, temporaries, write_tar

PATIENCE_SECONDS = 60.0
STUB = ["--tokenizer", "stub", "--size", "64", "--in-process"]
SPAWNED = ["--tokenizer", "stub", "--size", "64", "--no-ray"]


@pytest.fixture(scope="module")
def local_out(small_shards: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("local") / "out"
    arguments = ["tokenize", *map(str, small_shards), "--out", str(out), *STUB]
    subprocess.run([*BSQ, *arguments], check=True, capture_output=True, env=bsq_environment())
    return out


def options_of(object_store: Any) -> list[str]:
    pairs = [f"{name}={value}" for name, value in object_store.storage_options.items()]
    return [word for pair in pairs for word in ("--storage-option", pair)]


def rows_of(storage: Storage) -> list[dict[str, Any]]:
    manifest = read_manifest(storage)
    assert manifest is not None and manifest.summary.complete
    files = manifest.table["file"].to_pylist()
    return [row for file in files for row in pq.read_table(storage.url_of(file)).to_pylist()]


def remote_rows(storage: Storage, folder: Path) -> list[dict[str, Any]]:
    """Rows of a dataset in an object store, copied here file by file."""
    for name in storage.list("", recursive=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(storage.read_bytes(name))
    return rows_of(Storage(str(folder)))


def test_a_job_from_store_to_store_is_killed_resumed_and_holds_what_a_local_one_holds(
    small_shards: list[Path], local_out: Path, object_store: Any, tmp_path: Path, bsq: RunBsq
) -> None:
    source = Storage(f"{object_store.url}/shards", object_store.storage_options)
    for shard in small_shards:
        source.publish(shard.name, shard.read_bytes())
    out, options = f"{object_store.url}/deep/out", options_of(object_store)
    storage = Storage(out, object_store.storage_options)
    markers = tmp_path / "markers"
    markers.mkdir()
    job = subprocess.Popen(
        [*BSQ, "tokenize", f"{object_store.url}/shards/small-{{00..05}}.tar", "--out", out, *SPAWNED, *options],
        env=bsq_environment({"BSQTOK_HOLD_AT": f"after_ledger:{markers}"}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not list(markers.iterdir()):
            assert time.monotonic() < deadline and job.poll() is None
            time.sleep(0.02)
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
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
    found = remote_rows(storage, tmp_path / "copy")
    assert found == rows_of(Storage(str(local_out)))
    named = {commit.file for commit in after.commits.values()}
    assert named == {f"tokens/{name}" for name in storage.list("tokens", recursive=True)}, "strays are swept"
    for path in (tmp_path / "copy").rglob("*"):
        assert path.is_dir() or b"s3cr3t" not in path.read_bytes(), f"credentials in {path.name}"
    verified = bsq("verify", out, *options)
    assert verified.returncode == 0, verified.stdout


def test_local_shards_written_to_a_store_give_the_bytes_of_a_local_dataset(
    small_shards: list[Path], local_out: Path, object_store: Any, tmp_path: Path, bsq: RunBsq
) -> None:
    out, options = f"{object_store.url}/out", options_of(object_store)
    assert bsq("tokenize", *small_shards, "--out", out, *STUB, *options).returncode == 0
    remote_rows(Storage(out, object_store.storage_options), tmp_path / "copy")
    assert dataset_files(tmp_path / "copy") == dataset_files(local_out)
    again = bsq("tokenize", *small_shards, "--out", out, *STUB, *options)
    assert again.returncode == 0, "a finished job is finished"
    refused = bsq("tokenize", *small_shards, "--out", out, *STUB, *options, "--crop", "exact")
    assert refused.returncode == 4 and "crop" in refused.stderr


def test_a_bucket_that_is_not_there_is_told_in_one_line(
    small_shards: list[Path], object_store: Any, bsq: RunBsq
) -> None:
    refused = bsq("tokenize", *small_shards, "--out", "s3://no-such-bucket/out", *STUB, *options_of(object_store))
    assert refused.returncode == 4, refused.stderr
    (line,) = refused.stderr.strip().splitlines()
    assert "no-such-bucket" in line and "bucket" in line


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
    assert len(read_ledger(Storage(str(out)), 0).commits) >= 1, "what was committed is kept"

    resumed = bsq("resume", out, "--in-process")
    assert resumed.returncode == 0, resumed.stderr
    assert dataset_files(out) == dataset_files(undisturbed)
