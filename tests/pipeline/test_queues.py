from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.queues import ByteQueue, Stopped

PATIENCE_SECONDS = 20.0


def start(body: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 25), max_size=40))
def test_the_bound_holds_at_every_moment_except_for_a_large_item_alone(sizes: list[int]) -> None:
    bound = 10
    queue: ByteQueue[int] = ByteQueue(bound, threading.Event())
    broken: list[tuple[int, int]] = []

    def put_all() -> None:
        for number, size in enumerate(sizes):
            queue.put(number, size)
            # Nobody else puts, so what is seen here is at most what stood there after the put.
            waiting, num_bytes = len(queue), queue.num_bytes
            if num_bytes > bound and waiting > 1:
                broken.append((waiting, num_bytes))

    putter = start(put_all)
    taken = [queue.get() for _ in sizes]
    putter.join(PATIENCE_SECONDS)
    assert broken == []
    assert taken == list(range(len(sizes))), "first in, first out, nothing lost"
    assert queue.num_bytes == 0 and len(queue) == 0


def test_a_put_waits_for_room_and_a_large_item_for_an_empty_queue() -> None:
    queue: ByteQueue[str] = ByteQueue(10, threading.Event())
    queue.put("a", 6)
    queue.put("b", 4)
    putter = start(lambda: queue.put("huge", 1000))
    time.sleep(0.05)
    assert len(queue) == 2
    assert queue.get() == "a"
    time.sleep(0.05)
    assert len(queue) == 1, "not admitted beside another"
    assert queue.get() == "b"
    putter.join(PATIENCE_SECONDS)
    assert queue.num_bytes == 1000
    assert queue.get() == "huge"


def test_the_stop_flag_wakes_everyone_who_waits_to_get() -> None:
    stop = threading.Event()
    queue: ByteQueue[int] = ByteQueue(10, stop)
    stopped = []

    def get() -> None:
        with pytest.raises(Stopped):
            queue.get()
        stopped.append(1)

    threads = [start(get) for _ in range(4)]
    stop.set()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert len(stopped) == 4


def test_the_stop_flag_wakes_everyone_who_waits_to_put() -> None:
    stop = threading.Event()
    queue: ByteQueue[int] = ByteQueue(10, stop)
    queue.put(0, 10)
    stopped = []

    def put() -> None:
        with pytest.raises(Stopped):
            queue.put(1, 1)
        stopped.append(1)

    threads = [start(put) for _ in range(4)]
    stop.set()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert len(stopped) == 4
    assert len(queue) == 1


def test_what_still_waits_when_the_flag_is_set_is_not_handed_out() -> None:
    stop = threading.Event()
    queue: ByteQueue[int] = ByteQueue(10, stop)
    queue.put(0, 1)
    stop.set()
    with pytest.raises(Stopped):
        queue.get()


def test_many_putters_and_getters_lose_and_repeat_nothing() -> None:
    queue: ByteQueue[tuple[int, int]] = ByteQueue(16, threading.Event())
    taken: list[tuple[int, int]] = []

    def put(producer: int) -> None:
        for number in range(200):
            queue.put((producer, number), number % 9)

    def get() -> None:
        for _ in range(200):
            taken.append(queue.get())  # noqa: PERF401 - one at a time is the point

    threads = [start(lambda producer=producer: put(producer)) for producer in range(3)]  # type: ignore[misc]
    threads += [start(get) for _ in range(3)]
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert sorted(taken) == [(producer, number) for producer in range(3) for number in range(200)]
