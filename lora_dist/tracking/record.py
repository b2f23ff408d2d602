"""The record of one run: what its folder holds, read for a report or a status."""

import math
from dataclasses import dataclass
from functools import cached_property

import yaml

from lora_dist.run.folder import STEP, RunFolder


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder, read when it is first asked for. What is missing is empty or None, not guessed."""

    folder: RunFolder

    @cached_property
    def config(self) -> dict:
        return yaml.safe_load(self.folder.config.read_text(encoding="utf-8"))

    @cached_property
    def state(self) -> dict:
        return self.folder.read_state()

    @property
    def summary(self) -> dict:
        return self.state.get("summary") or {}

    @cached_property
    def lines(self) -> list[dict]:
        """The lines of metrics.jsonl."""
        return self.folder.read_metrics()

    @cached_property
    def starts(self) -> list[dict]:
        return self.folder.read_lines(self.folder.starts)

    @cached_property
    def samples(self) -> list[dict]:
        return self.folder.read_lines(self.folder.samples)

    @property
    def name(self) -> str:
        return self.folder.root.resolve().name

    @property
    def step(self) -> int:
        """The last step that was saved or logged."""
        return max([self.state.get("step") or 0, *(line[STEP] for line in self.lines[-1:])])

    @property
    def restarts(self) -> int:
        return self.state.get("restarts") or max(len(self.starts) - 1, 0)

    def series(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of each line that has the metric. Values that are not finite are left out."""
        return [(line[STEP], line[metric]) for line in self.lines if is_finite_number(line.get(metric))]

    def total(self, metric: str) -> float:
        return sum(value for _, value in self.series(metric))

    def first(self, metric: str) -> float | None:
        return next((line[metric] for line in self.lines if is_finite_number(line.get(metric))), None)

    def last(self, metric: str) -> float | None:
        return next((line[metric] for line in reversed(self.lines) if is_finite_number(line.get(metric))), None)


def is_finite_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def rank_of(metric: str) -> int:
    """The rank in the name of a per-rank metric: "memory/rank3/peak_allocated_gib" -> 3."""
    return int(metric.split("/")[1].removeprefix("rank"))
