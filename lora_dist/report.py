"""report.html: one self-contained page drawn from a run folder's metrics.jsonl, config.yaml and state.json."""

import html
import json

import yaml

from lora_dist.run_folder import RunFolder, write_whole

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --dim: #5c6775; --line: #d8dee6; --page: #fbfcfd; --card: #fff; --one: #1f6fb2; --two: #b8500c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9f0; --dim: #98a4b3; --line: #303a47; --page: #12171d; --card: #1a2129; --one: #6cb3ee; --two: #f0a060; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 60rem; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; } p { color: var(--dim); margin: .2rem 0 1rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; }
.figures div, figure, table { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.figures div { padding: .6rem .8rem; } .figures b { display: block; font-size: 1.2rem; font-variant-numeric: tabular-nums; } .figures span { color: var(--dim); font-size: .85rem; }
figure { margin: 0 0 .8rem; padding: .7rem .8rem .3rem; } figcaption { font-size: .9rem; color: var(--dim); }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--dim); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--line); } .one { stroke: var(--one); fill: none; stroke-width: 1.8; } .two { stroke: var(--two); fill: none; stroke-width: 1.8; } .dot { fill: var(--two); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 0 .8rem; }
table { width: 100%; border-collapse: separate; border-spacing: 0; font-size: .9rem; } td { padding: .3rem .8rem; border-top: 1px solid var(--line); overflow-wrap: anywhere; } tr:first-child td { border-top: 0; } td:first-child { color: var(--dim); width: 16rem; }
"""
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 240, 52, 24, 8


def read_metrics(folder: RunFolder) -> list[dict]:
    if not folder.metrics.exists():
        return []
    return [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]


def write_report(folder: RunFolder) -> None:
    """Draw the run folder as it is now into report.html."""
    config = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    state = json.loads(folder.state.read_text(encoding="utf-8")) if folder.state.exists() else {"status": "running", "step": 0, "summary": None}
    write_whole(folder.report, render(folder.root.name, config, state, read_metrics(folder)))


def render(name: str, config: dict, state: dict, metrics: list[dict]) -> str:
    summary = state["summary"] or {}
    series = {key: [(m["train/global_step"], m[key]) for m in metrics if key in m] for key in sorted({k for m in metrics for k in m})}
    charts = [_chart("Loss: training (line), held-out (dots)", series.get("train/loss", []), series.get("eval/loss", []))]
    small = [
        _chart(title, series.get(key, []))
        for key, title in (
            ("perf/tokens_per_second", "Tokens per second, padding not counted"),
            ("train/grad_norm", "Gradient norm before clipping"),
            ("train/learning_rate", "Learning rate"),
            ("perf/padding_fraction", "Padding, as a fraction of all positions"),
        )
    ]
    samples = "".join(f"<tr><td>{_text(when)}</td><td>{_text(text)}</td></tr>" for when, text in (summary.get("samples") or {}).items() if text)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(name)} - lora-dist</title><style>{STYLE}</style></head><body>
<h1>{_text(name)}</h1><p>{_text(state["status"])} at step {state["step"]} · {_text(summary.get("strategy", ""))} · {_text(config.get("model_name_or_path"))}</p>
<div class="figures">{"".join(f"<div><b>{_text(value)}</b><span>{_text(label)}</span></div>" for label, value in _figures(summary))}</div>
<h2>Curves</h2>{"".join(charts)}<div class="pair">{"".join(small)}</div>
{f"<h2>Samples</h2><table>{samples}</table>" if samples else ""}
<h2>Settings</h2><table>{"".join(f"<tr><td>{_text(k)}</td><td>{_text(v)}</td></tr>" for k, v in config.items() if v is not None)}</table>
</body></html>
"""


def _figures(summary: dict) -> list[tuple[str, str]]:
    figures = []
    if summary.get("loss_last") is not None:
        figures.append(("loss, first to last step", f"{summary['loss_first']:.3f} → {summary['loss_last']:.3f}"))
    if summary.get("eval_loss") is not None:
        figures.append(("held-out loss, base to adapter", f"{summary['eval_loss_base']:.3f} → {summary['eval_loss']:.3f}"))
    if summary.get("base_bytes_total"):
        figures.append((f"of the base on each of {summary['world_size']} rank(s)", f"{summary['base_bytes_per_rank'] / summary['base_bytes_total']:.0%}"))
        figures.append(("base in all", f"{summary['base_bytes_total'] / 2**20:.1f} MiB"))
        figures.append(("tokens per second", f"{summary['tokens_per_second']:,.0f}"))
        figures.append(("trainable parameters", f"{summary['trainable_params']:,}"))
    return figures


def _chart(title: str, line: list[tuple[int, float]], dots: list[tuple[int, float]] = ()) -> str:
    points = [*line, *dots]
    if not points:
        return ""
    last_step = max(max(x for x, _ in points), 1)
    low, high = min(y for _, y in points), max(y for _, y in points)
    pad = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - pad, high + pad

    def place(point: tuple[int, float]) -> tuple[float, float]:
        x = LEFT + point[0] / last_step * (WIDTH - LEFT - 8)
        y = TOP + (high - point[1]) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    parts = []
    for i in range(4):
        value = low + (high - low) * i / 3
        y = place((0, value))[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 8}" y1="{y}" y2="{y}"/><text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{value:.3g}</text>')
    for i in range(5):
        step = round(last_step * i / 4)
        parts.append(f'<text x="{place((step, low))[0]}" y="{HEIGHT - 6}" text-anchor="{"end" if i == 4 else "middle"}">{step}</text>')
    parts.append(f'<polyline class="one" points="{" ".join(f"{x},{y}" for x, y in map(place, line))}"/>')
    parts += [f'<circle class="dot" cx="{x}" cy="{y}" r="4"/>' for x, y in map(place, dots)]
    return f'<figure><figcaption>{_text(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(title)}">{"".join(parts)}</svg></figure>'


def _text(value) -> str:
    return html.escape(str(value))
