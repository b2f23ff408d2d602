"""The cost of measuring and logging a step: milliseconds on rank 0, and their fraction of the step.

    python benchmarks/metrics_cost.py

Two CPU ranks, fsdp, the embedded base, every step logged. Counted is the wall time that training waits for: summing the
clocks, gathering the ranks' numbers, writing the line, the trackers, the progress line, and counting right tokens. The
ranks wait for each other before the gather, which is not counted: otherwise a rank that is early would wait in the
gather.
"""

import json
import pkgutil
import statistics
import tempfile
import time
from pathlib import Path

from common import run_recipe

FLAGS = "--max_steps 40 --warmup_steps 2 --eval_fraction 0 --dataset_test_split none --save_steps 0 --sample_prompt"
PARTS = {  # function in lora_dist: what it does
    "training.loop:rank_metrics": "ranks' metrics gathered",
    "training.loop:step_metrics": "the step's metrics",
    "tracking.metrics:MetricsLog.log": "metrics.jsonl and the tracker",
    "training.terminal:ProgressLine.update": "the progress line",
    "data.tasks:Task.num_correct": "right tokens counted",
}


def clocked(folder: Path):
    """A patch: rank 0 writes the seconds of each part, and of the whole step, to `folder`/steps.json."""

    def patch(rank: int) -> None:
        import torch.distributed as dist

        import lora_dist.training.session

        seconds: dict[str, float] = dict.fromkeys([*PARTS, "step"], 0.0)
        steps = []

        def clock(owner, name: str, key: str) -> None:
            original = getattr(owner, name)

            def timed(*args, **kwargs):
                if name == "rank_metrics":
                    dist.barrier()
                started = time.perf_counter()
                try:
                    return original(*args, **kwargs)
                finally:
                    seconds[key] += time.perf_counter() - started

            setattr(owner, name, timed)

        for key in PARTS:
            module, path = key.split(":")
            owner, _, name = path.rpartition(".")
            clock(pkgutil.resolve_name(f"lora_dist.{module}:{owner}"), name, key)
        clock(lora_dist.training.loop, "train_step", "step")
        update = lora_dist.training.loop.ProgressLine.update

        def step_done(*args, **kwargs):
            update(*args, **kwargs)
            steps.append(dict(seconds))
            seconds.update(dict.fromkeys(seconds, 0.0))
            if rank == 0:
                (folder / "steps.json").write_text(json.dumps(steps))

        lora_dist.training.loop.ProgressLine.update = step_done

    return patch


def measure(report_to: str) -> dict[str, float]:
    """Median milliseconds of each part, over all steps except the first five."""
    with tempfile.TemporaryDirectory() as name:
        flags = [*FLAGS.split(), "", "--report_to", report_to, "--output_dir", f"{name}/run"]
        env = {"ACCELERATE_MIXED_PRECISION": "bf16", "WANDB_MODE": "offline"}
        run_recipe(*flags, strategy="fsdp", env=env, patch=clocked(Path(name)))
        steps = json.loads(Path(f"{name}/steps.json").read_text())[5:]
    return {key: 1000 * statistics.median(step[key] for step in steps) for key in steps[0]}


def main():
    print(
        "| tracker | " + " | ".join(f"{what}, ms" for what in PARTS.values()) + " | total, ms | step, ms | fraction |"
    )
    print("|---" * (len(PARTS) + 4) + "|")
    for report_to in ("none", "wandb", "tensorboard", "none", "wandb", "tensorboard"):
        parts = measure(report_to)
        step = parts.pop("step")
        cells = [report_to, *(f"{ms:.2f}" for ms in parts.values()), f"{sum(parts.values()):.2f}", f"{step:.0f}"]
        print("| " + " | ".join([*cells, f"{sum(parts.values()) / step:.2%}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
