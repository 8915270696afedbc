"""Workers as Ray actors: one per GPU, or a share of the CPUs where there is none.

Ray places and starts processes; nothing of the protocol relies on it.  Actors are not restarted by Ray: the driver
does that, because it knows what was in flight."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jobs.local_runner import DRAIN_SECONDS, HEARTBEAT_SECONDS, log_to
from jobs.placement import Node, count_workers, host_cpus
from jobs.runner import Death
from pipeline.allocator import huge_pages_in_children
from pipeline.messages import Activity, Assignment, Heartbeat, Message, WorkerBroken, WorkerSetup
from pipeline.worker import ShardWorker
from schemas.errors import BsqError, SpecError

# Set before Ray is imported: it reads them at import.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

KNOCK_SECONDS = 10.0
"""How long a cluster may take to accept a connection."""
NODES_SECONDS = 5.0
"""How often the cluster is asked which nodes it has."""
UNAVAILABLE_SECONDS = 1.0
"""Between calls to an actor that cannot be reached for the moment."""
_CALLS = {"commands": 1, "polls": 1}
"""Calls that run side by side: a poll answers while a shard is assigned or the worker drains, and commands keep their
order."""
_INNOCENT_DEATHS = ("its node has died", "killed by `ray.kill`")
"""How Ray says that an actor's end was not its own doing."""


class WorkerActor:
    """A ShardWorker inside an actor."""

    def __init__(self, setup: WorkerSetup, log_path: str) -> None:
        # On another node the folder may not exist; Ray's own log of the actor has it all then.
        with contextlib.suppress(OSError):
            log_to(log_path, setup.name)
        self._broken: list[Message] = []
        self._worker: ShardWorker | None = None
        try:
            self._worker = ShardWorker(setup)
        except BsqError as error:
            self._broken.append(WorkerBroken(error))

    @ray.method(concurrency_group="commands")
    def assign(self, assignment: Assignment) -> None:
        if self._worker is not None:
            self._worker.assign(assignment)

    @ray.method(concurrency_group="polls")
    def poll(self, timeout_seconds: float) -> tuple[list[Message], Heartbeat | None]:
        if self._worker is None:
            broken, self._broken = self._broken, []
            return broken, None
        return self._worker.poll(timeout_seconds), self._worker.heartbeat()

    @ray.method(concurrency_group="commands")
    def drain(self) -> list[Message]:
        if self._worker is None:
            return []
        self._worker.drain(DRAIN_SECONDS)
        return self._worker.poll(0)


class RayRunner:
    """Starts actors on a cluster of its own on this host, or on the one at `address`."""

    def __init__(
        self, setup: WorkerSetup, log_path: str, *, address: str | None, workers: int, num_gpus: int, num_cpus: int
    ) -> None:
        """`setup` is that of every worker but for its name; `workers` is how many were asked for, 0 for as many as the
        nodes have room for.  Raises SpecError in one line when the cluster cannot be reached."""
        self._setup = setup
        self._log_path = log_path
        self._asked = workers
        self._num_gpus, self._num_cpus = num_gpus, num_cpus
        self._handles: dict[int, _Actor] = {}
        self._num_workers, self._counted = 0, float("-inf")
        connect_ray(address)
        # The stubs of `ray.remote` do not know concurrency groups.
        remote: Any = ray.remote
        self._actor_class: Any = remote(
            num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=0, max_task_retries=0, concurrency_groups=_CALLS
        )(WorkerActor)

    @property
    def num_workers(self) -> int:
        """How many the nodes that are up have room for, of those asked for."""
        if time.monotonic() - self._counted > NODES_SECONDS:
            nodes = [Node(*resources) for resources in cluster_nodes()]
            self._num_workers = count_workers(nodes, workers=self._asked, cpus=self._num_cpus, gpus=self._num_gpus)
            self._counted = time.monotonic()
        return self._num_workers

    def start_worker(self, number: int) -> _Actor:
        setup = replace(self._setup, name=f"{self._setup.name}{number}")
        handle = _Actor(setup.name, self._actor_class.remote(setup, self._log_path))
        self._handles[number] = handle
        return handle

    def wait(self, timeout_seconds: float) -> None:
        polls = [handle.polling for handle in self._handles.values() if handle.polling is not None]
        if polls:
            ray.wait(polls, num_returns=1, timeout=timeout_seconds)
        else:
            time.sleep(timeout_seconds)
        if any(handle.death() is not None for handle in self._handles.values()):
            # With the worker its node may be gone.
            self._counted = float("-inf")

    def close(self) -> None:
        for handle in self._handles.values():
            handle.kill()
        ray.shutdown()


