"""The training loop: steps, evaluations, checkpoints and metrics, from wherever the run goes on."""

import contextlib
import json
import math
import resource
import statistics
import sys
import time

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from lora_dist import preemption, watchdog
from lora_dist.adapters import check_identical, save_adapter, verify_adapter
from lora_dist.checkpoint import RECENT_LOSSES, Progress, Saver, restore
from lora_dist.config import RunFailed, require
from lora_dist.evaluation import evaluate
from lora_dist.manifest import sync_files
from lora_dist.metrics import MetricsLog
from lora_dist.reduction import any_rank
from lora_dist.sharding import gathered_bytes
from lora_dist.step import StepResult, Training, train_step
from lora_dist.zero import is_partitioned

SPIKE_DEVIATIONS = 6  # standard deviations above the mean of the recent losses
SPIKE_MIN_LOSSES = 20  # before that there is nothing to compare with


def train(run: Training, metrics: MetricsLog) -> dict:
    """All steps that are left, with evaluations, checkpoints and metrics. Returns the measured summary. Collective."""
    config, gathered = run.config, None
    progress = restore(run) if run.folder.resume_from else Progress()
    why = f"the run is at step {progress.step} already; give more"
    require(progress.step <= run.num_steps, "max_steps", run.num_steps, why)
    run.folder.num_steps = run.num_steps
    if run.accelerator.is_main_process:
        with contextlib.suppress(OSError):  # a full disk
            run.folder.write_state("running", progress.step)
    saver = Saver(run)
    bar = _progress_bar(run, progress)
    run.model.train()
    watchdog.moved(progress.step, "evaluation")
    stopped = any_rank(preemption.stop_asked(), run.accelerator.device)  # while it was loading
    if not stopped:
        evaluate_if_due(run, metrics, progress)
    while progress.step < run.num_steps and not stopped:
        started, gathered_before = time.perf_counter(), gathered_bytes(run.model)
        result = train_step(run, progress.step)
        step_time_s, gathered = time.perf_counter() - started, gathered_bytes(run.model) - gathered_before
        count_step(run, progress, result, step_time_s)
        last = progress.step == run.num_steps
        stopped = result.stop_asked and not last
        if progress.step % config.logging_steps == 0 or last or result.skipped:
            metrics.log(step_metrics(run, result, progress, step_time_s), progress.step)
        is_best = not stopped and evaluate_if_due(run, metrics, progress)
        due = config.save_steps and (progress.step % config.save_steps == 0 or is_best)
        if due or last or stopped:
            watchdog.moved(progress.step, "checkpoint")
            saver.save(progress)
        if last or stopped:
            saver.finish()
        for values in saver.results():
            metrics.log(values, progress.step)
        bar.update()
        bar.set_postfix(loss=f"{result.loss:.3f}", refresh=False)
    bar.close()
    watchdog.at_rest()
    complete = progress.step == run.num_steps
    return {
        "steps": progress.step, "loss_first": progress.loss_first, "loss_last": (progress.recent_losses or [None])[-1],
        "eval_loss_base": progress.eval_loss_base, "eval_loss": progress.eval_loss if complete else None,
        "best_eval_loss": progress.best_eval_loss, "best_step": progress.best_step,
        "tokens_seen": progress.tokens_seen, "skipped_steps": progress.skipped_steps,
        "tokens_per_second": progress.tokens_seen / progress.train_time_s if progress.train_time_s else None,
        "gathered_bytes_per_step": None if is_partitioned(run.model) else gathered,  # DeepSpeed's are not counted
    }  # fmt: skip


def _progress_bar(run: Training, progress: Progress) -> tqdm:
    show = run.accelerator.is_main_process and sys.stderr.isatty()
    return tqdm(total=run.num_steps, initial=progress.step, unit="step", disable=not show)


def count_step(run: Training, progress: Progress, result: StepResult, step_time_s: float) -> None:
    """Add a step to what was done. Raises RunFailed after too many bad ones in a row. Collective."""
    progress.step += 1
    progress.train_time_s += step_time_s
    progress.tokens_seen += result.num_tokens
    progress.trained_tokens_seen += result.num_trained_tokens
    progress.skipped_steps += result.skipped
    progress.bad_steps_in_a_row = progress.bad_steps_in_a_row + 1 if result.bad else 0
    if result.bad:
        record_bad_step(run, progress, result)
        return
    if is_spike(result.loss, progress.recent_losses):
        progress.loss_spikes += 1
        _warn(run, f"step {progress.step}: the loss is {result.loss:.4g}, of the last {len(progress.recent_losses)} "
              f"steps at most {max(progress.recent_losses):.4g}")  # fmt: skip
    if progress.loss_first is None:
        progress.loss_first = result.loss
    progress.recent_losses = [*progress.recent_losses, result.loss][-RECENT_LOSSES:]


