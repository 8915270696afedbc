"""How far a job is, for people: a live display on a terminal, log lines elsewhere, and a summary at the end."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from schemas.lease import Progress

if TYPE_CHECKING:
    from rich.console import RenderableType

LINE_EVERY_SECONDS = 10.0
WAITS_AFTER_SECONDS = 20.0
"""Until then waiting says little: models are loaded, queues are filled."""
BAR_WIDTH = 30
WAIT_WORTH_TELLING = 0.25
"""Share of its time that one side must wait for the other before the display says so."""
READ_WAIT_WORTH_TELLING = 0.5
"""Share of the time without anything to decode that makes storage the limit, where the encoder waits."""


class JobDisplay(Protocol):
    """What a command shows while its job runs."""

    def observe(self, progress: Progress, line: str | None = None) -> None:
        """Show how far the job is, and `line`, something that happened, if given."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def job_display(stream: TextIO | None = None) -> JobDisplay:
    """The display for `stream` (stderr): live where it is a terminal, else time-stamped lines."""
    stream = stream or sys.stderr
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        return LiveDisplay(stream)
    return LineDisplay(stream)


class LineDisplay:
    """A line every ten seconds and one for each event."""

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._last = -LINE_EVERY_SECONDS

    def observe(self, progress: Progress, line: str | None = None) -> None:
        if line is not None:
            self._write(line)
        if self._clock() - self._last >= LINE_EVERY_SECONDS:
            self._last = self._clock()
            self._write("; ".join(describe_progress(progress)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def _write(self, line: str) -> None:
        # The reader of a pipe may have gone (`2>&1 | head`); the job goes on without being watched.
        try:
            self._stream.write(f"{time.strftime('%H:%M:%S')} {line}\n")
            self._stream.flush()
        except (OSError, ValueError):
            self._last = float("inf")


class LiveDisplay:
    """A bar and a few lines that are drawn again in place; events scroll by above them."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=stream, highlight=False)
        # Drawn by `observe` alone: no thread.  Standard output is left alone, it carries results.
        self._live = Live(
            "starting ...", console=self._console, auto_refresh=False, transient=True, redirect_stdout=False
        )

    def observe(self, progress: Progress, line: str | None = None) -> None:
        try:
            if line is not None:
                self._console.print(f"{time.strftime('%H:%M:%S')} {line}", markup=False)
            self._live.update(_panel(progress), refresh=True)
        except (OSError, ValueError):
            return  # the terminal is gone; the job goes on

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()


def describe_progress(progress: Progress) -> list[str]:
    """The state of a job in a few short sentences: shards, speed, failures, what waits for what."""
    done = progress.committed + progress.failed_shards
    share = f" ({done / progress.shards:.0%})" if progress.shards else ""
    shards = f"{done:,} of {progress.shards:,} shards{share}"
    if progress.eta_seconds is not None and done < progress.shards:
        left = math.ceil(progress.eta_seconds)
        shards += f", {left} s left" if left < 60 else f", {describe_seconds(left)} left"
    speed = f"{progress.samples:,} samples"
    if progress.samples_per_second:
        speed += f", {progress.samples_per_second:,.1f} samples/s, {progress.tokens_per_second:,.0f} tokens/s"
    if progress.workers:
        speed += f", {counted(progress.workers, 'worker')}"
    sentences = [shards, speed]
    if failures := _describe_failures(progress):
        sentences.append(failures)
    if hint := _describe_wait(progress):
        sentences.append(hint)
    return sentences


def describe_summary(progress: Progress) -> str:
    """The state of a job that has ended, as a small table."""
    shards = f"{progress.committed:,} of {progress.shards:,} committed"
    if progress.partial_shards:
        shards += f", {progress.partial_shards:,} of them partial"
    if progress.failed_shards:
        shards += f", {progress.failed_shards:,} failed"
    samples = f"{progress.samples:,}"
    if progress.failed_samples:
        samples += f", {progress.failed_samples:,} of them failed"
    if progress.warnings:
        samples += f", {counted(progress.warnings, 'warning')}"
    lines = {
        "shards": shards,
        "samples": samples,
        "rows": f"{progress.rows:,}",
        "tokens": f"{progress.tokens:,} in {describe_bytes(progress.bytes)}",
        "time": describe_seconds(progress.seconds),
    }
    if progress.samples_per_second:
        speed = f"{progress.samples_per_second:,.1f} samples/s, {progress.tokens_per_second:,.0f} tokens/s"
        lines["time"] += f" ({speed})"
    return "\n".join(f"{name:<8} {value}" for name, value in lines.items())


def describe_seconds(seconds: float) -> str:
    """A duration in the two units that matter: 8.4 s, 3 min 20 s, 5 h 12 min, 2 d 3 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86_400:,} d {whole % 86_400 // 3600} h"


def describe_bytes(num_bytes: float) -> str:
    """A size with three digits: 512 bytes, 22.9 kB, 1.31 GB."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f} bytes"
    units = ["TB", "GB", "MB", "kB"]
    num_bytes /= 1000
    while num_bytes >= 999.5 and len(units) > 1:
        num_bytes /= 1000
        units.pop()
    digits = 2 if num_bytes < 9.995 else 1 if num_bytes < 99.95 else 0
    return f"{num_bytes:,.{digits}f} {units[-1]}"


def counted(number: int, noun: str) -> str:
    """A number of things: 1 shard, 1,024 shards."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def field_line(name: str, text: str) -> str:
    """A line of what `bsq inspect` says."""
    return f"  {name:<14} {text}"


def shortened_text(text: str, most_chars: int) -> str:
    """`text` without control characters and at most so long."""
    plain = plain_text(text)
    return plain if len(plain) <= most_chars else plain[: most_chars - 1] + "…"


def plain_text(text: str) -> str:
    """`text` without control characters: what came from data must not steer a terminal or turn a page around."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def _describe_failures(progress: Progress) -> str:
    parts = []
    if progress.failed_samples:
        parts.append(f"{counted(progress.failed_samples, 'sample')} failed")
    if progress.failed_shards:
        parts.append(f"{counted(progress.failed_shards, 'shard')} failed")
    if progress.partial_shards:
        parts.append(f"{counted(progress.partial_shards, 'shard')} partial")
    if progress.warnings:
        parts.append(counted(progress.warnings, "warning"))
    return ", ".join(parts)


def _describe_wait(progress: Progress) -> str:
    if progress.seconds < WAITS_AFTER_SECONDS:
        return ""
    if progress.device_wait >= max(WAIT_WORTH_TELLING, progress.decode_wait):
        if progress.read_wait >= READ_WAIT_WORTH_TELLING:
            return (
                f"the encoder waits {progress.device_wait:.0%} of its time, and decoding for the storage: "
                f"more CPUs would not help"
            )
        return f"the encoder waits {progress.device_wait:.0%} of its time for decoding: more CPUs would help"
    if progress.decode_wait >= WAIT_WORTH_TELLING:
        return f"decoding waits {progress.decode_wait:.0%} of its time for the encoder: more devices would help"
    return ""


def _panel(progress: Progress) -> RenderableType:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    first, *others = describe_progress(progress)
    top = Table.grid(padding=(0, 2))
    bar = ProgressBar(
        total=max(progress.shards, 1), completed=progress.committed + progress.failed_shards, width=BAR_WIDTH
    )
    top.add_row(bar, Text(first))
    failures = _describe_failures(progress)
    lines = [
        Text(sentence, style="red" if sentence == failures else "", no_wrap=True, overflow="ellipsis")
        for sentence in others
    ]
    return Group(top, *lines)
