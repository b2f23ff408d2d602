"""Where the time of a step goes: a stopwatch for every step, and the profile of `--profile_steps`."""

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile

from lora_dist.files import write_whole
from lora_dist.run.folder import RunFolder

NUM_PROFILE_ROWS = 10


class Stopwatch:
    """Seconds that this rank spends in each part of a step. A profile shows the parts under the same names.

    On a GPU the device's own events are timed, because the host runs ahead of it; except for "data", which is the time
    that the host waits. `gather_wait_s()` returns the seconds that this rank has waited for gathers since loading, or
    None if that is not known; they are taken out of the parts in which they happen.
    """

    def __init__(self, device: torch.device, gather_wait_s: Callable[[], float | None]):
        self._on_gpu, self._gather_wait_s = device.type == "cuda", gather_wait_s
        self._gathered_before_s = gather_wait_s()
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        on_device = self._on_gpu and name != "data"
        with torch.profiler.record_function(name):
            start = _event() if on_device else None
            waited_s, started = self._gather_wait_s() or 0.0, time.perf_counter()
            try:
                yield
            finally:
                if on_device:
                    self._events.append((name, start, _event()))
                else:
                    waited_s = (self._gather_wait_s() or 0.0) - waited_s
                    self._seconds[name] += time.perf_counter() - started - waited_s

    def seconds(self) -> dict[str, float]:
        """Part to seconds so far; "gather" is missing if its time is not known. Waits for the device."""
        seconds = defaultdict(float, self._seconds)
        for name, start, end in self._events:
            end.synchronize()
            seconds[name] += start.elapsed_time(end) / 1000
        if self._gathered_before_s is not None:
            seconds["gather"] = self._gather_wait_s() - self._gathered_before_s
        return dict(seconds)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class StepProfiler:
    """Profiles the steps FIRST to LAST, both included, of "FIRST:LAST"; does nothing for None.

    Each rank writes `profile/rank-00000.json.gz`, rank 0 also `profile/table.json`. A run that is continued after FIRST
    is profiled from the step it continues with.
    """

    def __init__(self, steps: str | None, folder: RunFolder, rank: int):
        self.first, self.last = map(int, steps.split(":")) if steps else (0, -1)
        self.folder, self.rank = folder, rank
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Call before each step; the first step of a run is 1."""
        if self.first <= step <= self.last and self._profile is None:
            self._from = step
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile = profile(activities=activities)
            self._profile.start()

    def after(self, step: int) -> None:
        """Call after each step."""
        if step >= self.last:
            self.stop(step)

    def stop(self, step: int) -> None:
        """Write what was profiled, if anything was. If the disk is full, the profile is lost and the run goes on."""
        if self._profile is None:
            return
        done, self._profile, self.last = self._profile, None, -1
        done.stop()
        with contextlib.suppress(OSError):
            self.folder.profile.mkdir(parents=True, exist_ok=True)
            done.export_chrome_trace(str(self.folder.profile / f"rank-{self.rank:05d}.json.gz"))
            if self.rank == 0:
                table = {"steps": [self._from, step], "rows": profile_rows(done.key_averages())}
                write_whole(self.folder.profile / "table.json", json.dumps(table, indent=2) + "\n")


def profile_rows(events: EventList) -> list[dict]:
    """The operations that took most time by themselves, without the operations that they call."""
    on_gpu = any(event.self_device_time_total for event in events)
    took = [(event.self_device_time_total if on_gpu else event.self_cpu_time_total, event) for event in events]
    total = sum(microseconds for microseconds, _ in took) or 1.0
    took.sort(key=lambda pair: -pair[0])
    return [
        {"what": event.key, "self_time_s": microseconds / 1e6, "share": microseconds / total, "calls": event.count}
        for microseconds, event in took[:NUM_PROFILE_ROWS]
    ]
