"""The record of one run: what its folder holds, read for a report or a status."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_dist.boundary import boundary, read_json, read_yaml_settings
from lora_dist.errors import UserError
from lora_dist.run.folder import STATUSES, STEP, RunFolder, is_count, lines_of

MAX_NUMBER = 1e100  # no measurement is larger, and charts can still add and square it
# What each entry of state.json must be to be shown.
STATE_FITS: dict[str, Callable[[object], bool]] = {
    "status": lambda value: isinstance(value, str) and value in STATUSES,
    "step": is_count,
    "restarts": is_count,
    "num_steps": lambda value: value is None or is_count(value),
    "summary": lambda value: isinstance(value, dict | None),
    "slurm_job_id": lambda value: isinstance(value, str | None),
}


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder, read when it is first asked for. What is missing is empty or None, not guessed.

    A folder is read as far as that is possible: `problems` has a line for each part that could not be read or shown.
    """

    folder: RunFolder
    problems: list[str] = field(default_factory=list)

    def part(self, what: str, read: Callable[[], Any], otherwise: Any) -> Any:
        """What `read` returns. If it fails, `otherwise`, and a line in `problems` says so."""
        try:
            with boundary(what):
                return read()
        except UserError as error:
            self.problems.append(str(error))
            return otherwise

    def part_of_file(self, path: Path, read: Callable[[Path, str], dict]) -> dict:
        """The content of a file; {} if there is none, or if it cannot be read."""
        what = str(path.relative_to(self.folder.root))
        return self.part(what, lambda: read(path, what), {}) if os.path.lexists(path) else {}

    @cached_property
    def config(self) -> dict:
        return self.part_of_file(self.folder.config, read_yaml_settings)

    @cached_property
    def state(self) -> dict:
        state = self.part_of_file(self.folder.state, read_json)
        for name in [name for name, fits in STATE_FITS.items() if name in state and not fits(state[name])]:
            self.problems.append(f"state.json: {name} is {ascii(state.pop(name))[:100]}")
        return state

    @property
    def summary(self) -> dict:
        """The summary in state.json, without numbers that are not finite."""
        found = self.state.get("summary") or {}
        return {name: value for name, value in found.items() if type(value) is not float or is_finite_number(value)}

    @cached_property
    def lines(self) -> list[dict]:
        """The lines of metrics.jsonl."""
        return self._lines(self.folder.metrics, lambda line: is_count(line.get(STEP)))

    @cached_property
    def starts(self) -> list[dict]:
        return self._lines(self.folder.starts, lambda line: is_count(line.get("step", 0)))

    @cached_property
    def samples(self) -> list[dict]:
        def fits(line: dict) -> bool:
            texts = line.get("prompt"), line.get("completion"), line.get("reference") or ""
            return is_count(line.get(STEP)) and all(isinstance(text, str) for text in texts)

        return self._lines(self.folder.samples, fits)

    @cached_property
    def bad_steps(self) -> list[dict]:
        return self._lines(self.folder.bad_steps, lambda line: is_count(line.get("step")))

    def _lines(self, path: Path, fits: Callable[[dict], bool]) -> list[dict]:
        """The lines of a file that fit. A last line that is cut off is no problem: the run may be writing it."""
        if os.path.lexists(path) and not path.is_file():
            self.problems.append(f"{path.name}: is not a file")
        found = self.part(path.name, lambda: [line for line in self.folder.read_lines(path) if fits(line)], [])
        with contextlib.suppress(OSError):
            if left_out := sum(line.endswith("\n") for line in lines_of(path)) - len(found):
                self.problems.append(f"{path.name}: {left_out} of its lines are left out; no run wrote such lines")
        return found

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
    return type(value) in (int, float) and -MAX_NUMBER < value < MAX_NUMBER


def rank_of(metric: str) -> int:
    """The rank in the name of a per-rank metric: "memory/rank3/peak_allocated_gib" -> 3."""
    return int(metric.split("/")[1].removeprefix("rank"))
