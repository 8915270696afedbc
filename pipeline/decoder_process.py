"""Decodes in child processes, where a codec that crashes or hangs costs one sample and not the worker.

A child decodes one sample at a time, so it is always known which one ended it.  Payloads go to it through a socket;
frames come back through memory that both share, one clip with all its views at a time."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import faulthandler
import itertools
import logging
import math
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any

import torch

from pipeline.decode import Decoder, gave_up, media_kind
from pipeline.queues import POLL_SECONDS, Stopped
from pipeline.sample import ClipView, Member
from schemas.errors import DecodeTimeout, SampleError, WorkerCrash
from schemas.jobspec import ClipSpec, LimitsSpec, PreprocessSpec

log = logging.getLogger("bsqtok.worker")

START_SECONDS = 120.0
"""A child that is not up by then never will be."""
START_ATTEMPTS = 3
END_SECONDS = 5.0
"""From the end of its socket to the end of a child."""
GRACE_SECONDS = 2.0
"""Given beyond the limit, in which a decoder that still looks at the clock ends by itself, with a better message."""
CRASHES = 2
"""Children that a sample must end to be guilty: one may have been killed from outside."""

_PR_SET_PDEATHSIG = 1
_FIELDS = [field.name for field in dataclasses.fields(ClipView) if field.name != "pixels"]
_ViewMessage = tuple[int, dict[str, Any]]
"""Frames of a view, and its fields without them: a tensor would bring torch's own ways to share memory along."""


class DecodersUnavailable(Exception):
    """No child comes up: the fault is not the sample's."""


class _ChildEnded(Exception):
    """The child is gone; the text says how."""


class DecoderProcesses:
    """Up to `most` children, started when they are needed.  Called from many threads, each for one sample."""

    def __init__(
        self, preprocess: PreprocessSpec, clips: ClipSpec, limits: LimitsSpec, *, most: int, stop: threading.Event
    ) -> None:
        self._specs = (preprocess, clips, limits)
        self._views = preprocess.views
        self._limit_seconds = limits.decode_timeout_seconds
        self._stop = stop
        self._places = threading.Semaphore(most)
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._closed = False

    def views(self, key: str, media: Member) -> Iterator[ClipView]:
        """The same as `Decoder.views`, decoded in a child; the frames of a view are good until the next is asked for.

        Raises also WorkerCrash for a sample that ends two children, DecodeTimeout for one that has to be killed, and
        Stopped."""
        while not self._places.acquire(timeout=POLL_SECONDS):
            if self._stop.is_set():
                raise Stopped
        child: _Child | None = None
        try:
            num_clips = num_crashes = 0
            while True:
                child = child or self._take_child()
                try:
                    for views in child.clips(key, media, skip=num_clips):
                        yield from views
                        num_clips += 1
                    return
                except _ChildEnded as error:
                    child.kill()
                    child = None
                    num_crashes += 1
                    if num_crashes == CRASHES:
                        raise self._located(WorkerCrash(_crash_message(str(error))), media, num_clips) from None
                except DecodeTimeout as error:
                    if child.is_killed:
                        child = None
                        raise self._located(error, media, num_clips) from None
                    raise
        finally:
            self._put_back(child)
            self._places.release()

    def close_idle(self) -> None:
        """End the children that wait for work: each holds some hundred megabytes."""
        while self._idle:
            with self._lock:
                child = self._idle.pop() if self._idle else None
            if child is not None:
                child.kill()

    def close(self) -> None:
        """End all children, those at work when their sample ends."""
        self._closed = True
        self.close_idle()

    def _take_child(self) -> _Child:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        for _ in range(START_ATTEMPTS):
            try:
                return _Child(self._specs, self._limit_seconds, self._stop)
            except _ChildEnded as error:
                reason = str(error)
        raise DecodersUnavailable(f"a decoder process does not come up ({reason})")

    def _put_back(self, child: _Child | None) -> None:
        if child is None:
            return
        with self._lock:
            keep = child.is_idle and not self._closed and not self._stop.is_set()
            if keep:
                self._idle.append(child)
        if not keep:
            child.kill()

    def _located(self, error: SampleError, media: Member, num_clips: int) -> SampleError:
        error.member = media.name
        # As everywhere: of a video the clips from there on are missing, of a picture there is only one.
        with contextlib.suppress(SampleError):
            error.clip = num_clips if media_kind(media) == "video" else None
        return error


