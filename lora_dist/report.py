"""report.html: one self-contained page drawn from a run folder's files; and one page that compares several runs."""

import dataclasses
import datetime
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jinja2
import yaml

from lora_dist.charts import Chart, Series, draw
from lora_dist.config import TrainConfig, UserError
from lora_dist.manifest import write_whole
from lora_dist.metric_names import MOST_RANKS
from lora_dist.run_folder import STEP, RunFolder

PARTS = (  # of a step: metric, what it is called here
    ("data", "waiting for data"),
    ("gather", "gathering layers"),
    ("wait", "waiting for other stages"),
    ("forward", "forward"),
    ("backward", "backward"),
    ("reduce", "reducing gradients"),
    ("update", "updating"),
)
CURVES = (  # title, unit, (metric, name) each
    ("Learning rate", "", (("train/learning_rate", "learning rate"),)),
    ("Gradient norm before clipping", "", (("train/grad_norm", "gradient norm"),)),
    ("Throughput, all ranks", "tokens/s",
     (("perf/tokens_per_second", "padding not counted"), ("perf/padded_tokens_per_second", "padding counted"))),
    ("Padding", "share of positions", (("perf/padding_fraction", "padding"),)),
    ("Tokens predicted right", "share",
     (("train/mean_token_accuracy", "training"), ("eval/mean_token_accuracy", "held-out"))),
    ("Model FLOP utilisation", "share of peak", (("perf/mfu", "MFU"),)),
)  # fmt: skip
COMPARED = (
    ("Training loss", "nats a token", "train/loss"),
    ("Held-out loss", "nats a token", "eval/loss"),
    ("Throughput, all ranks, padding not counted", "tokens/s", "perf/tokens_per_second"),
    ("Learning rate", "", "train/learning_rate"),
    ("Gradient norm before clipping", "", "train/grad_norm"),
)
WIDE = {"width": 860, "height": 300}
MOST_RUNS = 8  # that a chart's colours and dashes tell apart


@dataclass(frozen=True)
class RunData:
    """What a run folder holds; files and numbers that are not there are empty, not guessed."""

    folder: RunFolder

    @cached_property
    def config(self) -> dict:
        return yaml.safe_load(self.folder.config.read_text(encoding="utf-8"))

    @cached_property
    def state(self) -> dict:
        return self.folder.read_state()

    @property
    def summary(self) -> dict:
        return self.state.get("summary") or {}

    @cached_property
    def lines(self) -> list[dict]:
        return self.folder.read_metrics()

    @cached_property
    def starts(self) -> list[dict]:
        return self.folder.read_lines(self.folder.starts)

    @cached_property
    def samples(self) -> list[dict]:
        return self.folder.read_lines(self.folder.samples)

    @property
    def name(self) -> str:
        return self.folder.root.resolve().name

    @property
    def step(self) -> int:
        return max([self.state.get("step") or 0, *(line[STEP] for line in self.lines[-1:])])

    def series(self, metric: str) -> list[tuple[int, float]]:
        return [(line[STEP], line[metric]) for line in self.lines if metric in line]

    def total(self, metric: str) -> float:
        return sum(value for _, value in self.series(metric))

    def last(self, metric: str):
        return next((line[metric] for line in reversed(self.lines) if metric in line), None)

    def first(self, metric: str):
        return next((line[metric] for line in self.lines if metric in line), None)


def write_report(folder: RunFolder, path: Path | None = None) -> None:
    """Draw the run folder as it is now into `path`, its report.html unless another is given."""
    write_whole(path or folder.report, render(RunData(folder)))


def write_comparison(folders: list[RunFolder], path: Path) -> None:
    """Draw several runs into one page. Raises UserError where they are too many to tell apart."""
    if len(folders) > MOST_RUNS:
        raise UserError(f"RUN: {len(folders)} are given: at most {MOST_RUNS} can be told apart in a chart")
    write_whole(path, render_comparison([RunData(folder) for folder in folders]))


def render(run: RunData) -> str:
    """The page of one run as text."""
    restarts = [start["step"] for start in run.starts[1:]]
    return _template("report").render(
        run=run, name=run.name, figures=figures(run), loss=_loss_charts(run, restarts),
        charts=[chart for curve in CURVES if (chart := _curve(run, *curve, restarts))],
        memory=memory(run), time=time_spent(run), waits=_reduce_waits(run), samples=samples(run),
        profile=_read_profile(run.folder), starts=[_start_row(start) for start in run.starts],
        incidents=incidents(run), settings=settings(run.config), environment=environment(run.starts),
    )  # fmt: skip


