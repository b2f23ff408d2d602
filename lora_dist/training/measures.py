"""What is measured of a step that is logged: names as in metric_names.py."""

import math
import resource

import torch

from lora_dist.model.flops import peak_tflops, step_work
from lora_dist.parallel.exact_sum import of_all_ranks
from lora_dist.tracking.metric_names import MOST_RANKS
from lora_dist.training.checkpoint import Progress
from lora_dist.training.step import StepResult, Training


def step_metrics(run: Training, result: StepResult, progress: Progress, step_time_s: float) -> dict[str, float]:
    """Of one step, and what was seen until then. A bad step has no loss: JSON knows no NaN."""
    batches, values, ranks = run.micro_batches, {}, run.accelerator.num_processes
    sequences = batches.per_step * batches.sequences
    if batches.per_epoch:  # of a stream it is not known
        values = {"train/epoch": progress.step * sequences / batches.per_epoch}
    measured = {"train/loss": result.loss, "train/grad_norm": result.grad_norm}
    if not result.bad:
        measured["train/mean_token_accuracy"] = result.accuracy
    return {
        **values,
        **{name: value for name, value in measured.items() if math.isfinite(value)},
        "train/learning_rate": run.scheduler.get_last_lr()[0],  # of the next step
        "train/tokens_seen": progress.tokens_seen,
        "train/trainable_tokens_seen": progress.trained_tokens_seen,
        "train/skipped_steps": progress.skipped_steps,
        "train/loss_spikes": progress.loss_spikes,
        "perf/step_time_s": step_time_s,
        **{f"perf/{part}_time_s": seconds for part, seconds in result.parts_s.items()},
        "perf/tokens_per_second": result.num_tokens / step_time_s,
        "perf/padded_tokens_per_second": result.num_positions / step_time_s,
        "perf/tokens_per_second_per_rank": result.num_tokens / step_time_s / ranks,
        "perf/trainable_tokens_per_second": result.num_trained_tokens / step_time_s,
        "perf/samples_per_second": sequences / step_time_s,
        "perf/padding_fraction": 1 - result.num_tokens / result.num_positions,
        **_work(run, result, step_time_s),
    }


def _work(run: Training, result: StepResult, step_time_s: float) -> dict[str, float]:
    if run.base_work is None:
        return {}
    trained = sum(param.numel() for param in run.params if param.dim() == 2)
    work = step_work(run.base_work, trained, result.num_positions, result.num_pairs)
    tflops = work.needed / step_time_s / run.accelerator.num_processes / 1e12
    values = {
        "perf/tflops_per_rank": tflops,
        "perf/recompute_fraction": work.recomputed / (work.needed + work.recomputed),
    }
    device = run.accelerator.device
    if device.type == "cuda":
        peak = peak_tflops(torch.cuda.get_device_name(device), run.accelerator.mixed_precision)
        values |= {"perf/mfu": tflops / peak} if peak else {}
    return values


def rank_metrics(run: Training, result: StepResult, hosts: list[str]) -> dict[str, float | str]:
    """What differs from rank to rank. Collective.

    `hosts`: of each rank. Above MOST_RANKS the ranks' own numbers become their least, mean and greatest.
    """
    device = run.accelerator.device
    names = ["perf/reduce_time_s", "memory/peak_allocated_gib"]
    mine = [result.parts_s.get("reduce", 0.0), peak_memory_bytes(device) / 2**30]
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        names += ["memory/peak_reserved_gib"]
        mine += [torch.cuda.max_memory_reserved(device) / 2**30, stats["num_alloc_retries"], stats["num_ooms"]]
    return summarise(names, of_all_ranks(mine, device), hosts)


def summarise(names: list[str], ranks: list[list[float]], hosts: list[str]) -> dict[str, float | str]:
    """`ranks`: a row for each rank: a column for each of `names`; on a GPU the allocator's retries and failures too."""
    values: dict[str, float | str] = {}
    for name, numbers in zip(names, zip(*ranks, strict=True), strict=False):
        group, _, what = name.partition("/")
        if len(ranks) <= MOST_RANKS:
            values |= {f"{group}/rank{rank}/{what}": number for rank, number in enumerate(numbers)}
        if group == "memory":
            values[f"memory/max_{what}"] = max(numbers)
            if len(ranks) > MOST_RANKS:
                values |= {f"memory/min_{what}": min(numbers), f"memory/mean_{what}": sum(numbers) / len(numbers)}
    first, peaks = ([row[column] for row in ranks] for column in (0, 1))
    slowest, worst = first.index(min(first)), peaks.index(max(peaks))
    if len(ranks) > 1:
        values["perf/slowest_rank"] = f"rank {slowest} ({hosts[slowest]})"
        values["memory/worst_rank"] = f"rank {worst} ({hosts[worst]})"
    if len(ranks[0]) > len(names):
        retries, ooms = (sum(row[column] for row in ranks) for column in (-2, -1))
        values |= {"memory/alloc_retries": retries, "memory/ooms": ooms}
    return values


def peak_memory_bytes(device: torch.device) -> int:
    """This rank's peak: of allocated GPU memory, or of the process where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
