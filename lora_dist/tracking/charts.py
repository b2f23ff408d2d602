"""Curves over optimizer steps as the geometry of an SVG: scales, ticks, and few enough points."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_POINTS = 600  # of a line: more than a screen shows
MAX_POINTS_OF_ALL = 4 * MAX_POINTS  # of a chart's lines, so that many runs fit on a page
MAX_DOTS = 120  # more would cover each other
LETTER = 7.0  # width of a digit in pixels
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
    y_texts = tick_texts(y_ticks)
    left = max(Chart.left, math.ceil(LETTER * max(map(len, y_texts))) + 9)
    frame = Frame(width, height, (min(0, *steps), last), (min(y_ticks[0], *values), max(y_ticks[-1], *values)), left)
    most = min(MAX_POINTS, MAX_POINTS_OF_ALL // len(series))
    x_ticks = [step for step in ticks(*frame.steps, 5) if frame.steps[0] <= step <= last and step == int(step)]
    return Chart(
        title=title,
        unit=unit,
        series=[
            Drawn(
                one.name,
                [
                    (frame.x(step), frame.y(value))
                    for step, value in thin(one.points, MAX_DOTS if one.as_dots else most)
                ],
                one.as_dots or len(one.points) == 1,
                one.style,
            )
            for one in series
        ],
        x_ticks=list(zip(map(frame.x, x_ticks), tick_texts(x_ticks), strict=True)),
        y_ticks=list(zip(map(frame.y, y_ticks), y_texts, strict=True)),
        marks=[frame.x(step) for step in restarts if frame.steps[0] <= step <= last],
        summary="; ".join(_in_words(one) for one in series),
        width=width,
        height=height,
        left=left,
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


def tick_texts(values: Sequence[float]) -> list[str]:
    """With as many digits as it takes to say each exactly: 12345 and 12346 are not both 12.35k."""
    exact = (digits for digits in range(4, 13) if all(float(f"{value:.{digits}g}") == value for value in values))
    digits = next(exact, 13)
    return [tick_text(value, digits) for value in values]


def tick_text(value: float, digits: int = 4) -> str:
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.{digits}g}{letter}"
    if size >= 1e-3 or not value:
        return f"{value:.{digits}g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
