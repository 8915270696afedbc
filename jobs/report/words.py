"""Numbers and strangers' texts as the page shows them."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from jobs.display import describe_seconds, plain_text
from pipeline.credentials import printable_url

MAX_TEXT_CHARS = 300


def text(value: object, most: int = MAX_TEXT_CHARS) -> str:
    """A string that came from data or storage: printable, without credentials, its middle left out where it is long.

    Not escaped: the template does that."""
    shown = plain_text(printable_url(str(value)))
    if len(shown) <= most:
        return shown
    return f"{shown[: most * 2 // 3]} … {shown[len(shown) - most // 3 + 3 :]}"


def count(number: float, noun: str = "") -> str:
    """1,234; with a noun in the right number: 1 shard, 2 shards."""
    figure = f"{number:,.0f}"
    return figure if not noun else f"{figure} {noun}{'' if number == 1 else 's'}"


def short(number: float) -> str:
    """Three digits and a unit: 950, 12.3 k, 4.56 M."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= factor:
            scaled = number / (1e3 if unit == "k" else factor)
            return f"{scaled:.{_digits(scaled)}f} {unit}"
    return f"{number:,.0f}" if number == int(number) or abs(number) >= 100 else f"{number:.{_digits(number)}f}"


def percent(share: float) -> str:
    """12%, 0.35%, 0%; never 0% or 100% for what only comes near."""
    if share in (0, 1):
        return f"{share:.0%}"
    value = min(max(100 * share, 0.001), 99.99)
    digits = 0 if 9.5 <= value < 99.5 else 1 if 0.95 <= value < 99.5 else 2 if value >= 0.01 else 3
    return f"{value:.{digits}f}%"


def seconds(value: float) -> str:
    """A duration: 12 µs, 3.4 ms, 8.4 s, 3 min 20 s."""
    if value >= 1 or value == 0:
        return describe_seconds(value)
    unit, scaled = ("ms", value * 1e3) if value >= 1e-3 else ("µs", value * 1e6)
    return f"{scaled:.{_digits(scaled)}f} {unit}"


def times(factor: float) -> str:
    """How many times as much: 4.2 times."""
    return "incomparably more" if math.isinf(factor) else f"{factor:,.{_digits(factor)}f} times"


def moment(epoch_seconds: float) -> str:
    """2026-11-21 10:20 UTC"""
    return datetime.fromtimestamp(epoch_seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _digits(value: float) -> int:
    return 2 if abs(value) < 1 else 1 if abs(value) < 10 else 0