def is_spike(loss: float, recent: list[float]) -> bool:
    """Whether a loss stands out of those before it."""
    if len(recent) < SPIKE_MIN_LOSSES:
        return False
    return loss > statistics.fmean(recent) + SPIKE_DEVIATIONS * statistics.pstdev(recent)


def record_bad_step(run: Training, progress: Progress, result: StepResult) -> None:
    """Write down which rows a bad step was made of. Raises RunFailed where it is one too many in a row. Collective."""
    step, sums = progress.step, {}
    for of_rank in gather_object([run.loss_sums]):
        for index, loss_sum in of_rank.items():  # where ranks share rows, each has a piece of it
            sums[index] = sums.get(index, 0.0) + loss_sum
    if run.accelerator.is_main_process:
        made_of = [
            {"index": index, "loss_sum": repr(sums[index]), "rows": run.read.row_ids(step - 1, index)}
            for index in sorted(sums)
        ]
        record = {"step": step, "loss": repr(result.loss), "grad_norm": repr(result.grad_norm)}
        record["micro_batches"] = made_of
        with contextlib.suppress(OSError), open(run.folder.bad_steps, "a", encoding="utf-8") as file:  # a full disk
            file.write(json.dumps(record) + "\n")
    what = f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: nothing was updated"
    if progress.bad_steps_in_a_row < run.config.max_bad_steps:
        _warn(run, f"{what}; its rows are in {run.folder.bad_steps}")
        return
    raise RunFailed(
        f"{what}, {progress.bad_steps_in_a_row} steps in a row; their rows are in {run.folder.bad_steps}; "
        "look at those, lower --learning_rate, or use bf16 in place of fp16"
    )


def _warn(run: Training, text: str) -> None:
    if run.accelerator.is_main_process:
        print(f"warning: {text}", file=sys.stderr, flush=True)


def step_metrics(run: Training, result: StepResult, progress: Progress, step_time_s: float) -> dict[str, float]:
    """Of one step, and what was seen until then. A bad step has no loss: JSON knows no NaN."""
    batches, values = run.micro_batches, {}
    if batches.per_epoch:  # of a stream it is not known
        values = {"train/epoch": progress.step * batches.per_step * batches.sequences / batches.per_epoch}
    measured = {"train/loss": result.loss, "train/grad_norm": result.grad_norm}
    return {
        **values,
        **{name: value for name, value in measured.items() if math.isfinite(value)},
        "train/learning_rate": run.scheduler.get_last_lr()[0],  # of the next step
        "train/tokens_seen": progress.tokens_seen,
        "train/trainable_tokens_seen": progress.trained_tokens_seen,
        "train/skipped_steps": progress.skipped_steps,
        "train/loss_spikes": progress.loss_spikes,
        "perf/step_time_s": step_time_s,
        "perf/data_time_s": result.data_time_s,
        "perf/tokens_per_second": result.num_tokens / step_time_s,
        "perf/padding_fraction": 1 - result.num_tokens / result.num_positions,
    }


def evaluate_if_due(run: Training, metrics: MetricsLog, progress: Progress) -> bool:
    """Evaluate the adapter as it is now, if wanted and not done yet. Whether it is the best so far. Collective.

    Step 0 is the base: lora_B is zero.
    """
    step, every = progress.step, run.config.eval_steps
    wanted = step in (0, run.num_steps) or (every and step % every == 0)
    if not (run.eval_rows and wanted) or progress.eval_step == step:
        return False
    progress.eval_loss, progress.eval_step = evaluate(run), step
    perplexity = {} if run.micro_batches.task.has_classes else {"eval/perplexity": math.exp(progress.eval_loss)}
    metrics.log({"eval/loss": progress.eval_loss, **perplexity}, step)
    if step == 0:
        progress.eval_loss_base = progress.eval_loss
        return False
    is_best = progress.best_eval_loss is None or progress.eval_loss < progress.best_eval_loss
    if is_best:
        progress.best_eval_loss, progress.best_step = progress.eval_loss, step
    return is_best


def save_adapter_checked(run: Training) -> None:
    """Write `adapter/`, which is then one on all ranks, trained, and what PEFT reads back as such. Collective.

    Raises RunFailed or RuntimeError where it is not; then there is no `adapter/`.
    """
    check_identical(run.model, run.accelerator.device)
    folder = run.folder.adapter
    if run.accelerator.is_main_process:
        save_adapter(run.model, run.tokenizer, run.folder.partial(folder))
        sync_files(run.folder.partial_name(folder))
    run.accelerator.wait_for_everyone()
    verify_adapter(run.model, run.folder.partial_name(folder), run.probe, autocast=run.accelerator.autocast)
    run.accelerator.wait_for_everyone()  # another node's ranks may be reading it still
    if run.accelerator.is_main_process:
        run.folder.put_in_place(run.folder.partial_name(folder), folder)


def peak_memory_bytes(device: torch.device) -> int:
    """This rank's peak: of allocated GPU memory, or of the process where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
