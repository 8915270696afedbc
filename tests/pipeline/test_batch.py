from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch

from pipeline.batch import Batch, Batcher
from pipeline.preprocess import Box
from pipeline.queues import Stopped
from pipeline.rows import Row, ShardRows
from pipeline.sample import ClipView, UnresizedFrame
from pipeline.sidecars import Sidecars
from schemas.jobspec import Engine, Filter

PATIENCE_SECONDS = 20.0
SIZE = 8


def batcher(*, images: int = 4, clips: int = 2, slots: int = 2, stop: threading.Event | None = None) -> Batcher:
    """Batches of `images` pictures, and of `clips` clips of 4 frames."""
    shapes = [(1, images), (4, clips)]
    return Batcher(shapes=shapes, size=SIZE, num_slots=slots, pin=False, stop=stop or threading.Event())


def row(key: str, shard: ShardRows | None = None) -> Row:
    return Row(
        shard=shard or ShardRows(shard=0, attempt=1, url=""),
        key=key,
        position=0,
        source_offset=0,
        sidecars=cast(Sidecars, None),
        clip=0,
        view=0,
        num_frames=1,
        width=1,
        height=1,
        crop=(0, 0, 1, 1),
        flipped=False,
        start=None,
        frame_times=None,
    )


def view_of(pixels: torch.Tensor | UnresizedFrame) -> ClipView:
    return ClipView(0, 0, pixels, width=SIZE, height=SIZE, crop=(0, 0, SIZE, SIZE), flipped=False)


def frames(level: int, num_frames: int = 1) -> ClipView:
    """Frames of one level each: `level`, `level` + 1 and so on."""
    levels = torch.arange(level, level + num_frames, dtype=torch.uint8)
    return view_of(levels[:, None, None, None].expand(num_frames, 3, SIZE, SIZE))


def levels(batch: Batch) -> list[list[int]]:
    """The level of every frame of every row."""
    assert (batch.frames_BTCHW == batch.frames_BTCHW[:, :, :1, :1, :1]).all()
    return cast(Any, batch.frames_BTCHW[: len(batch.rows), :, 0, 0, 0].tolist())


def never() -> bool:
    return False


def always() -> bool:
    return True


