from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from jobs import lease as lease_module
from jobs.lease import HeldLease, is_dead, read_lease, take_lease
from pipeline.storage import Storage, open_storage
from schemas.errors import LeaseHeld, LeaseLost
from schemas.lease import Lease, Progress
from tests.running_jobs import wait_until


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "out"))


def written(storage: Storage) -> dict[str, Any]:
    return dict(json.loads(storage.read_bytes("lease.json")))


def grow_old(storage: Storage, seconds: float = 3600) -> None:
    path = Path(storage.url_of("lease.json"))
    os.utime(path, (time.time() - seconds, time.time() - seconds))


def of_another_host(storage: Storage) -> None:
    """Rewrite the lease as if a driver on another machine held it."""
    storage.publish("lease.json", json.dumps(written(storage) | {"host": "elsewhere", "boot_id": "other"}).encode())


def test_the_first_driver_gets_the_lease_and_says_who_it_is(storage: Storage) -> None:
    take_lease(storage)
    lease = written(storage)
    assert (lease["pid"], lease["ttl_seconds"]) == (os.getpid(), 60)
    assert lease["host"] and lease["owner"] and lease["process_started"]
    found = read_lease(storage)
    assert found is not None and found[0].owner == lease["owner"] and found[1] < 30


def test_a_second_driver_is_refused_and_told_whom_to_wait_for(storage: Storage) -> None:
    take_lease(storage)
    before = storage.read_bytes("lease.json")
    with pytest.raises(LeaseHeld, match=rf"process {os.getpid()} on .*--force"):
        take_lease(storage)
    assert storage.read_bytes("lease.json") == before
    assert storage.list("logs") == [], "the clock probe is gone"


def test_a_released_lease_is_free(storage: Storage) -> None:
    take_lease(storage).release()
    assert read_lease(storage) is None
    take_lease(storage).release()


def test_a_lease_past_its_time_to_live_is_free(storage: Storage) -> None:
    take_lease(storage)
    of_another_host(storage)
    with pytest.raises(LeaseHeld):
        take_lease(storage)
    grow_old(storage)
    take_lease(storage)
    assert written(storage)["boot_id"] != "other"


