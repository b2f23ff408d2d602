"""report.html: one self-contained page drawn from a run folder's files; and one page that compares several runs."""

import dataclasses
import datetime
import os
from collections.abc import Iterable
from pathlib import Path

import jinja2

from lora_dist.boundary import read_json
from lora_dist.config import TrainConfig
from lora_dist.errors import UserError
from lora_dist.files import write_whole
from lora_dist.run.folder import RunFolder
from lora_dist.tracking.charts import Chart, Series, draw, smoothed
from lora_dist.tracking.metric_names import PARTS
from lora_dist.tracking.record import RunRecord, is_finite_number, rank_of
from lora_dist.tracking.report_sections import memory_bars, sample_cards, shorten
from lora_dist.units import count, duration, percent, size

CURVES = (  # title, unit, (metric, name of the line) for each line
    ("Learning rate", "", (("train/learning_rate", "learning rate"),)),
    ("Gradient norm before clipping", "", (("train/grad_norm", "gradient norm"),)),
    ("Throughput, all ranks", "tokens/s",
     (("perf/tokens_per_second", "padding not counted"), ("perf/padded_tokens_per_second", "padding counted"))),
    ("Padding", "fraction of positions", (("perf/padding_fraction", "padding"),)),
    ("Tokens predicted right", "fraction",
     (("train/mean_token_accuracy", "training"), ("eval/mean_token_accuracy", "held-out"))),
    ("Reward accuracy of pairs", "fraction",
     (("train/rewards/accuracies", "training"), ("eval/rewards/accuracies", "held-out"))),
    ("Rewards of answers", "beta x nats",
     (("train/rewards/chosen", "chosen"), ("train/rewards/rejected", "rejected"),
      ("eval/rewards/chosen", "chosen, held-out"), ("eval/rewards/rejected", "rejected, held-out"))),
    ("Reward margin of pairs", "beta x nats",
     (("train/rewards/margins", "training"), ("eval/rewards/margins", "held-out"))),
    ("Log-probability of answers", "nats",
     (("train/logps/chosen", "chosen"), ("train/logps/rejected", "rejected"),
      ("eval/logps/chosen", "chosen, held-out"), ("eval/logps/rejected", "rejected, held-out"))),
    ("Model FLOP utilisation", "fraction of peak", (("perf/mfu", "MFU"),)),
)  # fmt: skip
COMPARED_CURVES = (  # title, unit (None: the loss's own), metric
    ("Training loss", None, "train/loss"),
    ("Held-out loss", None, "eval/loss"),
    ("Throughput, all ranks, padding not counted", "tokens/s", "perf/tokens_per_second"),
    ("Learning rate", "", "train/learning_rate"),
    ("Gradient norm before clipping", "", "train/grad_norm"),
)
MARK = b" - lora-dist</title>"  # in each page; before it stands the name of the run
MARKED_BYTES = 5000
MIN_SMOOTHED = 40  # values; with fewer a running mean would hide more than it shows
WIDE_CHART = {"width": 860, "height": 300}
MAX_COMPARED = 8  # runs that the colours and dashes of a chart tell apart
# Limits that keep the page of a long run small.
MAX_STARTS, MAX_ERROR_CHARACTERS, MAX_BAD_STEPS = 30, 400, 20


def require_page(path: Path) -> None:
    """Raises UserError if there is something at this path that is not a page of ours, which may be overwritten."""
    for name in (path, path.with_name(f"{path.name}.partial")):  # the latter: what `write_whole` writes first
        if os.path.lexists(name) and not (name.is_file() and _begins_as_ours(name)):
            what = "is there, and is no page of lora-dist; give another name, or remove it"
            raise UserError(f"--output {name}: {what}")


def _begins_as_ours(path: Path) -> bool:
    with open(path, "rb") as file:
        return MARK in file.read(MARKED_BYTES)


def write_report(folder: RunFolder, path: Path | None = None) -> list[str]:
    """Draw the run folder as it is now into `path`; by default into its report.html.

    Returns a line for each part of the folder that could not be read or shown. The page names them too.
    """
    record = RunRecord(folder)
    write_whole(path or folder.report, render(record))
    return record.problems


def write_comparison(folders: list[RunFolder], path: Path) -> list[str]:
    """Draw several runs into one page, as `write_report` does. Raises UserError if there are too many to tell apart."""
    if len(folders) > MAX_COMPARED:
        raise UserError(f"RUN: {len(folders)} are given, but a chart can tell at most {MAX_COMPARED} apart; give fewer")
    records = [RunRecord(folder) for folder in folders]
    write_whole(path, render_comparison(records))
    return [f"{record.folder.root}: {problem}" for record in records for problem in record.problems]