def in_thread(body: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread


def test_a_batch_is_filled_across_shard_boundaries() -> None:
    batches = batcher()
    shards = [ShardRows(shard=number, attempt=1, url="") for number in range(2)]
    for number in range(4):
        batches.add(frames(number), row(f"{number}", shards[number // 3]))
    batch = batches.take(never)
    assert [item.shard.shard for item in batch.rows] == [0, 0, 0, 1]
    assert levels(batch) == [[0], [1], [2], [3]]


def test_pictures_and_clips_never_share_a_batch() -> None:
    batches = batcher(images=2, clips=1)
    batches.add(frames(10), row("picture"))
    batches.add(frames(20, 4), row("clip"))
    batches.add(frames(11), row("another"))
    first, second = batches.take(never), batches.take(never)
    assert [item.key for item in first.rows] == ["clip"]
    assert first.frames_BTCHW.shape == (1, 4, 3, SIZE, SIZE)
    assert [item.key for item in second.rows] == ["picture", "another"]
    assert second.frames_BTCHW.shape == (2, 1, 3, SIZE, SIZE)


@pytest.mark.parametrize("num_frames", [2, 3])
def test_a_short_clip_is_padded_with_its_last_frame(num_frames: int) -> None:
    batches = batcher(clips=1)
    batches.add(frames(50, 4), row("before"))
    batches.give_back(batches.take(never))
    batches.add(frames(20, num_frames), row("short"))
    last = 20 + num_frames - 1
    assert levels(batches.take(never)) == [[*range(20, last + 1), *[last] * (4 - num_frames)]]


def test_a_partial_batch_is_handed_over_only_when_no_input_can_come() -> None:
    batches = batcher()
    batches.add(frames(1), row("lone"))
    batches.add(frames(2, 3), row("clip"))
    idle = threading.Event()
    taken: list[Batch] = []
    thread = in_thread(lambda: taken.extend([batches.take(idle.is_set), batches.take(idle.is_set)]))
    time.sleep(0.25)
    assert taken == []
    idle.set()
    batches.wake()
    thread.join(PATIENCE_SECONDS)
    assert sorted(item.key for batch in taken for item in batch.rows) == ["clip", "lone"]


def test_a_row_whose_pixels_are_still_copied_holds_its_batch_back() -> None:
    batches = batcher(images=2)
    copying, go_on = threading.Event(), threading.Event()

    class SlowFrames(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.Tensor.copy_:
                copying.set()
                assert go_on.wait(PATIENCE_SECONDS)
            return super().__torch_function__(function, types, args, kwargs or {})

    slow = in_thread(lambda: batches.add(view_of(frames(1).frames_TCHW.as_subclass(SlowFrames)), row("slow")))
    assert copying.wait(PATIENCE_SECONDS)
    batches.add(frames(2), row("quick"))
    assert not batches.has_ready()
    go_on.set()
    slow.join(PATIENCE_SECONDS)
    batch = batches.take(never)
    assert [item.key for item in batch.rows] == ["slow", "quick"]
    assert levels(batch) == [[1], [2]]


@pytest.mark.parametrize("engine", ["torch", "pillow"])
@pytest.mark.parametrize("filter", ["lanczos", "bicubic", "bilinear"])
def test_a_frame_resized_in_its_place_equals_one_resized_before(filter: Filter, engine: Engine) -> None:
    pixels_HWC = np.random.default_rng(3).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    view = view_of(UnresizedFrame(pixels_HWC, Box(7, 2, 31, 31), (SIZE, SIZE), filter, engine))
    batches = batcher(images=3)
    for key in ("a", "b"):
        batches.add(view, row(key))
    batches.add(frames(0), row("c"))
    batch = batches.take(never)
    before_1CHW = view.frames_TCHW
    assert before_1CHW.shape == (1, 3, SIZE, SIZE) and before_1CHW.float().std() > 0
    assert torch.equal(batch.frames_BTCHW[0], before_1CHW)
    assert torch.equal(batch.frames_BTCHW[1], before_1CHW)
    assert not batch.frames_BTCHW[2].any()


def test_a_row_whose_pixels_cannot_be_written_is_spoiled_and_its_batch_goes_on() -> None:
    batches = batcher(images=2)
    spoiled, good = row("spoiled"), row("good")
    with pytest.raises(RuntimeError):
        batches.add(view_of(torch.zeros(1, 3, SIZE + 1, SIZE, dtype=torch.uint8)), spoiled)
    batches.add(frames(7), good)
    batch = batches.take(never)
    assert [item.spoiled for item in batch.rows] == [True, False]
    assert batch.frames_BTCHW[1].unique().tolist() == [7]


def test_at_most_the_given_number_of_batches_of_each_shape_is_ever_in_use() -> None:
    batches = batcher(images=1, slots=2)
    blocks = set()
    for number in range(2):
        batches.add(frames(number), row(str(number)))
    third = in_thread(lambda: batches.add(frames(9), row("third")))
    time.sleep(0.15)
    assert third.is_alive(), "the third picture waits for a free batch"
    # A clip has batches of its own, so it does not wait behind pictures.
    batches.add(frames(5, 2), row("clip"))
    for _ in range(2):
        batch = batches.take(never)
        blocks.add(batch.frames_BTCHW.data_ptr())
        batches.give_back(batch)
    third.join(PATIENCE_SECONDS)
    batch = batches.take(never)
    assert [item.key for item in batch.rows] == ["third"]
    assert batch.frames_BTCHW.data_ptr() in blocks, "memory is used again"
    assert batches.decode_wait_seconds > 0


def test_waiting_counts_while_it_lasts() -> None:
    stop = threading.Event()
    batches = batcher(stop=stop)

    def take() -> None:
        with pytest.raises(Stopped):
            batches.take(never)

    waiting = in_thread(take)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while batches.device_wait_seconds == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert batches.device_wait_seconds > 0 and waiting.is_alive(), "no batch has come yet"
    stop.set()
    batches.wake()
    waiting.join(PATIENCE_SECONDS)
    assert not waiting.is_alive()


def test_the_stop_flag_wakes_whoever_waits_to_add_or_to_take() -> None:
    stop = threading.Event()
    batches = batcher(images=1, slots=1, stop=stop)
    batches.add(frames(0), row("0"))
    other = batcher(stop=stop)
    stopped = []

    def expect_stop(body: Callable[[], object]) -> None:
        with pytest.raises(Stopped):
            body()
        stopped.append(1)

    threads = [
        in_thread(lambda: expect_stop(lambda: batches.add(frames(1), row("1")))),
        in_thread(lambda: expect_stop(lambda: other.take(never))),
        in_thread(lambda: expect_stop(lambda: other.take(always))),
    ]
    time.sleep(0.05)
    stop.set()
    batches.wake()
    other.wake()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert len(stopped) == 3


def test_many_threads_add_and_every_row_comes_out_once_with_its_own_pixels() -> None:
    batches = batcher(images=5, clips=2, slots=3)
    seen: list[tuple[str, list[int]]] = []
    done = threading.Event()

    def decode(decoder: int) -> None:
        for number in range(30):
            level = 60 * decoder + number
            num_frames = 1 + number % 4
            batches.add(frames(level, num_frames), row(f"{level}:{num_frames}"))

    def encode() -> None:
        while len(seen) < 120:
            batch = batches.take(done.is_set)
            seen.extend(zip([item.key for item in batch.rows], levels(batch), strict=True))
            batches.give_back(batch)

    encoder = in_thread(encode)
    decoders = [in_thread(lambda number=number: decode(number)) for number in range(4)]  # type: ignore[misc]
    for thread in decoders:
        thread.join(PATIENCE_SECONDS)
    done.set()
    batches.wake()
    encoder.join(PATIENCE_SECONDS)
    assert len(seen) == len({key for key, _ in seen}) == 120
    for key, found in seen:
        level, num_frames = map(int, key.split(":"))
        expected = list(range(level, level + num_frames))
        padded = expected if num_frames == 1 else expected + expected[-1:] * (4 - num_frames)
        assert found == padded
