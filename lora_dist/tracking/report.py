"""report.html: one self-contained page drawn from a run folder's files; and one page that compares several runs."""

import dataclasses
import datetime
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jinja2
import yaml

from lora_dist.config import TrainConfig
from lora_dist.errors import UserError
from lora_dist.files import write_whole
from lora_dist.run.folder import STEP, RunFolder
from lora_dist.tracking.charts import Chart, Series, draw
from lora_dist.tracking.metric_names import MOST_RANKS, PARTS

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
# What keeps the page of a long run small:
MOST_PROMPTS, MOST_BETWEEN, MOST_LETTERS = 20, 8, 1000
MOST_STARTS, MOST_LETTERS_OF_ERROR, MOST_BAD_STEPS = 30, 400, 20


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

    @property
    def restarts(self) -> int:
        return self.state.get("restarts") or max(len(self.starts) - 1, 0)

    def series(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of each line that has it; none that is no number, which has no place in a chart."""
        return [(line[STEP], line[metric]) for line in self.lines if is_number(line.get(metric))]

    def total(self, metric: str) -> float:
        return sum(value for _, value in self.series(metric))

    def last(self, metric: str) -> float | None:
        return next((line[metric] for line in reversed(self.lines) if is_number(line.get(metric))), None)

    def first(self, metric: str) -> float | None:
        return next((line[metric] for line in self.lines if is_number(line.get(metric))), None)


def is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


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
    restarts = [start["step"] for start in run.starts[1:] if "step" in start]
    return _template("report").render(
        run=run, name=run.name, placed=_placed(run), figures=figures(run), loss=_loss_charts(run, restarts),
        charts=[chart for curve in CURVES if (chart := _curve(run, *curve, restarts))],
        memory=memory(run), time=time_spent(run), waits=_reduce_waits(run), samples=samples(run),
        profile=_read_profile(run.folder), starts=[_start_row(start) for start in run.starts[-MOST_STARTS:]],
        earlier_starts=max(len(run.starts) - MOST_STARTS, 0), incidents=incidents(run),
        settings=settings(run.config), environment=environment(run.starts),
    )  # fmt: skip


def render_comparison(runs: list[RunData]) -> str:
    names = names_apart([run.folder.root.resolve() for run in runs])
    charts = []
    for title, unit, metric in COMPARED:
        lines = [Series(names[i], run.series(metric), style=i) for i, run in enumerate(runs)]
        charts.append(draw(title, unit, lines))
    results = [[names[i], run.state.get("status", ""), *results_of(run)] for i, run in enumerate(runs)]
    return _template("comparison").render(
        name="Comparison of " + ", ".join(names), runs=[{"name": name} for name in names],
        charts=[chart for chart in charts if chart], differing=differing_settings([run.config for run in runs]),
        results=results,
    )  # fmt: skip


def names_apart(roots: list[Path]) -> list[str]:
    """Of each folder its name, with as many of the folders above it as tell all of them apart."""
    names = [root.name for root in roots]
    for depth in range(2, max(len(root.parts) for root in roots) + 1):
        if len(set(names)) == len(set(roots)):
            break
        names = ["/".join(root.parts[-depth:]) for root in roots]
    return names


def differing_settings(configs: list[dict]) -> list[tuple[str, list]]:
    """(name, value in each run); "not set" where a run's version had no such setting."""
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


def _placed(run: RunData) -> str:
    """Strategy and ranks of the last start."""
    start = run.starts[-1] if run.starts else {}
    strategy = run.summary.get("strategy") or start.get("strategy")
    num_ranks = run.summary.get("world_size") or start.get("num_ranks")
    return " on ".join(filter(None, (strategy, num_ranks and count(num_ranks, "rank"))))


def figures(run: RunData) -> list[tuple[str, str]]:
    """(value, label) of what stands at the top; what was not measured is left out."""
    summary, found = run.summary, []
    first, last = run.first("train/loss"), run.last("train/loss")
    if first is not None:
        found.append((f"{first:.3f} → {last:.3f}", "training loss, first to last step"))
    found += _held_out_figures(run)
    if summary.get("tokens_per_second"):
        found.append((f"{summary['tokens_per_second']:,.0f}", "tokens per second, all ranks, no padding"))
    if summary.get("base_bytes_total") and summary.get("base_bytes_per_rank"):
        part = summary["base_bytes_per_rank"] / summary["base_bytes_total"]
        found.append((f"{part:.0%} of {size(summary['base_bytes_total'])}", "of the base on each rank"))
    if peaks := summary.get("peak_memory_bytes_per_rank"):
        found.append((size(max(peaks)), "peak memory of the fullest rank"))
    if summary.get("trainable_params"):
        found.append((f"{summary['trainable_params']:,}", "trained parameters"))
    if run.lines and run.starts and "time" in run.starts[0]:
        found.append((duration(run.lines[-1]["time"] - run.starts[0]["time"]), "from the first start to the last line"))
    return found


def _held_out_figures(run: RunData) -> list[tuple[str, str]]:
    points = run.series("eval/loss")
    if len(points) < 2:
        return []
    what = "base to base + adapter" if points[0][0] == 0 else f"step {points[0][0]} to step {points[-1][0]}"
    found = [(f"{points[0][1]:.3f} → {points[-1][1]:.3f}", f"held-out loss, {what}")]
    perplexities = [value for _, value in run.series("eval/perplexity")]
    if len(perplexities) == len(points):
        found.append((f"{perplexities[0]:.2f} → {perplexities[-1]:.2f}", "held-out perplexity"))
    return found


def memory(run: RunData) -> dict:
    """Bars of the ranks in percent of the longest, with what was expected. {} where nothing was measured."""
    summary = run.summary
    peaks, before = summary.get("peak_memory_bytes_per_rank"), summary.get("memory_before_bytes_per_rank")
    if not peaks:
        return _memory_so_far(run)
    expected = summary.get("expected") or {}
    on_cpu = any(before or [])
    starts = before if before and len(before) == len(peaks) else [0] * len(peaks)
    rows = [(f"rank {rank}", starts[rank], peak) for rank, peak in enumerate(peaks)]
    if len(peaks) > MOST_RANKS:
        order = sorted(range(len(peaks)), key=lambda rank: peaks[rank])
        chosen = {"least": order[0], "median": order[len(order) // 2], "greatest": order[-1]}
        rows = [(f"{what}: rank {rank}", starts[rank], peaks[rank]) for what, rank in chosen.items()]
    grown = "what it grew by: base, training and libraries" if on_cpu else "measured peak"
    return _memory_bars(
        rows, grown, estimate=expected.get("peak_bytes_per_rank"), base_expected=expected.get("base_bytes_per_rank"),
        base=summary.get("base_bytes_per_rank"),
    )  # fmt: skip


def _memory_so_far(run: RunData) -> dict:
    """Of a run that goes on, or failed, from its last line that says it."""
    least_mean_most = [f"memory/{what}_peak_allocated_gib" for what in ("min", "mean", "max")]
    for line in reversed(run.lines):
        ranks = sorted((name for name in line if name.startswith("memory/rank") and "allocated" in name), key=_rank_of)
        rows = [(f"rank {_rank_of(name)}", 0, line[name] * 2**30) for name in ranks]
        if not rows and all(name in line for name in least_mean_most):
            rows = [
                (called, 0, line[name] * 2**30)
                for called, name in zip(("least", "mean", "greatest"), least_mean_most, strict=True)
            ]
        if rows:
            return _memory_bars(rows, f"peak until step {line[STEP]}")
    return {}


def _memory_bars(
    rows: list[tuple[str, float, float]],
    grown: str,
    *,
    estimate: float | None = None,
    base_expected: float | None = None,
    base: float | None = None,
) -> dict:
    """`rows`: name, bytes before the base was loaded, bytes at the peak. `grown`: what is said of the difference."""
    longest = max(max(peak, start + (estimate or 0)) for _, start, peak in rows) or 1
    return {
        "rows": [
            {
                "name": name, "before": 100 * start / longest, "grown": 100 * (peak - start) / longest,
                "expected": 100 * (start + estimate) / longest if estimate else None, "peak": size(peak),
                "before_size": size(start) if start else None,
            }
            for name, start, peak in rows
        ],
        "on_cpu": any(start for _, start, _ in rows), "grown": grown, "estimate": size(estimate) if estimate else None,
        "base_expected": size(base_expected) if base_expected else None, "base_measured": size(base) if base else None,
    }  # fmt: skip


def time_spent(run: RunData) -> dict:
    """Seconds by what they went into, of all that was trained, and their shares. {} where nothing was measured.

    Steps that were not logged are taken to be as those that were.
    """
    logged = len(run.series("perf/step_time_s"))
    if not logged:
        return {}
    times = run.step / logged
    parts = [(called, run.total(f"perf/{part}_time_s") * times) for part, called in PARTS.items()]
    in_parts = sum(seconds for _, seconds in parts)
    rows = [(called, seconds) for called, seconds in parts if seconds]
    rows.append(("the rest of the steps", max(run.total("perf/step_time_s") * times - in_parts, 0.0)))
    rows += [("evaluating", run.total("eval/time_s")), ("saving", run.total("checkpoint/save_time_s"))]
    if run.summary.get("load_s"):
        rows.append(("loading the base, last start", run.summary["load_s"]))
    total = sum(seconds for _, seconds in rows)
    if not total:
        return {}
    rows = [{"what": what, "seconds": s, "share": s / total, "style": i} for i, (what, s) in enumerate(rows) if s]
    return {"rows": rows, "total": total, "all_logged": logged >= run.step}


def _reduce_waits(run: RunData) -> list[tuple[str, float]]:
    """Mean wait of each rank for the reduction, in seconds a step; [] of one rank and above MOST_RANKS."""
    names = sorted({name for line in run.lines for name in line if name.startswith("perf/rank")}, key=_rank_of)
    waits = [(f"rank {_rank_of(name)}", run.series(name)) for name in names]
    means = [(name, sum(value for _, value in points) / len(points)) for name, points in waits if points]
    return means if len(means) > 1 else []


def _rank_of(metric: str) -> int:
    return int(metric.split("/")[1].removeprefix("rank"))


def samples(run: RunData) -> dict:
    """Each prompt with its completions: of the first and the last evaluation, and some of those between."""
    found = _samples_by_prompt(run.samples)
    for sample in found:
        first, *between, last = sample["at"] if len(sample["at"]) > 1 else [*sample["at"], None]
        shown = between[:: -(-len(between) // MOST_BETWEEN)] if between else []
        sample |= {"first": first, "last": last, "between": shown, "num_between": len(between)}
    return {"shown": found[:MOST_PROMPTS], "num_left": max(len(found) - MOST_PROMPTS, 0)}


def _samples_by_prompt(lines: list[dict]) -> list[dict]:
    """Held-out rows may have the same prompt, so a sample is known by it and by how often it came in its step."""
    found: dict[tuple, dict] = {}
    times: Counter = Counter()
    for line in lines:
        times[line[STEP], line["prompt"]] += 1
        entry = found.setdefault(
            (line["prompt"], times[line[STEP], line["prompt"]]),
            {"prompt": shorten(line["prompt"]), "reference": shorten(line.get("reference")), "at": []},
        )
        entry["at"].append((line[STEP], shorten(line["completion"])))
    return list(found.values())


def shorten(text: str | None, most: int = MOST_LETTERS) -> str | None:
    return text if text is None or len(text) <= most else text[:most] + " …"


def _read_profile(folder: RunFolder) -> dict | None:
    path = folder.profile / "table.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _start_row(start: dict) -> dict:
    previous = start.get("previous") or {}
    ended = {"running": "killed"}.get(previous.get("status"), previous.get("status", ""))
    when, ranks = start.get("time"), [str(start[name]) for name in ("num_ranks", "strategy") if name in start]
    return {
        "when": f"{datetime.datetime.fromtimestamp(when, datetime.UTC):%Y-%m-%d %H:%M:%S}" if when else "",
        "step": start.get("step", ""), "ranks": " × ".join(ranks),
        "device": start.get("device", ""), "job": start.get("slurm_job_id"), "before": ended,
        "error": shorten(previous.get("error"), MOST_LETTERS_OF_ERROR),
    }  # fmt: skip


def incidents(run: RunData) -> list[str]:
    """What went wrong, in words; how the starts before the last one ended is in their table."""
    bad = run.folder.read_lines(run.folder.bad_steps)
    found = [_ending(run)] if run.state.get("status") in ("failed", "preempted") else []
    if run.restarts and len(run.starts) < 2:
        found.append(f"{count(run.restarts, 'restart')}, of which nothing else was recorded")
    found += [
        f"step {line['step']} was skipped: loss {line.get('loss', 'not recorded')}, "
        f"gradient norm {line.get('grad_norm', 'not recorded')}"
        for line in bad[:MOST_BAD_STEPS]
    ]
    skipped = max(int(run.last("train/skipped_steps") or 0), run.summary.get("skipped_steps") or 0, len(bad))
    if (more := skipped - len(bad[:MOST_BAD_STEPS])) > 0:
        found.append(f"{count(more, 'more step' if bad else 'step')} skipped")
    if spikes := run.last("train/loss_spikes"):
        found.append(f"{count(int(spikes), 'step')} whose loss stood far above those before")
    if failed := len(run.series("checkpoint/failed_saves")):
        found.append(f"{count(failed, 'checkpoint')} could not be written")
    return found


def _ending(run: RunData) -> str:
    why = " because a rank or its machine was gone" if run.state.get("rank_lost") else ""
    saved = f"; saved until step {run.state['step']}" if "step" in run.state else ""
    return f"the run {'failed' if run.state['status'] == 'failed' else 'was preempted'}{why}{saved}"


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
    rows = [("device", last.get("device")), ("hosts", ", ".join(last.get("hosts", [])))]
    rows += [("precision", last.get("mixed_precision")), ("commit", last.get("git_commit") or "not known")]
    rows += [("Slurm job", last.get("slurm_job_id"))]
    for package, version in last.get("versions", {}).items():
        earlier = {start.get("versions", {}).get(package) for start in starts} - {version, None}
        before = f" (earlier: {', '.join(sorted(earlier))})" if earlier else ""
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
        size(max(peaks)) if peaks else "", str(run.restarts),
    ]  # fmt: skip


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


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
