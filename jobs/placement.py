"""Where workers fit: how many, on which devices, with how many CPUs each.  Asked before anything is written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import SpecError
from schemas.jobspec import JobSpec

_GPU_DEVICE_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Where none of these is, torch would find no GPU; looking spares the driver its import."""
_CGROUP_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True, slots=True)
class Node:
    """What one machine has for workers."""

    cpus: int
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """How many workers run, and what each of them gets."""

    workers: int
    cpus_per_worker: int
    gpus: int
    """GPUs in all; 0 where the encoder runs on CPUs.  Otherwise every worker has one."""


def find_placement(spec: JobSpec, *, uses_ray: bool, ray_address: str | None, num_shards: int) -> Placement:
    """Place the workers of a job on this host, or on the cluster at `ray_address`.

    Raises SpecError in one line when there can never be room for them, or the cluster cannot be reached."""
    nodes = find_nodes(spec.device, ray_address)
    run = spec.run
    return place_workers(
        nodes, workers=run.workers, cpus_per_worker=run.cpus_per_worker, num_shards=num_shards, exclusive=uses_ray
    )


def find_nodes(device: str, ray_address: str | None) -> list[Node]:
    """The machines that workers may run on; without GPUs when `device` is cpu.

    Raises SpecError when `device` is cuda and there is no GPU, or the cluster cannot be reached."""
    if ray_address is not None:
        from jobs.ray_runner import cluster_nodes, connect_ray

        connect_ray(ray_address)
        nodes = [Node(cpus, gpus if device != "cpu" else 0) for cpus, gpus in cluster_nodes()]
    else:
        nodes = [Node(host_cpus(), _host_gpus() if device != "cpu" else 0)]
    if device == "cuda" and not sum(node.gpus for node in nodes):
        raise SpecError("device is cuda, but there is no GPU here. Use device: cpu, or a cluster that has one.")
    return nodes


def place_workers(
    nodes: Sequence[Node], *, workers: int, cpus_per_worker: int, num_shards: int, exclusive: bool
) -> Placement:
    """Share out `nodes` to workers: one for each GPU, or else one for each node, where `workers` is 0; never more than
    shards.

    A worker lies on one node.  Where `cpus_per_worker` is 0 it gets as many CPUs as all can have; otherwise, when
    `exclusive`, no CPU is given out twice.  Raises SpecError when they do not fit."""
    gpus = sum(node.gpus for node in nodes)
    workers = min(workers or gpus or _nodes_with_cpus(nodes) or 1, num_shards)
    if gpus and workers > gpus:
        raise SpecError(f"{workers} workers were asked for, but there are {gpus} GPUs. Ask for {gpus} or fewer.")
    each = 1 if gpus else 0
    if not exclusive:
        share = max(node.cpus for node in nodes) // max(1, workers)
        return Placement(workers, cpus_per_worker or max(1, share), gpus)
    if not cpus_per_worker:
        largest = max((node.cpus for node in nodes if node.gpus >= each), default=0)
        fitting = (cpus for cpus in range(largest, 0, -1) if count_room(nodes, cpus=cpus, gpus=each) >= workers)
        cpus_per_worker = next(fitting, 1)
    room = count_room(nodes, cpus=cpus_per_worker, gpus=each)
    if room < workers:
        raise SpecError(
            f"{workers} workers of {each} GPU and {cpus_per_worker} CPU each were asked for, but there is room for "
            f"{room}: {_describe(nodes)}. Ask for fewer workers or --cpus-per-worker."
        )
    return Placement(workers, cpus_per_worker, gpus)


def count_room(nodes: Sequence[Node], *, cpus: int, gpus: int) -> int:
    """How many workers of so many CPUs and GPUs each the nodes hold side by side."""
    return sum(min(node.cpus // cpus, node.gpus // gpus if gpus else node.cpus) for node in nodes)


def count_workers(nodes: Sequence[Node], *, workers: int, cpus: int, gpus: int) -> int:
    """How many workers of so many CPUs and GPUs each run on `nodes`: all that were asked for, or as many as are placed
    where `workers` is 0, but none without room."""
    wanted = workers or (sum(node.gpus for node in nodes) if gpus else _nodes_with_cpus(nodes))
    return min(wanted, count_room(nodes, cpus=cpus, gpus=gpus))


def host_cpus() -> int:
    """CPUs that this process may use: those it is bound to, or fewer where its container has a smaller quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CGROUP_CPU_MAX.read_text().split()
        return max(1, min(cpus, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return cpus  # no cgroup of version 2, or "max": no quota


def _nodes_with_cpus(nodes: Sequence[Node]) -> int:
    return sum(node.cpus > 0 for node in nodes)


def _host_gpus() -> int:
    if not any(Path(path).exists() for path in _GPU_DEVICE_FILES):
        return 0
    import torch

    return torch.cuda.device_count()


def _describe(nodes: Sequence[Node]) -> str:
    most_cpus, most_gpus = max(node.cpus for node in nodes), max(node.gpus for node in nodes)
    if len(nodes) == 1:
        return f"one node with {most_cpus} CPU and {most_gpus} GPU"
    return (
        f"{len(nodes)} nodes with {sum(node.cpus for node in nodes)} CPU and {sum(node.gpus for node in nodes)} GPU "
        f"in all, at most {most_cpus} CPU and {most_gpus} GPU on one"
    )
