"""The training loop: steps, evaluations, checkpoints and metrics."""

import math
import resource
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from lora_dist.adapters import check_identical, save_adapter, verify_adapter
from lora_dist.evaluation import evaluate
from lora_dist.manifest import write_manifest
from lora_dist.metrics import MetricsLog
from lora_dist.sharding import gathered_bytes
from lora_dist.step import StepResult, Training, train_step
from lora_dist.zero import is_partitioned


def save_checkpoint(run: Training, step: int) -> float:
    """Save the adapter of `step` to checkpoints/, keep the newest. Returns seconds. Collective."""
    started = time.perf_counter()
    folder = run.folder.checkpoint(step)
    save_adapter_checked(run, folder / "adapter", trained=step > 1 or not run.config.warmup_steps)
    if run.accelerator.is_main_process:
        write_manifest(folder)
        run.folder.prune_checkpoints(run.config.save_total_limit)
        run.folder.write_state("running", step)
    return time.perf_counter() - started


def save_adapter_checked(run: Training, folder: Path, *, trained: bool) -> None:
    """Save the adapter; raise RuntimeError unless it is one on all ranks and PEFT reads it back as such. Collective."""
    check_identical(run.model, run.accelerator.device)
    if run.accelerator.is_main_process:
        save_adapter(run.model, run.tokenizer, folder)
    run.accelerator.wait_for_everyone()
    verify_adapter(run.model, folder, run.probe, trained=trained, autocast=run.accelerator.autocast)


def peak_memory_bytes(device: torch.device) -> int:
    """This rank's peak: of allocated GPU memory, or of the process where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train(run: Training, metrics: MetricsLog) -> dict:
    """All steps, with evaluations, checkpoints and metrics. Returns the measured part of the summary. Collective."""
    config = run.config
    losses, tokens_seen, trained_seen, train_time_s = [], 0, 0, 0.0
    eval_loss = eval_loss_base = log_evaluation(run, metrics, 0)  # lora_B is zero: the base
    show_bar = run.accelerator.is_main_process and sys.stderr.isatty()
    bar = tqdm(total=run.num_steps, unit="step", disable=not show_bar)
    run.model.train()
    for done in range(1, run.num_steps + 1):
        started, gathered_before = time.perf_counter(), gathered_bytes(run.model)
        result = train_step(run, done - 1)
        step_time_s, gathered = time.perf_counter() - started, gathered_bytes(run.model) - gathered_before
        train_time_s += step_time_s
        tokens_seen, trained_seen = tokens_seen + result.num_tokens, trained_seen + result.num_trained_tokens
        losses.append(result.loss)
        last = done == run.num_steps
        preempted = result.stop_asked and not last
        values = {}
        if done % config.logging_steps == 0 or last:
            values = step_metrics(run, result, done, step_time_s)
            values |= {"train/tokens_seen": tokens_seen, "train/trainable_tokens_seen": trained_seen}
        if preempted or (config.save_steps and done % config.save_steps == 0 and not last):
            values["checkpoint/save_time_s"] = save_checkpoint(run, done)
        if values:
            metrics.log(values, done)
        if last or (config.eval_steps and done % config.eval_steps == 0):
            eval_loss = log_evaluation(run, metrics, done)
        bar.update()
        bar.set_postfix(loss=f"{result.loss:.3f}", refresh=False)
        if preempted:
            break
    bar.close()
    if done < run.num_steps:  # preempted: not evaluated since
        eval_loss = None
    return {
        "steps": done, "loss_first": losses[0], "loss_last": losses[-1], "eval_loss_base": eval_loss_base,
        "eval_loss": eval_loss, "tokens_seen": tokens_seen, "tokens_per_second": tokens_seen / train_time_s,
        "gathered_bytes_per_step": None if is_partitioned(run.model) else gathered,  # DeepSpeed's are not counted
    }  # fmt: skip


def step_metrics(run: Training, result: StepResult, done: int, step_time_s: float) -> dict[str, float]:
    batches, epoch = run.micro_batches, {}
    if batches.per_epoch:  # of a stream it is not known
        epoch = {"train/epoch": done * batches.per_step * batches.sequences / batches.per_epoch}
    return epoch | {
        "train/loss": result.loss,
        "train/grad_norm": result.grad_norm,
        "train/learning_rate": run.scheduler.get_last_lr()[0],  # of the next step
        "perf/step_time_s": step_time_s,
        "perf/data_time_s": result.data_time_s,
        "perf/tokens_per_second": result.num_tokens / step_time_s,
        "perf/padding_fraction": 1 - result.num_tokens / result.num_positions,
    }


def log_evaluation(run: Training, metrics: MetricsLog, step: int) -> float | None:
    """The held-out loss, logged; None where nothing is held out. Collective."""
    if not run.eval_rows:
        return None
    loss = evaluate(run)
    perplexity = {} if run.micro_batches.task.has_classes else {"eval/perplexity": math.exp(loss)}
    metrics.log({"eval/loss": loss, **perplexity}, step)
    return loss
