"""Datasets that grow or win back what had failed, and what must hold of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.append import append_job
from jobs.outcome import JobOutcome
from jobs.retry import RetryKind, retry_job
from jobs.start import start_job
from jobs.verify import verify_dataset
from pipeline.dataset import TokenDataset
from pipeline.dataset_files import read_job, read_manifest
from pipeline.parquet import read_parquet
from pipeline.storage import open_storage
from schemas.jobspec import JobSpec, parse_spec
from schemas.manifest import latest_parts
from tests.tiny_corpus import dataset_files, jpeg, mp4

WIDE = 1 << 20
"""Pixels: more than any picture here has."""


def job_spec(shards: Sequence[Path | str], out: Path, **values: Any) -> JobSpec:
    fixed = {"tokenizer": "stub", "preprocess": {"size": 64}, "clips": {"clip_frames": 4}}
    values = fixed | {"shards": [str(shard) for shard in shards], "out": str(out)} | values
    return parse_spec(values, source="test")


def tokenize(shards: Sequence[Path | str], out: Path, **values: Any) -> JobOutcome:
    return start_job(job_spec(shards, out, **values), runner="in-process")


def append(shards: Sequence[Path | str], out: Path, **values: Any) -> JobOutcome:
    spec = parse_spec({"shards": [str(shard) for shard in shards], "out": str(out)} | values, source="test")
    return append_job(spec, runner="in-process")


def retry(out: Path, kind: RetryKind, **values: Any) -> JobOutcome:
    return retry_job(str(out), kind, asked=parse_spec(values, source="test"), runner="in-process")


def all_rows(out: Path, generation: int | None = None) -> list[dict[str, Any]]:
    """Every row of a dataset with its shard, whatever part it is in, in source order."""
    storage = open_storage(str(out))
    manifest = read_manifest(storage, generation)
    assert manifest is not None
    rows = [
        {"shard": entry["shard"]} | row
        for entry in manifest.table.select(["shard", "file"]).to_pylist()
        for row in read_parquet(storage.read_bytes(entry["file"])).to_pylist()
    ]
    return sorted(rows, key=lambda row: (row["shard"], row["position"], row["clip"], row["view"]))


def loaded_rows(out: Path, generation: int | None = None) -> list[tuple[Any, ...]]:
    """Every row of a dataset as whoever trains on it gets it, in source order but for the shards."""
    names = ["position", "clip", "view", "key", "frames"]
    dataset = TokenDataset(out, names, "packed", "all", allow_partial=True, generation=generation)
    rows = dataset.__getitems__(range(len(dataset)))
    return sorted((*(row[name] for name in names), row["packed"].numpy().tobytes()) for row in rows)


def all_failures(out: Path) -> list[dict[str, Any]]:
    """What the failure tables that count say, by shard."""
    storage = open_storage(str(out))
    manifest = read_manifest(storage)
    assert manifest is not None
    latest = manifest.table.filter(pa.array(latest_parts(manifest.table)))
    return [
        {"shard": entry["shard"]} | row
        for entry in latest.select(["shard", "failures_file"]).to_pylist()
        if entry["failures_file"] is not None
        for row in read_parquet(storage.read_bytes(entry["failures_file"])).to_pylist()
    ]


def counts(out: Path) -> dict[str, Any]:
    """What a manifest says of a dataset, apart from how many files and generations it took."""
    manifest = read_manifest(open_storage(str(out)))
    assert manifest is not None
    summary = manifest.summary.model_dump()
    names = ("rows", "tokens", "samples", "failed", "warnings", "failed_shards", "partial_shards", "complete")
    return {name: summary[name] for name in names}


def assert_same_dataset(out: Path, expected: Path) -> None:
    """Both hold the same rows, failures and counts, though perhaps in other files; and both verify."""
    assert all_rows(out) == all_rows(expected)
    assert all_failures(out) == all_failures(expected)
    assert counts(out) == counts(expected)
    for folder in (out, expected):
        names = ("position", "clip", "view", "key", "frames", "tokens")
        assert loaded_rows(folder) == sorted(tuple(row[name] for name in names) for row in all_rows(folder))
        result = verify_dataset(str(folder))
        assert (result.problems, result.finished) == ([], True)
    assert result.samples == counts(out)["samples"] and result.failed == counts(out)["failed"]


def assert_adds(out: Path, before: dict[str, str]) -> None:
    """Nothing that was there has changed."""
    assert before.items() <= dataset_files(out).items()


KINDS: dict[str, Callable[[int], list[tuple[str, bytes]]]] = {
    "small": lambda number: [(f"{number:03d}.jpg", jpeg(number, 48, 40)), (f"{number:03d}.txt", b"small")],
    "large": lambda number: [(f"{number:03d}.jpg", jpeg(number, 96, 80)), (f"{number:03d}.txt", b"large")],
    "large, caption no text": lambda number: [(f"{number:03d}.jpg", jpeg(number)), (f"{number:03d}.txt", b"\xff\xfe")],
    "small, caption no text": lambda number: [
        (f"{number:03d}.jpg", jpeg(number, 48, 40)),
        (f"{number:03d}.txt", b"\xff\xfe"),
    ],
    "video": lambda number: [(f"{number:03d}.mp4", mp4(number, 9, width=48, height=40))],
    "large video": lambda number: [(f"{number:03d}.mp4", mp4(number, 6))],
    "no media": lambda number: [(f"{number:03d}.txt", b"nothing to see")],
    "damaged": lambda number: [(f"{number:03d}.jpg", b"\xff\xd8\xff" + bytes(500))],
    "same key again": lambda number: [("000.jpg", jpeg(number, 48, 40))],
}
"""What a sample may be, by name: its members, given its number."""


def job_of(out: Path) -> Any:
    return read_job(open_storage(str(out)))
