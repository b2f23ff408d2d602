"""What rank 0 prints: what was decided, how far the run is, and what came out."""

import datetime
import math
import os
import shlex
import statistics
import sys
import time
from collections import deque

from tqdm import tqdm

from lora_dist.model.adapters import describe_adapted, parameter_counts
from lora_dist.model.placement import describe_placement
from lora_dist.model.quantize_model import quantized_fraction
from lora_dist.parallel.fsdp import decoder_layers
from lora_dist.run.folder import STEP
from lora_dist.training.run import Run
from lora_dist.training.step import StepResult
from lora_dist.units import mib

LINE_INTERVAL_S = 30.0  # between two progress lines if stderr is not a terminal
NUM_RECENT_STEPS = 20  # the time left is estimated from their mean time
LINE_WIDTH = 98  # of the progress line with a bar of BAR_WIDTH; a narrower terminal gets a shorter bar
BAR_WIDTH = 20


def banner(run: Run) -> str:
    """What was decided, before the first step."""
    config, training, ranks = run.config, run.training, run.accelerator.num_processes
    trainable, total = parameter_counts(run.model)
    per_step = training.micro_batches.per_step
    sequences = config.per_device_train_batch_size * per_step
    kind = "pairs" if config.has_pairs else "sequences"
    expected = _expected_peak(run)
    return "\n".join([
        f"trainable params: {trainable} || all params: {total} || trainable%: {100 * trainable / total:.4f}",
        describe_adapted(run.model),
        f"strategy: {run.strategy.name} ({run.strategy.summary})",
        f"placement: {describe_placement(run.base.placement, len(decoder_layers(run.model)), ranks)}",
        f"base: {config.quantization}, {quantized_fraction(run.model)[0]:.0%} of the layers' weights; {_held(run)}",
        f"batch: {config.per_device_train_batch_size} {kind} x {per_step} micro-batches, shared by {ranks} rank(s)"
        f" = {sequences} {kind} a step, {training.num_steps} steps",
        *([f"memory: at most {expected} expected per rank, for base and training"] if expected else []),
        f"run folder: {run.folder.root}",
    ])  # fmt: skip


def closing_lines(run: Run, summary: dict) -> str:
    """What came out and what to do next. `summary` is the one of state.json."""
    lines = [_loss_line(run)] if summary["loss_first"] is not None else []
    lines += _held_out_lines(run, summary)
    lines += [f"base: {_held(run)}", _memory_line(run, summary)]
    if summary["tokens_per_second"]:
        lines.append(f"tokens per second: {summary['tokens_per_second']:.0f} (all ranks, padding not counted)")
    lines += _sample_lines(run, summary["steps"])
    lines += [f"run folder: {run.folder.root}", f"report: {run.folder.report}"]
    return "\n".join([*lines, *(_adapter_lines(run) if run.is_complete else _resume_lines(run, summary["steps"]))])


def _loss_line(run: Run) -> str:
    first, last, num_steps = run.progress.mean_losses()
    if num_steps == 1:
        return f"loss: {first:.4f} in the first step, {last:.4f} in the last of {run.progress.step}"
    return f"loss: {first:.4f} (mean of the first {num_steps} steps), {last:.4f} (mean of the last {num_steps} steps)"


def _held_out_lines(run: Run, summary: dict) -> list[str]:
    """Loss or perplexity, and the recipe's scores, each without and with the adapter."""
    lines = []
    if summary["eval_loss"] is not None:
        before, after, name = summary["eval_loss_base"], summary["eval_loss"], "loss"
        if run.training.micro_batches.task.has_perplexity:
            before, after, name = math.exp(before), math.exp(after), "perplexity"
        lines.append(f"held-out {name}: {before:.2f} base, {after:.2f} base + adapter")
    scores = run.scores | run.progress.reward_scores()
    for name in [name for name in scores if f"{name}_base" in scores]:
        before, after = scores[f"{name}_base"], scores[name]
        lines.append(f"held-out {name.replace('_', ' ')}: {before:.2f} base, {after:.2f} base + adapter")
    return lines


def _adapter_lines(run: Run) -> list[str]:
    lines = [f"adapter: {run.folder.adapter}"]
    if run.config.task_type == "CAUSAL_LM":  # the task of `lora-dist generate`
        prompt = shlex.quote(run.config.sample_prompt or "...")
        lines.append(f"try it: lora-dist generate --adapter {shlex.quote(str(run.folder.adapter))} {prompt}")
    return lines


def _resume_lines(run: Run, step: int) -> list[str]:
    checkpoint, _ = run.folder.newest_whole_checkpoint()
    saved = f"saved {checkpoint}" if checkpoint else "nothing to save yet"
    return [
        f"preempted: {saved}, {step} of {run.training.num_steps} steps",
        f"to go on: the same command with --output_dir {shlex.quote(str(run.folder.root))}",
    ]


def _held(run: Run) -> str:
    base = run.base.num_bytes
    return (
        f"{mib(base.held)} of {mib(base.total)} held per rank; "
        f"quantized weights: {mib(base.quantized_held)} of {mib(base.quantized_total)}"
    )


def _expected_peak(run: Run) -> str | None:
    peak = run.base.expected.peak_bytes_per_rank
    return mib(peak) if peak else None


def _memory_line(run: Run, summary: dict) -> str:
    peak, expected = max(summary["peak_memory_bytes_per_rank"]), _expected_peak(run)
    expected = f"at most {expected} expected; " if expected else ""
    if run.device.type == "cuda":
        return f"memory per rank: {expected}{mib(peak)} allocated at the peak"
    before = max(summary["memory_before_bytes_per_rank"])
    return f"memory per rank: {expected}the process peaked at {mib(peak)}, at {mib(before)} before it loaded the base"


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
    """Shows how far the run is, if `shown`: a line that is redrawn on a terminal, or a new one every 30 s elsewhere."""

    def __init__(self, num_steps: int, step: int, *, shown: bool):
        self.num_steps, self.shown = num_steps, shown
        self._times_s: deque[float] = deque(maxlen=NUM_RECENT_STEPS)
        self._printed_s = time.monotonic()
        self._bar = _progress_bar(num_steps, step) if shown and sys.stderr.isatty() else None

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


def _progress_bar(num_steps: int, step: int) -> tqdm:
    columns, rows = os.get_terminal_size(sys.stderr.fileno())
    # A fresh pseudo-terminal reports 0 columns and rows, for which tqdm draws nothing.
    columns, rows = columns or 80, rows or 24
    width = max(1, BAR_WIDTH - max(0, LINE_WIDTH - columns))
    bar_format = f"{{percentage:3.0f}}%|{{bar:{width}}}| {{desc}}"
    return tqdm(total=num_steps, initial=step, bar_format=bar_format, ncols=columns, nrows=rows)
