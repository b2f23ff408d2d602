"""The training loop: steps, evaluations, checkpoints and metrics, from wherever the run continues; and its end."""

import contextlib
import math
import statistics
import sys
import time

from huggingface_hub import upload_folder

from lora_dist import signals
from lora_dist.errors import RunFailed, UserError, require
from lora_dist.files import sync_files
from lora_dist.model.adapters import check_identical, save_adapter, verify_adapter
from lora_dist.parallel.ranks import any_rank, barrier, from_rank_0, gather
from lora_dist.run import watchdog
from lora_dist.tracking.model_card import TrainingResult, write_model_card
from lora_dist.tracking.report import write_report
from lora_dist.training.checkpoint import Saver, restore, restore_adapter
from lora_dist.training.evaluation import complete_samples, evaluate, set_reference
from lora_dist.training.measures import peak_memory_bytes, rank_metrics, run_summary, step_metrics
from lora_dist.training.run import Run
from lora_dist.training.step import StepResult, train_step
from lora_dist.training.terminal import ProgressLine, closing_lines
from lora_dist.training.timing import StepProfiler

SPIKE_DEVIATIONS = 6  # standard deviations above the mean of the recent losses
SPIKE_MIN_LOSSES = 20  # with fewer there is too little to compare with


def train(run: Run) -> None:
    """Take all steps that are left, with evaluations, checkpoints and metrics. Collective.

    Returns early, with a checkpoint saved, if the run is asked to stop. Raises RunFailed if it cannot go on.
    """
    signals.begin_training()
    start(run)
    saver = Saver(run)
    line = ProgressLine(run.training.num_steps, run.progress.step, shown=run.is_main)
    profiler = StepProfiler(run.config.profile_steps, run.folder, run.accelerator.process_index)
    stopped = any_rank(signals.stop_asked(), run.device)  # by SIGUSR1, while it was loading
    if not stopped:
        evaluate_if_due(run)
    while not run.is_complete and not stopped:
        profiler.before(run.progress.step + 1)
        result, step_time_s = take_step(run)
        profiler.after(run.progress.step)
        stopped = result.stop_asked and not run.is_complete
        log_if_due(run, result, step_time_s)
        is_best = not stopped and evaluate_if_due(run)
        save_if_due(run, saver, is_best=is_best, stopped=stopped)
        line.update(run.progress.step, result, step_time_s, peak_memory_bytes(run.device))
    line.close()
    profiler.stop(run.progress.step)
    if stopped:
        text = f"asked to stop: left after step {run.progress.step} of {run.training.num_steps}"
        run.metrics.alert("preempted", text)
    watchdog.stop_watching()
    if run.is_complete and run.config.load_best_model_at_end:
        load_best(run)
    score(run)


def start(run: Run) -> None:
    """Compute the reference of pairs, score the base, and continue from a checkpoint if there is one. Collective."""
    if run.config.has_pairs:
        set_reference(run)
    if run.score:  # before the adapter of a checkpoint is put in: these are the base's
        with as_base(run):
            run.scores |= {f"{name}_base": value for name, value in run.score(run).items()}
    if run.folder.resume_from:
        restore(run)
    step, num_steps = run.progress.step, run.training.num_steps
    require(step <= num_steps, "max_steps", num_steps, f"the run is at step {step} already; give more")
    run.folder.num_steps, refusal = num_steps, None
    if run.is_main:
        try:
            run.folder.begin_training()
        except UserError as error:
            refusal = error
    if refusal := from_rank_0(refusal):
        raise refusal
    run.model.train()
    watchdog.report_progress(step, "evaluation")


def as_base(run: Run) -> contextlib.AbstractContextManager:
    """The model without its adapters. New adapters change nothing, so that only others have to be turned off."""
    return run.model.disable_adapter() if run.config.adapter_name_or_path else contextlib.nullcontext()


