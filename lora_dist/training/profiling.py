"""`--profile_steps FIRST:LAST`: a trace of each rank for Perfetto, and a table of where the time went."""

import contextlib
import json

import torch
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile

from lora_dist.files import write_whole
from lora_dist.run.folder import RunFolder

NUM_ROWS = 10


class StepProfiler:
    """Profiles the steps FIRST to LAST, both included; nothing for None.

    `profile/rank-00000.json.gz` of each rank, and `profile/table.json` of rank 0. A run that goes on after FIRST is
    profiled from there.
    """

    def __init__(self, steps: str | None, folder: RunFolder, rank: int):
        self.first, self.last = map(int, steps.split(":")) if steps else (0, -1)
        self.folder, self.rank = folder, rank
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """`step`: the one that comes, from 1."""
        if self.first <= step <= self.last and self._profile is None:
            self._from = step
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile = profile(activities=activities)
            self._profile.start()

    def after(self, step: int) -> None:
        if step >= self.last:
            self.stop(step)

    def stop(self, step: int) -> None:
        """Write what was profiled, if anything was. A full disk costs the profile, not the run."""
        if self._profile is None:
            return
        done, self._profile, self.last = self._profile, None, -1
        done.stop()
        with contextlib.suppress(OSError):
            self.folder.profile.mkdir(parents=True, exist_ok=True)
            done.export_chrome_trace(str(self.folder.profile / f"rank-{self.rank:05d}.json.gz"))
            if self.rank == 0:
                table = {"steps": [self._from, step], "rows": rows(done.key_averages())}
                write_whole(self.folder.profile / "table.json", json.dumps(table, indent=2) + "\n")


def rows(events: EventList) -> list[dict]:
    """The operations that took most by themselves, not counting those that they call."""
    on_gpu = any(event.self_device_time_total for event in events)
    took = [(event.self_device_time_total if on_gpu else event.self_cpu_time_total, event) for event in events]
    total = sum(microseconds for microseconds, _ in took) or 1.0
    took.sort(key=lambda pair: -pair[0])
    return [
        {"what": event.key, "self_time_s": microseconds / 1e6, "share": microseconds / total, "calls": event.count}
        for microseconds, event in took[:NUM_ROWS]
    ]
