"""Jobs on several nodes, raylets of their own on this machine: where actors go, nodes that join, nodes that die."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.dataset_files import read_ledger
from pipeline.storage import open_storage
from tests.jobs.ray_cluster import ray_nodes, raylet
from tests.running_jobs import STUB, RunningJob, StartJob, descendants, wait_until
from tests.tiny_corpus import BSQ, REPOSITORY, RunBsq, bsq_environment, dataset_files


@pytest.fixture(scope="module")
def local_files(small_shards: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the same job leaves without Ray."""
    out = tmp_path_factory.mktemp("without-ray") / "out"
    arguments = ["tokenize", *map(str, small_shards), "--out", str(out), *STUB, "--in-process"]
    subprocess.run([*BSQ, *arguments], check=True, capture_output=True, env=bsq_environment())
    return dataset_files(out)


@pytest.fixture
def markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where actors stand still before a token file, whatever node they are on: they inherit from its raylet."""
    folder = tmp_path / "markers"
    folder.mkdir()
    monkeypatch.setenv("BSQTOK_HOLD_AT", f"before_tokens:{folder}")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return folder


@pytest.fixture
def cluster(markers: Path) -> Iterator[Any]:
    """A head that has no CPU for workers."""
    with ray_nodes() as cluster:
        yield cluster


@pytest.mark.long
def test_a_node_that_joins_gets_work_and_one_that_dies_costs_no_attempt(
    cluster: Any, markers: Path, small_shards: list[Path], local_files: dict[str, str], tmp_path: Path, start: StartJob
) -> None:
    out = tmp_path / "out"
    first = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    job: RunningJob = start(
        "tokenize", *small_shards, "--out", out, *STUB, "--ray-address", cluster.address, "--device", "cpu"
    )
    job.markers = markers
    (victim,) = job.wait_until_standing()
    cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    other = next(pid for pid in job.wait_until_standing(2) if pid != victim)
    assert dataset_files(out) == {}
    cluster.remove_node(first, allow_graceful=False)
    wait_until(lambda: "is gone" in job.said[1], "the driver hears of the dead node", job)
    job.let_go(victim)
    assert job.standing() == {other}
    assert job.end() == 0, job.said
    assert dataset_files(out) == local_files
    ledger = read_ledger(open_storage(str(out)), 0)
    lost = [attempt for attempts in ledger.failed_attempts.values() for attempt in attempts]
    assert len(lost) == 2 and not any(attempt.counts for attempt in lost), lost
    assert all("node has died" in attempt.message for attempt in lost)
    assert {commit.worker for commit in ledger.commits.values()} == {"cpu1"}
    assert all(ledger.commits[attempt.shard, 0].attempt == 2 for attempt in lost)


@pytest.mark.longest
def test_actors_have_a_gpu_each_and_more_than_there_are_is_refused_in_one_line(
    cluster: Any, markers: Path, small_shards: list[Path], tmp_path: Path, bsq: RunBsq, start: StartJob
) -> None:
    out = tmp_path / "out"
    # Ray takes our word for the GPUs, and the stub needs none.  By their CPUs alone both actors would fit one node.
    nodes = [cluster.add_node(num_cpus=2, num_gpus=1, object_store_memory=80 << 20) for _ in range(2)]
    command = ["tokenize", *small_shards, "--out", out, *STUB, "--ray-address", cluster.address]
    for options, said in {
        ("--workers", 3): "3 workers were asked for, but there are 2 GPUs. Ask for 2 or fewer.",
        ("--cpus-per-worker", 3): "2 workers of 1 GPU and 3 CPU each were asked for, but there is room for 0",
    }.items():
        refused = bsq(*command, *options)
        assert refused.returncode == 2, refused.stderr
        (line,) = refused.stderr.strip().splitlines()
        assert said in line
        assert not out.exists(), "nothing was written"
    job: RunningJob = start(*command, "--cpus-per-worker", 1)
    job.markers = markers
    actors = set(job.wait_until_standing(2))
    assert [len(actors & descendants(raylet(node))) for node in nodes] == [1, 1]
    assert job.end() == 0, job.said
    commits = read_ledger(open_storage(str(out)), 0).commits.values()
    assert len(commits) == len(small_shards) and {commit.worker for commit in commits} == {"gpu0", "gpu1"}
