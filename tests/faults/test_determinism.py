"""The same job gives the same bytes, whoever runs it, with however many workers and whatever batch."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from pipeline.dataset_files import read_ledger, read_manifest
from pipeline.storage import open_storage
from tests.tiny_corpus import RunBsq, dataset_files, jpeg, mp4, photo_members, write_tar

WAYS = {
    "one spawned worker, batches of 32": ["--no-ray", "--workers", "1", "--batch", "32"],
    "two spawned workers, batches of 4": ["--no-ray", "--workers", "2", "--batch", "4"],
    "inside the driver, batches of 4": ["--in-process", "--workers", "1", "--batch", "4"],
    "two Ray actors, batches of 32": ["--workers", "2", "--batch", "32"],
}


def tokenize_in_every_way(
    bsq: RunBsq, folder: Path, shards: list[Path], arguments: list[str], *, exit_code: int, timeout: float
) -> Path:
    """Run one job in all ways, assert that they agree in every byte, and return one of the outputs."""
    outputs = {}
    for number, (way, options) in enumerate(WAYS.items()):
        out = folder / f"out-{number}"
        job = bsq("tokenize", *shards, "--out", out, *arguments, *options, timeout=timeout)
        assert job.returncode == exit_code, (way, job.stderr)
        outputs[way] = dataset_files(out)
    first, *others = outputs
    for other in others:
        assert outputs[other] == outputs[first], f"{other} differs from {first}"
    return folder / "out-0"


@pytest.mark.long
def test_bytes_do_not_depend_on_workers_batches_or_who_runs_them(tmp_path: Path, bsq: RunBsq) -> None:
    mixed = photo_members(0, 6)
    mixed[4:4] = [("clip-a.mp4", mp4(1, 5)), ("clip-a.txt", b"five frames")]
    mixed[22:22] = [("clip-b.mp4", mp4(2, 21)), ("cut.jpg", jpeg(50)[:900]), ("bad.jpg", jpeg(51)), ("bad.cls", b"x")]
    mixed += [("late.webm", b"no video"), ("000001.jpg", jpeg(52)), ("clip-c.mp4", mp4(3, 9, width=80, height=96))]
    photos = [write_tar(tmp_path / f"photos-{number}.tar", photo_members(100 * number, 7)) for number in (1, 2)]
    whole = write_tar(tmp_path / "whole.tar", photo_members(300, 5)).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    shards = [write_tar(tmp_path / "mixed.tar", mixed), photos[0], tmp_path / "cut.tar", photos[1]]
    arguments = ["--tokenizer", "untrained:vit-tiny-32-l18", "--crop", "random", "--views", "2", "--flip", "0.5"]
    out = tokenize_in_every_way(bsq, tmp_path, shards, arguments, exit_code=3, timeout=120)
    ledger = read_ledger(open_storage(str(out)), 0)
    mixed_commit = ledger.commits[0, 0]
    # Two views of seven pictures and of one, three and two clips.
    assert mixed_commit.rows == 2 * (7 + 1 + 3 + 2)
    assert (mixed_commit.min_frames, mixed_commit.max_frames) == (1, 8)
    assert (mixed_commit.failed, mixed_commit.warnings) == (3, 1)
    assert ledger.commits[2, 0].partial
    assert len(dataset_files(out)) == 4 + 2


def samples_of(path: Path) -> list[list[tuple[str, bytes]]]:
    """The members of each sample of a good archive."""
    samples: dict[str, list[tuple[str, bytes]]] = {}
    with tarfile.open(path) as archive:
        for entry in archive:
            file = archive.extractfile(entry)
            if file is not None:
                samples.setdefault(entry.name.partition(".")[0], []).append((entry.name, file.read()))
    return list(samples.values())


@pytest.mark.long
@pytest.mark.shared
def test_bytes_of_the_real_model_over_real_and_hostile_input_do_not_depend_on_them_either(
    tmp_path: Path, bsq: RunBsq, shared: Path
) -> None:
    data = shared / "data"
    clips = samples_of(data / "demo" / "clips-000000.tar")
    photos = samples_of(data / "demo" / "photos-000000.tar")
    # After every second photograph a clip: both kinds of batch are filled from one shard.
    mixed: list[tuple[str, bytes]] = []
    for number, photo in enumerate(photos):
        mixed += photo
        if number % 2 == 0:
            mixed += clips[number // 2]
    shards = [
        write_tar(tmp_path / "mixed.tar", mixed),
        data / "demo" / "photos-000001.tar",
        *sorted(path for path in (data / "nasty").glob("*.tar*") if path.name != "many-members.tar"),
    ]
    arguments = ["--tokenizer", "untrained:vit-small-128-l18", "--fps", "2"]
    out = tokenize_in_every_way(bsq, tmp_path, shards, arguments, exit_code=3, timeout=1200)
    manifest = read_manifest(open_storage(str(out)))
    assert manifest is not None
    rows = manifest.table.to_pylist()
    assert rows[0]["min_frames"] == 1 and rows[0]["max_frames"] > 1, "pictures and clips in one shard"
    assert manifest.summary.rows > 200
    assert manifest.summary.failed > 50
