"""metrics.jsonl is the truth, Weights & Biases its mirror. Rank 0 only."""

import contextlib
import json
import netrc
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import ParseResult, urlparse

from accelerate import Accelerator

from lora_dist import preemption
from lora_dist.config import TrainConfig
from lora_dist.run_folder import RunFolder

PROJECT = "lora-dist"


class MetricsLog:
    """One line on the disk per call to `log`, mirrored to the trackers of the accelerator. Nothing on other ranks.

    Where the disk is full, lines wait in memory until there is room.
    """

    def __init__(self, folder: RunFolder, accelerator: Accelerator, config: TrainConfig, wandb_config: dict):
        self.accelerator, self.waiting, self.failed = accelerator, b"", False
        self.file = open(folder.metrics, "ab", buffering=0) if accelerator.is_main_process else None
        if self.file and config.report_to == "wandb":
            _start_wandb(folder, accelerator, wandb_config)

    def log(self, values: dict, step: int) -> None:
        """`values`: metric name to number, as docs/metrics.md lists them; `step`: optimizer steps done."""
        if self.file:
            line = json.dumps({"train/global_step": step, "time": round(time.time(), 3), **values}) + "\n"
            self.waiting += line.encode()
            self._write()
            with self._mirror():
                self.accelerator.log({"train/global_step": step, **values}, step=step)

    @contextlib.contextmanager
    def _mirror(self) -> Iterator[None]:
        """Whatever becomes of the mirror, the run goes on: Slurm's SIGTERM ends wandb's own process before ours."""
        try:
            yield
        except Exception as error:
            self.accelerator.trackers.clear()
            why = f"{type(error).__name__}: {error}"
            print(f"warning: wandb is gone ({why}); metrics.jsonl goes on", file=sys.stderr, flush=True)

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
            self._write()
            self.file.close()
            with self._mirror():  # not accelerator.end_training, which also leaves the process group
                for tracker in self.accelerator.trackers:
                    tracker.finish()


def _start_wandb(folder: RunFolder, accelerator: Accelerator, wandb_config: dict) -> None:
    """One run, online where there is an account and a server that answers, else kept on disk: training never waits."""
    import wandb

    server = urlparse(wandb.setup().settings.base_url)  # WANDB_BASE_URL and settings files included
    offline = "WANDB_MODE" not in os.environ and not (_has_credentials(server.hostname) and _answers(server))
    try:
        _init_wandb(wandb, folder, accelerator, wandb_config, offline)
    except wandb.errors.Error as error:  # CommError, AuthenticationError, UsageError
        accelerator.print(f"wandb: no answer from the server ({str(error).splitlines()[0]}): keeping the run on disk")
        wandb.teardown()
        accelerator.trackers.clear()  # else the one that failed is started again
        _init_wandb(wandb, folder, accelerator, wandb_config, offline=True)
    run = accelerator.get_tracker("wandb", unwrap=True)
    folder.wandb_run_id = run.id
    folder.write_state("running", folder.read_state()["step"])
    run.define_metric("train/global_step")
    for group in ("train", "eval", "perf", "checkpoint"):
        run.define_metric(f"{group}/*", step_metric="train/global_step")
    if run.offline:
        accelerator.print(f"wandb: offline; upload with: wandb sync {Path(run.dir).parent}")
    else:
        accelerator.print(f"wandb: {run.url}")


def _init_wandb(wandb, folder: RunFolder, accelerator: Accelerator, wandb_config: dict, offline: bool) -> None:
    settings = wandb.Settings(
        init_timeout=15, finish_timeout=60, x_transaction_log_flush_interval=1, silent=True,
        stop_fn=preemption.ask_to_stop,  # its own would interrupt this rank alone
    )  # fmt: skip
    if offline:  # else WANDB_MODE decides
        settings.mode = "offline"
    init = {"dir": str(folder.root), "name": folder.root.name, "job_type": "train", "settings": settings}
    init |= {"id": folder.wandb_run_id, "resume": "allow"}  # one run, however often it was interrupted
    accelerator.init_trackers(PROJECT, config=wandb_config, init_kwargs={"wandb": init})


def _has_credentials(host: str) -> bool:
    """Whether wandb would find a key, without its prompt on a terminal or its wait for the server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _answers(server: ParseResult) -> bool:
    """Whether something listens there: wandb.init alone would try for a minute and a half."""
    port = server.port or (443 if server.scheme == "https" else 80)
    try:
        socket.create_connection((server.hostname, port), timeout=2).close()
        return True
    except OSError:
        return False
