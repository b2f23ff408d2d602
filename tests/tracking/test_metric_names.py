"""docs/metrics.md holds the table of metrics."""

import os
import re
from pathlib import Path

from lora_dist.tracking.metric_names import METRICS

DOCS = Path(__file__).parents[2] / "docs/metrics.md"


def test_the_docs_are_the_table():
    rows = "".join(f"| `{m.name}` | {m.unit} | {m.when} | {m.meaning} |\n" for m in METRICS)
    text = DOCS.read_text(encoding="utf-8")
    head, rule, rest = text.partition("|---|---|---|---|\n")
    tail = rest[re.match(r"(\|.*\n)*", rest).end() :]
    if os.environ.get("LORA_DIST_WRITE_GOLDEN"):
        DOCS.write_text(head + rule + rows + tail, encoding="utf-8")
    assert DOCS.read_text(encoding="utf-8") == head + rule + rows + tail


def test_each_metric_has_one_name():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z_]+(/rank\{i\}|/rewards|/logps)?/[a-z0-9_]+", name) for name in names)
