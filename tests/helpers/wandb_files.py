"""A short run with Weights & Biases, and what its client wrote, read back with its own reader."""

import json
import subprocess
import sys
from pathlib import Path

from lora_dist.run.folder import STEP, RunFolder

FLAGS = ("--max_steps", "24", "--warmup_steps", "2", "--max_length", "64", "--per_device_train_batch_size", "2")
FLAGS += ("--gradient_accumulation_steps", "2", "--eval_fraction", "0.02", "--dataset_test_split", "none")
FLAGS += ("--save_steps", "5", "--eval_steps", "10", "--num_eval_samples", "1", "--sample_prompt", "")
OFFLINE = {"WANDB_MODE": "offline"}


def inspect(directory: Path) -> list[dict]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(directory)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in shown.splitlines() if line.startswith("{")]


def history(folder: RunFolder) -> list[dict]:
    """The rows of all starts, as `wandb sync` would send them."""
    rows = [
        record["history"]["item"] for path in folder.wandb_pending() for record in inspect(path) if "history" in record
    ]
    return [row for row in rows if STEP in row]
