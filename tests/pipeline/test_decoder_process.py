"""Decoding in a child gives what decoding in a thread gives; what ends or hangs the child costs one sample."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.decode import Decoder
from pipeline.decoder_process import DecoderProcesses
from pipeline.queues import Stopped
from pipeline.sample import ClipView, Member
from schemas.errors import DecodeTimeout, SampleError, WorkerCrash
from schemas.jobspec import ClipSpec, LimitsSpec, PreprocessSpec
from tests.tiny_corpus import bsq_environment, jpeg, mp4

PREPROCESS = PreprocessSpec(size=32, crop="random", views=2, flip=0.5)
CLIPS = ClipSpec(clip_frames=4, stride=4)
PATIENCE_SECONDS = 60.0


def media(name: str, payload: bytes) -> Member:
    return Member(name=name, kind="file", size=len(payload), offset=0, payload=payload)


def decoded(views: Iterator[ClipView]) -> tuple[list[tuple[object, ...]], SampleError | None]:
    """All there is to know of the views of a sample, and what ended them."""
    found: list[tuple[object, ...]] = []
    try:
        for view in views:
            pixels = bytes(view.frames_TCHW.contiguous().numpy())
            found.append(
                (view.clip, view.view, view.num_frames, pixels, view.crop, view.flipped, view.start, view.frame_times)
            )
    except SampleError as error:
        return found, error
    return found, None


Pool = Callable[..., DecoderProcesses]


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Make a pool; its children are gone when the test ends."""
    pools = []

    def make(*, timeout: float = 120.0, most: int = 1, stop: threading.Event | None = None) -> DecoderProcesses:
        limits = LimitsSpec(decode_timeout_seconds=timeout)
        pools.append(DecoderProcesses(PREPROCESS, CLIPS, limits, most=most, stop=stop or threading.Event()))
        return pools[-1]

    yield make
    for each in pools:
        each.close()


def children() -> set[int]:
    """The decoder children of this process."""
    found = set()
    for listing in Path("/proc/self/task").glob("*/children"):
        for pid in listing.read_text().split():
            if b"decoder_process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(int(pid))
    return found


def test_a_child_gives_every_view_and_failure_that_a_thread_gives(pool: Pool) -> None:
    samples = {
        "photo": media("photo.jpg", jpeg(1)),
        "cut": media("cut.jpg", jpeg(2)[:900]),
        "video": media("video.mp4", mp4(3, 10)),
        "cut-video": media("cut-video.mp4", mp4(4, 24)[:-200]),
        "text": media("text.jpg", b"no picture"),
    }
    apart, here = pool(), Decoder(PREPROCESS, CLIPS, LimitsSpec())
    for key, member in samples.items():
        expected, expected_error = decoded(here.views(key, member))
        found, error = decoded(apart.views(key, member))
        assert found == expected
        assert (type(error), str(error)) == (type(expected_error), str(expected_error))
        if error is not None and expected_error is not None:
            assert (error.member, error.clip) == (expected_error.member, expected_error.clip)
    assert len(children()) == 1, "one child did it all"


def test_a_sample_that_crashes_its_child_twice_is_told_and_the_next_is_decoded(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BSQTOK_DECODE_FAULT", "abort:poison")
    apart = pool()
    views, error = decoded(apart.views("poison", media("poison.jpg", jpeg(1))))
    assert views == [] and isinstance(error, WorkerCrash)
    assert "SIGABRT" in str(error) and (error.member, error.clip) == ("poison.jpg", None)
    views, error = decoded(apart.views("good", media("good.jpg", jpeg(1))))
    assert len(views) == 2 and error is None


@pytest.mark.parametrize("fault", [pytest.param("hang", marks=pytest.mark.long), "freeze"])
def test_a_sample_that_hangs_is_killed_after_its_time(pool: Pool, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setenv("BSQTOK_DECODE_FAULT", f"{fault}:endless")
    apart = pool(timeout=0.5)
    views, error = decoded(apart.views("endless", media("endless.mp4", mp4(1, 6))))
    assert views == [] and isinstance(error, DecodeTimeout)
    assert (error.member, error.clip) == ("endless.mp4", 0)
    assert children() == set()
    monkeypatch.delenv("BSQTOK_DECODE_FAULT")
    assert len(decoded(apart.views("good", media("good.jpg", jpeg(1))))[0]) == 2


def test_a_child_that_is_killed_from_outside_costs_nothing(pool: Pool) -> None:
    apart, video = pool(), media("video.mp4", mp4(3, 16))
    expected, _ = decoded(Decoder(PREPROCESS, CLIPS, LimitsSpec()).views("video", video))
    views = apart.views("video", video)
    first = [next(views) for _ in range(3)]
    assert [(view.clip, view.view) for view in first] == [(0, 0), (0, 1), (1, 0)]
    (child,) = children()
    os.kill(child, signal.SIGKILL)
    rest, error = decoded(views)
    assert error is None
    assert [item[:3] for item in rest] == [item[:3] for item in expected[3:]], "nothing twice, nothing missing"
    assert rest[1:] == expected[4:], "what came after is decoded again, and the same"


@pytest.mark.long
def test_children_are_shared_by_threads_and_never_more_than_allowed(pool: Pool) -> None:
    apart = pool(most=2)
    picture = media("photo.jpg", jpeg(5))
    expected, _ = decoded(Decoder(PREPROCESS, CLIPS, LimitsSpec()).views("key", picture))
    with ThreadPoolExecutor(6) as threads:
        results = list(threads.map(lambda _: decoded(apart.views("key", picture)), range(30)))
    assert all(result == (expected, None) for result in results)
    assert len(children()) <= 2
    apart.close_idle()
    assert children() == set()


@pytest.mark.long
def test_a_worker_that_stops_waits_for_no_child(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BSQTOK_DECODE_FAULT", "hang:endless")
    stop = threading.Event()
    views = pool(stop=stop).views("endless", media("endless.jpg", jpeg(1)))
    threading.Timer(3.0, stop.set).start()
    with pytest.raises(Stopped):
        next(views)
    assert children() == set()


@pytest.mark.long
def test_a_child_that_hangs_ends_with_its_parent() -> None:
    code = """
import threading, sys
from pipeline.decoder_process import DecoderProcesses
from pipeline.sample import Member
from schemas.jobspec import ClipSpec, LimitsSpec, PreprocessSpec
apart = DecoderProcesses(PreprocessSpec(size=32), ClipSpec(clip_frames=1, stride=1), LimitsSpec(), most=1,
                         stop=threading.Event())
child = apart._take_child()
apart._idle.append(child)
print(child._process.pid, flush=True)
list(apart.views("endless", Member(name="x.jpg", kind="file", size=1, offset=0, payload=b"x")))
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env=bsq_environment({"BSQTOK_DECODE_FAULT": "freeze:endless"}),
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while Path(f"/proc/{child}/stat").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{child}/stat").exists()
