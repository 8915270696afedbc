"""One driver per output: the lease saves work; the ledger's numbers keep it correct."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from pipeline.storage import Storage
from schemas.errors import BsqError, LeaseHeld, LeaseLost
from schemas.lease import Lease, Progress

LEASE_NAME = "lease.json"
TTL_SECONDS = 60.0
RENEWALS_PER_TTL = 4


class HeldLease:
    """The lease of this driver, renewed with its progress."""

    def __init__(self, storage: Storage, lease: Lease, token: str) -> None:
        self._storage = storage
        self._lease = lease
        self._token = token
        self._renewed = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether it is time to renew."""
        return time.monotonic() - self._renewed > self._lease.ttl_seconds / RENEWALS_PER_TTL

    def renew(self, progress: Progress) -> None:
        """Rewrite the lease with `progress`.  Raises LeaseLost when another driver has taken it."""
        lease = self._lease.model_copy(update={"progress": progress})
        if not self._storage.write_if_token(LEASE_NAME, _to_bytes(lease), self._token):
            raise LeaseLost(
                f"{self._storage.url}: {_taken_by(self._storage)} This driver stops; committed work is kept."
            )
        self._adopt(lease)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Renew the lease from a thread, during what takes long and does not look at it: a large ledger is read, a
        manifest written.  A lease that was taken meanwhile is noticed at the next renewal."""
        ended = threading.Event()

        def keep() -> None:
            while not ended.wait(self._lease.ttl_seconds / RENEWALS_PER_TTL):
                try:
                    self.renew(self._lease.progress)
                except BsqError:
                    return  # who holds it by then is for the ledger's numbers to decide

        thread = threading.Thread(target=keep, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def release(self) -> None:
        """Remove the lease if it is still ours."""
        current = self._storage.read_with_token(LEASE_NAME)
        if current is not None and current[1] == self._token:
            self._storage.delete(LEASE_NAME)

    def _adopt(self, lease: Lease) -> None:
        current = self._storage.read_with_token(LEASE_NAME)
        if current is None or current[0] != _to_bytes(lease):
            raise LeaseLost(
                f"{self._storage.url}: {_taken_by(self._storage)} This driver stops; committed work is kept."
            )
        self._lease, self._token, self._renewed = lease, current[1], time.monotonic()


def take_lease(storage: Storage, *, force: bool = False) -> HeldLease:
    """Become the driver of this output.

    A lease is free when there is none, when it is older than its time to live, or when its process is provably dead
    on this host.  `force` takes it in any case.  Raises LeaseHeld naming the holder."""
    lease = Lease(
        owner=str(uuid.uuid4()),
        host=socket.gethostname(),
        boot_id=_boot_id(),
        pid_namespace=_pid_namespace(),
        pid=os.getpid(),
        process_started=_process_started(os.getpid()),
        ttl_seconds=TTL_SECONDS,
    )
    data = _to_bytes(lease)
    won = storage.create_only(LEASE_NAME, data)
    while not won:
        current = storage.read_with_token(LEASE_NAME)
        if current is None:
            won = storage.create_only(LEASE_NAME, data)
            continue
        held, token, modified = current
        holder = _parse(held)
        if holder is not None and not force:
            age = _age(storage, modified)
            if age < holder.ttl_seconds and not is_dead(holder):
                raise LeaseHeld(
                    f"{storage.url}: another driver is at work: process {holder.pid} on {holder.host}, last seen "
                    f"{max(0.0, age):.0f} s ago. Wait for it; if it is gone, try again in "
                    f"{holder.ttl_seconds - age:.0f} s or add --force."
                )
        won = storage.write_if_token(LEASE_NAME, data, token)
    current = storage.read_with_token(LEASE_NAME)
    if current is None or current[0] != data:
        raise LeaseHeld(f"{storage.url}: another driver took the lease at the same moment. See `bsq status`.")
    return HeldLease(storage, lease, current[1])


def read_lease(storage: Storage) -> tuple[Lease, float] | None:
    """The lease and its age in seconds; None where there is none, or none that can be read."""
    current = storage.read_with_token(LEASE_NAME)
    lease = _parse(current[0]) if current is not None else None
    if current is None or lease is None:
        return None
    # Readers may not be allowed to write a probe; status can live with two clocks.
    return lease, time.time() - current[2]


def is_dead(lease: Lease) -> bool:
    """Whether the holder's process is provably gone: same boot and process namespace, no such process."""
    if lease.boot_id != _boot_id() or lease.pid_namespace != _pid_namespace() or not lease.boot_id:
        return False
    return _process_started(lease.pid) != lease.process_started


def _taken_by(storage: Storage) -> str:
    current = storage.read_with_token(LEASE_NAME)
    holder = _parse(current[0]) if current is not None else None
    if holder is None:
        return "the lease was removed while this driver was at work."
    return f"process {holder.pid} on {holder.host} has taken the job over."


def _age(storage: Storage, modified: float) -> float:
    """Seconds since the lease was written, both times by the clock of the storage."""
    probe = f"logs/clock-{uuid.uuid4().hex}"
    storage.publish(probe, b"")
    try:
        return storage.modified(probe) - modified
    finally:
        storage.delete(probe)


def _parse(data: bytes) -> Lease | None:
    # A lease that cannot be read protects nobody; taking it over replaces it.
    with contextlib.suppress(ValidationError, BsqError):
        return Lease.model_validate_json(data)
    return None


def _to_bytes(lease: Lease) -> bytes:
    return lease.model_dump_json(indent=1).encode() + b"\n"


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _pid_namespace() -> str:
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""


def _process_started(pid: int) -> str:
    """Start of a process in clock ticks since boot; empty when there is no such process, or only its corpse."""
    with contextlib.suppress(OSError):
        # The name in parentheses may hold anything, so fields count from the last parenthesis on.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in ("Z", "X") else fields[19]
    return ""
