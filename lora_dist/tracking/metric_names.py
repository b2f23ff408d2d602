"""Every metric a run may log: its name, unit and meaning. docs/metrics.md is this table; dashboards draw from it."""

from dataclasses import dataclass

PROJECT = "lora-dist"  # of the trackers, where none is named
LOGGED, EVALUATED, SAVED = "every `--logging_steps`", "at step 0, every `--eval_steps`, at the end", "a save has ended"
MOST_RANKS = 16  # above it per-rank numbers become their least, mean and greatest, and the name of the worst rank
# Of a step, each with its metric perf/PART_time_s, and what a reader calls it.
PARTS = {
    "data": "waiting for data", "gather": "gathering layers", "wait": "waiting for other stages", "forward": "forward",
    "backward": "backward", "reduce": "reducing gradients", "update": "updating",
}  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """`name`: with `rank{i}` where there is one for each rank."""

    name: str
    unit: str
    when: str
    what: str


METRICS = (
    Metric("train/loss", "nats a token", LOGGED,
           "mean over the trained tokens (of SEQ_CLS rows or classes) of the global batch: all ranks, all "
           "micro-batches; not of a step whose loss is no number"),
    Metric("train/mean_token_accuracy", "0 to 1", LOGGED,
           "share of those tokens (of several classes at once: of the decisions) for which the highest logit is right"),
    Metric("train/grad_norm", "", LOGGED, "of the global batch's gradient, before clipping"),
    Metric("train/learning_rate", "", LOGGED, "of the next step"),
    Metric("train/epoch", "passes", LOGGED,
           "sequences seen / sequences of the data set, packed ones where `--packing`; not of a stream"),
    Metric("train/tokens_seen", "tokens", LOGGED, "since the start, padding not counted"),
    Metric("train/trainable_tokens_seen", "tokens", LOGGED, "those of them that had a loss"),
    Metric("train/skipped_steps", "steps", LOGGED,
           "so far, whose loss or gradient was not finite: nothing was updated"),
    Metric("train/loss_spikes", "steps", LOGGED,
           "so far, whose loss stood 6 standard deviations above the last 50"),
    Metric("eval/loss", "as train/loss", EVALUATED, "over the held-out rows; at step 0 of the base alone"),
    Metric("eval/perplexity", "", EVALUATED, "e to the power of eval/loss; not of classes"),
    Metric("eval/mean_token_accuracy", "0 to 1", EVALUATED, "as train/mean_token_accuracy, over the held-out rows"),
    Metric("eval/time_s", "s", EVALUATED, "that training waited for it, completions included"),
    Metric("eval/accuracy", "0 to 1", "at the end of bloomz_complaints",
           "held-out rows whose completion greedy decoding writes exactly"),
    Metric("eval/micro_f1", "0 to 1", "at the end of quotes_tags", "all decisions together"),
    Metric("eval/macro_f1", "0 to 1", "at the end of quotes_tags", "the mean of the classes"),
    Metric("perf/step_time_s", "s", LOGGED, "of this step: the parts below, and what is between them"),
    Metric("perf/data_time_s", "s", LOGGED, "of it, on rank 0: waiting for micro-batches, which are made ahead"),
    Metric("perf/gather_time_s", "s", LOGGED,
           "of it, on rank 0: waiting for layers of a sharded base, and so for other ranks; of FSDP2 without a GPU, "
           "where no computation hides it"),
    Metric("perf/wait_time_s", "s", LOGGED, "of it, on rank 0: in a pipeline, waiting for other stages"),
    Metric("perf/forward_time_s", "s", LOGGED,
           "of it, on rank 0: forwards, without the gathers in them where those are known"),
    Metric("perf/backward_time_s", "s", LOGGED, "the same of the backwards, recomputation included"),
    Metric("perf/reduce_time_s", "s", LOGGED,
           "of it, on rank 0: adding the gradients of all ranks, waiting for the slowest included"),
    Metric("perf/update_time_s", "s", LOGGED, "of it, on rank 0: clipping and the optimizer"),
    Metric("perf/tokens_per_second", "tokens/s", LOGGED, "all ranks together, padding not counted"),
    Metric("perf/padded_tokens_per_second", "tokens/s", LOGGED, "the same, padding counted"),
    Metric("perf/tokens_per_second_per_rank", "tokens/s", LOGGED, "perf/tokens_per_second / ranks"),
    Metric("perf/trainable_tokens_per_second", "tokens/s", LOGGED, "all ranks together, tokens that had a loss"),
    Metric("perf/samples_per_second", "rows/s", LOGGED, "all ranks together, packed ones where `--packing`"),
    Metric("perf/padding_fraction", "0 to 1", LOGGED, "share of the batch's positions that are padding"),
    Metric("perf/tflops_per_rank", "TFLOP/s", LOGGED,
           "floating-point operations that the step needs, a rank and second: 4 a frozen and 6 a trained weight and "
           "token, and attention; padding counted, recomputation not"),
    Metric("perf/mfu", "0 to 1", LOGGED,
           "perf/tflops_per_rank / the GPU's dense peak in the run's precision; only of GPUs whose peak is known"),
    Metric("perf/recompute_fraction", "0 to 1", LOGGED,
           "share of all operations done that is recomputation, on top of those counted above"),
    Metric("perf/rank{i}/reduce_time_s", "s", LOGGED,
           "perf/reduce_time_s of each rank: the one that waits least is the slowest"),
    Metric("perf/slowest_rank", "rank and host", LOGGED, "the one with the least perf/reduce_time_s"),
    Metric("memory/rank{i}/peak_allocated_gib", "GiB", LOGGED,
           "most that torch had allocated on the GPU, so far; without a GPU most that the process held"),
    Metric("memory/rank{i}/peak_reserved_gib", "GiB", LOGGED, "GPU: most that torch had reserved, so far"),
    Metric("memory/max_peak_allocated_gib", "GiB", LOGGED, "the greatest of the ranks"),
    Metric("memory/max_peak_reserved_gib", "GiB", LOGGED, "GPU: the greatest of the ranks"),
    Metric("memory/worst_rank", "rank and host", LOGGED, "the one with the greatest peak"),
    Metric("memory/mean_peak_allocated_gib", "GiB", LOGGED, "above 16 ranks, in place of the ranks' own"),
    Metric("memory/min_peak_allocated_gib", "GiB", LOGGED, "the same"),
    Metric("memory/mean_peak_reserved_gib", "GiB", LOGGED, "the same"),
    Metric("memory/min_peak_reserved_gib", "GiB", LOGGED, "the same"),
    Metric("memory/alloc_retries", "", LOGGED, "GPU: of all ranks, so far: freed what was cached and tried again"),
    Metric("memory/ooms", "", LOGGED, "GPU: of all ranks, so far"),
    Metric("checkpoint/save_time_s", "s", SAVED,
           "that training waited: comparing the ranks, copying to host memory"),
    Metric("checkpoint/write_time_s", "s", SAVED,
           "of the thread that wrote it beside the training: write, read back, fsync, manifest"),
    Metric("checkpoint/failed_saves", "saves", "a save has failed", "in a row"),
)  # fmt: skip