def render(record: RunRecord) -> str:
    """The page of one run as HTML text. A section that cannot be drawn is left out, and `record.problems` says so."""
    part, steps = record.part, [start["step"] for start in record.starts[1:] if "step" in start]
    charts = [part(title, lambda c=(title, *rest): _curve(record, *c, steps), None) for title, *rest in CURVES]
    sections = dict(
        name=record.name, state=record.state, step=record.step, restarts=record.restarts, config=record.config,
        error=record.summary.get("error"), strategy=part("strategy", lambda: _strategy_and_ranks(record), ""),
        figures=part("key figures", lambda: key_figures(record), []),
        loss=part("loss", lambda: _loss_charts(record, steps), []), charts=[chart for chart in charts if chart],
        memory=part("memory", lambda: memory_bars(record), {}), time=part("time", lambda: time_spent(record), {}),
        waits=part("waits", lambda: _reduce_waits(record), []), profile=_read_profile(record),
        samples=part("samples.jsonl", lambda: sample_cards(record), {}),
        starts=part("starts.jsonl", lambda: [_start_row(start) for start in record.starts[-MAX_STARTS:]], []),
        num_earlier_starts=max(len(record.starts) - MAX_STARTS, 0),
        incidents=part("faults", lambda: incidents(record), []), settings=settings(record.config),
        environment=part("environment", lambda: environment(record.starts), []),
    )  # fmt: skip
    return _template("report").render(sections, problems=record.problems)


def render_comparison(records: list[RunRecord]) -> str:
    """The page that compares several runs, as HTML text."""
    names = distinct_names([record.folder.root.resolve() for record in records])
    charts = []
    for title, unit, metric in COMPARED_CURVES:
        lines = [Series(names[i], record.series(metric), style=i) for i, record in enumerate(records)]
        charts.append(draw(title, _loss_unit(records) if unit is None else unit, lines))
    results = [
        [names[i], record.state.get("status", ""), *record.part("results", lambda r=record: results_of(r), [])]
        for i, record in enumerate(records)
    ]
    differing = differing_settings([record.config for record in records])
    return _template("comparison").render(
        name="Comparison of " + ", ".join(names), run_names=names, results=results,
        charts=[chart for chart in charts if chart], differing=differing,
        problems=[f"{names[i]}: {problem}" for i, record in enumerate(records) for problem in record.problems],
    )  # fmt: skip


def distinct_names(roots: list[Path]) -> list[str]:
    """The name of each folder, preceded by as many of its parents as are needed to tell all folders apart."""
    names = [root.name for root in roots]
    for depth in range(2, max(len(root.parts) for root in roots) + 1):
        if len(set(names)) == len(set(roots)):
            break
        names = ["/".join(root.parts[-depth:]) for root in roots]
    return names


def differing_settings(configs: list[dict]) -> list[tuple[str, list]]:
    """(name, value in each run); "not set" if the version that wrote a run had no such setting."""
    names = dict.fromkeys(name for config in configs for name in config if name != "output_dir")
    rows = [(name, [config.get(name, "not set") for config in configs]) for name in names]
    return [(name, values) for name, values in rows if len(set(map(str, values))) > 1]


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "duration": duration}
    return environment.get_template(f"{name}.html.jinja")


def _loss_charts(record: RunRecord, restart_steps: list[int]) -> list[Chart]:
    """The loss twice: in a wide chart, and in a narrow one for a phone. [] if there is no loss yet."""
    losses = record.series("train/loss")
    averaged = [Series("training, running mean", smoothed(losses))] if len(losses) >= MIN_SMOOTHED else []
    series = [
        Series("training", losses, faint=bool(averaged)),
        *averaged,
        Series("held-out", record.series("eval/loss"), as_dots=True, style=1),
    ]
    charts = [
        draw("Loss", _loss_unit([record]), series, restarts=restart_steps, **chart_size)
        for chart_size in (WIDE_CHART, {"height": 240})
    ]
    return [chart for chart in charts if chart]


def _loss_unit(records: list[RunRecord]) -> str:
    """What a loss is a mean over: tokens; of a classifier of whole rows, rows or decisions; of pairs, pairs."""
    kinds = {(str(record.config.get("task_type")), record.config.get("loss_type", "nll")) for record in records}
    ((task, loss), *others) = kinds
    if others:
        return "nats" if all(loss == "nll" for _, loss in kinds) else ""
    return "per pair" if loss != "nll" else "nats per row or class" if task == "SEQ_CLS" else "nats per token"


def _curve(record: RunRecord, title: str, unit: str, lines: Iterable, restart_steps: list[int]) -> Chart | None:
    series = [
        Series(name, record.series(metric), as_dots=metric.startswith("eval/"), style=style)
        for style, (metric, name) in enumerate(lines)
    ]
    return draw(title, unit, series, restarts=restart_steps)


