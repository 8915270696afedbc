"""How far a job is, for people: a live display on a terminal, log lines elsewhere, and a summary at the end."""

from __future__ import annotations

import math

from jobs.screen import Screen
from schemas.lease import Progress

WAITS_AFTER_SECONDS = 20.0
"""Until then waiting says little: models are loaded, queues are filled."""
WAIT_WORTH_TELLING = 0.25
"""Share of its time that one side must wait for the other before the display says so."""
READ_WAIT_WORTH_TELLING = 0.5
"""Share of the time without anything to decode that makes storage the limit, where the encoder waits."""


class JobDisplay(Screen):
    """Shows a job: a line for each event, and how far it is."""

    def observe(self, progress: Progress, line: str | None = None) -> None:
        """Show how far the job is, and `line`, something that happened, if given."""
        if line is not None:
            self.tell(line)
        done = (progress.committed + progress.failed_shards) / max(progress.shards, 1)
        self.draw(done, describe_progress(progress), alarming=_describe_failures(progress))


def describe_progress(progress: Progress) -> list[str]:
    """The state of a job in a few short sentences: shards, speed, failures, what waits for what."""
    done = progress.committed + progress.failed_shards
    share = f" ({done / progress.shards:.0%})" if progress.shards else ""
    shards = f"{done:,} of {counted(progress.shards, 'shard')}{share}"
    if progress.eta_seconds is not None and done < progress.shards:
        left = math.ceil(progress.eta_seconds)
        shards += f", {left} s left" if left < 60 else f", {describe_seconds(left)} left"
    speed = f"{progress.samples:,} samples"
    # Samples count when their shard is committed, the rate when they are encoded: before, one belies the other.
    if progress.samples_per_second and progress.samples:
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
