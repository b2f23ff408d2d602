"""What is measured: of a step that is logged, under the names of metric_names.py, and of a whole run."""

import dataclasses
import math
import resource

import torch

from lora_dist.model.adapters import parameter_counts
from lora_dist.parallel.ranks import gather, gather_numbers
from lora_dist.parallel.zero import is_partitioned
from lora_dist.tracking.flops import peak_tflops, step_work
from lora_dist.tracking.metric_names import MAX_RANKS_SHOWN
from lora_dist.training.run import Run
from lora_dist.training.step import StepResult


def step_metrics(run: Run, result: StepResult, step_time_s: float) -> dict[str, float]:
    """The metrics of a step and of the run so far. A bad step has no loss, because JSON has no NaN."""
    training, progress, ranks = run.training, run.progress, run.accelerator.num_processes
    batches, values = training.micro_batches, {}
    sequences = batches.per_step * batches.sequences
    if batches.sequences_per_epoch:  # not known for a stream
        values = {"train/epoch": progress.step * sequences / batches.sequences_per_epoch}
    measured = {"train/loss": result.loss, "train/grad_norm": result.grad_norm}
    if not result.bad:
        measured |= {f"train/{name}": value for name, value in result.measures.items()}
    return {
        **values,
        **{name: value for name, value in measured.items() if math.isfinite(value)},
        "train/learning_rate": training.scheduler.get_last_lr()[0],  # of the next step
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


def _work(run: Run, result: StepResult, step_time_s: float) -> dict[str, float]:
    """Operations per second of a step, and the share of the device's peak, if they are known."""
    if run.base.work is None:
        return {}
    trained = sum(param.numel() for param in run.training.params if param.dim() == 2)
    work = step_work(run.base.work, trained, result.num_positions, result.num_pairs)
    tflops = work.needed / step_time_s / run.accelerator.num_processes / 1e12
    values = {
        "perf/tflops_per_rank": tflops,
        "perf/recompute_fraction": work.recomputed / (work.needed + work.recomputed),
    }
    if run.device.type == "cuda":
        peak = peak_tflops(torch.cuda.get_device_name(run.device), run.accelerator.mixed_precision)
        values |= {"perf/mfu": tflops / peak} if peak else {}
    return values


def rank_metrics(run: Run, result: StepResult) -> dict[str, float | str]:
    """The metrics that differ from rank to rank. Collective."""
    names = ["perf/reduce_time_s", "memory/peak_allocated_gib"]
    mine = [result.parts_s.get("reduce", 0.0), peak_memory_bytes(run.device) / 2**30]
    if run.device.type == "cuda":
        stats = torch.cuda.memory_stats(run.device)
        names += ["memory/peak_reserved_gib"]
        mine += [torch.cuda.max_memory_reserved(run.device) / 2**30, stats["num_alloc_retries"], stats["num_ooms"]]
    return summarise(names, gather_numbers(mine, run.device), run.metrics.hosts)


def summarise(names: list[str], ranks: list[list[float]], hosts: list[str]) -> dict[str, float | str]:
    """Metrics of all ranks: one per rank, or their least, mean and greatest above MAX_RANKS_SHOWN; and the worst rank.

    `ranks[r]` holds rank r's value for each of `names`, followed on a GPU by the allocator's retries and out-of-memory
    count. `hosts[r]` is rank r's host.
    """
    values: dict[str, float | str] = {}
    for name, numbers in zip(names, zip(*ranks, strict=True), strict=False):
        group, _, what = name.partition("/")
        if len(ranks) <= MAX_RANKS_SHOWN:
            values |= {f"{group}/rank{rank}/{what}": number for rank, number in enumerate(numbers)}
        if group == "memory":
            values[f"memory/max_{what}"] = max(numbers)
            if len(ranks) > MAX_RANKS_SHOWN:
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
    """This rank's peak of allocated GPU memory; without a GPU, the peak of its process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_summary(run: Run) -> dict:
    """The `summary` of state.json. None stands for what was not measured. Collective."""
    trainable, total = parameter_counts(run.model)
    counted = run.last_step and not is_partitioned(run.model)  # DeepSpeed does not say what it gathers
    peaks = gather((peak_memory_bytes(run.device), run.base.memory_before_bytes))
    return {
        "world_size": run.accelerator.num_processes,
        "strategy": run.strategy.name,
        "quantization": run.config.quantization,
        "base_bytes_total": run.base.num_bytes.total,
        "base_bytes_per_rank": run.base.num_bytes.held,
        "expected": dataclasses.asdict(run.base.expected),
        "trainable_params": trainable,
        "all_params": total,
        "effective_batch_sequences": run.config.per_device_train_batch_size * run.training.micro_batches.per_step,
        "peak_memory_bytes_per_rank": [peak for peak, _ in peaks],
        "memory_before_bytes_per_rank": [before for _, before in peaks],
        "load_s": run.base.load_s,
        "restarts": run.folder.restarts,
        **run.progress.summary(run.progress.step if run.is_complete else run.training.num_steps),
        "gathered_bytes_per_step": run.last_step.gathered_bytes if counted else None,
        **run.scores,
    }
