"""All metrics that a run may log: name, unit and meaning. docs/metrics.md is this table; dashboards draw from it."""

from dataclasses import dataclass

PROJECT = "lora-dist"  # of the trackers, if the user names none
LOGGED, EVALUATED, SAVED = "every `--logging_steps`", "at step 0, every `--eval_steps`, at the end", "a save has ended"
# With more ranks, per-rank metrics are replaced by their minimum, mean and maximum, and the name of the worst rank.
MAX_RANKS_SHOWN = 16
# Parts of a step: each has a metric perf/PART_time_s, and this description for readers.
PARTS = {
    "data": "waiting for data", "gather": "gathering layers", "wait": "waiting for other stages", "forward": "forward",
    "backward": "backward", "reduce": "reducing gradients", "update": "updating",
}  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """A number with a name. `rank{i}` in the name: one metric per rank."""

    name: str
    unit: str
    when: str
    meaning: str


# What is measured of pairs: name (TRL's), unit, meaning.
OF_PAIRS = (
    ("rewards/chosen", "beta x nats",
     "reward of the chosen answers, mean over the global batch's pairs: `--beta` times the log-probability that an "
     "answer gained over the reference"),
    ("rewards/rejected", "beta x nats", "the same for the rejected answers"),
    ("rewards/margins", "beta x nats", "rewards/chosen - rewards/rejected"),
    ("rewards/accuracies", "0 to 1",
     "fraction of the pairs whose chosen answer has the higher reward; 0 before the first step: all rewards are 0"),
    ("logps/chosen", "nats", "log-probability of a chosen answer, summed over its tokens; mean over the pairs"),
    ("logps/rejected", "nats", "the same for the rejected answers"),
)  # fmt: skip
METRICS = (
    Metric("train/loss", "nats per token", LOGGED,
           "mean over the trained tokens of the global batch (SEQ_CLS: over its rows or classes; losses of pairs: over "
           "its pairs), all ranks and micro-batches; left out if it is not finite"),
    Metric("train/mean_token_accuracy", "0 to 1", LOGGED,
           "fraction of those tokens for which the highest logit is right (rows with several classes: fraction of the "
           "decisions); not logged for pairs"),
    *(Metric(f"train/{name}", unit, f"{LOGGED}, for pairs", meaning) for name, unit, meaning in OF_PAIRS),
    Metric("train/grad_norm", "", LOGGED, "norm of the global batch's gradient, before clipping"),
    Metric("train/learning_rate", "", LOGGED, "learning rate of the next step"),
    Metric("train/epoch", "passes", LOGGED,
           "sequences seen / sequences of the data set; with `--packing`, packed rows; not logged for a stream"),
    Metric("train/tokens_seen", "tokens", LOGGED, "since the start, padding not counted"),
    Metric("train/trainable_tokens_seen", "tokens", LOGGED, "since the start, only tokens with a loss"),
    Metric("train/skipped_steps", "steps", LOGGED,
           "since the start, steps that updated nothing because the loss or gradient was not finite"),
    Metric("train/loss_spikes", "steps", LOGGED,
           "since the start, steps whose loss was more than 6 standard deviations above the last 50"),
    Metric("eval/loss", "as train/loss", EVALUATED, "over the held-out rows; at step 0 that of the base alone"),
    Metric("eval/perplexity", "", EVALUATED, "exp(eval/loss); not logged for classifiers and pairs"),
    Metric("eval/mean_token_accuracy", "0 to 1", EVALUATED, "as train/mean_token_accuracy, over the held-out rows"),
    *(Metric(f"eval/{name}", unit, f"{EVALUATED}, for pairs", f"as train/{name}, over the held-out pairs")
      for name, unit, _ in OF_PAIRS),
    Metric("eval/time_s", "s", EVALUATED, "seconds that training waited for the evaluation, completions included"),
    Metric("eval/accuracy", "0 to 1", "at the end of bloomz_complaints",
           "fraction of the held-out rows whose completion greedy decoding writes exactly"),
    Metric("eval/micro_f1", "0 to 1", "at the end of quotes_tags", "F1 of all decisions together"),
    Metric("eval/macro_f1", "0 to 1", "at the end of quotes_tags", "mean of the classes' F1"),
    Metric("perf/step_time_s", "s", LOGGED, "this step: the parts below, and what lies between them"),
    Metric("perf/data_time_s", "s", LOGGED,
           "part of the step on rank 0: waiting for micro-batches, which are prepared ahead"),
    Metric("perf/gather_time_s", "s", LOGGED,
           "part of the step on rank 0: waiting for layers of a sharded base, and so for other ranks; with FSDP2 only "
           "without a GPU, where no computation hides it"),
    Metric("perf/wait_time_s", "s", LOGGED, "part of the step on rank 0: in a pipeline, waiting for other stages"),
    Metric("perf/forward_time_s", "s", LOGGED,
           "part of the step on rank 0: forward passes, without the gathers in them if those are known"),
    Metric("perf/backward_time_s", "s", LOGGED, "the same for the backward passes, recomputation included"),
    Metric("perf/reduce_time_s", "s", LOGGED,
           "part of the step on rank 0: adding the gradients of all ranks, waiting for the slowest rank included"),
    Metric("perf/update_time_s", "s", LOGGED, "part of the step on rank 0: clipping and the optimizer"),
    Metric("perf/tokens_per_second", "tokens/s", LOGGED, "all ranks together, padding not counted"),
    Metric("perf/padded_tokens_per_second", "tokens/s", LOGGED, "all ranks together, padding counted"),
    Metric("perf/tokens_per_second_per_rank", "tokens/s", LOGGED, "perf/tokens_per_second / number of ranks"),
    Metric("perf/trainable_tokens_per_second", "tokens/s", LOGGED, "all ranks together, only tokens with a loss"),
    Metric("perf/samples_per_second", "rows/s", LOGGED, "all ranks together; with `--packing`, packed rows"),
    Metric("perf/padding_fraction", "0 to 1", LOGGED, "fraction of the batch's positions that are padding"),
    Metric("perf/tflops_per_rank", "TFLOP/s", LOGGED,
           "floating-point operations that the step needs, per rank and second: per token 4 for a frozen and 6 for a "
           "trained weight, and attention; padding counted, recomputation not"),
    Metric("perf/mfu", "0 to 1", LOGGED,
           "perf/tflops_per_rank / the GPU's dense peak in the run's precision; only for GPUs whose peak is known"),
    Metric("perf/recompute_fraction", "0 to 1", LOGGED,
           "recomputed operations / all operations done, which are those of perf/tflops_per_rank and the recomputed "
           "ones"),
    Metric("perf/rank{i}/reduce_time_s", "s", LOGGED,
           "perf/reduce_time_s of each rank: the rank that waits least is the slowest"),
    Metric("perf/slowest_rank", "rank and host", LOGGED, "the rank with the least perf/reduce_time_s"),
    Metric("memory/rank{i}/peak_allocated_gib", "GiB", LOGGED,
           "most that torch had allocated on the GPU since the start; without a GPU, most that the process held"),
    Metric("memory/rank{i}/peak_reserved_gib", "GiB", LOGGED, "GPU: most that torch had reserved since the start"),
    Metric("memory/max_peak_allocated_gib", "GiB", LOGGED, "maximum over the ranks"),
    Metric("memory/max_peak_reserved_gib", "GiB", LOGGED, "GPU: maximum over the ranks"),
    Metric("memory/worst_rank", "rank and host", LOGGED, "the rank with the greatest peak_allocated_gib"),
    Metric("memory/mean_peak_allocated_gib", "GiB", LOGGED, "mean over the ranks; above 16 ranks, in place of rank{i}"),
    Metric("memory/min_peak_allocated_gib", "GiB", LOGGED,
           "minimum over the ranks; above 16 ranks, in place of rank{i}"),
    Metric("memory/mean_peak_reserved_gib", "GiB", LOGGED,
           "GPU: mean over the ranks; above 16 ranks, in place of rank{i}"),
    Metric("memory/min_peak_reserved_gib", "GiB", LOGGED,
           "GPU: minimum over the ranks; above 16 ranks, in place of rank{i}"),
    Metric("memory/alloc_retries", "", LOGGED,
           "GPU: how often the allocators of all ranks freed their caches and tried again, since the start"),
    Metric("memory/ooms", "", LOGGED, "GPU: out-of-memory errors of all ranks' allocators, since the start"),
    Metric("checkpoint/save_time_s", "s", SAVED,
           "seconds that training waited: comparing the ranks, copying to host memory"),
    Metric("checkpoint/write_time_s", "s", SAVED,
           "seconds of the thread that wrote it while training continued: write, read back, fsync, manifest"),
    Metric("checkpoint/failed_saves", "saves", "a save has failed", "failed saves in a row"),
)  # fmt: skip
