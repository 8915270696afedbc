"""What the driver asks of whoever runs workers.  Three supervisors meet it: Ray actors, spawned child processes, and
the driver's own process; all run the same ShardWorker."""

from __future__ import annotations

from typing import Protocol

from pipeline.messages import Assignment, Heartbeat, Message


class WorkerHandle(Protocol):
    """One worker as the driver sees it.  No call blocks, whatever the worker is stuck in."""

    name: str

    def assign(self, assignment: Assignment) -> None:
        """Hand over a shard."""

    def take_messages(self) -> list[Message]:
        """What has arrived since the last call."""

    def heartbeat(self) -> Heartbeat | None:
        """The last one that arrived; None before the worker is up."""

    def death(self) -> str | None:
        """Why the worker is gone, in words for people; None while it lives."""

    def drain(self) -> None:
        """Ask it to read nothing more, finish what is read, and end."""

    def kill(self) -> None:
        """End it at once."""


class Runner(Protocol):
    """Starts workers."""

    num_workers: int

    def start_worker(self, number: int) -> WorkerHandle:
        """Start worker `number`, from 0 to num_workers - 1, also in place of one that died."""

    def wait(self, timeout_seconds: float) -> None:
        """Return when a worker has news, or after the timeout."""

    def close(self) -> None:
        """End every worker and whatever else was started."""
