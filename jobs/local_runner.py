"""Workers as spawned child processes of the driver, or (for debugging) as threads inside it."""

from __future__ import annotations

import contextlib
import logging
import mmap
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from multiprocessing import connection, resource_tracker
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Literal

from jobs.runner import Death
from pipeline.activities import ActivityBoard, board_bytes
from pipeline.allocator import huge_pages_in_children
from pipeline.messages import Activity, Assignment, Heartbeat, Message, WorkerBroken, WorkerSetup
from pipeline.worker import ShardWorker
from schemas.errors import BsqError

log = logging.getLogger("bsqtok.worker")

HEARTBEAT_SECONDS = 0.5
DRAIN_SECONDS = 10.0
KILL_SECONDS = 5.0
"""For the kernel to end a killed child; one that waits for a lost disk may take for ever."""
_REQUESTED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
"""How a child is asked to go: by an administrator, or by a machine that is taken away."""
Command = Assignment | Literal["drain"]


class ChildRunner:
    """One spawned process per worker, joined to the driver by a pipe.

    A child ends when its pipe does, so none outlives a driver that was killed."""

    def __init__(self, setups: list[WorkerSetup], log_path: str) -> None:
        self._setups = setups
        self._log_path = log_path
        self._handles: dict[int, _Child] = {}
        self.num_workers = len(setups)

    def start_worker(self, number: int) -> _Child:
        handle = _Child(self._setups[number], self._log_path)
        self._handles[number] = handle
        return handle

    def wait(self, timeout_seconds: float) -> None:
        pipes = [handle.pipe for handle in self._handles.values() if not handle.pipe.closed]
        connection.wait(pipes, timeout_seconds)

    def close(self) -> None:
        for handle in self._handles.values():
            handle.kill()


class _Child:
    def __init__(self, setup: WorkerSetup, log_path: str) -> None:
        self.name = setup.name
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._memory = _SharedMemory(board_bytes(setup.num_cpus + setup.decode_processes))
        self._board = ActivityBoard(self._memory.mapped)
        self._process: SpawnProcess = context.Process(
            target=_run_child, args=(setup, theirs, log_path, self._memory.path), name=setup.name, daemon=True
        )
        with _blocking_interrupts(), huge_pages_in_children():
            self._process.start()
        theirs.close()
        self._heartbeat: Heartbeat | None = None
        self._messages: list[Message] = []
        self._hung_up = False

    def assign(self, assignment: Assignment) -> None:
        self._send(assignment)

    def drain(self) -> None:
        self._send("drain")

    def take_messages(self) -> list[Message]:
        try:
            while not self._hung_up and self.pipe.poll(0):
                messages, heartbeat = self.pipe.recv()
                self._messages += messages
                self._heartbeat = heartbeat or self._heartbeat
        except (EOFError, OSError):
            self._hung_up = True
            self.pipe.close()
        taken, self._messages = self._messages, []
        return taken

    def heartbeat(self) -> Heartbeat | None:
        return self._heartbeat

    def activities(self) -> Mapping[str, Activity]:
        # From memory that outlives the child: what it did when it died, not when it last said so.
        return self._board.read()

    def death(self) -> Death | None:
        if not self._hung_up:
            return None
        self._process.join(1.0)
        self._memory.close()
        code = self._process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code)
            return Death(f"worker {self.name} was killed by {name.name}", counts=name not in _REQUESTED)
        return Death(f"worker {self.name} ended with exit code {code}")

    def kill(self) -> None:
        self._process.kill()
        self._process.join(KILL_SECONDS)
        self._hung_up = True
        self.pipe.close()
        self._memory.close()

    def _send(self, command: Command) -> None:
        # A child that is gone shows in death(); what was assigned to it is given to another.
        with contextlib.suppress(OSError, ValueError):
            self.pipe.send(command)