def render_comparison(runs: list[RunData]) -> str:
    charts = []
    for title, unit, metric in COMPARED:
        series = [Series(run.name, run.series(metric), style=style) for style, run in enumerate(runs)]
        few = max((len(one.points) for one in series), default=0) <= 30
        charts.append(draw(title, unit, [dataclasses.replace(one, as_dots=few) for one in series]))
    names = [n for n in runs[0].config if n != "output_dir" and len({str(r.config.get(n)) for r in runs}) > 1]
    differing = [(name, [run.config.get(name) for run in runs]) for name in names]
    results = [[run.name, run.state["status"], *results_of(run)] for run in runs]
    return _template("comparison").render(
        name="Comparison of " + ", ".join(run.name for run in runs), runs=runs, charts=[c for c in charts if c],
        differing=differing, results=results,
    )  # fmt: skip


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"share": share, "seconds": duration, "gib": gib}
    return environment.get_template(f"{name}.html.jinja")


def _loss_charts(run: RunData, restarts: list[int]) -> list[Chart]:
    """The same wide and, for a phone, narrow; none where there is no loss yet."""
    series = [
        Series("training", run.series("train/loss")),
        Series("held-out", run.series("eval/loss"), as_dots=True, style=1),
    ]
    charts = [draw("Loss", "nats a token", series, restarts=restarts, **size) for size in (WIDE, {"height": 240})]
    return [chart for chart in charts if chart]


def _curve(run: RunData, title: str, unit: str, metrics: Iterable, restarts: list[int]) -> Chart | None:
    series = [
        Series(name, run.series(metric), as_dots=metric.startswith("eval/"), style=style)
        for style, (metric, name) in enumerate(metrics)
    ]
    return draw(title, unit, series, restarts=restarts)


def figures(run: RunData) -> list[tuple[str, str]]:
    """(value, label) of what stands at the top; what was not measured is left out."""
    summary, found = run.summary, []
    first, last = run.first("train/loss"), run.last("train/loss")
    if first is not None:
        found.append((f"{first:.3f} → {last:.3f}", "training loss, first to last step"))
    before, after = run.first("eval/loss"), run.last("eval/loss")
    if before is not None and len(run.series("eval/loss")) > 1:
        found.append((f"{before:.3f} → {after:.3f}", "held-out loss, base to base + adapter"))
        if run.last("eval/perplexity") is not None:
            found.append((f"{math.exp(before):.2f} → {math.exp(after):.2f}", "held-out perplexity"))
    if summary.get("tokens_per_second"):
        found.append((f"{summary['tokens_per_second']:,.0f}", "tokens per second, all ranks, no padding"))
    if summary.get("base_bytes_total"):
        part = summary["base_bytes_per_rank"] / summary["base_bytes_total"]
        found.append((f"{part:.0%} of {size(summary['base_bytes_total'])}", "of the base on each rank"))
    if peaks := summary.get("peak_memory_bytes_per_rank"):
        found.append((size(max(peaks)), "peak memory of the fullest rank"))
    if summary.get("trainable_params"):
        found.append((f"{summary['trainable_params']:,}", "trained parameters"))
    if run.lines and run.starts:
        found.append((duration(run.lines[-1]["time"] - run.starts[0]["time"]), "from the first start to the last line"))
    return found


