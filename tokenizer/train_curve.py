"""The curve of a run as a picture, drawn from its log.  Standard library only."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from tokenizer.checkpoint import write_whole

WIDTH, HEIGHT, MARGIN = 720, 360, 52
COLOURS = ("#9aa5b1", "#1f6feb", "#d1651f", "#2b8a3e")
MAX_POINTS = 600
_TICKS = 5


def draw_curve(log: Path, target: Path, title: str, ceiling: float | None, names: Sequence[str]) -> None:
    """Draw the values `names` of a log over its steps, and a dashed line at `ceiling`; nothing without values.

    The file appears whole or not at all."""
    curves = {name: points for name in names if (points := _points(log, name))}
    if not curves:
        return
    values = [value for points in curves.values() for _, value in points]
    last = max(points[-1][0] for points in curves.values())
    high = max(ceiling or -math.inf, sorted(values)[int(0.99 * (len(values) - 1))])
    low = min(values)
    span = (high - low) or 1.0

    def place(step: float, value: float) -> tuple[float, float]:
        x = MARGIN + (WIDTH - 2 * MARGIN) * step / last
        y = MARGIN + (HEIGHT - 2 * MARGIN) * (high - min(value, high)) / span
        return round(x, 1), round(y, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12" fill="#333">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{MARGIN}" y="24" font-size="14">{escape(title)}</text>',
    ]
    for number in range(_TICKS):
        value, step = low + span * number / (_TICKS - 1), last * number / (_TICKS - 1)
        x, y = place(step, value)
        parts += [
            f'<path d="M{MARGIN} {y}H{WIDTH - MARGIN}" stroke="#e5e8ec"/>',
            f'<text x="{MARGIN - 6}" y="{y + 4}" text-anchor="end">{value:.4g}</text>',
            f'<text x="{x}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{step:,.0f}</text>',
        ]
    if ceiling is not None:
        y = place(0, ceiling)[1]
        parts.append(f'<path d="M{MARGIN} {y}H{WIDTH - MARGIN}" stroke="#c92a2a" stroke-dasharray="5 4"/>')
    for number, (name, points) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = "L".join(f"{x} {y}" for x, y in (place(*point) for point in _thinned(points)))
        parts += [
            f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>',
            f'<text x="{WIDTH - MARGIN}" y="{24 + 15 * number}" text-anchor="end" fill="{colour}">'
            f"{escape(name)} {points[-1][1]:.4g}</text>",
        ]
    write_whole(target, "\n".join([*parts, "</svg>\n"]).encode())


def _points(log: Path, name: str) -> list[tuple[int, float]]:
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    read = [json.loads(line) for line in lines]
    return [(line["step"], line[name]) for line in read if name in line and math.isfinite(line[name])]


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most about `MAX_POINTS`, the last among them."""
    every = math.ceil(len(points) / MAX_POINTS)
    return [*points[:-1:every], points[-1]]
