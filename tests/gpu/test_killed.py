"""On one GPU: a run that is killed and continued ends with the bytes of a run that is not. Not run: no GPU."""

import signal
import time

import pytest
import torch

from lora_dist.run.folder import RunFolder
from tests.helpers.ranks import start_rank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
FLAGS = ("--model_name_or_path", "embedded", "--dataset_name", "embedded", "--dataset_text_field", "quote")
FLAGS += ("--max_steps", "60", "--warmup_steps", "5", "--max_length", "64", "--save_steps", "5", "--report_to", "none")


def start(folder: RunFolder):
    env = {"ACCELERATE_MIXED_PRECISION": "bf16", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return start_rank(0, *FLAGS, "--output_dir", str(folder.root), num_ranks=1, env=env)


def finish(folder: RunFolder) -> bytes:
    process = start(folder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    return (folder.adapter / "adapter_model.safetensors").read_bytes()


def test_a_killed_run_ends_with_the_bytes_of_the_undisturbed_one(tmp_path):
    whole, killed = finish(RunFolder(tmp_path / "whole")), RunFolder(tmp_path / "killed")
    process, deadline = start(killed), time.monotonic() + 120
    while not killed.checkpoint(10).exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert finish(killed) == whole
    assert killed.read_state()["restarts"] == 1
