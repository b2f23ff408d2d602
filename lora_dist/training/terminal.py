"""What rank 0 prints: what was decided, how far the run is, and what came out."""

import datetime
import math
import statistics
import sys
import time
from collections import deque

from tqdm import tqdm

from lora_dist.data.tasks import TASKS
from lora_dist.model.adapters import parameter_counts
from lora_dist.model.placement import describe
from lora_dist.model.quantize_model import quantized_share
from lora_dist.parallel.fsdp import decoder_layers
from lora_dist.run.folder import STEP
from lora_dist.training.run import Run
from lora_dist.training.step import StepResult

LINE_INTERVAL_S = 30.0  # between two progress lines if there is no terminal
NUM_RECENT_STEPS = 20  # whose mean time gives the time left


def mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.2f} MiB"


def banner(run: Run) -> str:
    """What was decided, before the first step."""
    config, training, ranks = run.config, run.training, run.accelerator.num_processes
    trainable, total = parameter_counts(run.model)
    per_step = training.micro_batches.per_step
    sequences = config.per_device_train_batch_size * per_step
    expected = _expected_peak(run)
    return "\n".join([
        f"trainable params: {trainable} || all params: {total} || trainable%: {100 * trainable / total:.4f}",
        f"strategy: {run.strategy.name} ({run.strategy.summary})",
        f"placement: {describe(run.base.placement, len(decoder_layers(run.model)), ranks)}",
        f"base: {config.quantization}, {quantized_share(run.model)[0]:.0%} of the layers' weights; {_held(run)}",
        f"batch: {config.per_device_train_batch_size} sequences x {per_step} micro-batches, shared by {ranks} rank(s)"
        f" = {sequences} sequences a step, {training.num_steps} steps",
        *([f"memory: at most {expected} expected per rank, for base and training"] if expected else []),
        f"run folder: {run.folder.root}",
    ])  # fmt: skip


def closing_lines(run: Run, summary: dict) -> str:
    """What came out, from the `summary` of state.json."""
    lines = []
    if not run.is_complete:
        saved, _ = run.folder.newest_whole_checkpoint()
        kept = f"saved {saved}" if saved else "nothing to save yet"
        lines.append(f"preempted: {kept}, {summary['steps']} of {run.training.num_steps} steps")
    if summary["loss_first"] is not None:
        first, last = summary["loss_first"], summary["loss_last"]
        lines.append(f"loss: {first:.4f} at the start, {last:.4f} at the end ({summary['steps']} steps)")
    if summary["eval_loss"] is not None:
        before, after, what = summary["eval_loss_base"], summary["eval_loss"], "loss"
        if not TASKS[run.config.task_type].has_classes:
            before, after, what = math.exp(before), math.exp(after), "perplexity"
        lines.append(f"held-out {what}: {before:.2f} base, {after:.2f} base + adapter")
    for name in [name for name in run.scores if f"{name}_base" in run.scores]:
        before, after = run.scores[f"{name}_base"], run.scores[name]
        lines.append(f"held-out {name.replace('_', ' ')}: {before:.2f} base, {after:.2f} base + adapter")
    lines.append(f"base: {_held(run)}")
    lines.append(_memory_line(run, summary))
    if summary["tokens_per_second"]:
        lines.append(f"tokens per second: {summary['tokens_per_second']:.0f} (all ranks, padding not counted)")
    lines += _sample_lines(run, summary["steps"])
    lines.append(f"run folder: {run.folder.root}")
    return "\n".join(lines)


def _held(run: Run) -> str:
    base = run.base.num_bytes
    return (
        f"{mib(base.per_rank)} of {mib(base.total)} held per rank; "
        f"of its quantized weights {mib(base.quantized_per_rank)} of {mib(base.quantized_total)}"
    )


def _expected_peak(run: Run) -> str | None:
    peak = run.base.expected.peak_bytes_per_rank
    return mib(peak) if peak else None


def _memory_line(run: Run, summary: dict) -> str:
    fullest = max(summary["peak_memory_bytes_per_rank"])
    expected = f"at most {_expected_peak(run)} expected per rank, " if _expected_peak(run) else ""
    if run.device.type == "cuda":
        return f"memory: {expected}at most {mib(fullest)} allocated"
    before = max(summary["memory_before_bytes_per_rank"])
    return (
        f"memory: {expected}not counting the process, which held at most {mib(fullest)}, {mib(before)} before the base"
    )


def _sample_lines(run: Run, last_step: int) -> list[str]:
    """The completions of `--sample_prompt` by the base and by the adapter."""
    prompt, samples = run.config.sample_prompt.rstrip(), run.folder.read_lines(run.folder.samples)
    names = {0: "before", last_step: "after"}
    return [
        f"{names[line[STEP]]}: {line['prompt']}{line['completion']}"
        for line in samples
        if line["prompt"] == prompt and line[STEP] in names
    ]


class ProgressLine:
    """How far the run is: one line that is redrawn on a terminal, and printed every 30 seconds elsewhere.

    Shows nothing unless `shown`.
    """

    def __init__(self, num_steps: int, step: int, *, shown: bool):
        self.num_steps, self.shown = num_steps, shown
        self._times_s: deque[float] = deque(maxlen=NUM_RECENT_STEPS)
        self._printed_s = time.monotonic()
        on_terminal = shown and sys.stderr.isatty()
        bar_format = "{percentage:3.0f}%|{bar:20}| {desc}"
        self._bar = tqdm(total=num_steps, initial=step, bar_format=bar_format) if on_terminal else None

    def update(self, step: int, result: StepResult, step_time_s: float, peak_bytes: int) -> None:
        """Call after each step. `step`: steps completed. `peak_bytes`: of this rank's memory."""
        if not self.shown:
            return
        self._times_s.append(step_time_s)
        left_s = (self.num_steps - step) * statistics.fmean(self._times_s)
        line = (
            f"step {step}/{self.num_steps}  loss {result.loss:.4f}  {result.num_tokens / step_time_s:,.0f} tokens/s  "
            f"peak {peak_bytes / 2**30:.2f} GiB  {datetime.timedelta(seconds=round(left_s))} left"
        )
        if self._bar is not None:
            self._bar.set_description_str(line, refresh=False)
            self._bar.update()
        elif time.monotonic() - self._printed_s >= LINE_INTERVAL_S:
            self._printed_s = time.monotonic()
            print(line, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
