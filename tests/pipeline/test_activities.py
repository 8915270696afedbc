"""What threads do is read back as it was written, also by another process after the writer is dead."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.activities import SLOT_BYTES, ActivityBoard, board_bytes
from pipeline.messages import Activity
from tests.tiny_corpus import bsq_environment


def board(num_threads: int = 4) -> ActivityBoard:
    return ActivityBoard(bytearray(board_bytes(num_threads)))


@settings(deadline=None)
@given(
    key=st.text(st.characters(blacklist_categories=["Cs"]), max_size=200),
    shard=st.integers(0, 10**9),
    stage=st.sampled_from(["read", "decode", "encode"]),
)
def test_what_a_thread_says_is_read_back(key: str, shard: int, stage: str) -> None:
    memory = board()
    memory.begin("decode-0", stage, shard, key)
    (activity,) = memory.read().values()
    assert (activity.stage, activity.shard, activity.key) == (stage, shard, key)


def test_each_thread_has_its_own_place_and_one_that_waits_is_left_out() -> None:
    memory = board()
    for number in range(3):
        memory.begin(f"decode-{number}", "decode", number, f"key {number}")
    memory.end("decode-1")
    memory.begin("decode-2", "batch", 7)
    found = {name: (item.stage, item.shard, item.key) for name, item in memory.read().items()}
    assert found == {"decode-0": ("decode", 0, "key 0"), "decode-2": ("batch", 7, "")}


def test_the_clock_of_an_activity_begins_anew_with_each() -> None:
    memory = board()
    memory.begin("decode-0", "decode", 1, "first")
    time.sleep(0.05)
    (activity,) = memory.read().values()
    assert activity.seconds >= 0.05
    memory.begin("decode-0", "decode", 1, "second")
    (activity,) = memory.read().values()
    assert activity.seconds < 0.05


def test_a_key_that_is_too_long_is_cut_and_more_threads_than_places_do_no_harm() -> None:
    memory = board(num_threads=1)
    for number in range(100):
        memory.begin(f"decode-{number}", "decode", number, "é" * 3 * SLOT_BYTES)
    activities = memory.read()
    assert len(activities) == board_bytes(1) // SLOT_BYTES
    assert all(item.key.startswith("ééé") and item.key.isprintable() for item in activities.values())


def test_memory_that_is_no_board_is_read_as_nothing_or_as_something_but_without_harm() -> None:
    noise = bytearray(b"\x20\x00" + bytes(8) + b"one\0two\0three\0four" + bytes(board_bytes(1)))
    assert ActivityBoard(noise).read() == {}


def test_it_outlives_the_process_that_wrote_it() -> None:
    descriptor = os.memfd_create("board")
    os.ftruncate(descriptor, board_bytes(2))
    memory = ActivityBoard(mmap.mmap(descriptor, board_bytes(2)))
    code = (
        "import mmap, os; from pipeline.activities import ActivityBoard\n"
        f"ActivityBoard(mmap.mmap({descriptor}, 0)).begin('decode-0', 'decode', 5, 'poison')\n"
        "os.abort()"
    )
    died = subprocess.run(
        [sys.executable, "-c", code],
        pass_fds=[descriptor],
        env=bsq_environment(),
        check=False,
        stderr=subprocess.DEVNULL,
    )
    assert died.returncode == -6
    activity = memory.read()["decode-0"]
    assert activity == Activity("decode", 5, "poison", activity.seconds)
