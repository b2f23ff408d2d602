"""A workspace in Weights & Biases, as code: what one looks at in a run of this toolkit, and how runs are compared."""

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

NAME = "lora-dist"
OF_RANKS = r"memory/rank\d+/peak_allocated_gib", r"memory/rank\d+/peak_reserved_gib", r"perf/rank\d+/reduce_time_s"
ANSWER_S = 10  # wandb itself waits 20 s for a server that is not there, and calls its own service busy then


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

    def section(name: str, *panels, columns: int = 3) -> ws.Section:
        rows = math.ceil(len(panels) / columns)  # all on one page
        layout = ws.SectionLayoutSettings(columns=columns, rows=rows)
        return ws.Section(name=name, panels=list(panels), is_open=True, layout_settings=layout)

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
                columns=2,
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
                columns=2,
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
            section(
                "Samples",
                wr.MediaBrowser(title="Completions", media_keys=["eval/samples"]),
                wr.WeavePanelSummaryTable(table_name="eval/samples"),  # the last evaluation's, of each run
                columns=1,
            ),
            section("Runs", wr.RunComparer(diff_only="split"), columns=1),
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


def apply(entity: str | None, project: str, url: str | None = None) -> str:
    """Save the workspace as a new view, or over the one at `url`. Returns its address.

    Raises UserError: no entity, a `url` of no view or of another project's, no key, no answer, or what is refused.
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
        raise UserError(f"WANDB_BASE_URL {server}: {why}; give that of a server that can be reached from here")
    try:
        if view:
            earlier = ws.Workspace.from_url(f"/{entity}/{project}?nw={view}")  # it takes no other path
            earlier.name, earlier.settings, earlier.sections = workspace.name, workspace.settings, workspace.sections
            workspace = earlier
        saved = urlsplit(workspace.save().url)  # it lacks the app's own path, which the usual server has
    except Exception as error:  # wandb's failed requests, and what the library makes of an answer, share no class
        why = " ".join(str(error).split())[:200]
        raise UserError(f"dashboard: {entity}/{project} on {server}: {type(error).__name__}: {why}") from None
    return f"{settings.app_url.rstrip('/')}{saved.path}?{saved.query}"


def _view_name(url: str, entity: str, project: str) -> str:
    """The name of the view at a browser's address, with or without its `/workspace`. Raises UserError."""
    address = urlsplit(url)
    *_, owner, name = ["", "", *unquote(address.path).strip("/").removesuffix("/workspace").split("/")]
    view = parse_qs(address.query).get("nw", [""])[0].strip("/")
    if not owner or not re.fullmatch(r"(?!nwuser)\w+", view):  # nwuser...: one's own, which the library cannot write
        form = f"https://wandb.ai/{entity}/{project}?nw=a0b1c2d3"
        raise UserError(f"--url {url}: is no saved view; give the address that this command printed, like {form}")
    if (owner, name) != (entity, project):
        rule = f"is a view of {owner}/{name}: give --entity {owner} --project {name}, or another address"
        raise UserError(f"--url {url}: {rule}")
    return view
