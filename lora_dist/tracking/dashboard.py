"""A workspace in Weights & Biases, as code: the panels that show a run of lora-dist and compare runs."""

import json
import math
import os
import re
from urllib.parse import parse_qs, unquote, urlsplit

import wandb

from lora_dist.errors import UserError
from lora_dist.run.folder import STEP
from lora_dist.tracking.metric_names import PARTS
from lora_dist.tracking.wandb_run import why_no_answer

NAME = "lora-dist"  # of the saved view
# Regular expressions for the per-rank metrics.
ALLOCATED, RESERVED = r"memory/rank\d+/peak_allocated_gib", r"memory/rank\d+/peak_reserved_gib"
REDUCE_TIME = r"perf/rank\d+/reduce_time_s"
ANSWER_S = 10  # wandb itself waits 20 s for a server that does not answer, and then reports that its service is busy

# The line plots, by section: title, the metrics that it draws, and arguments of LinePlot. A regular expression in place
# of the metrics draws one line per rank.
STACKED, LOG_SCALE = {"plot_type": "stacked-area"}, {"log_y": True}
LOSS_PLOTS = (
    ("Loss, nats per token", ("train/loss", "eval/loss"), {}),
    ("Held-out perplexity", ("eval/perplexity",), {}),
    ("Tokens predicted right, fraction", ("train/mean_token_accuracy", "eval/mean_token_accuracy"), {}),
    ("Reward accuracy of pairs, fraction", ("train/rewards/accuracies", "eval/rewards/accuracies"), {}),
    ("Reward margin of pairs", ("train/rewards/margins", "eval/rewards/margins"), {}),
    ("Rewards of chosen and rejected answers",
     ("train/rewards/chosen", "train/rewards/rejected", "eval/rewards/chosen", "eval/rewards/rejected"), {}),
    ("Log-probabilities of chosen and rejected answers, nats",
     ("train/logps/chosen", "train/logps/rejected", "eval/logps/chosen", "eval/logps/rejected"), {}),
    ("Scores", ("eval/accuracy", "eval/micro_f1", "eval/macro_f1"), {}),
)  # fmt: skip
OPTIMISATION_PLOTS = (
    ("Learning rate", ("train/learning_rate",), {}),
    ("Gradient norm before clipping", ("train/grad_norm",), LOG_SCALE),
    ("Skipped steps and loss spikes since the start", ("train/skipped_steps", "train/loss_spikes"), {}),
)
THROUGHPUT_PLOTS = (
    ("Tokens/s, all ranks: without padding, with padding, trained",
     ("perf/tokens_per_second", "perf/padded_tokens_per_second", "perf/trainable_tokens_per_second"), {}),
    ("Tokens/s per rank", ("perf/tokens_per_second_per_rank",), {}),
    ("Rows/s, all ranks", ("perf/samples_per_second",), {}),
    ("Model FLOP utilisation, fraction of the GPU's peak", ("perf/mfu",), {}),
    ("TFLOP/s per rank", ("perf/tflops_per_rank",), {}),
    ("Recomputation, fraction of all operations", ("perf/recompute_fraction",), {}),
)  # fmt: skip
TIME_PLOTS = (
    ("Parts of a step on rank 0, s", tuple(f"perf/{part}_time_s" for part in PARTS), STACKED),
    ("Step, s", ("perf/step_time_s",), {}),
    ("Wait in the reduction per rank, s: the rank that waits least is the slowest", REDUCE_TIME, {}),
    ("Evaluation, s", ("eval/time_s",), {}),
)
MEMORY_PLOTS = (
    ("Peak allocated per rank, GiB", ALLOCATED, {}),
    ("Peak reserved per rank, GiB", RESERVED, {}),
    ("Peak allocated over the ranks, GiB",
     tuple(f"memory/{what}_peak_allocated_gib" for what in ("min", "mean", "max")), {}),
    ("Peak reserved over the ranks, GiB",
     tuple(f"memory/{what}_peak_reserved_gib" for what in ("min", "mean", "max")), {}),
    ("Allocator retries and out-of-memory errors, all ranks", ("memory/alloc_retries", "memory/ooms"), {}),
)  # fmt: skip
DATA_PLOTS = (
    ("Passes over the data", ("train/epoch",), {}),
    ("Tokens seen, and tokens trained on", ("train/tokens_seen", "train/trainable_tokens_seen"), {}),
    ("Padding, fraction of the positions", ("perf/padding_fraction",), {}),
)
CHECKPOINT_PLOTS = (
    ("Wait of the training, s", ("checkpoint/save_time_s",), {}),
    ("Writing while training continues, s", ("checkpoint/write_time_s",), {}),
    ("Failed saves in a row", ("checkpoint/failed_saves",), {}),
)