def _strategy_and_ranks(record: RunRecord) -> str:
    """Strategy and ranks of the last start: "fsdp on 2 ranks"."""
    start = record.starts[-1] if record.starts else {}
    strategy = record.summary.get("strategy") or start.get("strategy")
    num_ranks = record.summary.get("world_size") or start.get("num_ranks")
    return " on ".join(filter(None, (strategy, num_ranks and count(num_ranks, "rank"))))


def key_figures(record: RunRecord) -> list[tuple[str, str]]:
    """(value, label) of the numbers at the top of the page. Numbers that were not measured are left out."""
    summary, found = record.summary, []
    first, last = record.first("train/loss"), record.last("train/loss")
    if first is not None:
        found.append((f"{first:.3f} → {last:.3f}", "training loss, first to last step"))
    found += _held_out_figures(record)
    for name, value in summary.items():  # the recipe's scores, for example F1, without and with the adapter
        base = None if name == "eval_loss" else summary.get(f"{name}_base")
        if isinstance(base, float) and isinstance(value, float):
            found.append((f"{base:.3f} → {value:.3f}", f"{name.replace('_', ' ')}, base to base + adapter"))
    if summary.get("tokens_per_second"):
        found.append((f"{summary['tokens_per_second']:,.0f}", "tokens per second, all ranks, padding not counted"))
    if summary.get("base_bytes_total") and summary.get("base_bytes_per_rank"):
        fraction = summary["base_bytes_per_rank"] / summary["base_bytes_total"]
        found.append((f"{fraction:.0%} of {size(summary['base_bytes_total'])}", "of the base held by each rank"))
    if peaks := summary.get("peak_memory_bytes_per_rank"):
        found.append((size(max(peaks)), "peak memory of the fullest rank"))
    if summary.get("trainable_params"):
        found.append((f"{summary['trainable_params']:,}", "trained parameters"))
    if record.lines and record.starts and "time" in record.starts[0]:
        seconds = record.lines[-1]["time"] - record.starts[0]["time"]
        found.append((duration(seconds), "from the first start to the last logged line"))
    return found


def _held_out_figures(record: RunRecord) -> list[tuple[str, str]]:
    points = record.series("eval/loss")
    if len(points) < 2:
        return []
    from_to = "base to base + adapter" if points[0][0] == 0 else f"step {points[0][0]} to step {points[-1][0]}"
    found = [(f"{points[0][1]:.3f} → {points[-1][1]:.3f}", f"held-out loss, {from_to}")]
    perplexities = [value for _, value in record.series("eval/perplexity")]
    if len(perplexities) == len(points):
        found.append((f"{perplexities[0]:.2f} → {perplexities[-1]:.2f}", "held-out perplexity"))
    return found


def time_spent(record: RunRecord) -> dict:
    """Seconds of the whole training, and fractions of it, by what they were spent on. {} if none were measured.

    Steps that were not logged are counted as if they took as long as the logged ones.
    """
    num_logged = len(record.series("perf/step_time_s"))
    if not num_logged:
        return {}
    steps_per_logged = record.step / num_logged
    parts = [(name, record.total(f"perf/{part}_time_s") * steps_per_logged) for part, name in PARTS.items()]
    in_parts = sum(seconds for _, seconds in parts)
    rows = [(name, seconds) for name, seconds in parts if seconds]
    in_steps = record.total("perf/step_time_s") * steps_per_logged
    rows.append(("the rest of the steps", max(in_steps - in_parts, 0.0)))
    rows += [("evaluating", record.total("eval/time_s")), ("saving", record.total("checkpoint/save_time_s"))]
    if record.summary.get("load_s"):
        rows.append(("loading the base, last start", record.summary["load_s"]))
    total = sum(seconds for _, seconds in rows)
    if not total:
        return {}
    rows = [
        {"what": name, "seconds": seconds, "fraction": seconds / total, "style": i}
        for i, (name, seconds) in enumerate(rows)
        if seconds
    ]
    return {"rows": rows, "total": total, "all_logged": num_logged >= record.step}


def _reduce_waits(record: RunRecord) -> list[tuple[str, float]]:
    """(rank, mean seconds per step that it waits in the reduction). [] for one rank, or if there are too many."""
    names = sorted({name for line in record.lines for name in line if name.startswith("perf/rank")}, key=rank_of)
    waits = [(f"rank {rank_of(name)}", record.series(name)) for name in names]
    means = [(name, sum(value for _, value in points) / len(points)) for name, points in waits if points]
    return means if len(means) > 1 else []