def take_step(run: Run) -> tuple[StepResult, float]:
    """One optimizer step, counted: (what came out, its seconds). Raises RunFailed if it is one bad step too many."""
    started = time.perf_counter()
    result = train_step(run.training, run.progress.step)
    step_time_s = time.perf_counter() - started
    recent = run.progress.recent_losses
    if not result.bad and is_spike(result.loss, recent):
        run.progress.loss_spikes += 1
        what = f"the loss is {result.loss:.4g}; in the last {len(recent)} steps it was at most {max(recent):.4g}"
        warn(run, f"step {run.progress.step + 1}: {what}")
    run.progress.count(result, step_time_s)
    run.last_step = result
    if result.bad:
        record_bad_step(run, result)
    return result, step_time_s


def is_spike(loss: float, recent: list[float]) -> bool:
    """True if a loss stands out above the recent ones."""
    if len(recent) < SPIKE_MIN_LOSSES:
        return False
    return loss > statistics.fmean(recent) + SPIKE_DEVIATIONS * statistics.pstdev(recent)


def record_bad_step(run: Run, result: StepResult) -> None:
    """Write down which rows a bad step consists of. Raises RunFailed after too many in a row. Collective."""
    progress, folder, sums = run.progress, run.folder, {}
    for of_rank in gather(result.loss_sums):
        for index, loss_sum in of_rank.items():  # ranks that share rows each have the sum of their piece
            sums[index] = sums.get(index, 0.0) + loss_sum
    step = progress.step
    if run.is_main:
        rows = run.training.read.row_ids
        micro_batches = [
            {"index": index, "loss_sum": repr(sums[index]), "rows": rows(step - 1, index)} for index in sorted(sums)
        ]
        record = {"step": step, "loss": repr(result.loss), "grad_norm": repr(result.grad_norm)}
        folder.append_lines(folder.bad_steps, [record | {"micro_batches": micro_batches}])
    what = f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: nothing was updated"
    run.metrics.alert("loss or gradient is not finite", f"{what}; its rows are in {folder.bad_steps}")
    if progress.bad_steps_in_a_row < run.config.max_bad_steps:
        warn(run, f"{what}; its rows are in {folder.bad_steps}")
        return
    raise RunFailed(
        f"{what}, {progress.bad_steps_in_a_row} steps in a row; their rows are in {folder.bad_steps}; "
        "look at those, lower --learning_rate, or use bf16 in place of fp16"
    )


def warn(run: Run, text: str) -> None:
    if run.is_main:
        print(f"warning: {text}", file=sys.stderr, flush=True)


def log_if_due(run: Run, result: StepResult, step_time_s: float) -> None:
    """Log the step if it is time for it, if it is the last one, or if nothing was updated. Collective."""
    step = run.progress.step
    if step % run.config.logging_steps == 0 or run.is_complete or result.skipped:
        of_ranks = rank_metrics(run, result)
        run.metrics.log(step_metrics(run, result, step_time_s) | of_ranks, step)


def evaluate_if_due(run: Run) -> bool:
    """Evaluate the adapter and complete the samples, if it is time for it and not done at this step. Collective.

    Returns True if the adapter is the best so far. At step 0 the base is evaluated.
    """
    progress, every = run.progress, run.config.eval_steps
    step = progress.step
    wanted = step == 0 or run.is_complete or (every and step % every == 0)
    if not wanted or progress.eval_step == step:
        return False
    progress.eval_step, started = step, time.perf_counter()
    with as_base(run) if step == 0 else contextlib.nullcontext():
        run.metrics.log_samples(complete_samples(run), step)
        if not run.held_out:
            return False
        progress.eval_loss, measures = evaluate(run)
    progress.eval_reward_accuracy = measures.get("rewards/accuracies")
    has_perplexity = run.training.micro_batches.task.has_perplexity
    perplexity = {"eval/perplexity": math.exp(progress.eval_loss)} if has_perplexity else {}
    values = {"eval/loss": progress.eval_loss, **perplexity, **{f"eval/{name}": n for name, n in measures.items()}}
    run.metrics.log({**values, "eval/time_s": time.perf_counter() - started}, step)
    if step == 0:
        progress.eval_loss_base = progress.eval_loss
        progress.eval_reward_accuracy_base = progress.eval_reward_accuracy
        return False
    is_best = progress.best_eval_loss is None or progress.eval_loss < progress.best_eval_loss
    progress.evaluations_since_best += 1
    if is_best:
        progress.best_eval_loss, progress.best_step = progress.eval_loss, step
        progress.evaluations_since_best = 0
    return is_best


