"""report.html: one self-contained page drawn from a run folder's metrics.jsonl, config.yaml and state.json."""

import json
from dataclasses import dataclass
from pathlib import Path

import jinja2
import yaml

from lora_dist.manifest import write_whole
from lora_dist.run_folder import RunFolder

CHARTS = (  # title, metric drawn as a line, metric drawn as dots
    ("Loss: training (line), held-out (dots)", "train/loss", "eval/loss"),
    ("Tokens per second, padding not counted", "perf/tokens_per_second", None),
    ("Gradient norm before clipping", "train/grad_norm", None),
    ("Learning rate", "train/learning_rate", None),
    ("Padding, as a fraction of all positions", "perf/padding_fraction", None),
)


def write_report(folder: RunFolder) -> None:
    """Draw the run folder as it is now into report.html."""
    config = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    state = json.loads(folder.state.read_text(encoding="utf-8"))
    write_whole(folder.report, render(folder.root.name, config, state, folder.read_metrics()))


def render(name: str, config: dict, state: dict, metrics: list[dict]) -> str:
    """The page as text. `state` and `metrics` are state.json and the lines of metrics.jsonl."""
    summary = state["summary"] or {}
    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    charts = [Chart.of(title, _series(metrics, line), _series(metrics, dots)) for title, line, dots in CHARTS]
    return jinja2.Environment(autoescape=True, trim_blocks=True).from_string(template).render(
        name=name, config=config, state=state, summary=summary, figures=_figures(summary),
        charts=[chart for chart in charts if chart], samples=[s for s in summary.get("samples", {}).items() if s[1]],
    )  # fmt: skip


def _series(metrics: list[dict], key: str | None) -> list[tuple[int, float]]:
    return [(m["train/global_step"], m[key]) for m in metrics if key in m]


def tick_text(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.1e}"


def _figures(summary: dict) -> list[tuple[str, str]]:
    """Label and value of the figures at the top; those that were not measured are left out."""
    if summary.get("loss_last") is None:
        return []
    share = summary["base_bytes_per_rank"] / summary["base_bytes_total"]
    figures = [("training loss, first to last step", f"{summary['loss_first']:.3f} → {summary['loss_last']:.3f}")]
    if summary["eval_loss"] is not None:
        change = f"{summary['eval_loss_base']:.3f} → {summary['eval_loss']:.3f}"
        figures.append(("held-out loss, base to base + adapter", change))
    return figures + [
        (f"of the base on each of {summary['world_size']} rank(s)", f"{share:.0%}"),
        ("base in all", f"{summary['base_bytes_total'] / 2**20:,.1f} MiB"),
        ("tokens per second", f"{summary['tokens_per_second']:,.0f}"),
        ("trainable parameters", f"{summary['trainable_params']:,}"),
    ]


@dataclass(frozen=True)
class Chart:
    """A line and dots over optimizer steps, in the pixels of an SVG."""

    title: str
    line: list[tuple[float, float]]
    dots: list[tuple[float, float]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    width: int = 640
    height: int = 240
    left: int = 72

    @classmethod
    def of(cls, title: str, line: list[tuple[int, float]], dots: list[tuple[int, float]]) -> "Chart | None":
        """None where there is nothing to draw."""
        values = [value for _, value in (*line, *dots)]
        if not values:
            return None
        last_step = max(step for step, _ in (*line, *dots)) or 1
        margin = (max(values) - min(values)) * 0.05 or abs(values[0]) * 0.05 or 1.0
        low, high = min(values) - margin, max(values) + margin
        if min(values) >= 0:
            low = max(low, 0.0)

        def x(step: float) -> float:
            return round(cls.left + step / last_step * (cls.width - cls.left - 8), 1)

        def y(value: float) -> float:
            return round(14 + (high - value) / (high - low) * (cls.height - 38), 1)

        return cls(
            title,
            [(x(step), y(value)) for step, value in line],
            [(x(step), y(value)) for step, value in dots],
            [(x(step), str(step)) for step in sorted({round(last_step * i / 4) for i in range(5)})],
            [(y(value), tick_text(value)) for value in (low + (high - low) * i / 3 for i in range(4))],
        )