class _SharedMemory:
    """Memory without a name that a child on this host can open; the kernel frees it with the last who holds it."""

    def __init__(self, num_bytes: int) -> None:
        self._descriptor = os.memfd_create("bsqtok-activities")
        os.ftruncate(self._descriptor, num_bytes)
        self.mapped = mmap.mmap(self._descriptor, num_bytes)
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def close(self) -> None:
        """Let nobody open it any more; `mapped` stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@contextlib.contextmanager
def _blocking_interrupts() -> Iterator[None]:
    """Let a process that is started meanwhile never hear of Ctrl-C, not even while it imports.

    It reaches the whole process group; the driver decides what it means for its workers."""
    # The first child brings a tracker along, whose start unblocks the signal again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_child(setup: WorkerSetup, pipe: connection.Connection[Any, Any], log_path: str, board_path: str) -> None:
    """Body of a child: build the worker, then carry commands in and messages out until the pipe ends."""
    log_to(log_path, setup.name)
    try:
        with open(board_path, "r+b") as file:  # noqa: PTH123 - of a descriptor, not of a disk
            board = mmap.mmap(file.fileno(), 0)
        worker = ShardWorker(setup, board)
    except BsqError as error:
        pipe.send(([WorkerBroken(error)], None))
        return
    except Exception as error:
        log.exception("the worker did not start")
        failed = BsqError(f"it did not start ({type(error).__name__}: {error}); the traceback is in {log_path}")
        pipe.send(([WorkerBroken(failed, stops_job=False)], None))
        return
    ended = threading.Event()

    def send_messages() -> None:
        try:
            # The first says at once that the worker is up.
            pipe.send(([], worker.heartbeat()))
            while not ended.is_set():
                messages = worker.poll(HEARTBEAT_SECONDS)
                pipe.send((messages, worker.heartbeat()))
        except OSError:
            os._exit(1)

    sender = threading.Thread(target=send_messages, name="send", daemon=True)
    sender.start()
    try:
        while (command := pipe.recv()) != "drain":
            worker.assign(command)
    except (EOFError, OSError):
        # The driver is gone: nobody would record what this worker publishes.
        os._exit(1)
    worker.drain(DRAIN_SECONDS)
    ended.set()
    sender.join()
    pipe.send((worker.poll(0), worker.heartbeat()))
    pipe.close()
    os._exit(0)


def log_to(log_path: str, name: str) -> None:
    """Send log records, and whatever libraries print, to a file instead of the progress display."""
    logging.basicConfig(filename=log_path, level=logging.INFO, format=f"%(asctime)s {name} %(message)s", force=True)
    with Path(log_path).open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


class InProcessRunner:
    """Workers as threads of the driver: no isolation, but breakpoints and profilers work."""

    def __init__(self, setups: list[WorkerSetup]) -> None:
        self._setups = setups
        self._handles: list[_Local] = []
        self.num_workers = len(setups)

    def start_worker(self, number: int) -> _Local:
        handle = _Local(self._setups[number])
        self._handles.append(handle)
        return handle

    def wait(self, timeout_seconds: float) -> None:
        if self._handles:
            self._handles[0].fetch(timeout_seconds / len(self._handles))
            for handle in self._handles[1:]:
                handle.fetch(timeout_seconds / len(self._handles))

    def close(self) -> None:
        for handle in self._handles:
            handle.kill()


class _Local:
    def __init__(self, setup: WorkerSetup) -> None:
        self.name = setup.name
        self._messages: list[Message] = []
        self._worker: ShardWorker | None = None
        self._gone = False
        try:
            self._worker = ShardWorker(setup)
        except BsqError as error:
            self._messages.append(WorkerBroken(error))

    def fetch(self, timeout_seconds: float) -> None:
        if self._worker is not None and not self._messages:
            self._messages += self._worker.poll(timeout_seconds)

    def assign(self, assignment: Assignment) -> None:
        if self._worker is not None:
            self._worker.assign(assignment)

    def take_messages(self) -> list[Message]:
        self.fetch(0)
        taken, self._messages = self._messages, []
        return taken

    def heartbeat(self) -> Heartbeat | None:
        return self._worker.heartbeat() if self._worker is not None else None

    def activities(self) -> Mapping[str, Activity]:
        beat = self.heartbeat()
        return beat.activities if beat is not None else {}

    def death(self) -> Death | None:
        return Death(f"worker {self.name} was stopped") if self._gone else None

    def drain(self) -> None:
        if self._worker is not None:
            self._worker.drain(DRAIN_SECONDS)
        self._gone = True

    def kill(self) -> None:
        if self._worker is not None:
            self._worker.stop()
        self._gone = True
