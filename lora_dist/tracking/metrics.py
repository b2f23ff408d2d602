"""Logs metrics. metrics.jsonl is the record; Weights & Biases and other trackers mirror it. Rank 0 only."""

import io
import json
import os
import sys
import time
from collections.abc import Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING

import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from lora_dist.run import watchdog
from lora_dist.run.folder import STEP, RunFolder
from lora_dist.tracking.metric_names import PROJECT

if TYPE_CHECKING:
    from lora_dist.tracking.wandb_run import WandbMirror


class MetricsLog:
    """Writes one line to metrics.jsonl per call of `log`, and sends it to the trackers that `report_to` names.

    On ranks other than 0 all methods do nothing. If the disk is full, lines wait in memory until there is room. A
    tracker that fails is dropped with a warning. Use it as a context manager: it closes the file and the trackers.

    `start` describes this start of the run, for starts.jsonl; `hosts[r]` is rank r's host.
    """

    def __init__(self, folder: RunFolder, report_to: str, *, rank: int, start: dict, hosts: list[str]):
        self.folder, self.hosts = folder, hosts
        self.unwritten = b""  # lines that are not on the disk yet
        self.disk_failed = False  # at the last attempt to write
        self.writes = rank == 0
        self.wandb: WandbMirror | None = None
        self.trackers: dict[str, GeneralTracker] = {}
        if not self.writes:
            return
        folder.record_start(start)
        for name in report_to.split(","):
            try:
                self._start_mirror(name)
            except Exception as error:
                _warn_dropped(name, error)

    @cached_property
    def file(self) -> io.FileIO:
        """metrics.jsonl. Opened at the first line: `RunFolder.begin_training` puts another file in its place."""
        return open(self.folder.metrics, "ab", buffering=0)

    def _start_mirror(self, name: str) -> None:
        if name == "wandb" and os.environ.get("WANDB_MODE") != "disabled":
            from lora_dist.tracking import wandb_run  # takes a third of a second, which the other ranks can save

            self.wandb = wandb_run.WandbMirror(self.folder, print_line=partial(print, flush=True))
            watchdog.call_on_failure(self.wandb.fail)
        elif name not in ("wandb", "none"):
            self.trackers[name] = _start_tracker(name, self.folder)

    def log(self, values: dict, step: int) -> None:
        """Log metrics by name, as docs/metrics.md lists them. `step`: optimizer steps completed."""
        if not self.writes:
            return
        line = json.dumps({STEP: step, "time": round(time.time(), 3), **values}) + "\n"
        self.unwritten += line.encode()
        self._write()
        values = {STEP: step, **values}
        self._to_wandb(lambda mirror: mirror.log(values, step))
        numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
        self._to_trackers(lambda tracker: tracker.log(numbers, step=step))

    def log_samples(self, samples: list[dict], step: int) -> None:
        """Log completions to samples.jsonl and W&B. Each sample has "prompt", "reference" and "completion"."""
        if self.writes and samples:
            self.folder.append_lines(self.folder.samples, [{STEP: step, **sample} for sample in samples])
            self._to_wandb(lambda mirror: mirror.log_samples(samples, step))

    def alert(self, title: str, text: str) -> None:
        """Have Weights & Biases send a mail or a Slack message."""
        self._to_wandb(lambda mirror: mirror.alert(f"{self.folder.root.name}: {title}", text))

    def log_adapter(self) -> None:
        """Store the run's `adapter/` in Weights & Biases, as an artifact."""
        self._to_wandb(lambda mirror: mirror.log_adapter())

    def _to_wandb(self, act: Callable[["WandbMirror"], None]) -> None:
        """The run continues if W&B fails: Slurm's SIGTERM, for example, ends wandb's own process before ours."""
        try:
            if self.wandb:
                act(self.wandb)
        except Exception as error:
            self.wandb = None
            _warn_dropped("wandb", error)

    def _to_trackers(self, act: Callable[[GeneralTracker], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                act(tracker)
            except Exception as error:
                del self.trackers[name]
                _warn_dropped(name, error)

    def _write(self) -> None:
        """Write all lines that wait; warn at the first failure in a row."""
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
            self.disk_failed = False
        except OSError as error:
            if not self.disk_failed:
                why = "its lines are kept in memory until there is room"
                print(f"warning: {self.folder.metrics}: {error.strerror}: {why}", file=sys.stderr, flush=True)
            self.disk_failed = True

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if self.writes:
            watchdog.call_on_failure(None)
            self._write()
            if "file" in vars(self):
                self.file.close()
            why = None if error is None else f"{error_type.__name__}: {error}"
            self._to_wandb(lambda mirror: mirror.finish(why=why))
            self._to_trackers(lambda tracker: tracker.finish())


def _warn_dropped(name: str, error: Exception) -> None:
    why = f"{type(error).__name__}: {error}"
    text = f"warning: {name} failed ({why}); the run continues, and metrics.jsonl has all metrics"
    print(text, file=sys.stderr, flush=True)


def _start_tracker(name: str, folder: RunFolder) -> GeneralTracker:
    """Start one of accelerate's trackers. It gets the settings as numbers and strings: some accept nothing else."""
    tracker_class, settings = LOGGER_TYPE_TO_CLASS[name], yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    if tracker_class.requires_logging_directory:
        options = {"purge_step": folder.step + 1} if name == "tensorboard" and folder.step else {}
        tracker = tracker_class(name, folder.root, **options)
    elif name == "trackio":
        tracker = tracker_class(PROJECT, name=folder.root.name, resume="allow", embed=False)
    else:
        tracker = tracker_class(PROJECT)
    tracker.start()
    plain = {key: value if isinstance(value, int | float) else str(value) for key, value in settings.items()}
    tracker.store_init_configuration(plain)
    return tracker
