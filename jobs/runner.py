"""What the driver asks of whoever runs workers.  Three supervisors meet it: Ray actors, spawned child processes, and
the driver's own process; all run the same ShardWorker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from pipeline.messages import Activity, Assignment, Heartbeat, Message


@dataclass(frozen=True, slots=True)
class Death:
    """How a worker ended."""

    reason: str
    """In words for people."""
    counts: bool = True
    """Whether what it worked on may be to blame; not for a lost node, a preemption, or a kill that was asked for."""


class WorkerHandle(Protocol):
    """One worker as the driver sees it.  No call blocks, whatever the worker is stuck in."""

    name: str

    def assign(self, assignment: Assignment) -> None:
        """Hand over a shard."""

    def take_messages(self) -> list[Message]:
        """What has arrived since the last call."""

    def heartbeat(self) -> Heartbeat | None:
        """The last one that arrived; None before the worker is up."""

    def activities(self) -> Mapping[str, Activity]:
        """What each of its threads does, or did when it was last heard of."""

    def death(self) -> Death | None:
        """Why the worker is gone; None while it lives."""

    def drain(self) -> None:
        """Ask it to read nothing more, finish what is read, and end."""

    def kill(self) -> None:
        """End it at once."""


class Runner(Protocol):
    """Starts workers."""

    @property
    def num_workers(self) -> int:
        """How many there can be now; changes as nodes come and go."""

    def start_worker(self, number: int) -> WorkerHandle:
        """Start worker `number`, counted from 0, also in place of one that died."""

    def wait(self, timeout_seconds: float) -> None:
        """Return when a worker has news, or after the timeout."""

    def close(self) -> None:
        """End every worker and whatever else was started."""