def _read_profile(record: RunRecord) -> dict | None:
    def read() -> dict:
        table = read_json(path, "profile/table.json")
        rows = [{name: row[name] for name in ("what", "self_time_s", "share", "calls")} for row in table["rows"]]
        if not all(is_finite_number(row[name]) for row in rows for name in ("self_time_s", "share", "calls")):
            raise ValueError("a time, a share or a count is no number")
        return {"steps": [int(table["steps"][0]), int(table["steps"][1])], "rows": rows}

    path = record.folder.profile / "table.json"
    return record.part("profile/table.json", read, None) if os.path.lexists(path) else None


def _start_row(start: dict) -> dict:
    """A line of starts.jsonl as the row of a table, with how the start before it ended."""
    previous = start.get("previous") or {}
    ended = {"running": "killed"}.get(previous.get("status"), previous.get("status", ""))
    time_s, ranks = start.get("time"), [str(start[name]) for name in ("num_ranks", "strategy") if name in start]
    return {
        "when": f"{datetime.datetime.fromtimestamp(time_s, datetime.UTC):%Y-%m-%d %H:%M:%S}" if time_s else "",
        "step": start.get("step", ""), "ranks": " × ".join(ranks),
        "device": start.get("device", ""), "job": start.get("slurm_job_id"), "previous": ended,
        "error": shorten(previous.get("error"), MAX_ERROR_CHARACTERS),
    }  # fmt: skip


def incidents(record: RunRecord) -> list[str]:
    """What went wrong, one line each. The table of starts shows how the starts before the last one ended."""
    bad_steps = record.bad_steps
    found = [_ending(record)] if record.state.get("status") in ("failed", "preempted") else []
    if record.restarts and len(record.starts) < 2:
        found.append(f"{count(record.restarts, 'restart')}, with no details recorded")
    found += [
        f"step {line['step']} was skipped: loss {line.get('loss', 'not recorded')}, "
        f"gradient norm {line.get('grad_norm', 'not recorded')}"
        for line in bad_steps[:MAX_BAD_STEPS]
    ]
    logged, summed = record.last("train/skipped_steps"), record.summary.get("skipped_steps")
    num_skipped = max(int(logged or 0), summed or 0, len(bad_steps))
    if (more := num_skipped - len(bad_steps[:MAX_BAD_STEPS])) > 0:
        found.append(f"{count(more, 'more step' if bad_steps else 'step')} skipped")
    if spikes := record.last("train/loss_spikes"):
        found.append(f"{count(int(spikes), 'step')} with a loss far above the steps before")
    if failed := len(record.series("checkpoint/failed_saves")):
        found.append(f"{count(failed, 'checkpoint')} could not be written")
    return found


def _ending(record: RunRecord) -> str:
    why = " because a rank or its machine was gone" if record.state.get("rank_lost") else ""
    saved = f"; saved until step {record.state['step']}" if "step" in record.state else ""
    return f"the run {'failed' if record.state['status'] == 'failed' else 'was preempted'}{why}{saved}"


def settings(config: dict) -> dict[str, list[tuple]]:
    """Settings by whether they differ from TrainConfig's defaults.

    "changed" holds (name, value, default), "others" holds (name, value).
    """
    defaults = dataclasses.asdict(TrainConfig())
    changed = [(name, value, defaults.get(name)) for name, value in config.items() if value != defaults.get(name)]
    others = [(name, value) for name, value in config.items() if value == defaults.get(name)]
    return {"changed": changed, "others": others}


def environment(starts: list[dict]) -> list[tuple[str, str]]:
    """(name, value) for the last start; versions that differed at earlier starts are named beside it."""
    if not starts:
        return []
    last = starts[-1]
    rows = [("device", last.get("device")), ("hosts", ", ".join(last.get("hosts", [])))]
    rows += [("precision", last.get("mixed_precision")), ("commit", last.get("git_commit") or "not known")]
    rows += [("Slurm job", last.get("slurm_job_id"))]
    for package, version in last.get("versions", {}).items():
        earlier = {start.get("versions", {}).get(package) for start in starts} - {version, None}
        note = f" (earlier: {', '.join(sorted(earlier))})" if earlier else ""
        rows.append((package, version + note))
    return [(name, value) for name, value in rows if value]


def results_of(record: RunRecord) -> list[str]:
    """The cells of a compared run: steps, loss, held-out loss, perplexity, tokens/s, peak memory, restarts."""
    loss, held_out, perplexity = (record.last(name) for name in ("train/loss", "eval/loss", "eval/perplexity"))
    rate, peaks = (record.summary.get(name) for name in ("tokens_per_second", "peak_memory_bytes_per_rank"))
    return [
        str(record.step), *("" if value is None else f"{value:.4f}" for value in (loss, held_out)),
        "" if perplexity is None else f"{perplexity:.2f}", f"{rate:,.0f}" if rate else "",
        size(max(peaks)) if peaks else "", str(record.restarts),
    ]  # fmt: skip
