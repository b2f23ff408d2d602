"""What it costs a step to be measured and logged: milliseconds on rank 0, and their share of the step.

    python benchmarks/metrics_cost.py

Two CPU ranks, fsdp, the embedded base, every step logged. Wall time of what training waits for: reading the clocks'
sums, the ranks' gather, the line on the disk, the mirrors, the line for people, and the count of tokens that are right.
The ranks meet before they gather, uncounted: a rank that is early waits there and not in the next step's first gather.
"""

import json
import pkgutil
import statistics
import tempfile
import time
from pathlib import Path

from common import run_recipe

FLAGS = "--max_steps 40 --warmup_steps 2 --eval_fraction 0 --dataset_test_split none --save_steps 0 --sample_prompt"
PARTS = {  # of lora_dist
    "training.loop:rank_metrics": "the ranks' numbers, gathered",
    "training.loop:step_metrics": "the step's numbers",
    "tracking.metrics:MetricsLog.log": "metrics.jsonl and the mirror",
    "training.terminal:ProgressLine.update": "the line for people",
    "data.tasks:Task.num_correct": "tokens that are right",
}


def clocked(folder: Path):
    """A patch: seconds in each of PARTS and in all of a step, of rank 0."""

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
    """Median milliseconds of each part, over the steps but the first five."""
    with tempfile.TemporaryDirectory() as name:
        flags = [*FLAGS.split(), "", "--report_to", report_to, "--output_dir", f"{name}/run"]
        env = {"ACCELERATE_MIXED_PRECISION": "bf16", "WANDB_MODE": "offline"}
        run_recipe(*flags, strategy="fsdp", env=env, patch=clocked(Path(name)))
        steps = json.loads(Path(f"{name}/steps.json").read_text())[5:]
    return {key: 1000 * statistics.median(step[key] for step in steps) for key in steps[0]}


def main():
    print("| mirror | " + " | ".join(f"{what}, ms" for what in PARTS.values()) + " | all, ms | step, ms | share |")
    print("|---" * (len(PARTS) + 4) + "|")
    for report_to in ("none", "wandb", "tensorboard", "none", "wandb", "tensorboard"):
        parts = measure(report_to)
        step = parts.pop("step")
        cells = [report_to, *(f"{ms:.2f}" for ms in parts.values()), f"{sum(parts.values()):.2f}", f"{step:.0f}"]
        print("| " + " | ".join([*cells, f"{sum(parts.values()) / step:.2%}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
