"""The table of metrics, and what is made of the ranks' numbers."""

import os
import re
from pathlib import Path

import pytest

from lora_dist.tracking.metric_names import METRICS, MOST_RANKS
from lora_dist.training.measures import summarise

DOCS = Path(__file__).parents[2] / "docs/metrics.md"
NAMES = ["perf/reduce_time_s", "memory/peak_allocated_gib"]
ON_GPU = [*NAMES, "memory/peak_reserved_gib"]


def known(name: str) -> bool:
    return re.sub(r"/rank\d+/", "/rank{i}/", name) in {metric.name for metric in METRICS}


def test_the_docs_are_the_table():
    rows = "".join(f"| `{m.name}` | {m.unit} | {m.when} | {m.what} |\n" for m in METRICS)
    text = DOCS.read_text(encoding="utf-8")
    head, rule, rest = text.partition("|---|---|---|---|\n")
    tail = rest[re.match(r"(\|.*\n)*", rest).end() :]
    if os.environ.get("LORA_DIST_WRITE_GOLDEN"):
        DOCS.write_text(head + rule + rows + tail, encoding="utf-8")
    assert DOCS.read_text(encoding="utf-8") == head + rule + rows + tail


def test_each_metric_has_one_name():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z_]+(/rank\{i\})?/[a-z0-9_]+", name) for name in names)


def test_few_ranks_have_their_own_numbers():
    values = summarise(NAMES, [[0.5, 1.0], [0.1, 3.0], [0.4, 2.0]], ["a", "b", "b"])
    assert values == {
        "perf/rank0/reduce_time_s": 0.5, "perf/rank1/reduce_time_s": 0.1, "perf/rank2/reduce_time_s": 0.4,
        "memory/rank0/peak_allocated_gib": 1.0, "memory/rank1/peak_allocated_gib": 3.0,
        "memory/rank2/peak_allocated_gib": 2.0, "memory/max_peak_allocated_gib": 3.0,
        "perf/slowest_rank": "rank 1 (b)", "memory/worst_rank": "rank 1 (b)",
    }  # fmt: skip
    assert all(map(known, values))


def test_many_ranks_become_their_extremes_and_the_worst_is_named():
    ranks = [[1.0, 10.0 + (rank == 13), 20.0, 1, 0] for rank in range(MOST_RANKS + 1)]
    ranks[5][0], ranks[4][2] = 0.25, 64.0
    values = summarise(ON_GPU, ranks, [f"node{rank // 8}" for rank in range(17)])
    assert not [name for name in values if "/rank" in name]
    assert (values["memory/min_peak_allocated_gib"], values["memory/max_peak_allocated_gib"]) == (10.0, 11.0)
    assert values["memory/mean_peak_allocated_gib"] == pytest.approx(171 / 17)
    assert values["memory/max_peak_reserved_gib"] == 64.0
    assert (values["perf/slowest_rank"], values["memory/worst_rank"]) == ("rank 5 (node0)", "rank 13 (node1)")
    assert (values["memory/alloc_retries"], values["memory/ooms"]) == (17, 0)
    assert all(map(known, values))


def test_one_rank_is_neither_slow_nor_worst():
    values = summarise(ON_GPU, [[0.0, 1.0, 2.0, 3, 4]], ["here"])
    assert "perf/slowest_rank" not in values and "memory/worst_rank" not in values
    assert (values["memory/alloc_retries"], values["memory/ooms"]) == (3, 4)
