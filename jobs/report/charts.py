"""Charts as inline SVG: shapes stretch with the page, words are HTML beside them and keep their size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

from jobs.display import describe_seconds
from jobs.report.drift import CodeUsage, ShardUsage, Usage
from jobs.report.speed import Rate, Speed
from jobs.report.words import count, percent, seconds, short

Floats = npt.NDArray[np.float64]

WIDTH, HEIGHT = 1000.0, 100.0
"""Of the drawing; it is stretched to its place."""
MAX_DOTS = 1500
"""More shards than this are drawn as the range of each of so many columns."""
COLUMNS = 300
_TIME_STEPS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400)
_LEAST_TICKS = 4


@dataclass(frozen=True, slots=True)
class Tick:
    """A label on an axis, at a share of its length from the left or from below."""

    share: float
    label: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A word beside a point."""

    x: float
    y: float
    label: str


def rate_chart(rate: Rate) -> Markup:
    """Samples per second over working time; pauses are dashed lines."""
    top = _round_up(float(rate.per_second.max()))
    length = rate.working_seconds
    xs = rate.edges / length * WIDTH
    ys = HEIGHT - rate.per_second / top * HEIGHT
    steps = "".join(f"L{x:.1f} {y:.2f}H{end:.1f}" for x, end, y in zip(xs, xs[1:], ys, strict=False))
    outline = "M" + steps[1:]
    shapes = [
        Markup('<path class="area" d="M0 {}{}V{}Z"/>').format(_figure(HEIGHT), Markup(steps), _figure(HEIGHT)),
        Markup('<path class="line" d="{}"/>').format(Markup(outline)),
    ]
    for number, speed in enumerate(rate.per_second):
        when = f"{describe_seconds(rate.edges[number])} to {describe_seconds(rate.edges[number + 1])}"
        shapes.append(_hover(xs[number], xs[number + 1] - xs[number], f"{when}: {short(speed)} samples/s"))
    marks = []
    for at, pause in rate.pauses:
        shapes.append(Markup('<path class="cut" d="M{} 0V{}"/>').format(_figure(at / length * WIDTH), _figure(HEIGHT)))
        marks.append(Mark(at / length, 0.94, f"paused {describe_seconds(pause)}"))
    mean = float(np.average(rate.per_second, weights=np.diff(rate.edges)))
    return _frame(
        shapes,
        label=f"Samples per second over {describe_seconds(length)} of work: {short(mean)} on average, at most "
        f"{short(float(rate.per_second.max()))}.",
        y_ticks=[Tick(value / top, short(value)) for value in _ticks(top)],
        x_ticks=_time_ticks(length),
        marks=marks[:6],
    )


def shard_chart(speed: Speed) -> Markup:
    """Seconds of all stages for one frame of each shard, on a logarithmic scale; slow shards are named."""
    values = speed.per_frame
    scale = _LogScale(float(values.min()), float(values.max()))
    slow = {each.shard: each for each in speed.slow_shards}
    xs = (np.arange(len(values)) + 0.5) / len(values)
    shapes = _dots_or_ranges(xs, np.asarray([scale.share(value) for value in values]))
    median = scale.share(float(np.median(values)))
    shapes.append(_level(median))
    marks = []
    for place in np.flatnonzero(np.isin(speed.shards, list(slow))).tolist():
        x, y = float(xs[place]), scale.share(float(values[place]))
        shapes.append(_dots([(x, y)], "dot flag"))
        marks.append(Mark(x, y, f"shard {speed.shards[place]}"))
    return _frame(
        shapes,
        label=f"Time for one frame in each of {count(len(values), 'shard')}: the median shard takes "
        f"{seconds(float(np.median(values)))}, the slowest {seconds(float(values.max()))}.",
        y_ticks=[Tick(scale.share(value), seconds(value)) for value in scale.ticks()],
        x_ticks=_shard_ticks(speed.shards),
        marks=marks,
    )


def drift_chart(usage: Usage) -> Markup:
    """Distance of each shard from the rest in multiples of chance; shards that drift are named."""
    values = np.asarray([each.score for each in usage.shards])
    scale = _LogScale(min(0.7, float(values.min())), max(3.0, float(values.max())))
    xs = (np.arange(len(values)) + 0.5) / len(values)
    usual = [(x, scale.share(each.score)) for x, each in zip(xs, usage.shards, strict=True) if not each.drifts]
    shapes = [_level(scale.share(1.0)), _dots(usual, "dot")]
    marks = []
    for x, each in zip(xs, usage.shards, strict=True):
        if each.drifts:
            shapes.append(_dots([(float(x), scale.share(each.score))], "dot flag"))
            marks.append(Mark(float(x), scale.share(each.score), f"shard {each.shard}"))
    for x, each in zip(xs, usage.shards, strict=True):
        width = WIDTH / len(values)
        shapes.append(_hover(x * WIDTH - width / 2, width, f"shard {each.shard}: {each.score:.1f} times chance"))
    return _frame(
        shapes,
        label=f"Distance of the tokens of {count(len(values), 'shard')} from the rest: the median shard lies at "
        f"{usage.usual_score:.1f} times chance, the furthest at {values.max():.1f} times.",
        y_ticks=[Tick(scale.share(value), f"{value:g}×") for value in scale.ticks()],
        x_ticks=_shard_ticks(np.asarray([each.shard for each in usage.shards])),
        marks=marks[:8],
    )


