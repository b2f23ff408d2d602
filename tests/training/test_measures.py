"""What is logged of a step, on two ranks: documented names, parts that make up the step, both ranks' numbers."""

import gzip
import json
import re

import pytest

from lora_dist.run.folder import STEP, RunFolder
from lora_dist.tracking.metric_names import MAX_RANKS_SHOWN, METRICS, PARTS
from lora_dist.training.measures import summarise
from tests.helpers.ranks import fork_ranks

FLAGS = ("--max_steps", "6", "--warmup_steps", "1", "--max_length", "64", "--per_device_train_batch_size", "2")
FLAGS += ("--gradient_accumulation_steps", "2", "--eval_fraction", "0", "--save_steps", "3", "--report_to", "none")
FLAGS += ("--dataset_test_split", "none", "--sample_prompt", "")
KNOWN = {metric.name.replace("{i}", str(rank)) for metric in METRICS for rank in (0, 1)}
NAMES = ["perf/reduce_time_s", "memory/peak_allocated_gib"]
ON_GPU = [*NAMES, "memory/peak_reserved_gib"]


def known(name: str) -> bool:
    return re.sub(r"/rank\d+/", "/rank{i}/", name) in {metric.name for metric in METRICS}


def trained(folder: RunFolder, strategy: str, *flags: str, patch=None) -> list[dict]:
    ended = fork_ranks(*FLAGS, *flags, "--output_dir", str(folder.root), num_ranks=2, strategy=strategy, patch=patch)
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2]
    lines = folder.read_metrics()
    assert {name for line in lines for name in line} - {STEP, "time"} <= KNOWN
    return [line for line in lines if "train/loss" in line]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory) -> tuple[RunFolder, list[dict]]:
    folder = RunFolder(tmp_path_factory.mktemp("profiled") / "run")
    return folder, trained(folder, "fsdp", "--profile_steps", "3:4")


def test_the_base_takes_what_was_expected(profiled):
    summary = profiled[0].read_state()["summary"]
    assert summary["expected"]["base_bytes_per_rank"] == summary["base_bytes_per_rank"] < summary["base_bytes_total"]
    assert summary["expected"]["peak_bytes_per_rank"] > summary["base_bytes_per_rank"]
    peaks = zip(summary["memory_before_bytes_per_rank"], summary["peak_memory_bytes_per_rank"], strict=True)
    assert all(0 < before < peak for before, peak in peaks)


def test_the_parts_make_up_the_step(profiled):
    for line in profiled[1][2:]:
        parts = {part: line[f"perf/{part}_time_s"] for part in PARTS if part != "wait"}
        assert all(seconds > 0 for seconds in parts.values()), parts
        assert 0.8 * line["perf/step_time_s"] < sum(parts.values()) <= line["perf/step_time_s"]
        assert parts["backward"] > parts["update"]


def test_each_ranks_numbers_are_there(profiled):
    for line in profiled[1]:
        for rank in (0, 1):
            assert 0.05 < line[f"memory/rank{rank}/peak_allocated_gib"] < 10
            assert line[f"perf/rank{rank}/reduce_time_s"] > 0
        assert line["perf/rank0/reduce_time_s"] == line["perf/reduce_time_s"]
        peaks = [line[f"memory/rank{rank}/peak_allocated_gib"] for rank in (0, 1)]
        assert line["memory/max_peak_allocated_gib"] == max(peaks)
        assert line["memory/worst_rank"].startswith(f"rank {peaks.index(max(peaks))} (")


def test_rates_count_padding_or_not(profiled):
    for line in profiled[1]:
        assert line["perf/tokens_per_second"] == pytest.approx(
            line["perf/padded_tokens_per_second"] * (1 - line["perf/padding_fraction"])
        )
        assert line["perf/tokens_per_second_per_rank"] * 2 == pytest.approx(line["perf/tokens_per_second"])
        assert line["perf/trainable_tokens_per_second"] < line["perf/tokens_per_second"]
        assert line["perf/samples_per_second"] == pytest.approx(8 / line["perf/step_time_s"])
        assert line["perf/tflops_per_rank"] > 0 and 0.2 < line["perf/recompute_fraction"] < 1 / 3
        assert "perf/mfu" not in line  # the peak of a CPU is not known


def test_a_profile_is_there_of_each_rank(profiled):
    folder, _ = profiled
    for rank in (0, 1):
        with gzip.open(folder.profile / f"rank-{rank:05d}.json.gz") as file:
            events = json.load(file)["traceEvents"]
        names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
        assert names.count("reduce") == 2 and names.count("forward") == 4  # two steps of two micro-batches
    table = json.loads((folder.profile / "table.json").read_text())
    assert table["steps"] == [3, 4] and 5 <= len(table["rows"]) <= 10
    times = [row["self_time_s"] for row in table["rows"]]
    assert times == sorted(times, reverse=True) and 0.3 < sum(row["share"] for row in table["rows"]) <= 1


def slow_rank_1(rank: int) -> None:
    if rank == 1:
        import time

        from lora_dist.training import step

        original = step.flatten_gradients

        def flatten_gradients(*args, **kwargs):
            time.sleep(0.2)  # far more than another process on this machine may take
            return original(*args, **kwargs)

        step.flatten_gradients = flatten_gradients


def test_the_slowest_rank_is_named(tmp_path):
    lines = trained(RunFolder(tmp_path / "run"), "ddp", patch=slow_rank_1)
    assert all("perf/gather_time_s" not in line for line in lines)  # nothing is gathered
    named = [line["perf/slowest_rank"] for line in lines[1:]]
    assert all(name.startswith("rank 1 (") for name in named), named


def test_a_pipeline_says_how_long_it_waits_for_other_stages(tmp_path):
    lines = trained(RunFolder(tmp_path / "run"), "pipeline")
    assert all(line["perf/wait_time_s"] > 0 for line in lines)


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
    ranks = [[1.0, 10.0 + (rank == 13), 20.0, 1, 0] for rank in range(MAX_RANKS_SHOWN + 1)]
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
