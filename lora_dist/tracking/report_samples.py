"""The samples section of a report: each prompt with its completions over the training."""

from collections import Counter

from lora_dist.run.folder import STEP
from lora_dist.tracking.record import RunRecord

# Limits that keep the page of a long run small.
MAX_PROMPTS = 20
MAX_BETWEEN = 8  # completions shown between the first and the last one
MAX_CHARACTERS = 1000


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
