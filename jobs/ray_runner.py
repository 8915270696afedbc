"""Workers as Ray actors: one per GPU, or a share of the CPUs where there is none.

Ray places and starts processes; nothing of the protocol relies on it.  Actors are not restarted by Ray: the driver
does that, because it knows what was in flight."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from typing import Any

from jobs.local_runner import DRAIN_SECONDS, HEARTBEAT_SECONDS, log_to
from jobs.placement import host_cpus
from pipeline.messages import Assignment, Heartbeat, Message, WorkerBroken, WorkerSetup
from pipeline.worker import ShardWorker
from schemas.errors import BsqError, SpecError

# Set before Ray is imported: it reads them at import.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray.exceptions import RayActorError, RayError

KNOCK_SECONDS = 10.0
"""How long a cluster may take to accept a connection."""
ACTOR_CALLS = 4
"""Calls that an actor answers side by side: polls, assignments, and a drain among them."""


class WorkerActor:
    """A ShardWorker inside an actor; its calls run side by side so that a heartbeat answers while a shard runs."""

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

    def assign(self, assignment: Assignment) -> None:
        if self._worker is not None:
            self._worker.assign(assignment)

    def poll(self, timeout_seconds: float) -> tuple[list[Message], Heartbeat | None]:
        if self._worker is None:
            broken, self._broken = self._broken, []
            return broken, None
        return self._worker.poll(timeout_seconds), self._worker.heartbeat()

    def drain(self) -> list[Message]:
        if self._worker is None:
            return []
        self._worker.drain(DRAIN_SECONDS)
        return self._worker.poll(0)


class RayRunner:
    """Starts actors on a cluster of its own on this host, or on the one at `address`."""

    def __init__(
        self, setups: list[WorkerSetup], log_path: str, *, address: str | None, num_gpus: float, num_cpus: int
    ) -> None:
        """Raises SpecError in one line when the cluster cannot be reached."""
        self._setups = setups
        self._log_path = log_path
        self.num_workers = len(setups)
        self._handles: dict[int, _Actor] = {}
        connect_ray(address)
        self._options = {
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": ACTOR_CALLS,
        }
        self._actor_class: Any = ray.remote(WorkerActor)

    def start_worker(self, number: int) -> _Actor:
        setup = self._setups[number]
        handle = _Actor(setup.name, self._actor_class.options(**self._options).remote(setup, self._log_path))
        self._handles[number] = handle
        return handle

    def wait(self, timeout_seconds: float) -> None:
        polls = [handle.polling for handle in self._handles.values() if handle.polling is not None]
        if polls:
            ray.wait(polls, num_returns=1, timeout=timeout_seconds)

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
        self._death: str | None = None
        self._draining: Any = None
        # The first poll waits for nothing: its answer says that the worker is up.
        self.polling: Any = actor.poll.remote(0)

    def assign(self, assignment: Assignment) -> None:
        if self._death is None:
            self._actor.assign.remote(assignment)

    def take_messages(self) -> list[Message]:
        while self.polling is not None and ray.wait([self.polling], timeout=0)[0]:
            try:
                messages, heartbeat = ray.get(self.polling)
            except RayActorError as error:
                self._die(f"worker {self.name} is gone ({_first_line(error)})")
                break
            except RayError as error:
                self._die(f"worker {self.name} failed ({_first_line(error)})")
                break
            self._messages += messages
            self._heartbeat = heartbeat or self._heartbeat
            self.polling = self._actor.poll.remote(HEARTBEAT_SECONDS)
        if self._draining is not None and ray.wait([self._draining], timeout=0)[0]:
            with contextlib.suppress(RayError):
                self._messages += ray.get(self._draining)
            self._draining = None
            self._die(f"worker {self.name} was stopped")
        taken, self._messages = self._messages, []
        return taken

    def heartbeat(self) -> Heartbeat | None:
        return self._heartbeat

    def death(self) -> str | None:
        return self._death

    def drain(self) -> None:
        if self._death is None and self._draining is None:
            self._draining = self._actor.drain.remote()

    def kill(self) -> None:
        with contextlib.suppress(RayError):
            ray.kill(self._actor, no_restart=True)
        self._die(f"worker {self.name} was killed")

    def _die(self, reason: str) -> None:
        self._death = self._death or reason
        self.polling = None


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
