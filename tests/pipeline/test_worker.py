"""One worker driven as a supervisor drives it: assign, poll, heartbeat, stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jobs.begin import resolve
from pipeline import worker as worker_module
from pipeline.decode import Decoder
from pipeline.encode import Encoded, StubEncoder
from pipeline.messages import Activity
from pipeline.sample import ClipView, Member
from pipeline.sidecars import Sidecars, read_sidecars
from pipeline.worker import Assignment, Message, ShardCommitted, ShardFailed, ShardWorker, WorkerBroken, WorkerSetup
from schemas.jobspec import LimitsSpec, parse_spec
from schemas.ledger import Commit
from tests.tiny_corpus import dataset_files, jpeg, mp4, photo_members, write_tar

PATIENCE_SECONDS = 30.0
Start = Callable[..., ShardWorker]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a worker with the stub encoder that writes to tmp_path / "out"; all end with the test."""
    workers: list[ShardWorker] = []
    threads = torch.get_num_threads()

    def start_worker(*, batch: int = 8, num_cpus: int = 2, decode_bytes: int = 1 << 20, **spec: Any) -> ShardWorker:
        values: dict[str, Any] = {"shards": ["/a.tar"], "out": str(tmp_path / "out"), "tokenizer": "stub"}
        values |= {"preprocess": {"size": 32}, "clips": {"clip_frames": 4, "fps": 8}} | spec
        job = resolve(parse_spec(values, source="test"), gpus=False, storage_options={}).job
        setup = WorkerSetup(
            name="w0",
            out=values["out"],
            job=job,
            num_cpus=num_cpus,
            batch=batch,
            decode_bytes=decode_bytes,
            device="cpu",
        )
        workers.append(ShardWorker(setup))
        return workers[-1]

    yield start_worker
    for worker in workers:
        worker.stop()
        assert not any(thread.is_alive() for thread in worker._threads)
    torch.set_num_threads(threads)


def listen(worker: ShardWorker, count: int) -> list[Message]:
    """The next `count` messages."""
    messages: list[Message] = []
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(messages) < count and time.monotonic() < deadline:
        messages += worker.poll(0.2)
    assert len(messages) == count, (messages, worker.heartbeat())
    return messages


def commits(worker: ShardWorker, count: int) -> dict[int, Commit]:
    messages = listen(worker, count)
    assert all(isinstance(message, ShardCommitted) for message in messages), messages
    return {message.commit.shard: message.commit for message in messages if isinstance(message, ShardCommitted)}


def rows(tmp_path: Path, commit: Commit) -> list[dict[str, Any]]:
    return list(pq.read_table(tmp_path / "out" / commit.file).to_pylist())