def load_best(run: Run) -> None:
    """Put the adapter of the best checkpoint into the model, if that is not the last one. Collective.

    The checkpoint is kept until the end (`RunFolder.prune_checkpoints`). Raises UserError if it is not there: its save
    may have failed on a full disk.
    """
    progress = run.progress
    if progress.best_step not in (None, progress.step):
        restore_adapter(run, run.folder.checkpoint(progress.best_step))
        progress.eval_loss = progress.best_eval_loss


def save_if_due(run: Run, saver: Saver, *, is_best: bool, stopped: bool) -> None:
    """Save a checkpoint if it is time for it, and log the saves that have ended. Collective."""
    every, step, ends = run.config.save_steps, run.progress.step, run.is_complete or stopped
    if ends or (every and (step % every == 0 or is_best)):
        watchdog.report_progress(step, "checkpoint")
        saver.save()
    if ends:
        saver.finish()
    for values in saver.results():
        run.metrics.log(values, step)


def score(run: Run) -> None:
    """Score the adapter if the run is complete; if it was preempted, it should leave soon. Collective."""
    if run.score and run.is_complete:
        scores = run.score(run)
        run.scores |= scores
        run.metrics.log({f"eval/{name}": value for name, value in scores.items()}, run.progress.step)


def finish(run: Run) -> None:
    """Save and check the adapter, write state and report, print what came out, push if asked. Collective.

    A preempted run has saved a checkpoint already and gets no `adapter/`.
    """
    if run.is_complete:
        save_adapter_checked(run)
    summary = run_summary(run)
    if not run.is_main:
        return
    run.folder.write_state("completed" if run.is_complete else "preempted", run.progress.step, summary)
    write_report(run.folder)
    print(closing_lines(run, summary), flush=True)
    if run.is_complete and run.config.wandb_log_adapter:
        run.metrics.log_adapter()
    if run.is_complete and run.config.push_to_hub:
        url = upload_folder(repo_id=run.config.hub_model_id, folder_path=run.folder.adapter)
        print(f"pushed to {url}", flush=True)


def save_adapter_checked(run: Run) -> None:
    """Write `adapter/`, and check that it is the same on all ranks, trained, and what PEFT reads back. Collective.

    Raises RunFailed or RuntimeError if it is not; then there is no `adapter/`.
    """
    check_identical(run.model)
    folder, partial = run.folder.adapter, run.folder.partial_name(run.folder.adapter)
    if run.is_main:
        save_adapter(run.model, run.tokenizer, run.folder.make_partial(folder))
        write_model_card(partial, run.config, training_result(run))
        sync_files(partial)
    barrier()
    verify_adapter(run.model, partial, run.training.probe, autocast=run.accelerator.autocast)
    barrier()  # another node's ranks may still be reading it
    if run.is_main:
        run.folder.put_in_place(partial, folder)


def training_result(run: Run) -> TrainingResult:
    """What the adapter's model card says about the run."""
    progress, task = run.progress, run.training.micro_batches.task
    return TrainingResult(
        num_steps=progress.step,
        sequences_per_step=run.config.per_device_train_batch_size * run.training.micro_batches.per_step,
        tokens_seen=progress.tokens_seen,
        eval_loss_base=progress.eval_loss_base,
        eval_loss=progress.eval_loss if run.held_out else None,
        scores=run.scores | progress.reward_scores(),
        classes=tuple(run.model.config.id2label.values()) if task.has_classes else (),
    )
