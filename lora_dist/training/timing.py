"""Where the time of a step goes, on this rank."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch


class Stopwatch:
    """Seconds of each part of a step. A profile shows the parts under the same names.

    On a GPU by the device's own events, as the host runs ahead of it; but "data" is the host's wait. `gather_wait_s`:
    what this rank has waited for gathers since loading; it is taken out of the parts they lie in, where it is known.
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
            start, waited_s, started = (
                _event() if on_device else None,
                self._gather_wait_s() or 0.0,
                time.perf_counter(),
            )
            try:
                yield
            finally:
                if on_device:
                    self._events.append((name, start, _event()))
                else:
                    waited_s = (self._gather_wait_s() or 0.0) - waited_s
                    self._seconds[name] += time.perf_counter() - started - waited_s

    def seconds(self) -> dict[str, float]:
        """Part to seconds so far; without "gather" where its time is not known. Waits for the device."""
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
