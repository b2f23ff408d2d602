"""Run folders as training leaves them, for the tests of the pages, and the page of one."""

import dataclasses
import json
import math
from pathlib import Path

from lora_dist.config import TrainConfig
from lora_dist.run.folder import STEP, RunFolder
from lora_dist.tracking.record import RunRecord
from lora_dist.tracking.report import write_report

GIB = 2**30
SUMMARY = {
    "world_size": 2, "strategy": "fsdp", "base_bytes_total": 100 * 2**20, "base_bytes_per_rank": 50 * 2**20,
    "tokens_per_second": 1234.5, "trainable_params": 49152, "load_s": 2.0,
    "peak_memory_bytes_per_rank": [3 * GIB, 2 * GIB], "memory_before_bytes_per_rank": [GIB, GIB],
    "expected": {"base_bytes_per_rank": 50 * 2**20, "peak_bytes_per_rank": GIB // 2},
}  # fmt: skip
START = {
    "time": 1000.0, "step": 0, "strategy": "fsdp", "num_ranks": 2, "hosts": ["node1"], "device": "cpu",
    "mixed_precision": "bf16", "versions": {"torch": "2.13.0"}, "git_commit": "abc", "slurm_job_id": None,
    "previous": None,
}  # fmt: skip
AGAIN = {**START, "time": 1060.0, "step": 4, "num_ranks": 3, "versions": {"torch": "2.13.1"},
         "previous": {"status": "running", "error": None}}  # fmt: skip


def step_line(step: int, **values) -> dict:
    parts = {"data": 0.1, "gather": 0.2, "forward": 0.3, "backward": 0.5, "reduce": 0.1, "update": 0.05}
    timed = {f"perf/{part}_time_s": seconds for part, seconds in parts.items()}
    return {
        STEP: step, "time": 1000.0 + 10 * step, "train/loss": 3 - step / 10, "perf/step_time_s": 1.5, **timed,
        "perf/rank0/reduce_time_s": 0.1, "perf/rank1/reduce_time_s": 0.3, **values,
    }  # fmt: skip


def make_folder(root: Path, config: TrainConfig) -> RunFolder:
    """The folder of a run that was started twice and is complete."""
    folder = RunFolder(root)
    folder.root.mkdir()
    folder.num_steps, folder.restarts = 10, 1
    folder.write_config(dataclasses.replace(config, output_dir=str(folder.root), lora_r=7))
    folder.write_state("completed", 10, SUMMARY)
    lines = [{STEP: 0, "time": 1000.0, "eval/loss": math.log(15), "eval/perplexity": 15.0, "eval/time_s": 2.0}]
    lines += [step_line(step) for step in range(1, 11)]
    lines.append({STEP: 10, "time": 1120.0, "eval/loss": math.log(6), "eval/perplexity": 6.0, "eval/time_s": 3.0})
    lines.append({STEP: 10, "time": 1121.0, "checkpoint/save_time_s": 0.5, "checkpoint/write_time_s": 9.0})
    folder.append_lines(folder.metrics, lines)
    folder.append_lines(folder.starts, [START, AGAIN])
    sample = {"prompt": "Two <things>", "reference": "are & were"}
    texts = {0: "before", 5: "between", 10: "after <b>all</b>"}
    folder.append_lines(folder.samples, [{STEP: step, **sample, "completion": text} for step, text in texts.items()])
    return folder


def page(folder: RunFolder) -> str:
    write_report(folder)
    return folder.report.read_text(encoding="utf-8")


def another(folder: RunFolder, name: str, **changes) -> RunFolder:
    other = RunFolder(folder.root.parent / name)
    other.root.mkdir()
    config = RunRecord(folder).config | changes
    other.config.write_text(json.dumps(config))
    other.write_state("completed", 10, SUMMARY)
    lines = [
        line | {name: line[name] + 1 for name in ("train/loss",) if name in line} for line in folder.read_metrics()
    ]
    other.append_lines(other.metrics, lines)
    return other