def memory(run: RunData) -> dict:
    """Bars of the ranks in percent of the longest, with what was expected. {} where nothing was measured."""
    summary = run.summary
    peaks = summary.get("peak_memory_bytes_per_rank")
    if not peaks:
        return {}
    expected = summary.get("expected") or {}
    before = summary.get("memory_before_bytes_per_rank") or [0] * len(peaks)
    rows = [(f"rank {rank}", before[rank], peak) for rank, peak in enumerate(peaks)]
    if len(peaks) > MOST_RANKS:
        order = sorted(range(len(peaks)), key=lambda rank: peaks[rank])
        chosen = {"least": order[0], "median": order[len(order) // 2], "greatest": order[-1]}
        rows = [(f"{what}: rank {rank}", before[rank], peaks[rank]) for what, rank in chosen.items()]
    estimate, base = expected.get("peak_bytes_per_rank"), expected.get("base_bytes_per_rank")
    longest = max(*peaks, *(start + (estimate or 0) for _, start, _ in rows))
    return {
        "rows": [
            {
                "name": name, "before": 100 * start / longest, "grown": 100 * (peak - start) / longest,
                "expected": 100 * (start + estimate) / longest if estimate else None, "peak": size(peak),
                "before_size": size(start) if start else None,
            }
            for name, start, peak in rows
        ],
        "on_cpu": any(before), "estimate": size(estimate) if estimate else None,
        "base_expected": size(base) if base else None, "base_measured": size(summary["base_bytes_per_rank"]),
    }  # fmt: skip


def time_spent(run: RunData) -> dict:
    """Seconds by what they went into, of all that was trained, and their shares. {} where nothing was measured.

    Steps that were not logged are taken to be as those that were.
    """
    logged = len(run.series("perf/step_time_s"))
    if not logged:
        return {}
    times = run.step / logged
    parts = [(called, run.total(f"perf/{part}_time_s") * times) for part, called in PARTS]
    in_parts = sum(seconds for _, seconds in parts)
    rows = [(called, seconds) for called, seconds in parts if seconds]
    rows.append(("the rest of the steps", max(run.total("perf/step_time_s") * times - in_parts, 0.0)))
    rows += [("evaluating", run.total("eval/time_s")), ("saving", run.total("checkpoint/save_time_s"))]
    if run.summary.get("load_s"):
        rows.append(("loading the base, last start", run.summary["load_s"]))
    total = sum(seconds for _, seconds in rows)
    rows = [{"what": what, "seconds": s, "share": s / total, "style": i} for i, (what, s) in enumerate(rows) if s]
    return {"rows": rows, "total": total, "all_logged": logged >= run.step}


def _reduce_waits(run: RunData) -> list[tuple[str, float]]:
    """Mean wait of each rank for the reduction, in seconds a step; [] above MOST_RANKS ranks."""
    names = sorted({name for line in run.lines for name in line if name.startswith("perf/rank")},
                   key=lambda name: int(name.split("/")[1][4:]))  # fmt: skip
    waits = [(name.split("/")[1].replace("rank", "rank "), run.series(name)) for name in names]
    return [(name, sum(value for _, value in points) / len(points)) for name, points in waits]


def samples(run: RunData) -> list[dict]:
    """Each prompt with its completions, by step."""
    prompts: dict[str, dict] = {}
    for line in run.samples:
        entry = prompts.setdefault(line["prompt"], {"prompt": line["prompt"], "reference": line["reference"], "at": []})
        entry["at"].append((line[STEP], line["completion"]))
    return list(prompts.values())


def _read_profile(folder: RunFolder) -> dict | None:
    path = folder.profile / "table.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _start_row(start: dict) -> dict:
    previous = start.get("previous")
    ended = "" if not previous else {"running": "killed"}.get(previous["status"], previous["status"])
    return {
        "when": f"{datetime.datetime.fromtimestamp(start['time'], datetime.UTC):%Y-%m-%d %H:%M:%S}",
        "step": start["step"], "ranks": f"{start['num_ranks']} × {start['strategy']}", "device": start["device"],
        "job": start.get("slurm_job_id"), "before": ended, "error": (previous or {}).get("error"),
    }  # fmt: skip


def incidents(run: RunData) -> list[str]:
    bad = run.folder.read_lines(run.folder.bad_steps)
    found = [
        f"step {line['step']} was skipped: loss {line['loss']}, gradient norm {line['grad_norm']}" for line in bad[:20]
    ]
    if len(bad) > 20:
        found.append(f"{len(bad) - 20} more steps were skipped: see bad_steps.jsonl")
    if spikes := run.last("train/loss_spikes"):
        found.append(f"{spikes} step(s) whose loss stood far above those before")
    if failed := len(run.series("checkpoint/failed_saves")):
        found.append(f"{failed} checkpoint(s) could not be written")
    return found


def settings(config: dict) -> dict[str, list[tuple]]:
    """Those that differ from TrainConfig's defaults as (name, value, default), and all others as (name, value)."""
    defaults = dataclasses.asdict(TrainConfig())
    changed = [(name, value, defaults.get(name)) for name, value in config.items() if value != defaults.get(name)]
    others = [(name, value) for name, value in config.items() if value == defaults.get(name)]
    return {"changed": changed, "others": others}


def environment(starts: list[dict]) -> list[tuple[str, str]]:
    """Of the last start; a version that an earlier one had, too."""
    if not starts:
        return []
    last = starts[-1]
    rows = [("device", last["device"]), ("hosts", ", ".join(last["hosts"])), ("precision", last["mixed_precision"])]
    rows += [("commit", last["git_commit"] or "not known"), ("Slurm job", last["slurm_job_id"])]
    for package, version in last["versions"].items():
        earlier = {start["versions"].get(package) for start in starts} - {version}
        before = f" (earlier: {', '.join(sorted(map(str, earlier)))})" if earlier else ""
        rows.append((package, version + before))
    return [(name, value) for name, value in rows if value]


def results_of(run: RunData) -> list[str]:
    """Of the comparison: steps, loss, held-out loss, perplexity, tokens/s, peak memory, restarts."""
    summary, loss, held_out = run.summary, run.last("train/loss"), run.last("eval/loss")
    perplexity, rate = run.last("eval/perplexity"), summary.get("tokens_per_second")
    peaks = summary.get("peak_memory_bytes_per_rank")
    return [
        str(run.step), *("" if value is None else f"{value:.4f}" for value in (loss, held_out)),
        "" if perplexity is None else f"{perplexity:.2f}", f"{rate:,.0f}" if rate else "",
        size(max(peaks)) if peaks else "", str(run.state.get("restarts", "")),
    ]  # fmt: skip


def size(num_bytes: float) -> str:
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.3g} {unit}" if num_bytes < 1000 * limit else f"{num_bytes / limit:,.0f} {unit}"
    return f"{num_bytes / 2**10:.3g} KiB"


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f}"


def share(value: float) -> str:
    return f"{value:.1%}" if value >= 0.0005 else "< 0.1%"


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
