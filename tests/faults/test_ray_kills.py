"""Actors, drivers and whole nodes of a Ray cluster killed at named points and at random; the job is resumed and whole.

`pytest tests/faults/test_ray_kills.py --kills 30 -s` runs longer and prints a table."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.steps import WORKER_STEPS
from tests.faults.kill_matrix import SLOW, KillMatrix
from tests.jobs.ray_cluster import ray_nodes, raylet
from tests.running_jobs import RunningJob, StartJob, command_line, descendants, signal_quietly
from tests.tiny_corpus import REPOSITORY

NUM_NODES = 2


@dataclass
class RayKillMatrix(KillMatrix):
    """Kills on a cluster whose actors stand still at every step of a worker, and are let go where none is wanted."""

    victims: tuple[str, ...] = ("driver", "worker", "node")
    cluster: Any = None
    markers: Path = Path()
    """Where actors say that they stand, whatever job they belong to: they inherit it from their node."""
    wanted: str = ""
    ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.where = ("--ray-address", self.cluster.address)
        for _ in range(NUM_NODES):
            self.add_node()

    def add_node(self) -> None:
        self.cluster.add_node(num_cpus=1, num_gpus=0, object_store_memory=80 << 20)

    def let_others_go(self) -> None:
        """Body of a thread: nobody stands for long at a step that is not wanted."""
        while not self.ended.wait(0.02):
            for marker in self.markers.iterdir():
                if marker.stem != self.wanted:
                    marker.unlink(missing_ok=True)

    def begin_job(self, command: Sequence[object], step: str, faults: Sequence[str]) -> RunningJob:
        self.wanted = step
        job = super().begin_job(command, step, faults)
        if step in WORKER_STEPS:
            job.markers = self.markers
        return job

    def candidates(self, job: RunningJob, victim: str) -> set[int]:
        if victim == "driver":
            return {job.pid}
        found = {pid for node in self.cluster.worker_nodes for pid in descendants(raylet(node))}
        return {pid for pid in found if b"ray::WorkerActor" in command_line(pid)}

    def kill(self, job: RunningJob, victim: str, held: int) -> bool:
        if victim != "node":
            return super().kill(job, victim, held)
        nodes = sorted(self.cluster.worker_nodes, key=raylet)
        node = next((node for node in nodes if held in descendants(raylet(node))), self.generator.choice(nodes))
        processes = descendants(raylet(node))
        self.cluster.remove_node(node, allow_graceful=False)
        for pid in processes:
            signal_quietly(pid)
        job.let_go()
        self.add_node()
        return True


@pytest.fixture
def matrix(
    shards: list[Path],
    undisturbed: dict[str, str],
    tmp_path: Path,
    start: StartJob,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[RayKillMatrix]:
    markers = tmp_path / "markers"
    markers.mkdir()
    monkeypatch.setenv("BSQTOK_HOLD_AT", f"{'+'.join(WORKER_STEPS)}:{markers}")
    monkeypatch.setenv("BSQTOK_DECODE_FAULT", ",".join(SLOW))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(ray_nodes())
        matrix = RayKillMatrix(shards, undisturbed, tmp_path, start, cluster=cluster, markers=markers)
        thread = threading.Thread(target=matrix.let_others_go, daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(matrix.ended.set)
        yield matrix


@pytest.mark.longest
def test_kills_of_actors_drivers_and_nodes_leave_a_dataset_that_resume_completes(
    matrix: RayKillMatrix, request: pytest.FixtureRequest
) -> None:
    try:
        matrix.run(request.config.getoption("--kills"))
    finally:
        print(f"\n{matrix.table()}")
    assert matrix.num_struck >= request.config.getoption("--kills")