def channel_chart(usage: Usage, drifting: Sequence[ShardUsage]) -> Markup:
    """Entropy of each channel as a bar, and beside it that of drifting shards as a line."""
    from jobs.report.drift import binary_entropy

    entropies = usage.entropies
    step = WIDTH / len(entropies)
    shapes = []
    for channel, entropy in enumerate(entropies.tolist()):
        left, height = channel * step + step * 0.14, max(entropy, 0.004) * HEIGHT
        shapes.append(
            Markup('<rect class="fill" x="{}" y="{}" width="{}" height="{}"/>').format(
                *map(_figure, (left, HEIGHT - height, step * 0.72, height))
            )
        )
    for number, shard in enumerate(drifting[:2]):
        lines = "".join(
            f"M{channel * step + step * 0.04:.1f} {HEIGHT - entropy * HEIGHT:.2f}h{step * 0.92:.1f}"
            for channel, entropy in enumerate(binary_entropy(shard.ones).tolist())
        )
        shapes.append(Markup('<path class="level flag flag-{}" d="{}"/>').format(number, lines))
    for channel, (ones, entropy) in enumerate(zip(usage.ones.tolist(), entropies.tolist(), strict=True)):
        words = f"channel {channel}: {percent(ones)} ones, {entropy:.3f} bits"
        words += "".join(f"; shard {each.shard}: {percent(float(each.ones[channel]))} ones" for each in drifting[:2])
        shapes.append(_hover(channel * step, step, words))
    every = 1 if len(entropies) <= 24 else 4
    return _frame(
        shapes,
        label=f"Entropy of {count(len(entropies), 'channel')}: the least {entropies.min():.3f}, the mean "
        f"{entropies.mean():.3f} of 1 bit.",
        y_ticks=[Tick(value, f"{value:g}") for value in (0.0, 0.5, 1.0)],
        x_ticks=[Tick((c + 0.5) / len(entropies), str(c)) for c in range(0, len(entropies), every)],
        small=True,
    )


