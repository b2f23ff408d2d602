"""On one GPU: times by CUDA events, MFU, reserved memory and a profile. Not run: no GPU."""

import gzip
import json

import pytest
import torch

from lora_dist.run.folder import RunFolder
from lora_dist.tracking.flops import peak_tflops
from tests.helpers.ranks import start_rank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
FLAGS = ("--model_name_or_path", "embedded", "--dataset_name", "embedded", "--dataset_text_field", "quote")
FLAGS += ("--max_steps", "12", "--warmup_steps", "2", "--save_steps", "0", "--report_to", "none")


def test_what_is_measured_of_a_step(tmp_path):
    folder = RunFolder(tmp_path / "run")
    flags = (*FLAGS, "--profile_steps", "6:7", "--output_dir", str(folder.root))
    process = start_rank(0, *flags, num_ranks=1, env={"ACCELERATE_MIXED_PRECISION": "bf16"})
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    peak = peak_tflops(torch.cuda.get_device_name(), "bf16")
    for line in [line for line in folder.read_metrics() if "train/loss" in line][4:]:
        parts = [line[f"perf/{part}_time_s"] for part in ("data", "forward", "backward", "update")]
        assert all(seconds > 0 for seconds in parts) and sum(parts) <= 1.05 * line["perf/step_time_s"]
        assert line["memory/rank0/peak_reserved_gib"] >= line["memory/rank0/peak_allocated_gib"] > 0
        assert line["memory/ooms"] == 0
        assert ("perf/mfu" in line) == bool(peak)
        assert not peak or 0 < line["perf/mfu"] == pytest.approx(line["perf/tflops_per_rank"] / peak)
    with gzip.open(folder.profile / "rank-00000.json.gz") as file:
        assert any(event.get("cat") == "kernel" for event in json.load(file)["traceEvents"])
