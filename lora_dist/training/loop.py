"""The training loop: steps, evaluations, checkpoints and metrics, from wherever the run goes on."""

import contextlib
import math
import statistics
import sys
import time

from accelerate.utils import gather_object

from lora_dist import signals
from lora_dist.errors import RunFailed, require
from lora_dist.files import sync_files
from lora_dist.model.adapters import check_identical, save_adapter, verify_adapter
from lora_dist.parallel.exact_sum import any_rank
from lora_dist.parallel.fsdp import gathered_bytes
from lora_dist.parallel.zero import is_partitioned
from lora_dist.run import watchdog
from lora_dist.tracking.metrics import MetricsLog
from lora_dist.training.checkpoint import RECENT_LOSSES, Progress, Saver, restore
from lora_dist.training.evaluation import complete_samples, evaluate
from lora_dist.training.measures import peak_memory_bytes, rank_metrics, step_metrics
from lora_dist.training.profiling import StepProfiler
from lora_dist.training.progress import ProgressLine
from lora_dist.training.step import StepResult, Training, train_step

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
    line = ProgressLine(run.num_steps, progress.step, shown=run.accelerator.is_main_process)
    profiler = StepProfiler(config.profile_steps, run.folder, run.accelerator.process_index)
    run.model.train()
    watchdog.moved(progress.step, "evaluation")
    stopped = any_rank(signals.stop_asked(), run.accelerator.device)  # while it was loading
    if not stopped:
        evaluate_if_due(run, metrics, progress)
    while progress.step < run.num_steps and not stopped:
        profiler.before(progress.step + 1)
        started, gathered_before = time.perf_counter(), gathered_bytes(run.model)
        result = train_step(run, progress.step)
        step_time_s, gathered = time.perf_counter() - started, gathered_bytes(run.model) - gathered_before
        count_step(run, metrics, progress, result, step_time_s)
        profiler.after(progress.step)
        last = progress.step == run.num_steps
        stopped = result.stop_asked and not last
        if progress.step % config.logging_steps == 0 or last or result.skipped:
            of_ranks = rank_metrics(run, result, metrics.hosts)
            metrics.log(step_metrics(run, result, progress, step_time_s) | of_ranks, progress.step)
        is_best = not stopped and evaluate_if_due(run, metrics, progress)
        due = config.save_steps and (progress.step % config.save_steps == 0 or is_best)
        if due or last or stopped:
            watchdog.moved(progress.step, "checkpoint")
            saver.save(progress)
        if last or stopped:
            saver.finish()
        for values in saver.results():
            metrics.log(values, progress.step)
        line.update(progress.step, result, step_time_s, peak_memory_bytes(run.accelerator.device))
    line.close()
    profiler.stop(progress.step)
    if stopped:
        metrics.alert("preempted", f"asked to stop: left after step {progress.step} of {run.num_steps}")
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


def count_step(run: Training, metrics: MetricsLog, progress: Progress, result: StepResult, step_time_s: float) -> None:
    """Add a step to what was done. Raises RunFailed after too many bad ones in a row. Collective."""
    progress.step += 1
    progress.train_time_s += step_time_s
    progress.tokens_seen += result.num_tokens
    progress.trained_tokens_seen += result.num_trained_tokens
    progress.skipped_steps += result.skipped
    progress.bad_steps_in_a_row = progress.bad_steps_in_a_row + 1 if result.bad else 0
    if result.bad:
        record_bad_step(run, metrics, progress, result)
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


def record_bad_step(run: Training, metrics: MetricsLog, progress: Progress, result: StepResult) -> None:
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
        run.folder.append_lines(run.folder.bad_steps, [record])
    what = f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: nothing was updated"
    metrics.alert("loss or gradient is not finite", f"{what}; its rows are in {run.folder.bad_steps}")
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


def evaluate_if_due(run: Training, metrics: MetricsLog, progress: Progress) -> bool:
    """Evaluate the adapter as it is now, and complete the samples, if wanted and not done yet. Collective.

    Whether it is the best so far. Step 0 is the base: lora_B is zero.
    """
    step, every = progress.step, run.config.eval_steps
    wanted = step in (0, run.num_steps) or (every and step % every == 0)
    if not wanted or progress.eval_step == step:
        return False
    progress.eval_step, started = step, time.perf_counter()
    metrics.log_samples(complete_samples(run), step)
    if not run.eval_rows:
        return False
    progress.eval_loss, accuracy = evaluate(run)
    perplexity = {} if run.micro_batches.task.has_classes else {"eval/perplexity": math.exp(progress.eval_loss)}
    values = {"eval/loss": progress.eval_loss, **perplexity, "eval/mean_token_accuracy": accuracy}
    metrics.log({**values, "eval/time_s": time.perf_counter() - started}, step)
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
