"""A workspace in Weights & Biases, as code: what one looks at in a run of this toolkit, and how runs are compared."""

import json
import os
import re

from lora_dist.config import UserError
from lora_dist.run_folder import STEP

NAME = "lora-dist"
OF_RANKS = r"memory/rank\d+/peak_allocated_gib", r"memory/rank\d+/peak_reserved_gib", r"perf/rank\d+/reduce_time_s"
PARTS = ("data", "gather", "wait", "forward", "backward", "reduce", "update")


def build(entity: str, project: str):
    """The workspace, unsaved: needs no account. Raises UserError where wandb-workspaces is not installed."""
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise UserError("dashboard: needs a package: pip install 'lora-dist[dashboard]'") from None

    def lines(title: str, *names: str, **more) -> wr.LinePlot:
        return wr.LinePlot(title=title, x=STEP, y=[*names], **more)

    def of_ranks(title: str, regex: str) -> wr.LinePlot:
        return wr.LinePlot(title=title, x=STEP, metric_regex=regex)

    def section(name: str, *panels) -> ws.Section:
        return ws.Section(name=name, panels=list(panels), is_open=True)

    stacked = {"plot_type": "stacked-area"}
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        settings=ws.WorkspaceSettings(x_axis=STEP, smoothing_type="none"),
        sections=[
            section(
                "Loss",
                lines("Loss, nats a token", "train/loss", "eval/loss"),
                lines("Held-out perplexity", "eval/perplexity"),
                lines("Tokens predicted right, share", "train/mean_token_accuracy", "eval/mean_token_accuracy"),
                lines("Scores", "eval/accuracy", "eval/micro_f1", "eval/macro_f1"),
            ),
            section(
                "Optimisation",
                lines("Learning rate", "train/learning_rate"),
                lines("Gradient norm before clipping", "train/grad_norm", log_y=True),
                lines("Skipped steps and loss spikes, so far", "train/skipped_steps", "train/loss_spikes"),
            ),
            section(
                "Throughput",
                lines("Tokens/s, all ranks: real, padded, trained", "perf/tokens_per_second",
                      "perf/padded_tokens_per_second", "perf/trainable_tokens_per_second"),
                lines("Tokens/s and rank", "perf/tokens_per_second_per_rank"),
                lines("Rows/s, all ranks", "perf/samples_per_second"),
                lines("Model FLOP utilisation, share of the GPU's peak", "perf/mfu"),
                lines("TFLOP/s and rank", "perf/tflops_per_rank"),
                lines("Recomputation, share of all operations", "perf/recompute_fraction"),
            ),
            section(
                "Where the time goes",
                lines("A step's parts on rank 0, s", *(f"perf/{part}_time_s" for part in PARTS), **stacked),
                lines("A step, s", "perf/step_time_s"),
                of_ranks("Waiting for the reduction, each rank, s: the least is the slowest rank", OF_RANKS[2]),
                lines("An evaluation, s", "eval/time_s"),
            ),
            section(
                "Memory per rank",
                of_ranks("Peak allocated, GiB", OF_RANKS[0]),
                of_ranks("Peak reserved, GiB", OF_RANKS[1]),
                lines("Peak allocated of the ranks, GiB", "memory/min_peak_allocated_gib",
                      "memory/mean_peak_allocated_gib", "memory/max_peak_allocated_gib"),
                lines("Peak reserved of the ranks, GiB", "memory/min_peak_reserved_gib",
                      "memory/mean_peak_reserved_gib", "memory/max_peak_reserved_gib"),
                lines("Allocator's retries and failures, all ranks", "memory/alloc_retries", "memory/ooms"),
            ),
            section(
                "Data",
                lines("Passes over the data", "train/epoch"),
                lines("Tokens seen, and those trained on", "train/tokens_seen", "train/trainable_tokens_seen"),
                lines("Padding, share of the positions", "perf/padding_fraction"),
            ),
            section(
                "Checkpoints",
                lines("Training waits, s", "checkpoint/save_time_s"),
                lines("Written beside training, s", "checkpoint/write_time_s"),
                lines("Failed saves in a row", "checkpoint/failed_saves"),
            ),
            section("Samples", wr.MediaBrowser(title="Completions", media_keys=["eval/samples"])),
            section("Runs", wr.RunComparer(diff_only="split")),
        ],
    )  # fmt: skip


def spec(workspace) -> dict:
    """What the server gets, but for random ids: the same at each call."""
    text = workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)  # there is no public way
    return _without_ids(json.loads(text))


def _without_ids(value):
    if isinstance(value, dict):
        return {key: _without_ids(item) for key, item in value.items() if key not in ("__id__", "id")}
    return [_without_ids(item) for item in value] if isinstance(value, list) else value


def apply(entity: str | None, project: str, url: str | None) -> str:
    """Save the workspace as a new view, or over the one at `url`. Returns its address. Raises UserError."""
    import requests
    import wandb

    if not entity:
        raise UserError("--entity: is missing; give the user or team that the project belongs to")
    workspace = build(entity, project)
    os.environ["WANDB_SILENT"] = "true"
    try:
        if url:
            import wandb_workspaces.workspaces as ws

            earlier = ws.Workspace.from_url(re.sub(r"/workspace(?=\?|$)", "", url))
            earlier.name, earlier.settings, earlier.sections = workspace.name, workspace.settings, workspace.sections
            workspace = earlier
        return workspace.save().url
    except (wandb.errors.Error, requests.RequestException, ValueError) as error:
        server, why = wandb.setup().settings.base_url, " ".join(str(error).split())[:200]
        raise UserError(f"dashboard: {entity}/{project} on {server}: {type(error).__name__}: {why}") from None
