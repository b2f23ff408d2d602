"""The sections of a report that need some arranging: memory, a bar per rank; samples, a card per prompt."""

from collections import Counter
from dataclasses import dataclass

from lora_dist.run.folder import STEP
from lora_dist.tracking.metric_names import MAX_RANKS_SHOWN
from lora_dist.tracking.record import RunRecord, rank_of
from lora_dist.units import GIB, size

# Limits that keep the page of a long run small.
MAX_PROMPTS = 20
MAX_BETWEEN = 8  # completions shown between the first and the last one
MAX_CHARACTERS = 1000


@dataclass(frozen=True)
class Bar:
    """Peak memory of one rank, or of the least, mean or fullest one."""

    name: str
    before: float  # bytes that the process held before the base was loaded; 0 on a GPU
    peak: float  # bytes


def memory_bars(record: RunRecord) -> dict:
    """What the template draws: bars in percent of the longest, and texts. {} if no memory was measured."""
    summary = record.summary
    peaks, before = summary.get("peak_memory_bytes_per_rank"), summary.get("memory_before_bytes_per_rank")
    if not peaks:
        return _bars_so_far(record)
    if not before or len(before) != len(peaks):
        before = [0] * len(peaks)
    bars = [Bar(f"rank {rank}", before[rank], peak) for rank, peak in enumerate(peaks)]
    if len(peaks) > MAX_RANKS_SHOWN:
        order = sorted(range(len(peaks)), key=lambda rank: peaks[rank])
        chosen = {"least": order[0], "median": order[len(order) // 2], "greatest": order[-1]}
        bars = [Bar(f"{what}: rank {rank}", before[rank], peaks[rank]) for what, rank in chosen.items()]
    growth = "growth after that: base, training and libraries" if any(before) else "measured peak"
    expected = summary.get("expected") or {}
    return _draw(bars, growth, expected.get("peak_bytes_per_rank")) | {
        "base_expected": _size(expected.get("base_bytes_per_rank")),
        "base_measured": _size(summary.get("base_bytes_per_rank")),
    }


def _bars_so_far(record: RunRecord) -> dict:
    """The same for a run that has no summary, because it still runs or failed: from the last line with memory."""
    min_mean_max = [f"memory/{what}_peak_allocated_gib" for what in ("min", "mean", "max")]
    for line in reversed(record.lines):
        names = sorted((name for name in line if name.startswith("memory/rank") and "allocated" in name), key=rank_of)
        bars = [Bar(f"rank {rank_of(name)}", 0, line[name] * GIB) for name in names]
        if not bars and all(name in line for name in min_mean_max):
            words = zip(("least", "mean", "greatest"), min_mean_max, strict=True)
            bars = [Bar(word, 0, line[name] * GIB) for word, name in words]
        if bars:
            return _draw(bars, f"peak until step {line[STEP]}", None) | {"base_expected": None, "base_measured": None}
    return {}


def _draw(bars: list[Bar], growth: str, expected: float | None) -> dict:
    """`growth` explains the part of a bar after `before`; `expected` is the estimated peak of that part in bytes."""
    longest = max(max(bar.peak, bar.before + (expected or 0)) for bar in bars) or 1
    rows = [
        {
            "name": bar.name, "before": 100 * bar.before / longest, "grown": 100 * (bar.peak - bar.before) / longest,
            "expected": 100 * (bar.before + expected) / longest if expected else None, "peak": size(bar.peak),
            "before_size": _size(bar.before),
        }
        for bar in bars
    ]  # fmt: skip
    return {"rows": rows, "on_cpu": any(bar.before for bar in bars), "growth": growth, "estimate": _size(expected)}


def _size(num_bytes: float | None) -> str | None:
    return size(num_bytes) if num_bytes else None


def sample_cards(record: RunRecord) -> dict:
    """What the template shows: for each prompt the first and the last completion, and some of those in between."""
    cards = _completions_by_prompt(record.samples)
    for card in cards:
        first, *between, last = card["completions"] if len(card["completions"]) > 1 else [*card["completions"], None]
        shown = between[:: -(-len(between) // MAX_BETWEEN)] if between else []
        card |= {"first": first, "last": last, "between": shown, "num_between": len(between)}
    return {"shown": cards[:MAX_PROMPTS], "num_left": max(len(cards) - MAX_PROMPTS, 0)}


def _completions_by_prompt(lines: list[dict]) -> list[dict]:
    """One dict per prompt; its "completions" are (step, text).

    Several held-out rows may have the same prompt. The n-th line of a step with that prompt belongs to the n-th row.
    """
    cards: dict[tuple[str, int], dict] = {}
    occurrences: Counter = Counter()
    for line in lines:
        occurrences[line[STEP], line["prompt"]] += 1
        card = cards.setdefault(
            (line["prompt"], occurrences[line[STEP], line["prompt"]]),
            {"prompt": shorten(line["prompt"]), "reference": shorten(line.get("reference")), "completions": []},
        )
        card["completions"].append((line[STEP], shorten(line["completion"])))
    return list(cards.values())


def shorten(text: str | None, max_characters: int = MAX_CHARACTERS) -> str | None:
    return text if text is None or len(text) <= max_characters else text[:max_characters] + " …"
