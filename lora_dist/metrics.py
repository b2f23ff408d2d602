"""metrics.jsonl is the truth, Weights & Biases its mirror. Rank 0 only."""

import json
import os
import socket
import time
from urllib.parse import urlparse

from accelerate import Accelerator

from lora_dist.config import TrainConfig
from lora_dist.run_folder import RunFolder

PROJECT = "lora-dist"


class MetricsLog:
    """One flushed line per call to `log`, mirrored to the trackers of the accelerator. Does nothing on other ranks."""

    def __init__(self, folder: RunFolder, accelerator: Accelerator, config: TrainConfig, wandb_config: dict):
        self.accelerator = accelerator
        self.file = open(folder.metrics, "a", encoding="utf-8") if accelerator.is_main_process else None
        if self.file and config.report_to == "wandb":
            _start_wandb(folder, accelerator, wandb_config)

    def log(self, values: dict, step: int) -> None:
        """`values`: metric name to number, as docs/metrics.md lists them; `step`: optimizer steps done."""
        if self.file:
            self.file.write(json.dumps({"train/global_step": step, "time": round(time.time(), 3), **values}) + "\n")
            self.file.flush()
            self.accelerator.log({"train/global_step": step, **values}, step=step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if self.file:
            self.file.close()
            for (
                tracker
            ) in self.accelerator.trackers:  # not accelerator.end_training, which also leaves the process group
                tracker.finish()


def _start_wandb(folder: RunFolder, accelerator: Accelerator, wandb_config: dict) -> None:
    import wandb

    # Without an account, or without a server that answers, the run is kept on disk: training never waits for W&B.
    offline = "WANDB_MODE" not in os.environ and not (_has_credentials(wandb) and _answers(wandb.Settings().base_url))
    settings = wandb.Settings(
        init_timeout=20,
        finish_timeout=60,
        x_transaction_log_flush_interval=1,
        silent=True,
        **({"mode": "offline"} if offline else {}),
    )
    init = {"dir": str(folder.root), "name": folder.root.name, "job_type": "train", "settings": settings}
    accelerator.init_trackers(PROJECT, config=wandb_config, init_kwargs={"wandb": init})
    run = accelerator.get_tracker("wandb", unwrap=True)
    run.define_metric("train/global_step")
    for group in ("train", "eval", "perf", "memory", "checkpoint"):
        run.define_metric(f"{group}/*", step_metric="train/global_step")
    if run.settings._offline:
        accelerator.print(
            f"wandb: offline, in {run.settings.sync_dir}; upload it with: wandb sync {run.settings.sync_dir}"
        )
    else:
        accelerator.print(f"wandb: {run.url}")


def _has_credentials(wandb) -> bool:
    return bool(wandb.login(prompt=False))


def _answers(base_url: str) -> bool:
    """Whether something listens there: wandb.init alone would try for a minute and a half."""
    url = urlparse(base_url)
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=2).close()
        return True
    except OSError:
        return False
