"""One line that says how far a run is: redrawn on a terminal, now and then in a log file."""

import datetime
import statistics
import sys
import time
from collections import deque

from tqdm import tqdm

from lora_dist.training.step import StepResult

EVERY_S = 30.0  # a line, where there is no terminal
RECENT_STEPS = 20  # that the time left is reckoned from


class ProgressLine:
    """Of rank 0; the others show nothing."""

    def __init__(self, num_steps: int, step: int, *, shown: bool):
        self.num_steps, self.shown = num_steps, shown
        self._times_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self._said_s = time.monotonic()
        on_terminal = shown and sys.stderr.isatty()
        bar_format = "{percentage:3.0f}%|{bar:20}| {desc}"
        self._bar = tqdm(total=num_steps, initial=step, bar_format=bar_format) if on_terminal else None

    def update(self, step: int, result: StepResult, step_time_s: float, peak_bytes: int) -> None:
        """`step` steps are done. `peak_bytes`: of this rank's memory."""
        if not self.shown:
            return
        self._times_s.append(step_time_s)
        left_s = (self.num_steps - step) * statistics.fmean(self._times_s)
        line = (
            f"step {step}/{self.num_steps}  loss {result.loss:.4f}  {result.num_tokens / step_time_s:,.0f} tokens/s  "
            f"peak {peak_bytes / 2**30:.2f} GiB  {datetime.timedelta(seconds=round(left_s))} left"
        )
        if self._bar is not None:
            self._bar.set_description_str(line, refresh=False)
            self._bar.update()
        elif time.monotonic() - self._said_s >= EVERY_S:
            self._said_s = time.monotonic()
            print(line, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