class _Actor:
    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self._actor = actor
        self._heartbeat: Heartbeat | None = None
        self._messages: list[Message] = []
        self._death: Death | None = None
        self._draining: Any = None
        self._poll_again = float("inf")
        # The first poll waits for nothing: its answer says that the worker is up.
        self.polling: Any = actor.poll.remote(0)

    def assign(self, assignment: Assignment) -> None:
        if self._death is None:
            self._actor.assign.remote(assignment)

    def take_messages(self) -> list[Message]:
        if self.polling is None and self._death is None and time.monotonic() > self._poll_again:
            self.polling = self._actor.poll.remote(0)
        while self.polling is not None and ray.wait([self.polling], timeout=0)[0]:
            try:
                messages, heartbeat = ray.get(self.polling)
            except ActorUnavailableError:
                # It may be dead or only out of reach: Ray knows in a while, and the driver's watchdog waits no longer.
                self.polling, self._poll_again = None, time.monotonic() + UNAVAILABLE_SECONDS
                break
            except RayActorError as error:
                self._die(_describe_death(self.name, error))
                break
            except RayError as error:
                self._die(Death(f"worker {self.name} failed ({_first_line(error)})"))
                break
            self._messages += messages
            self._heartbeat = heartbeat or self._heartbeat
            self.polling = self._actor.poll.remote(HEARTBEAT_SECONDS)
        if self._draining is not None and ray.wait([self._draining], timeout=0)[0]:
            with contextlib.suppress(RayError):
                self._messages += ray.get(self._draining)
            self._draining = None
            self._die(Death(f"worker {self.name} was stopped"))
        taken, self._messages = self._messages, []
        return taken

    def heartbeat(self) -> Heartbeat | None:
        return self._heartbeat

    def activities(self) -> Mapping[str, Activity]:
        return self._heartbeat.activities if self._heartbeat is not None else {}

    def death(self) -> Death | None:
        return self._death

    def drain(self) -> None:
        if self._death is None and self._draining is None:
            self._draining = self._actor.drain.remote()

    def kill(self) -> None:
        with contextlib.suppress(RayError):
            ray.kill(self._actor, no_restart=True)
        self._die(Death(f"worker {self.name} was killed"))

    def _die(self, death: Death) -> None:
        self._death = self._death or death
        self.polling = None


def _describe_death(name: str, error: RayActorError) -> Death:
    """What Ray says of the end of an actor, in a line, and whether its work may be to blame."""
    lines = [line.strip() for line in str(error).splitlines()]
    innocent = error.preempted or any(phrase in str(error) for phrase in _INNOCENT_DEATHS)
    # The first lines name the actor; the cause is told after them.
    cause = next((line for line in lines if line.startswith(("The actor died because", "The actor is dead"))), "")
    why = "the node was preempted" if error.preempted else (cause or lines[0] if lines else type(error).__name__)
    return Death(f"worker {name} is gone ({why[:200].rstrip('.')})", counts=not innocent)


def cluster_nodes() -> list[tuple[int, int]]:
    """CPUs and GPUs of every node that is up."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    return [(int(have.get("CPU", 0)), int(have.get("GPU", 0))) for have in resources]


def connect_ray(address: str | None) -> None:
    """Start Ray on this host, or join the cluster at `address`, unless that has been done.

    Raises SpecError when it cannot be reached."""
    if ray.is_initialized():
        return
    # An address in the environment would join a cluster that the user did not ask for.
    if address is None:
        os.environ.pop("RAY_ADDRESS", None)
    try:
        _knock(address or "")
        with huge_pages_in_children():
            ray.init(
                address=address or "local",
                include_dashboard=False if address is None else None,
                num_cpus=host_cpus() if address is None else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=True,
            )
    except (OSError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at {address}" if address else "Ray on this host"
        raise SpecError(
            f"{where} cannot be reached: {_first_line(error)}. Check --ray-address, or use --no-ray."
        ) from error


def _knock(address: str) -> None:
    """Raise OSError when nobody answers at `address`: Ray itself would try for minutes, and print what it thinks."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_SECONDS).close()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
