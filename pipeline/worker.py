"""ShardWorker: joins the stages of one process on one device.  Read this file first.

    reader -> [undecoded samples] -> decoders -> [batches] -> encode lanes -> rows -> [complete shards] -> writer

Every arrow is a queue bounded in bytes or slots; every box is a thread, or several.  A worker is driven by four
calls that any supervisor can make from outside its process: assign, poll, heartbeat, stop."""

from __future__ import annotations

import gc
import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import torch

from pipeline.activities import ActivityBoard, board_bytes
from pipeline.allocator import keep_freed_memory
from pipeline.batch import Batch, Batcher
from pipeline.byte_stream import ShardStream, open_shard
from pipeline.decode import Decoder, gave_up
from pipeline.decoder_process import DecoderProcesses, DecodersUnavailable
from pipeline.encode import Encoder, PendingBatch, arithmetic_id, batch_shapes, cut_tokens, open_encoder
from pipeline.group import group_samples
from pipeline.media import media_kind_of_extension
from pipeline.messages import (
    Assignment,
    Heartbeat,
    Message,
    ShardCommitted,
    ShardFailed,
    WorkerBroken,
    WorkerSetup,
)
from pipeline.missing import find_missing
from pipeline.publish import find_published, publish_shard
from pipeline.queues import POLL_SECONDS, ByteQueue, Stopped
from pipeline.rows import Row, ShardRows, rows_to_table
from pipeline.sample import ClipView, Sample
from pipeline.sidecars import Sidecars, read_sidecars
from pipeline.storage import open_storage
from pipeline.tar import read_members
from schemas.errors import (
    ArchiveError,
    BsqError,
    NoFrames,
    NonFiniteLatents,
    SampleError,
    ShardError,
)

log = logging.getLogger("bsqtok.worker")

# Slots of each kind of batch beyond those that the encode lanes hold: one being filled, one waiting.
SPARE_SLOTS = 2
SUSPECT_PROCESSES = 4
"""Children that decode what is not trusted, at most; each holds some hundred megabytes while it is needed."""
CHUNK_SAMPLES = 32
CHUNK_BYTES = 4 << 20
"""What a decoder takes at a time: so many pictures, or about so many bytes of them."""