class _Child:
    """One child and the memory that it shares."""

    def __init__(
        self, specs: tuple[PreprocessSpec, ClipSpec, LimitsSpec], limit_seconds: float, stop: threading.Event
    ) -> None:
        """Start it and wait until it is up.  Raises _ChildEnded or Stopped."""
        preprocess, clips, _ = specs
        assert isinstance(preprocess.size, int) and isinstance(clips.clip_frames, int)
        self._frame_shape = (3, preprocess.size, preprocess.size)
        self._limit_seconds = limit_seconds
        self._stop = stop
        self.is_killed = False
        self.is_idle = False
        # Pages that are never written cost nothing, so there is room for the largest clip.
        num_bytes = preprocess.views * clips.clip_frames * 3 * preprocess.size**2
        memory = os.memfd_create("bsqtok-frames")
        self._pipe, theirs = multiprocessing.Pipe()
        try:
            os.ftruncate(memory, num_bytes)
            self._frames = torch.frombuffer(mmap.mmap(memory, num_bytes), dtype=torch.uint8)
            call = f"serve({theirs.fileno()}, {memory}, {os.getpid()})"
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"import sys; sys.path = {sys.path!r}; from {__name__} import serve; {call}"],
                pass_fds=(theirs.fileno(), memory),
                stdin=subprocess.DEVNULL,
                # Ctrl-C reaches the process group of a terminal; what it means is for the driver to say.
                process_group=0,
            )
        finally:
            theirs.close()
            os.close(memory)
        try:
            self._send(specs)
            self._receive(START_SECONDS)
        except DecodeTimeout:
            raise _ChildEnded(f"it took longer than {START_SECONDS:g} s") from None
        except BaseException:
            self.kill()
            raise
        self.is_idle = True

    def clips(self, key: str, media: Member, *, skip: int) -> Iterator[list[ClipView]]:
        """Yield the views of each clip after the first `skip`.

        Raises SampleError, _ChildEnded, Stopped, and DecodeTimeout after killing a child that does not answer."""
        self.is_idle = False
        self._send((key, media.name, skip))
        self._send_bytes(media.payload or b"")
        left_seconds = self._limit_seconds + GRACE_SECONDS
        while True:
            began = time.monotonic()
            answer = self._receive(left_seconds)
            # What the consumer of a clip takes does not count.
            left_seconds -= time.monotonic() - began
            if isinstance(answer, SampleError):
                self.is_idle = True
                raise answer
            if answer is None:
                self.is_idle = True
                return
            yield self._with_frames(answer)
            self._send("next")

    def kill(self) -> None:
        """End it at once."""
        self.is_killed = True
        self.is_idle = False
        self._pipe.close()
        self._process.kill()
        self._process.wait()

    def _with_frames(self, clip: list[_ViewMessage]) -> list[ClipView]:
        views = []
        start = 0
        for num_frames, fields in clip:
            shape = (num_frames, *self._frame_shape)
            stop = start + math.prod(shape)
            views.append(ClipView(pixels=self._frames[start:stop].view(shape), **fields))
            start = stop
        return views

    def _send(self, message: Any) -> None:
        try:
            self._pipe.send(message)
        except OSError as error:
            raise self._ended() from error

    def _send_bytes(self, payload: bytes) -> None:
        try:
            self._pipe.send_bytes(payload)
        except OSError as error:
            raise self._ended() from error

    def _receive(self, timeout_seconds: float) -> Any:
        deadline = time.monotonic() + timeout_seconds
        try:
            while not self._pipe.poll(POLL_SECONDS):
                if self._stop.is_set():
                    raise Stopped
                if time.monotonic() > deadline:
                    self.kill()
                    raise DecodeTimeout(
                        f"decoding took longer than limits.decode_timeout_seconds ({self._limit_seconds:g}) and did "
                        f"not answer. Raise the limit, or convert the media."
                    )
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            if self._stop.is_set():
                raise Stopped from error
            raise self._ended() from error

    def _ended(self) -> _ChildEnded:
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        return _ChildEnded(signal.Signals(-code).name if code < 0 else f"exit code {code}")


def serve(pipe_descriptor: int, memory_descriptor: int, parent: int) -> None:
    """Body of a child: decode what comes through the pipe until it ends."""
    # A child that hangs does not see its pipe end, so the kernel ends it with its parent.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    faulthandler.enable()
    torch.set_num_threads(1)
    pipe: Connection[Any, Any] = Connection(pipe_descriptor)
    with contextlib.suppress(EOFError, ConnectionError):
        preprocess, clips, limits = pipe.recv()
        decoder = Decoder(preprocess, clips, limits)
        frames = torch.frombuffer(mmap.mmap(memory_descriptor, 0), dtype=torch.uint8)
        pipe.send("ready")
        while True:
            key, name, skip = pipe.recv()
            payload = pipe.recv_bytes()
            media = Member(name=name, kind="file", size=len(payload), offset=0, payload=payload)
            try:
                views = decoder.views(key, media)
                for number in itertools.count():
                    # Of a clip all views are handed over or none.
                    clip = list(islice(views, preprocess.views))
                    if not clip:
                        break
                    if number >= skip:
                        pipe.send(_into_memory(clip, frames))
                        pipe.recv()
                pipe.send(None)
            except SampleError as error:
                pipe.send(error)
            except (EOFError, ConnectionError):
                raise
            except Exception as error:
                log.exception("decoding %s", key)
                pipe.send(gave_up(error))
    os._exit(0)


def _into_memory(views: list[ClipView], memory: torch.Tensor) -> list[_ViewMessage]:
    """Lay the frames of `views` one after the other; return what else there is to say about them."""
    start = 0
    messages = []
    for view in views:
        frames_TCHW = view.frames_TCHW
        stop = start + frames_TCHW.numel()
        memory[start:stop].view(frames_TCHW.shape).copy_(frames_TCHW)
        messages.append((view.num_frames, {name: getattr(view, name) for name in _FIELDS}))
        start = stop
    return messages


def _crash_message(how: str) -> str:
    return f"decoding it ended {CRASHES} processes ({how}). Convert the media, or leave the sample out."
