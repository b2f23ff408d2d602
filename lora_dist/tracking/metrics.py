"""metrics.jsonl is the truth; Weights & Biases and other trackers are its mirrors. Rank 0 only."""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from lora_dist.run import watchdog
from lora_dist.run.folder import STEP, RunFolder
from lora_dist.tracking.metric_names import PROJECT

if TYPE_CHECKING:
    from lora_dist.tracking.wandb_run import WandbRun


class MetricsLog:
    """One line on the disk per call to `log`, mirrored to what `report_to` names. Nothing where rank is not 0.

    Where the disk is full, lines wait in memory until there is room. `start`: how this start of the run was made.
    `hosts`: of each rank.
    """

    def __init__(self, folder: RunFolder, report_to: str, *, rank: int, start: dict, hosts: list[str]):
        self.folder, self.hosts, self.waiting, self.failed = folder, hosts, b"", False
        self.file = open(folder.metrics, "ab", buffering=0) if rank == 0 else None
        self.wandb: WandbRun | None = None
        self.trackers: dict[str, GeneralTracker] = {}
        if not self.file:
            return
        folder.record_start(start)
        for name in report_to.split(","):
            try:
                self._start_mirror(name)
            except Exception as error:
                _warn_gone(name, error)

    def _start_mirror(self, name: str) -> None:
        if name == "wandb" and os.environ.get("WANDB_MODE") != "disabled":
            from lora_dist import wandb_run  # a third of a second, which the other ranks need not wait

            self.wandb = wandb_run.WandbRun(self.folder, say=partial(print, flush=True))
            watchdog.at_failure = self.wandb.fail
        elif name not in ("wandb", "none"):
            self.trackers[name] = _start_tracker(name, self.folder)

    def log(self, values: dict, step: int) -> None:
        """`values`: metric name to value, as docs/metrics.md lists them; `step`: optimizer steps done."""
        if not self.file:
            return
        line = json.dumps({STEP: step, "time": round(time.time(), 3), **values}) + "\n"
        self.waiting += line.encode()
        self._write()
        values = {STEP: step, **values}
        self._to_wandb(lambda run: run.log(values, step))
        numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
        self._to_trackers(lambda tracker: tracker.log(numbers, step=step))

    def log_samples(self, samples: list[dict], step: int) -> None:
        """`samples`: {"prompt", "reference", "completion"} each."""
        if self.file and samples:
            self.folder.append_lines(self.folder.samples, [{STEP: step, **sample} for sample in samples])
            self._to_wandb(lambda run: run.log_samples(samples, step))

    def alert(self, title: str, text: str) -> None:
        """Tell whoever watches from afar: Weights & Biases sends mail or Slack messages."""
        self._to_wandb(lambda run: run.alert(f"{self.folder.root.name}: {title}", text))

    def log_adapter(self) -> None:
        """The run's `adapter/`, as an artifact of Weights & Biases."""
        self._to_wandb(lambda run: run.log_adapter())

    def _to_wandb(self, act: Callable[["WandbRun"], None]) -> None:
        """Whatever becomes of a mirror, the run goes on: Slurm's SIGTERM ends wandb's own process before ours."""
        try:
            if self.wandb:
                act(self.wandb)
        except Exception as error:
            self.wandb = None
            _warn_gone("wandb", error)

    def _to_trackers(self, act: Callable[[GeneralTracker], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                act(tracker)
            except Exception as error:
                del self.trackers[name]
                _warn_gone(name, error)

    def _write(self) -> None:
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
            self.failed = False
        except OSError as error:
            if not self.failed:
                why = "its lines are kept until there is room"
                print(f"warning: {self.file.name}: {error.strerror}: {why}", file=sys.stderr, flush=True)
            self.failed = True

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if self.file:
            watchdog.at_failure = None
            self._write()
            self.file.close()
            why = None if error is None else f"{error_type.__name__}: {error}"
            self._to_wandb(lambda run: run.finish(why=why))
            self._to_trackers(lambda tracker: tracker.finish())


def _warn_gone(name: str, error: Exception) -> None:
    why = f"{type(error).__name__}: {error}"
    print(f"warning: {name} is gone ({why}); metrics.jsonl goes on", file=sys.stderr, flush=True)


def _start_tracker(name: str, folder: RunFolder) -> GeneralTracker:
    """One of accelerate's. It has the settings as plain values: some take no others."""
    tracker_class, settings = LOGGER_TYPE_TO_CLASS[name], yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    if tracker_class.requires_logging_directory:
        begins = {"purge_step": folder.step + 1} if name == "tensorboard" and folder.step else {}
        tracker = tracker_class(name, folder.root, **begins)
    elif name == "trackio":
        tracker = tracker_class(PROJECT, name=folder.root.name, resume="allow", embed=False)
    else:
        tracker = tracker_class(PROJECT)
    tracker.start()
    plain = {key: value if isinstance(value, int | float) else str(value) for key, value in settings.items()}
    tracker.store_init_configuration(plain)
    return tracker