def failures(tmp_path: Path, commit: Commit) -> list[dict[str, Any]]:
    return list(pq.read_table(tmp_path / "out" / commit.failures.file).to_pylist()) if commit.failures else []


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Decoding of every key that begins with "stuck" waits for this event."""
    go_on = threading.Event()
    decode = Decoder.views

    def views(self: Decoder, key: str, media: Member) -> Iterator[ClipView]:
        if key.startswith("stuck"):
            assert go_on.wait(PATIENCE_SECONDS)
        return decode(self, key, media)

    monkeypatch.setattr(Decoder, "views", views)
    yield go_on
    go_on.set()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---- nothing waits for ever


def test_a_shard_smaller_than_a_batch_is_finished_without_another_behind_it(tmp_path: Path, start: Start) -> None:
    members = [("a.jpg", jpeg(1)), ("b.mp4", mp4(1, 3)), ("c.mp4", mp4(2, 9)), ("d.jpg", jpeg(2))]
    worker = start(batch=1000)
    worker.assign(Assignment(0, 1, str(write_tar(tmp_path / "a.tar", members))))
    commit = commits(worker, 1)[0]
    found = [(row["key"], row["clip"], row["frames"]) for row in rows(tmp_path, commit)]
    assert found == [("a", 0, 1), ("b", 0, 3), ("c", 0, 4), ("c", 1, 4), ("c", 2, 1), ("d", 0, 1)]


def test_shards_share_batches_and_come_out_as_if_each_were_alone(tmp_path: Path, start: Start) -> None:
    shards = [write_tar(tmp_path / f"{n}.tar", [*photo_members(10 * n, 3), ("v.mp4", mp4(n, 5))]) for n in range(4)]
    batches: list[int] = []
    encoder = StubEncoder.submit

    def submit(self: StubEncoder, frames_BTCHW: torch.Tensor, num_rows: int) -> Any:
        batches.append(num_rows)
        return encoder(self, frames_BTCHW, num_rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StubEncoder, "submit", submit)
        together = start(batch=8)
        for number, shard in enumerate(shards):
            together.assign(Assignment(number, 1, str(shard)))
        commits(together, 4)
        files = dataset_files(tmp_path / "out")
    assert max(batches) > 3, "pictures of several shards were encoded together"
    for number, shard in enumerate(shards):
        alone = start(batch=1)
        alone.assign(Assignment(number, 1, str(shard)))
        commits(alone, 1)
    assert dataset_files(tmp_path / "out") == files, "each alone gives the same bytes"


def test_a_short_clip_has_the_tokens_of_its_own_frames_only(tmp_path: Path, start: Start) -> None:
    worker = start()
    worker.assign(Assignment(0, 1, str(write_tar(tmp_path / "a.tar", [("v.mp4", mp4(5, 6))]))))
    first, short = rows(tmp_path, commits(worker, 1)[0])
    assert (first["frames"], short["frames"]) == (4, 2)
    assert len(first["tokens"]) == 2 * len(short["tokens"])
    assert short["frame_times"] == pytest.approx([0.0, 0.125])
    assert short["start"] == pytest.approx(0.5)


def test_members_waiting_to_be_decoded_stay_within_their_bytes(
    tmp_path: Path, start: Start, stuck: threading.Event
) -> None:
    bound = 64 << 10
    members = [(f"stuck-{number:03d}.jpg", jpeg(number) + bytes(20 << 10)) for number in range(20)]
    worker = start(decode_bytes=bound)
    worker.assign(Assignment(0, 1, str(write_tar(tmp_path / "a.tar", members))))
    wait_until(lambda: worker.heartbeat().waiting_bytes > bound // 2)
    time.sleep(0.1)
    assert worker.heartbeat().waiting_bytes <= bound
    stuck.set()
    assert commits(worker, 1)[0].rows == 20


def test_stop_ends_every_thread_while_all_stages_are_full(tmp_path: Path, start: Start, stuck: threading.Event) -> None:
    members = [(f"stuck-{number:03d}.jpg", jpeg(number)) for number in range(6)]
    worker = start(decode_bytes=1)
    for number in range(3):
        worker.assign(Assignment(number, 1, str(write_tar(tmp_path / f"{number}.tar", members))))
    wait_until(lambda: len(worker.heartbeat().activities) >= 3)
    threading.Timer(0.2, stuck.set).start()
    began = time.monotonic()
    worker.stop()
    assert time.monotonic() - began < 5
    assert not any(thread.is_alive() for thread in worker._threads)
    assert not (tmp_path / "out" / "tokens").exists()


# ---- heartbeat


def test_the_heartbeat_answers_and_names_stage_shard_and_key_while_a_decoder_is_stuck(
    tmp_path: Path, start: Start, stuck: threading.Event
) -> None:
    worker = start()
    assert not worker.heartbeat().busy
    members = [("a.jpg", jpeg(1)), ("stuck.jpg", jpeg(2)), ("z.jpg", jpeg(3))]
    worker.assign(Assignment(7, 1, str(write_tar(tmp_path / "a.tar", members))))
    wait_until(lambda: worker.heartbeat().samples == 2)
    time.sleep(0.1)
    began = time.monotonic()
    before = worker.heartbeat()
    assert time.monotonic() - began < 0.5
    assert before.busy
    decoding = [activity for activity in before.activities.values() if activity.stage == "decode"]
    assert [(activity.shard, activity.key) for activity in decoding] == [(7, "stuck")]
    time.sleep(0.3)
    assert worker.heartbeat().progress == before.progress, "who is stuck makes no progress"
    stuck.set()
    commits(worker, 1)
    after = worker.heartbeat()
    assert after.progress > before.progress
    assert (after.samples, after.rows, after.busy) == (3, 3, False)


def test_the_key_whose_sidecars_are_being_read_is_named(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Activity] = []

    def read(members: dict[str, Member], carry: tuple[str, ...], limits: LimitsSpec) -> Sidecars:
        told.append(worker.heartbeat().activities[threading.current_thread().name])
        return read_sidecars(members, carry, limits)

    monkeypatch.setattr(worker_module, "read_sidecars", read)
    worker = start(num_cpus=1)
    worker.assign(Assignment(7, 1, str(write_tar(tmp_path / "a.tar", photo_members(0, 2)))))
    commits(worker, 1)
    assert [(item.stage, item.shard, item.key) for item in told] == [
        ("sidecars", 7, "000000"),
        ("sidecars", 7, "000001"),
    ]


# ---- errors


def test_a_decoder_that_raises_what_nobody_expects_costs_one_sample(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Decoder.views

    def views(self: Decoder, key: str, media: Member) -> Iterator[ClipView]:
        if key == "000001":
            raise ZeroDivisionError("in a codec")
        return decode(self, key, media)

    monkeypatch.setattr(Decoder, "views", views)
    worker = start()
    worker.assign(Assignment(0, 1, str(write_tar(tmp_path / "a.tar", photo_members(0, 3)))))
    commit = commits(worker, 1)[0]
    assert [row["key"] for row in rows(tmp_path, commit)] == ["000000", "000002"]
    (failure,) = failures(tmp_path, commit)
    assert (failure["key"], failure["stage"], failure["error"]) == ("000001", "decode", "MediaCorrupt")
    assert "ZeroDivisionError" in failure["message"]


@pytest.mark.parametrize(
    ("target", "name", "thread"),
    [
        (StubEncoder, "submit", "encode-0"),
        (worker_module, "group_samples", "read"),
        (worker_module, "publish_shard", "write"),
    ],
)
def test_an_unexpected_error_anywhere_else_is_told_and_breaks_the_worker(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch, target: Any, name: str, thread: str
) -> None:
    def fail(*arguments: object, **settings: object) -> None:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(target, name, fail)
    worker = start()
    worker.assign(Assignment(0, 1, str(write_tar(tmp_path / "a.tar", photo_members(0, 3)))))
    (message,) = listen(worker, 1)
    assert isinstance(message, WorkerBroken)
    assert not message.stops_job, "another worker may do better"
    assert thread in str(message.error) and "ZeroDivisionError" in str(message.error)


def test_an_output_that_refuses_stops_the_job(tmp_path: Path, start: Start) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokens").write_text("a file in the way")
    worker = start()
    worker.assign(Assignment(0, 1, str(write_tar(tmp_path / "a.tar", photo_members(0, 3)))))
    (message,) = listen(worker, 1)
    assert isinstance(message, WorkerBroken) and message.stops_job
    assert type(message.error).__name__ == "OutputNotWritable"


@pytest.mark.parametrize(
    ("content", "error", "retryable"),
    [(None, "ShardNotFound", False), (b"<html></html>" * 100, "NotATar", False)],
)
def test_a_shard_that_fails_is_told_and_the_next_goes_on(
    tmp_path: Path, start: Start, content: bytes | None, error: str, retryable: bool
) -> None:
    bad = tmp_path / "bad.tar"
    if content is not None:
        bad.write_bytes(content)
    worker = start()
    worker.assign(Assignment(0, 2, str(bad)))
    worker.assign(Assignment(1, 1, str(write_tar(tmp_path / "good.tar", photo_members(0, 2)))))
    first, second = listen(worker, 2)
    assert isinstance(first, ShardFailed)
    assert (first.shard, first.attempt, first.error, first.retryable) == (0, 2, error, retryable)
    assert str(bad) in first.message
    assert isinstance(second, ShardCommitted) and second.commit.rows == 2


def test_nothing_is_published_of_a_shard_that_fails_in_the_middle(tmp_path: Path, start: Start) -> None:
    whole = write_tar(tmp_path / "whole.tar", photo_members(0, 12)).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) * 3 // 4])
    worker = start(batch=4, damaged_shards="fail")
    worker.assign(Assignment(0, 1, str(tmp_path / "cut.tar")))
    worker.assign(Assignment(1, 1, str(tmp_path / "whole.tar")))
    first, second = listen(worker, 2)
    assert isinstance(first, ShardFailed) and (first.error, first.retryable) == ("TarTruncated", False)
    assert isinstance(second, ShardCommitted) and second.commit.rows == 12
    assert [name for name in dataset_files(tmp_path / "out") if "0000000-" in name] == []


def test_a_clip_of_which_one_view_is_not_finite_is_dropped_with_all_its_views(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = StubEncoder.submit
    num_clips = 0

    class WithNaN:
        def __init__(self, encoded: Encoded, bad: int | None) -> None:
            finite = np.ones(len(encoded.packed), dtype=np.bool_)
            if bad is not None:
                finite[bad] = False
            self._encoded = Encoded(encoded.packed, finite)

        def wait(self) -> Encoded:
            return self._encoded

    def with_nan(self: StubEncoder, frames_BTCHW: torch.Tensor, num_rows: int) -> Any:
        nonlocal num_clips
        encoded = submit(self, frames_BTCHW, num_rows).wait()
        bad = None
        if frames_BTCHW.shape[1] > 1:
            # The second row of clips there is: a view of the first clip.
            bad = 1 - num_clips if 0 <= 1 - num_clips < num_rows else None
            num_clips += num_rows
        return WithNaN(encoded, bad)

    monkeypatch.setattr(StubEncoder, "submit", with_nan)
    worker = start(num_cpus=1, preprocess={"size": 32, "views": 2, "crop": "random"})
    members = [("a.jpg", jpeg(1)), ("v.mp4", mp4(1, 8)), ("z.jpg", jpeg(2))]
    worker.assign(Assignment(0, 1, str(write_tar(tmp_path / "a.tar", members))))
    commit = commits(worker, 1)[0]
    found = [(row["key"], row["clip"], row["view"]) for row in rows(tmp_path, commit)]
    assert found == [("a", 0, 0), ("a", 0, 1), ("v", 1, 0), ("v", 1, 1), ("z", 0, 0), ("z", 0, 1)]
    (failure,) = failures(tmp_path, commit)
    assert (failure["key"], failure["clip"], failure["error"]) == ("v", 0, "NonFiniteLatents")
    assert (commit.samples, commit.failed) == (3, 1)


# ---- adoption, draining


def test_an_orphan_is_adopted_without_decoding_and_only_when_asked(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = str(write_tar(tmp_path / "a.tar", photo_members(0, 3)))
    first = start()
    first.assign(Assignment(0, 1, shard))
    made = commits(first, 1)[0]
    decoded = []
    decode = Decoder.views

    def views(self: Decoder, key: str, media: Member) -> Iterator[ClipView]:
        decoded.append(key)
        return decode(self, key, media)

    monkeypatch.setattr(Decoder, "views", views)
    second = start()
    second.assign(Assignment(0, 2, shard, adopt=True))
    adopted = commits(second, 1)[0]
    assert (adopted.file, adopted.attempt, decoded) == (made.file, 2, [])
    assert not second.heartbeat().busy
    second.assign(Assignment(0, 2, shard))
    assert commits(second, 1)[0].file == made.file
    assert len(decoded) == 3


def test_an_orphan_of_a_source_that_has_changed_since_is_made_again(tmp_path: Path, start: Start) -> None:
    worker = start()
    worker.assign(Assignment(0, 1, str(write_tar(tmp_path / "a.tar", photo_members(0, 3)))))
    made = commits(worker, 1)[0]
    worker.assign(Assignment(0, 2, str(write_tar(tmp_path / "a.tar", photo_members(0, 9))), adopt=True))
    again = commits(worker, 1)[0]
    assert again.rows == 9 and again.file != made.file


def test_draining_publishes_what_was_read_and_forgets_the_rest(
    tmp_path: Path, start: Start, stuck: threading.Event
) -> None:
    worker = start(batch=100, decode_bytes=1)
    read = write_tar(tmp_path / "read.tar", photo_members(0, 5))
    slow = write_tar(tmp_path / "slow.tar", [(f"stuck-{number}.jpg", jpeg(number)) for number in range(9)])
    for number, shard in enumerate((read, slow, read)):
        worker.assign(Assignment(number, 1, str(shard)))
    # Both decoders hold a sample of the second shard, a third waits, and the reader with the fourth.
    wait_until(lambda: worker.heartbeat().samples == 5 and worker.heartbeat().waiting_bytes > 0)
    threading.Timer(0.3, stuck.set).start()
    began = time.monotonic()
    worker.drain(PATIENCE_SECONDS)
    assert time.monotonic() - began < PATIENCE_SECONDS / 2
    messages = worker.poll(0)
    assert [message.commit.shard for message in messages if isinstance(message, ShardCommitted)] == [0]
    assert len(messages) == 1
    assert all("0000000-" in name for name in dataset_files(tmp_path / "out"))
