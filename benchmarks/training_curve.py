"""Draw how a training run went: PSNR and the entropy of its channels over pictures seen, as SVG.

python -m benchmarks.training_curve RUN/log.jsonl --batch 32 --out curve.svg"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

WIDTH, PANEL, LEFT, BOTTOM, GAP = 720, 190, 56, 30, 26
COLOURS = ("#4269d0", "#ff725c", "#3ca951")

Points = Sequence[tuple[float, float]]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw(log: list[dict[str, Any]], batch: int) -> str:
    """Two panels over pictures seen: PSNR in dB, and the least and mean entropy of a channel in bits."""

    def points(name: str) -> Points:
        return [(line["step"] * batch, line[name]) for line in log if name in line]

    entropy = [(line["step"] * batch, statistics.mean(line["channel_bits"])) for line in log if "channel_bits" in line]
    psnr = {"training crops": points("psnr"), "validation": points("val_psnr")}
    bits = {"least channel": points("least_channel_bits"), "mean of channels": entropy}
    last = max(line["step"] for line in log) * batch
    height = 2 * (PANEL + BOTTOM) + GAP
    panels = _panel(psnr, "PSNR, dB", 12, last) + "".join(
        f'<g transform="translate(0 {PANEL + BOTTOM + GAP})">{_panel(bits, "bits per channel", 0.5, last)}</g>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="#fff"/>{panels}</svg>\n'
    )


def _panel(series: dict[str, Points], title: str, floor: float, last: float) -> str:
    values = [value for points in series.values() for _, value in points]
    low, high = min(floor, *values), max(values)
    high = high + 0.05 * (high - low)

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + x / last * (WIDTH - LEFT - 16), 18 + (high - y) / (high - low) * (PANEL - 18)

    parts = [f'<text x="{LEFT}" y="11" font-weight="bold">{title}</text>']
    for value in _ticks(low, high):
        _, y = place(0, value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 16}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in _ticks(0, last):
        x, _ = place(value, low)
        parts.append(f'<text x="{x:.1f}" y="{PANEL + 16}" text-anchor="middle">{value:,.0f}</text>')
    parts.append(f'<text x="{WIDTH - 16}" y="{PANEL + 29}" text-anchor="end">pictures seen</text>')
    for number, (name, points) in enumerate(series.items()):
        path = "L".join("{:.1f} {:.1f}".format(*place(*point)) for point in points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{COLOURS[number]}" stroke-width="1.8"/>')
        parts.append(f'<text x="{WIDTH - 140}" y="{PANEL - 40 + 16 * number}" fill="{COLOURS[number]}">{name}</text>')
    return "".join(parts)


def _ticks(low: float, high: float) -> Iterable[float]:
    """About five round numbers from `low` to `high`."""
    step = next(s for s in (10.0**e * m for e in range(-3, 9) for m in (1, 2, 5)) if (high - low) / s <= 6)
    number = math.ceil(low / step)
    while number * step <= high:
        yield number * step
        number += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="log.jsonl of the run")
    parser.add_argument("--batch", type=int, required=True, help="pictures of one step, over all processes")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.write_text(draw(read_log(arguments.log), arguments.batch), encoding="utf-8")


if __name__ == "__main__":
    main()
