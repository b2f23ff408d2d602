"""Curves over optimizer steps, as the geometry of an SVG: scales, ticks, and not too many points."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_POINTS = 600  # per line: more than a screen shows
MAX_POINTS_PER_CHART = 4 * MAX_POINTS  # over all lines of a chart, so that many runs fit on a page
MAX_DOTS = 120  # more would cover each other
DIGIT_WIDTH = 7.0  # pixels
Points = Sequence[tuple[float, float]]  # (step, value), by step


@dataclass(frozen=True)
class Series:
    """A line of a chart, or dots if there are few values and each one counts.

    `style` is the number of one of the page's colours and dashes. A `faint` line lies behind the smoothed one.
    """

    name: str
    points: Points
    as_dots: bool = False
    style: int = 0
    faint: bool = False


@dataclass(frozen=True)
class DrawnSeries:
    """A series in pixels."""

    name: str
    xy: Points
    as_dots: bool
    style: int
    faint: bool


@dataclass(frozen=True)
class Chart:
    """What the template draws. All positions are in pixels; ticks are (position, text)."""

    title: str
    unit: str
    series: list[DrawnSeries]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[float]  # x of each restart
    summary: str  # the chart in words, for screen readers
    width: int
    height: int
    left: int = 58  # margins
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
    """Lay out a chart; None if no series has points. `restarts`: the steps from which later starts continued."""
    series = [one for one in series if one.points]
    if not series:
        return None
    values = [value for one in series for _, value in one.points]
    y_ticks = ticks(min(values), max(values), 4)
    y_texts = tick_texts(y_ticks)
    left = max(Chart.left, math.ceil(DIGIT_WIDTH * max(map(len, y_texts))) + 9)
    first, last = _step_range(series)
    frame = Frame(width, height, (first, last), (min(y_ticks[0], *values), max(y_ticks[-1], *values)), left)
    x_ticks = [step for step in ticks(first, last, 5) if first <= step <= last and step == int(step)]
    max_points = min(MAX_POINTS, MAX_POINTS_PER_CHART // len(series))
    return Chart(
        title=title,
        unit=unit,
        series=[_to_pixels(one, frame, MAX_DOTS if one.as_dots else max_points) for one in series],
        x_ticks=list(zip(map(frame.x, x_ticks), tick_texts(x_ticks), strict=True)),
        y_ticks=list(zip(map(frame.y, y_ticks), y_texts, strict=True)),
        marks=[frame.x(step) for step in restarts if first <= step <= last],
        summary="; ".join(_in_words(one) for one in series),
        width=width,
        height=height,
        left=left,
    )


def _step_range(series: list[Series]) -> tuple[float, float]:
    """First and last step of the x axis, which starts at 0 and is never empty."""
    steps = [step for one in series for step, _ in one.points]
    first = min(0, *steps)
    return first, max(steps) if max(steps) > first else min(steps) + 1


def _to_pixels(series: Series, frame: Frame, max_points: int) -> DrawnSeries:
    xy = [(frame.x(step), frame.y(value)) for step, value in thin(series.points, max_points)]
    return DrawnSeries(series.name, xy, series.as_dots or len(series.points) == 1, series.style, series.faint)


def _in_words(series: Series) -> str:
    (first_step, first), (last_step, last) = series.points[0], series.points[-1]
    return f"{series.name}: {tick_text(first)} at step {first_step:g}, {tick_text(last)} at step {last_step:g}"


def smoothed(points: Points) -> Points:
    """Means over a window of a twentieth of the values, centred at each step; at both ends, over the half there is."""
    reach = len(points) // 40
    sums = [0.0, *itertools.accumulate(value for _, value in points)]
    means = []
    for i, (step, _) in enumerate(points):
        first, end = max(0, i - reach), min(len(points), i + reach + 1)
        means.append((step, (sums[end] - sums[first]) / (end - first)))
    return means


def thin(points: Points, max_points: int = MAX_POINTS) -> Points:
    """At most `max_points` points: both ends, and the lowest and highest of each stretch, so that no spike is lost."""
    if len(points) <= max_points:
        return points
    num_stretches = max_points // 2 - 1
    kept = {0, len(points) - 1}
    for i in range(num_stretches):
        stretch = range(len(points) * i // num_stretches, len(points) * (i + 1) // num_stretches)
        kept |= {min(stretch, key=lambda at: points[at][1]), max(stretch, key=lambda at: points[at][1])}
    return [points[at] for at in sorted(kept)]


def ticks(low: float, high: float, about: int) -> list[float]:
    """About `about` evenly spaced round numbers, from at most `low` to at least `high`.

    Their distance is 1, 2 or 5 times a power of ten.
    """
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def tick_texts(values: Sequence[float]) -> list[str]:
    """Texts with as many digits as all values need to be exact, so that 12345 and 12346 are not both 12.35k."""
    exact = (digits for digits in range(4, 13) if all(float(f"{value:.{digits}g}") == value for value in values))
    digits = next(exact, 13)
    return [tick_text(value, digits) for value in values]


def tick_text(value: float, digits: int = 4) -> str:
    """A short text: 0.25 -> "0.25", 12345 -> "12.35k", 2e-4 -> "2e-4"."""
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.{digits}g}{letter}"
    if size >= 1e-3 or not value:
        return f"{value:.{digits}g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
