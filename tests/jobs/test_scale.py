"""Ten thousand shards through the real driver, ledger, lease and manifest; `benchmarks/scale.py` runs a million."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import scale
from jobs.progress import read_status
from pipeline.dataset_files import read_ledger, read_manifest
from pipeline.storage import open_storage

NUM_SHARDS = 10_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scale")


@pytest.fixture(scope="module")
def interrupted(folder: Path) -> dict[str, Any]:
    """A job in a process of its own, interrupted near its end."""
    return scale.run_phase("begin", str(folder / "out"), NUM_SHARDS)


@pytest.fixture(scope="module")
def finished(folder: Path, interrupted: dict[str, Any]) -> dict[str, Any]:
    """The same job, resumed in another process."""
    status = read_status(str(folder / "out"))
    assert status.state == "interrupted"
    assert status.progress.committed == len(read_ledger(open_storage(str(folder / "out")), 0).commits) < NUM_SHARDS
    return scale.run_phase("resume", str(folder / "out"), NUM_SHARDS)


def test_a_long_ledger_has_few_segments(folder: Path, interrupted: dict[str, Any]) -> None:
    # A segment for some 256 records, and a few for what came in between; none of them is merged yet.
    assert NUM_SHARDS // 512 <= interrupted["most_segments"] <= NUM_SHARDS // 256 + 8


def test_memory_hardly_grows_with_the_number_of_shards(folder: Path, interrupted: dict[str, Any]) -> None:
    small = scale.run_phase("begin", str(folder / "small"), NUM_SHARDS // 10)
    grown_kb = 1024 * (interrupted["rss_mb"] - small["rss_mb"])
    assert grown_kb < 2 * NUM_SHARDS, "two kilobytes for each shard are two gigabytes for a million"


def test_a_job_that_was_interrupted_gives_the_manifest_of_one_that_was_not(
    folder: Path, finished: dict[str, Any]
) -> None:
    num_failed = NUM_SHARDS // scale.FAILING
    assert (finished["committed"], finished["failed"]) == (NUM_SHARDS - num_failed, num_failed)
    scale.begin(str(folder / "whole"), NUM_SHARDS)
    resumed, whole = (read_manifest(open_storage(str(folder / name))) for name in ("out", "whole"))
    assert resumed is not None and whole is not None
    shards = resumed.table["shard"].to_numpy()
    expected = [shard for shard in range(NUM_SHARDS) if shard % scale.FAILING != scale.FAILING - 1]
    assert np.array_equal(shards, expected)
    # Who did it, and whether it was the first attempt, may differ; what was made may not.
    columns = [name for name in resumed.table.schema.names if name not in ("worker", "attempt")]
    assert resumed.table.select(columns).equals(whole.table.select(columns))
    assert resumed.table["first_row"].to_pylist() == list(range(0, scale.IMAGES * len(expected), scale.IMAGES))
    assert resumed.summary.failed_shards == num_failed
    loaded = scale.run_phase("load", str(folder / "out"), NUM_SHARDS)
    assert loaded["samples"] == scale.IMAGES * len(expected) and loaded["windows"] > len(expected) / 4
    assert not (folder / "out" / "lease.json").exists()