def test_a_lease_whose_process_is_gone_is_free_at_once(storage: Storage) -> None:
    code = (
        "from jobs.lease import take_lease; from pipeline.storage import open_storage; "
        f"take_lease(open_storage({storage.url!r}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(Path.cwd())})
    dead = written(storage)
    assert dead["pid"] != os.getpid()
    take_lease(storage)
    assert written(storage)["pid"] == os.getpid()


def of(lease: Lease, **changes: Any) -> Lease:
    return lease.model_copy(update=changes)


def test_only_what_is_provably_dead_counts_as_dead(storage: Storage) -> None:
    take_lease(storage)
    found = read_lease(storage)
    assert found is not None
    mine = found[0]
    assert not is_dead(mine)
    assert is_dead(of(mine, pid=2**22 + 1)), "no such process"
    assert is_dead(of(mine, process_started="1")), "its number was given to another process"
    assert not is_dead(of(mine, pid=2**22 + 1, boot_id="other")), "another machine, or before a restart"
    assert not is_dead(of(mine, pid=2**22 + 1, pid_namespace="other")), "another container"
    assert not is_dead(of(mine, pid=2**22 + 1, boot_id="")), "nothing is known of that machine"


def test_a_process_that_is_only_a_corpse_is_dead(storage: Storage) -> None:
    take_lease(storage)
    found = read_lease(storage)
    assert found is not None
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        started = lease_module._process_started(child.pid)
        # It has ended, but nobody has asked for its exit code yet.
        deadline = time.monotonic() + 20
        while lease_module._process_started(child.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert started and is_dead(of(found[0], pid=child.pid, process_started=started))


def test_force_takes_a_lease_that_is_alive_and_the_first_driver_notices(storage: Storage) -> None:
    first = take_lease(storage)
    second = take_lease(storage, force=True)
    with pytest.raises(LeaseLost, match=r"has taken the job over.*committed work is kept"):
        first.renew(Progress(committed=1))
    second.renew(Progress(committed=2))
    assert written(storage)["progress"]["committed"] == 2


def test_who_lost_the_lease_does_not_remove_that_of_the_winner(storage: Storage) -> None:
    first = take_lease(storage)
    take_lease(storage, force=True)
    first.release()
    assert read_lease(storage) is not None


def test_a_lease_that_vanished_is_lost(storage: Storage) -> None:
    lease = take_lease(storage)
    storage.delete("lease.json")
    with pytest.raises(LeaseLost, match="removed"):
        lease.renew(Progress())
    assert read_lease(storage) is None


def test_renewing_shows_the_progress_and_makes_the_lease_young(storage: Storage) -> None:
    lease = take_lease(storage)
    for committed in (1, 2, 3):
        grow_old(storage)
        lease.renew(Progress(shards=9, committed=committed))
        found = read_lease(storage)
        assert found is not None and found[0].progress.committed == committed and found[1] < 30


def test_a_lease_is_kept_young_while_something_takes_long(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "TTL_SECONDS", 0.2)
    lease = take_lease(storage)
    lease.renew(Progress(committed=7))
    with lease.kept():
        grow_old(storage)
        wait_until(lambda: time.time() - storage.modified("lease.json") < 60, "the lease is renewed")
    assert written(storage)["progress"]["committed"] == 7
    lease.renew(Progress(committed=8))


def test_a_lease_that_is_taken_while_it_is_kept_stays_with_the_winner(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "TTL_SECONDS", 0.2)
    lease = take_lease(storage)
    with lease.kept():
        winner = take_lease(storage, force=True)
        renewals = [thread for thread in threading.enumerate() if thread.name == "lease"]
        wait_until(lambda: not any(thread.is_alive() for thread in renewals), "nobody renews it any more")
    with pytest.raises(LeaseLost, match="has taken the job over"):
        lease.renew(Progress())
    winner.renew(Progress())


def test_renewal_is_due_four_times_in_a_time_to_live(storage: Storage) -> None:
    lease = take_lease(storage)
    assert not lease.is_due
    lease._renewed -= 16
    assert lease.is_due
    lease.renew(Progress())
    assert not lease.is_due


@pytest.mark.parametrize("data", [b"", b"{", b"null", b'{"owner": 1}'])
def test_a_lease_that_cannot_be_read_protects_nobody(storage: Storage, data: bytes) -> None:
    storage.publish("lease.json", data)
    assert read_lease(storage) is None
    take_lease(storage)
    assert written(storage)["pid"] == os.getpid()


def test_of_many_drivers_that_start_together_one_wins(storage: Storage) -> None:
    won: list[HeldLease] = []
    refused: list[LeaseHeld] = []
    together = threading.Barrier(8)

    def start() -> None:
        together.wait()
        try:
            won.append(take_lease(storage))
        except LeaseHeld as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 7)
    won[0].renew(Progress())


def test_of_many_drivers_that_find_a_stale_lease_one_wins(storage: Storage) -> None:
    take_lease(storage)
    of_another_host(storage)
    grow_old(storage)
    won: list[HeldLease] = []
    together = threading.Barrier(8)

    def start() -> None:
        together.wait()
        with contextlib.suppress(LeaseHeld):
            won.append(take_lease(storage))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    won[0].renew(Progress())


def test_the_lease_works_the_same_in_an_object_store(object_store: Any) -> None:
    storage = open_storage(f"{object_store.url}/out", object_store.storage_options)
    first = take_lease(storage)
    first.renew(Progress(committed=1))
    with pytest.raises(LeaseHeld):
        take_lease(storage)
    second = take_lease(storage, force=True)
    with pytest.raises(LeaseLost):
        first.renew(Progress())
    second.renew(Progress(committed=2))
    second.release()
    assert read_lease(storage) is None