def code_chart(piece: CodeUsage) -> Markup:
    """Share of tokens that the commonest codes make up; the diagonal is codes that are all as common."""
    covered = np.concatenate([[0.0], np.cumsum(piece.shares)])
    places = np.unique(np.linspace(0, piece.codes, 65).round().astype(int))
    points = " ".join(f"{x / piece.codes * WIDTH:.1f},{HEIGHT - covered[x] * HEIGHT:.2f}" for x in places.tolist())
    shapes = [
        Markup('<path class="level" d="M0 {}L{} 0"/>').format(_figure(HEIGHT), _figure(WIDTH)),
        Markup('<polygon class="area" points="0,{} {} {},{}"/>').format(
            _figure(HEIGHT), points, _figure(WIDTH), _figure(HEIGHT)
        ),
        Markup('<polyline class="line" points="{}"/>').format(points),
    ]
    tenth = float(covered[max(1, piece.codes // 10)])
    return _frame(
        shapes,
        label=f"The commonest tenth of the codes makes up {percent(tenth)} of the tokens.",
        y_ticks=[Tick(value, f"{value:.0%}") for value in (0.0, 0.5, 1.0)],
        x_ticks=[Tick(value, f"{value:.0%}") for value in (0.0, 0.5, 1.0)],
        small=True,
    )


# --- pieces


def _frame(
    shapes: Iterable[Markup],
    *,
    label: str,
    y_ticks: Sequence[Tick],
    x_ticks: Sequence[Tick],
    marks: Sequence[Mark] = (),
    small: bool = False,
) -> Markup:
    grid = Markup().join(
        Markup('<path class="grid" d="M0 {}H{}"/>').format(_figure((1 - tick.share) * HEIGHT), _figure(WIDTH))
        for tick in y_ticks
    )
    rows = Markup().join(
        Markup('<span style="bottom:{}%">{}</span>').format(_figure(100 * tick.share), tick.label) for tick in y_ticks
    )
    columns = Markup().join(
        Markup('<span class="{}" style="left:{}%">{}</span>').format(
            "first" if tick.share < 0.02 else "last" if tick.share > 0.98 else "", _figure(100 * tick.share), tick.label
        )
        for tick in x_ticks
    )
    words = Markup().join(
        Markup('<span class="mark{}" style="left:{}%;bottom:{}%">{}</span>').format(
            " left" if mark.x > 0.8 else "", _figure(100 * mark.x), _figure(100 * mark.y), mark.label
        )
        for mark in marks
    )
    return Markup(
        '<div class="chart{}" role="img" aria-label="{}"><div class="rows">{}</div><div class="canvas">'
        '<svg viewBox="0 0 {} {}" preserveAspectRatio="none" aria-hidden="true">{}{}</svg>{}</div>'
        '<div class="columns">{}</div></div>'
    ).format(
        " small" if small else "",
        label,
        rows,
        _figure(WIDTH),
        _figure(HEIGHT),
        grid,
        Markup().join(shapes),
        words,
        columns,
    )


class _LogScale:
    """Shares of the height for values on a logarithmic scale, with room above and below."""

    def __init__(self, least: float, most: float) -> None:
        self._low = math.log10(max(least, 1e-12))
        high = math.log10(max(most, 1e-12))
        margin = max(0.08 * (high - self._low), 0.12)
        self._low, self._high = self._low - margin, high + margin

    def share(self, value: float) -> float:
        return (math.log10(max(value, 1e-12)) - self._low) / (self._high - self._low)

    def ticks(self) -> list[float]:
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
            values = [
                step * 10.0**power
                for power in range(math.floor(self._low), math.ceil(self._high) + 1)
                for step in steps
                if self._low <= math.log10(step * 10.0**power) <= self._high
            ]
            if len(values) >= _LEAST_TICKS - 1:
                break
        return values[:: -(-len(values) // 6)]


def _dots_or_ranges(xs: Floats, ys: Floats) -> list[Markup]:
    if len(xs) <= MAX_DOTS:
        return [_dots(list(zip(xs.tolist(), ys.tolist(), strict=True)), "dot")]
    bounds = np.linspace(0, len(ys), COLUMNS + 1).astype(int)
    low, high = np.minimum.reduceat(ys, bounds[:-1]), np.maximum.reduceat(ys, bounds[:-1])
    width = WIDTH / COLUMNS
    ranges = "".join(
        f"M{(place + 0.5) * width:.1f} {HEIGHT - bottom * HEIGHT:.2f}V{HEIGHT - top * HEIGHT:.2f}"
        for place, (bottom, top) in enumerate(zip(low.tolist(), high.tolist(), strict=True))
    )
    return [Markup('<path class="range" d="{}"/>').format(ranges)]


def _dots(points: Sequence[tuple[float, float]], kind: str) -> Markup:
    """Lines of no length with round ends: they stay round when the drawing is stretched."""
    path = "".join(f"M{x * WIDTH:.1f} {HEIGHT - y * HEIGHT:.2f}h0" for x, y in points)
    return Markup('<path class="{}" d="{}"/>').format(kind, path)


def _level(share: float) -> Markup:
    return Markup('<path class="level" d="M0 {}H{}"/>').format(_figure((1 - share) * HEIGHT), _figure(WIDTH))


def _hover(x: float, width: float, words: str) -> Markup:
    return Markup('<rect class="hover" x="{}" y="0" width="{}" height="{}"><title>{}</title></rect>').format(
        _figure(x), _figure(width), _figure(HEIGHT), escape(words)
    )


def _figure(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _round_up(value: float) -> float:
    """The next 1, 1.5, 2, 3, 4, 5, 6, 8 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * power >= value * (1 - 1e-9))


def _ticks(top: float) -> list[float]:
    """Round values from 0 to `top`, which `_round_up` made."""
    leading = top / 10.0 ** math.floor(math.log10(top))
    parts = 3 if round(leading, 1) in (1.5, 3, 6) else 5 if round(leading, 1) in (1, 5) else 4
    return [top * number / parts for number in range(parts + 1)]


def _time_ticks(length: float) -> list[Tick]:
    step = next((step for step in _TIME_STEPS if length / step <= 7), math.ceil(length / 86_400 / 6) * 86_400)
    values = np.arange(0, length * 1.0001, step).tolist()
    return [Tick(value / length, _axis_time(value)) for value in values]


def _axis_time(value: float) -> str:
    if value < 60:
        return f"{value:g} s" if value else "0"
    return describe_seconds(value).removesuffix(" 0 s").removesuffix(" 0 min").removesuffix(" 0 h")


def _shard_ticks(shards: npt.NDArray[np.int64]) -> list[Tick]:
    places = np.unique(np.linspace(0, len(shards) - 1, min(len(shards), 6)).round().astype(int))
    return [Tick((place + 0.5) / len(shards), str(shards[place])) for place in places.tolist()]
