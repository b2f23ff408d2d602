"""Curves over optimizer steps as the geometry of an SVG: scales, ticks, and few enough points."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_POINTS = 600  # of a line: more than a screen shows
Points = Sequence[tuple[float, float]]  # (step, value), by step


@dataclass(frozen=True)
class Series:
    """`as_dots`: few values, each of which counts. `style`: which of the page's colours and dashes."""

    name: str
    points: Points
    as_dots: bool = False
    style: int = 0


@dataclass(frozen=True)
class Drawn:
    """A series in pixels."""

    name: str
    xy: Points
    as_dots: bool
    style: int


@dataclass(frozen=True)
class Chart:
    """`marks`: x of each restart. `summary`: the chart in words, for those who do not see it."""

    title: str
    unit: str
    series: list[Drawn]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[float]
    summary: str
    width: int
    height: int
    left: int = 58
    right: int = 12
    top: int = 12
    bottom: int = 26

    @property
    def legend(self) -> bool:
        return len(self.series) > 1 or bool(self.marks)


@dataclass(frozen=True)
class Frame:
    """The scales of a chart: from steps and values to pixels."""

    width: int
    height: int
    steps: tuple[float, float]
    values: tuple[float, float]
    left: int = field(default=Chart.left)

    def x(self, step: float) -> float:
        first, last = self.steps
        return round(self.left + (step - first) / (last - first) * (self.width - self.left - Chart.right), 1)

    def y(self, value: float) -> float:
        low, high = self.values
        return round(Chart.top + (high - value) / (high - low) * (self.height - Chart.top - Chart.bottom), 1)


def draw(
    title: str, unit: str, series: list[Series], *, restarts: Sequence[float] = (), width: int = 420, height: int = 220
) -> Chart | None:
    """None where there is nothing to draw. `restarts`: the steps that later starts went on from."""
    series = [one for one in series if one.points]
    if not series:
        return None
    steps = [step for one in series for step, _ in one.points]
    values = [value for one in series for _, value in one.points]
    y_ticks = ticks(min(values), max(values), 4)
    last = max(steps) if max(steps) > min(0, *steps) else min(steps) + 1
    frame = Frame(width, height, (min(0, *steps), last), (min(y_ticks[0], *values), max(y_ticks[-1], *values)))
    x_ticks = [step for step in ticks(*frame.steps, 5) if frame.steps[0] <= step <= last and step == int(step)]
    return Chart(
        title=title,
        unit=unit,
        series=[
            Drawn(
                one.name,
                [(frame.x(step), frame.y(value)) for step, value in (one.points if one.as_dots else thin(one.points))],
                one.as_dots or len(one.points) == 1,
                one.style,
            )
            for one in series
        ],
        x_ticks=[(frame.x(step), tick_text(step)) for step in x_ticks],
        y_ticks=[(frame.y(value), tick_text(value)) for value in y_ticks],
        marks=[frame.x(step) for step in restarts if frame.steps[0] <= step <= last],
        summary="; ".join(_in_words(one) for one in series),
        width=width,
        height=height,
    )


def _in_words(series: Series) -> str:
    (first_step, first), (last_step, last) = series.points[0], series.points[-1]
    return f"{series.name}: {tick_text(first)} at step {first_step:g}, {tick_text(last)} at step {last_step:g}"


def thin(points: Points, most: int = MAX_POINTS) -> Points:
    """At most `most` points: of each stretch the lowest and the highest, so that no spike is lost; and both ends."""
    if len(points) <= most:
        return points
    stretches = most // 2 - 1
    kept = {0, len(points) - 1}
    for i in range(stretches):
        stretch = range(len(points) * i // stretches, len(points) * (i + 1) // stretches)
        kept |= {min(stretch, key=lambda at: points[at][1]), max(stretch, key=lambda at: points[at][1])}
    return [points[at] for at in sorted(kept)]


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) from at most `low` to at least `high`."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def tick_text(value: float) -> str:
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.4g}{letter}"
    return f"{value:.4g}" if size >= 1e-3 or not value else f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