class ShardWorker:
    """Turns assigned shards into published token files.

    `poll` returns what happened; nothing is ever raised from a thread into the void."""

    def __init__(self, setup: WorkerSetup, board: Any = None) -> None:
        """Load the tokenizer and start the threads.  Raises SpecError or CheckpointError.

        `board` is memory for an ActivityBoard that the supervisor shares; left out, only heartbeats tell."""
        self._setup = setup
        job = setup.job
        spec = job.spec
        self._storage = open_storage(setup.out, setup.storage_options)
        folder = self._storage.url_of(job.tokenizer.folder)
        assert isinstance(spec.preprocess.size, int) and isinstance(spec.clips.clip_frames, int)
        shapes = batch_shapes(setup.batch, spec.clips.clip_frames)
        self._encoder: Encoder = open_encoder(
            job.tokenizer,
            folder,
            dtype=spec.dtype,
            device=setup.device,
            num_cpus=setup.num_cpus,
            shapes=shapes,
            storage_options=setup.storage_options,
        )
        keep_freed_memory()
        # The modules and the model stay: the collector need not look through them again and again.
        gc.freeze()
        # Parallelism comes from the threads here; torch's own would fight with them for the cores.
        torch.set_num_threads(1)
        self._decoder = Decoder(spec.preprocess, spec.clips, spec.limits)
        self._stop = threading.Event()
        self._draining = threading.Event()
        self._num_shards_reading_ended = 0
        self._inbox: ByteQueue[Assignment] = ByteQueue(1 << 30, self._stop)
        # No more than keeps the decoders busy: what waits long is out of the cache when it is decoded.
        decode_bytes = setup.decode_bytes or max(16 << 20, setup.num_cpus * (8 << 20))
        self._samples: ByteQueue[tuple[list[Sample], ShardRows]] = ByteQueue(decode_bytes, self._stop)
        # A chunk is at most a small part of what may wait, so that one more of them hardly passes the bound.
        self._chunk_bytes = min(CHUNK_BYTES, decode_bytes // 8)
        self._complete: ByteQueue[ShardRows] = ByteQueue(1 << 30, self._stop)
        self._outbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._batcher = Batcher(
            shapes=shapes,
            size=spec.preprocess.size,
            num_slots=self._encoder.num_lanes * self._encoder.depth + SPARE_SLOTS,
            pin=self._encoder.pin,
            stop=self._stop,
        )
        # pyarrow looks for pandas when it makes its first array: better now than between two shards.
        rows_to_table([], spec.carry)
        self._counts = threading.Lock()
        self._reader_waits = True
        self._num_undecoded = 0
        self._progress = self._num_rows = self._num_tokens = self._num_samples = 0
        self._num_shards_open = 0
        self._stream: ShardStream | None = None
        self._began = time.monotonic()
        self._num_decoders = max(1, setup.decode_processes or setup.num_cpus)
        self._contained = DecoderProcesses(
            spec.preprocess,
            spec.clips,
            spec.limits,
            most=setup.decode_processes or min(SUSPECT_PROCESSES, self._num_decoders),
            stop=self._stop,
        )
        self._board = ActivityBoard(bytearray(board_bytes(self._num_decoders)) if board is None else board)
        self._threads = [self._thread("read", self._read_shards), self._thread("write", self._write_shards)]
        self._threads += [self._thread(f"decode-{n}", self._decode_samples) for n in range(self._num_decoders)]
        self._threads += [self._thread(f"encode-{n}", self._encode_batches) for n in range(self._encoder.num_lanes)]
        for thread in self._threads:
            thread.start()

    def assign(self, assignment: Assignment) -> None:
        """Take on a shard, to be worked on after those assigned before."""
        with self._counts:
            self._num_shards_open += 1
        self._inbox.put(assignment, 1)

    def poll(self, timeout_seconds: float) -> list[Message]:
        """Return what has happened since the last call, waiting up to `timeout_seconds` for something."""
        messages: list[Message] = []
        try:
            messages.append(self._outbox.get(timeout=timeout_seconds) if timeout_seconds else self._outbox.get_nowait())
            while True:
                messages.append(self._outbox.get_nowait())
        except queue.Empty:
            return messages

    def heartbeat(self) -> Heartbeat:
        """Say what the worker is doing; answers at once, whatever the threads are stuck in."""
        with self._counts:
            return Heartbeat(
                # Reading a large member, or past one, is progress too.
                progress=self._progress + (self._stream.bytes_read if self._stream else 0),
                busy=self._num_shards_open > 0,
                rows=self._num_rows,
                tokens=self._num_tokens,
                samples=self._num_samples,
                seconds=time.monotonic() - self._began,
                device_wait_seconds=self._batcher.device_wait_seconds,
                num_lanes=self._encoder.num_lanes,
                decode_wait_seconds=self._batcher.decode_wait_seconds,
                num_decoders=self._num_decoders,
                waiting_bytes=self._samples.num_bytes,
                batched_bytes=self._batcher.ready_bytes,
                activities=self._board.read(),
            )

    def stop(self, timeout_seconds: float = 10.0) -> None:
        """End the threads; what is not published is forgotten."""
        self._stop.set()
        self._batcher.wake()
        deadline = time.monotonic() + timeout_seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._contained.close()

    def drain(self, timeout_seconds: float) -> None:
        """Read nothing more, finish and publish what has been read completely, then stop."""
        self._draining.set()
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline and self._num_shards_reading_ended and not self._stop.is_set():
            time.sleep(POLL_SECONDS)
        self.stop()

    # ---- reader

    def _read_shards(self) -> None:
        while True:
            self._reader_waits = True
            self._board.end("read")
            self._batcher.wake()
            assignment = self._inbox.get()
            if self._draining.is_set():
                raise Stopped
            self._reader_waits = False
            self._board.begin("read", "read", assignment.shard)
            shard = ShardRows(
                shard=assignment.shard,
                attempt=assignment.attempt,
                url=assignment.url,
                part=assignment.part,
                suspects=assignment.suspects,
                contained=assignment.contained,
            )
            try:
                if not self._adopt(assignment):
                    if assignment.earlier is not None:
                        shard.missing = find_missing(self._storage, assignment.url, assignment.earlier)
                        shard.suspects |= shard.missing.poison_keys
                    self._read_shard(shard)
            except ShardError as error:
                shard.aborted = True
                self._post_failure(shard, error.stage, error.error, str(error), error.retryable)
            except (ArchiveError, OSError) as error:
                shard.aborted = True
                stage, name = (
                    (error.stage, error.error) if isinstance(error, ArchiveError) else ("open", "ShardUnreadable")
                )
                self._post_failure(shard, stage, name, str(error), retryable=not isinstance(error, ArchiveError))

    def _read_shard(self, shard: ShardRows) -> None:
        """Read a shard to its end.  Raises ShardError; ArchiveError only where damaged shards shall fail."""
        spec = self._setup.job.spec
        missing = shard.missing
        began = time.monotonic()
        with open_shard(shard.url, self._setup.storage_options, stop=self._stop) as stream:
            shard.source_bytes, shard.source_etag = stream.size, stream.etag
            self._stream = stream
            samples = group_samples(read_members(stream, spec.limits), spec.limits)
            chunk: list[Sample] = []
            chunk_bytes = 0
            while True:
                try:
                    sample = next(samples, None)
                except ArchiveError as error:
                    newly_damaged = missing is not None and not missing.was_damaged
                    if spec.damaged_shards == "fail" or newly_damaged:
                        raise
                    shard.fail_archive(error)
                    break
                if sample is None:
                    break
                if self._draining.is_set():
                    shard.aborted = True
                    raise Stopped
                if missing is not None and missing.is_past_end(sample.position):
                    shard.keep_failures(missing.archive_failures())
                    break
                shard.num_samples += 1
                if missing is not None and not missing.wants(sample):
                    continue
                if sample.failure is not None:
                    shard.fail_sample(sample, sample.failure)
                    continue
                chunk.append(sample)
                chunk_bytes += sample.num_bytes
                # Pictures go on by the handful: what is done for each in Python then finds its code in the cache,
                # which decoding sweeps clean.  A decoder that waits gets what there is.
                is_full = len(chunk) == CHUNK_SAMPLES or chunk_bytes >= self._chunk_bytes
                if is_full or len(self._samples) < self._num_decoders or _is_video(sample):
                    shard.seconds.read += time.monotonic() - began
                    self._hand_on(chunk, chunk_bytes, shard)
                    chunk, chunk_bytes = [], 0
                    began = time.monotonic()
        shard.num_retries = stream.num_retries
        shard.seconds.read += time.monotonic() - began
        if missing is not None:
            missing.check_end(shard.num_samples)
            shard.keep_failures(missing.kept_failures())
        self._hand_on(chunk, chunk_bytes, shard)
        with self._counts:
            self._num_shards_reading_ended += 1
        self._release(shard)

    def _hand_on(self, samples: list[Sample], num_bytes: int, shard: ShardRows) -> None:
        if not samples:
            return
        shard.hold()
        with self._counts:
            self._num_undecoded += 1
        self._samples.put((samples, shard), num_bytes)

    def _adopt(self, assignment: Assignment) -> bool:
        if not assignment.adopt:
            return False
        with open_shard(assignment.url, self._setup.storage_options, stop=self._stop) as stream:
            size, etag = stream.size, stream.etag
        commit = find_published(
            self._storage,
            self._setup.job,
            shard=assignment.shard,
            part=assignment.part,
            attempt=assignment.attempt,
            source_bytes=size,
            source_etag=etag,
            worker=self._setup.name,
        )
        if commit is None:
            return False
        self._post(ShardCommitted(commit, {}))
        return True

    # ---- decoders

    def _decode_samples(self) -> None:
        name = threading.current_thread().name
        spec = self._setup.job.spec
        while True:
            self._board.end(name)
            samples, shard = self._samples.get()
            if not shard.aborted:
                sidecars = []
                for sample in samples:
                    self._board.begin(name, "sidecars", shard.shard, sample.key)
                    sidecars.append(read_sidecars(sample.members, spec.carry, spec.limits))
                for sample, carried in zip(samples, sidecars, strict=True):
                    self._decode_sample(sample, carried, shard, name)
            with self._counts:
                self._num_undecoded -= 1
                self._num_samples += len(samples)
                dry = self._num_undecoded == 0
            if dry:
                self._batcher.wake()
            self._release(shard)

    def _decode_sample(self, sample: Sample, sidecars: Sidecars, shard: ShardRows, thread: str) -> None:
        assert sample.media is not None
        is_trusted = not (self._setup.decode_processes or shard.contained or sample.key in shard.suspects)
        decoder, doing = (self._decoder, "decode") if is_trusted else (self._contained, "decode in a child")
        seconds, num_views = 0.0, 0
        try:
            for warning in sidecars.warnings:
                shard.fail_sample(sample, warning)
            began = time.monotonic()
            # Told anew for each view: a watchdog looks how long the next one takes, not the device before it.
            self._board.begin(thread, doing, shard.shard, sample.key)
            views = decoder.views(sample.key, sample.media)
            while (view := next(views, None)) is not None:
                seconds += time.monotonic() - began
                num_views += 1
                self._board.begin(thread, "batch", shard.shard, sample.key)
                seconds += self._hand_to_batch(sample, shard, Row.of(shard, sample, sidecars, view), view)
                self._board.begin(thread, doing, shard.shard, sample.key)
                began = time.monotonic()
            seconds += time.monotonic() - began
            if num_views == 0:
                raise NoFrames("the video is shorter than one clip, and short_clips is drop.")
        except SampleError as error:
            shard.fail_sample(sample, error)
        except (Stopped, DecodersUnavailable):
            raise
        except Exception as error:
            log.exception("decoding %s of shard %d (%s)", sample.key, shard.shard, shard.url)
            shard.fail_sample(sample, gave_up(error))
        shard.add_seconds(decode=seconds)
        # Without the lock: a lost count does no harm, the number only has to grow.
        self._progress += 1

    def _hand_to_batch(self, sample: Sample, shard: ShardRows, row: Row, view: ClipView) -> float:
        for warning in view.warnings:
            shard.fail_sample(sample, warning)
        if shard.has_clip(row):
            return 0.0
        shard.hold()
        return self._batcher.add(view, row)

    # ---- device

    def _is_idle(self) -> bool:
        # While draining, the reader hands nothing on, whatever is still assigned to it.
        no_input = self._draining.is_set() or (self._reader_waits and len(self._inbox) == 0)
        return no_input and self._num_undecoded == 0

    def _encode_batches(self) -> None:
        name = threading.current_thread().name
        submitted: deque[tuple[Batch, PendingBatch, float]] = deque()
        while True:
            self._board.end(name)
            if submitted and (len(submitted) == self._encoder.depth or not self._batcher.has_ready()):
                self._finish_batch(*submitted.popleft())
                continue
            batch = self._batcher.take(self._is_idle)
            row = batch.rows[0]
            self._board.begin(name, "encode", row.shard.shard, row.key)
            began = time.monotonic()
            submitted.append((batch, self._encoder.submit(batch.frames_BTCHW, len(batch.rows)), began))

    def _finish_batch(self, batch: Batch, pending: PendingBatch, began: float) -> None:
        job = self._setup.job
        tokens_per_frame = job.tokenizer.grid[0] * job.tokenizer.grid[1]
        encoded = pending.wait()
        rows = batch.rows
        self._batcher.give_back(batch)
        share = (time.monotonic() - began) / len(rows)
        rows_of_shard: dict[int, list[Row]] = {}
        num_tokens = 0
        for number, row in enumerate(rows):
            rows_of_shard.setdefault(id(row.shard), []).append(row)
            num_row_tokens = row.num_frames * tokens_per_frame
            num_tokens += num_row_tokens
            if row.spoiled:
                continue
            if encoded.finite[number]:
                row.tokens = cut_tokens(encoded.packed[number], num_row_tokens, job.tokenizer.bits)
            else:
                row.shard.fail_row(row, NonFiniteLatents("NaN or infinity came out of the encoder."))
        with self._counts:
            self._num_rows += len(rows)
            self._num_tokens += num_tokens
            self._progress += 1
        for finished in rows_of_shard.values():
            shard = finished[0].shard
            shard.add_rows([row for row in finished if row.tokens])
            shard.add_seconds(encode=share * len(finished))
            self._release(shard, len(finished))

    # ---- writer

    def _release(self, shard: ShardRows, count: int = 1) -> None:
        if shard.release(count) and not shard.aborted:
            self._complete.put(shard, 1)

    def _write_shards(self) -> None:
        while True:
            self._board.end("write")
            shard = self._complete.get()
            self._board.begin("write", "write", shard.shard)
            value = self._encoder.arithmetic()
            commit = publish_shard(
                self._storage, self._setup.job, shard, arithmetic=arithmetic_id(value), worker=self._setup.name
            )
            with self._counts:
                self._num_shards_reading_ended -= 1
            failures = Counter(item.error for item in shard.ordered_failures() if item.severity == "failed")
            self._post(ShardCommitted(commit, value, dict(failures)))

    # ---- messages

    def _post(self, message: Message) -> None:
        with self._counts:
            self._progress += 1
            if isinstance(message, ShardCommitted | ShardFailed):
                self._num_shards_open -= 1
        self._outbox.put(message)

    def _post_failure(self, shard: ShardRows, stage: str, error: str, message: str, retryable: bool) -> None:
        self._post(ShardFailed(shard.shard, shard.attempt, stage, error, message, retryable))

    def _thread(self, name: str, body: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                body()
            except Stopped:
                pass
            except BsqError as error:
                self._post(WorkerBroken(error))
            except Exception as error:
                # A thread that dies takes the worker with it, audibly: half a worker would hang for ever.
                log.exception("thread %s died", name)
                failed = BsqError(f"thread {name} failed: {type(error).__name__}: {error}")
                self._post(WorkerBroken(failed, stops_job=False))

        return threading.Thread(target=run, name=name, daemon=True)


def _is_video(sample: Sample) -> bool:
    """Whether decoding may take long, by the name alone; the content is the decoder's to look at."""
    return sample.media is not None and media_kind_of_extension(sample.media.name.rpartition("/")[2]) == "video"