def build(entity: str, project: str):
    """The workspace, not saved yet; needs no account. Raises UserError if wandb-workspaces is not installed."""
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise UserError("dashboard: needs a package: pip install 'lora-dist[dashboard]'") from None

    completions = [
        wr.MediaBrowser(title="Completions", media_keys=["eval/samples"]),
        wr.WeavePanelSummaryTable(table_name="eval/samples"),  # of each run's last evaluation
    ]
    sections = [
        _section("Loss", _line_plots(LOSS_PLOTS), columns=2),
        _section("Optimisation", _line_plots(OPTIMISATION_PLOTS)),
        _section("Throughput", _line_plots(THROUGHPUT_PLOTS)),
        _section("Where the time goes", _line_plots(TIME_PLOTS), columns=2),
        _section("Memory per rank", _line_plots(MEMORY_PLOTS)),
        _section("Data", _line_plots(DATA_PLOTS)),
        _section("Checkpoints", _line_plots(CHECKPOINT_PLOTS)),
        _section("Samples", completions, columns=1),
        _section("Runs", [wr.RunComparer(diff_only="split")], columns=1),
    ]
    settings = ws.WorkspaceSettings(x_axis=STEP, smoothing_type="none")
    return ws.Workspace(entity=entity, project=project, name=NAME, settings=settings, sections=sections)


def _line_plots(table: tuple) -> list:
    import wandb_workspaces.reports.v2 as wr

    return [
        wr.LinePlot(title=title, x=STEP, metric_regex=metrics, **arguments)
        if isinstance(metrics, str)
        else wr.LinePlot(title=title, x=STEP, y=[*metrics], **arguments)
        for title, metrics, arguments in table
    ]


def _section(name: str, panels: list, *, columns: int = 3):
    """An open section that shows all its panels on one page."""
    import wandb_workspaces.workspaces as ws

    layout = ws.SectionLayoutSettings(columns=columns, rows=math.ceil(len(panels) / columns))
    return ws.Section(name=name, panels=panels, is_open=True, layout_settings=layout)


def spec(workspace) -> dict:
    """What the server gets, without the random ids, so that it is the same at each call."""
    text = workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)  # no public function does this
    return _without_ids(json.loads(text))


def _without_ids(value):
    if isinstance(value, dict):
        return {key: _without_ids(item) for key, item in value.items() if key not in ("__id__", "id")}
    return [_without_ids(item) for item in value] if isinstance(value, list) else value


def apply(entity: str | None, project: str, url: str | None = None) -> str:
    """Save the workspace as a new view, or over the view at `url`. Returns its address.

    Raises UserError if there is no entity or no key, if `url` is not a view of this project, or if the server does not
    answer or refuses.
    """
    if not entity:
        raise UserError("--entity: is missing; give the user or team that the project belongs to")
    view = _view_name(url, entity, project) if url is not None else None
    workspace = build(entity, project)

    import wandb_workspaces.workspaces as ws

    os.environ["WANDB_SILENT"] = "true"
    settings = wandb.setup().settings
    server = settings.base_url
    if why := why_no_answer(server, ANSWER_S):
        raise UserError(f"WANDB_BASE_URL {server}: {why}; give the address of a server that can be reached from here")
    try:
        if view:
            earlier = ws.Workspace.from_url(f"/{entity}/{project}?nw={view}")  # the only form of path that it accepts
            earlier.name, earlier.settings, earlier.sections = workspace.name, workspace.settings, workspace.sections
            workspace = earlier
        saved = urlsplit(workspace.save().url)  # without the path of the app, e.g. /wandb, which a server may have
    except Exception as error:  # failed requests and errors in parsing an answer share no base class
        why = " ".join(str(error).split())[:200]
        raise UserError(f"dashboard: {entity}/{project} on {server}: {type(error).__name__}: {why}") from None
    return f"{settings.app_url.rstrip('/')}{saved.path}?{saved.query}"


def _view_name(url: str, entity: str, project: str) -> str:
    """The name of the view at an address from a browser, with or without `/workspace` in it. Raises UserError."""
    address = urlsplit(url)
    *_, owner, name = ["", "", *unquote(address.path).strip("/").removesuffix("/workspace").split("/")]
    view = parse_qs(address.query).get("nw", [""])[0].strip("/")
    # nwuser...: a user's own workspace, which the library cannot write.
    if not owner or not re.fullmatch(r"(?!nwuser)\w+", view):
        form = f"https://wandb.ai/{entity}/{project}?nw=a0b1c2d3"
        raise UserError(f"--url {url}: is not a saved view; give the address that this command printed, like {form}")
    if (owner, name) != (entity, project):
        rule = f"is a view of {owner}/{name}: give --entity {owner} --project {name}, or another address"
        raise UserError(f"--url {url}: {rule}")
    return view
