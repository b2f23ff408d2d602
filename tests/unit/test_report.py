"""What the pages say, from files that are there, half there, or missing. test_report_browser.py looks at them."""

import dataclasses
import json
import math
import re

import pytest

from lora_dist.charts import MAX_POINTS, Series, draw, thin, tick_text, ticks
from lora_dist.config import UserError
from lora_dist.report import RunData, duration, memory, share, size, time_spent, write_comparison, write_report
from lora_dist.run_folder import STEP, RunFolder

GIB = 2**30
SUMMARY = {
    "world_size": 2, "strategy": "fsdp", "base_bytes_total": 100 * 2**20, "base_bytes_per_rank": 50 * 2**20,
    "tokens_per_second": 1234.5, "trainable_params": 49152, "load_s": 2.0,
    "peak_memory_bytes_per_rank": [3 * GIB, 2 * GIB], "memory_before_bytes_per_rank": [GIB, GIB],
    "expected": {"base_bytes_per_rank": 50 * 2**20, "peak_bytes_per_rank": GIB // 2},
}  # fmt: skip
START = {
    "time": 1000.0, "step": 0, "strategy": "fsdp", "num_ranks": 2, "hosts": ["node1"], "device": "cpu",
    "mixed_precision": "bf16", "versions": {"torch": "2.13.0"}, "git_commit": "abc", "slurm_job_id": None,
    "previous": None,
}  # fmt: skip
AGAIN = {**START, "time": 1060.0, "step": 4, "num_ranks": 3, "versions": {"torch": "2.13.1"},
         "previous": {"status": "running", "error": None}}  # fmt: skip


def step_line(step: int, **values) -> dict:
    parts = {"data": 0.1, "gather": 0.2, "forward": 0.3, "backward": 0.5, "reduce": 0.1, "update": 0.05}
    timed = {f"perf/{part}_time_s": seconds for part, seconds in parts.items()}
    return {
        STEP: step, "time": 1000.0 + 10 * step, "train/loss": 3 - step / 10, "perf/step_time_s": 1.5, **timed,
        "perf/rank0/reduce_time_s": 0.1, "perf/rank1/reduce_time_s": 0.3, **values,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path, config) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    folder.num_steps, folder.restarts = 10, 1
    folder.write_config(dataclasses.replace(config, output_dir=str(folder.root), lora_r=7))
    folder.write_state("completed", 10, SUMMARY)
    lines = [{STEP: 0, "time": 1000.0, "eval/loss": math.log(15), "eval/perplexity": 15.0, "eval/time_s": 2.0}]
    lines += [step_line(step) for step in range(1, 11)]
    lines.append({STEP: 10, "time": 1120.0, "eval/loss": math.log(6), "eval/perplexity": 6.0, "eval/time_s": 3.0})
    lines.append({STEP: 10, "time": 1121.0, "checkpoint/save_time_s": 0.5, "checkpoint/write_time_s": 9.0})
    folder.append_lines(folder.metrics, lines)
    folder.append_lines(folder.starts, [START, AGAIN])
    sample = {"prompt": "Two <things>", "reference": "are & were"}
    texts = {0: "before", 5: "between", 10: "after <b>all</b>"}
    folder.append_lines(folder.samples, [{STEP: step, **sample, "completion": text} for step, text in texts.items()])
    return folder


def page(folder: RunFolder) -> str:
    write_report(folder)
    return folder.report.read_text(encoding="utf-8")


def test_the_figures_are_those_of_the_files(folder):
    text = page(folder)
    for figure in ("2.900 → 2.000", "2.708 → 1.792", "15.00 → 6.00", "1,234", "50% of 100 MiB", "3 GiB", "49,152"):
        assert f"<b>{figure}</b>" in text, figure
    assert "<b>2 min 01 s</b>" in text  # from the first start to the last line
    assert "step 10 of 10" in text and "fsdp on 2 ranks" in text and "1 restart<" in text


def test_text_of_users_is_text(folder):
    text = page(folder)
    assert "Two &lt;things&gt;" in text and "after &lt;b&gt;all&lt;/b&gt;" in text and "are &amp; were" in text
    assert "<b>all" not in text and "<things>" not in text
    assert text.index("before") < text.index("between")  # in the details below the two that count
    assert "1 between" in text


def test_nothing_is_fetched(folder):
    text = page(folder)
    assert not re.search(r"\b(src|href|action)=|url\(|@import|<script|://", text)


def test_where_a_run_was_started_again_is_marked(folder):
    text = page(folder)
    (loss,) = [svg for svg in re.findall(r"<svg viewBox=\"0 0 860.*?</svg>", text, re.S)]
    (mark,) = re.findall(r'<line class="mark" x1="([\d.]+)"', loss)
    circles = re.findall(r'cx="([\d.]+)"', loss)
    first, last = float(circles[0]), float(circles[-1])  # the evaluations of steps 0 and 10
    assert float(mark) == pytest.approx(first + 0.4 * (last - first), abs=0.2)
    assert "started again from here" in text and "killed" in text and "3 × fsdp" in text
    assert "2.13.1 (earlier: 2.13.0)" in text


def test_where_the_time_went_adds_up(folder):
    spent = time_spent(RunData(folder))
    seconds = {row["what"]: row["seconds"] for row in spent["rows"]}
    assert seconds == {
        "waiting for data": pytest.approx(1.0), "gathering layers": pytest.approx(2.0), "forward": pytest.approx(3.0),
        "backward": pytest.approx(5.0), "reducing gradients": pytest.approx(1.0), "updating": pytest.approx(0.5),
        "the rest of the steps": pytest.approx(2.5), "evaluating": 5.0, "saving": 0.5,
        "loading the base, last start": 2.0,
    }  # fmt: skip
    assert spent["total"] == pytest.approx(22.5) and spent["all_logged"]
    assert sum(row["share"] for row in spent["rows"]) == pytest.approx(1)
    assert "rank 0 100 ms, rank 1 300 ms" in page(folder)


def test_steps_that_were_not_logged_are_as_those_that_were(folder):
    lines = [line for line in folder.read_metrics() if line[STEP] % 5 == 0]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    spent = time_spent(RunData(folder))
    seconds = {row["what"]: row["seconds"] for row in spent["rows"]}
    assert seconds["forward"] == pytest.approx(3.0) and seconds["evaluating"] == 5.0 and not spent["all_logged"]
    assert "are taken to be as those that were" in page(folder)


def test_memory_is_drawn_beside_what_was_expected(folder):
    drawn = memory(RunData(folder))
    first, second = drawn["rows"]
    assert first == {
        "name": "rank 0", "before": pytest.approx(100 / 3), "grown": pytest.approx(200 / 3),
        "expected": pytest.approx(50), "peak": "3 GiB", "before_size": "1 GiB",
    }  # fmt: skip
    assert second["grown"] == pytest.approx(100 / 3)
    assert (drawn["base_expected"], drawn["base_measured"], drawn["estimate"]) == ("50 MiB", "50 MiB", "512 MiB")


def test_of_many_ranks_three_are_shown(folder):
    peaks = [(10 + (rank * 7) % 64) * GIB for rank in range(64)]
    many = {**SUMMARY, "peak_memory_bytes_per_rank": peaks, "memory_before_bytes_per_rank": [0] * 64, "expected": {}}
    folder.write_state("completed", 10, many)
    drawn = memory(RunData(folder))
    assert [row["name"] for row in drawn["rows"]] == ["least: rank 0", "median: rank 32", "greatest: rank 9"]
    assert not drawn["on_cpu"] and drawn["rows"][2]["grown"] == 100 and drawn["rows"][0]["expected"] is None


def test_what_went_wrong_is_listed(folder):
    folder.append_lines(folder.bad_steps, [{"step": 3, "loss": "nan", "grad_norm": "1.0", "micro_batches": []}])
    folder.append_lines(folder.metrics, [{STEP: 10, "time": 1, "checkpoint/failed_saves": 1, "train/loss_spikes": 2}])
    text = page(folder)
    assert "step 3 was skipped: loss nan" in text and "1 checkpoint(s) could not" in text and "2 step(s) whose" in text


def test_a_quiet_run_has_no_faults(folder):
    folder.starts.unlink()
    assert "None." in page(folder)


def test_settings_stand_beside_their_defaults(folder):
    changed, others = page(folder).split("Those that differ")[1].split("others, as by default")
    assert re.search(r"<code>lora_r</code></th><td>7</td><td class=\"dim\">16</td>", changed)
    assert "lora_alpha" not in changed and "lora_alpha" in others


def test_a_run_that_has_only_begun_has_a_page(folder):
    for path in (folder.metrics, folder.samples, folder.starts):
        path.unlink()
    folder.write_state("running", 0)
    text = page(folder)
    assert "running" in text and "<svg" not in text and "Where the time went" not in text


def test_a_failed_run_says_why_and_a_half_written_line_is_left_out(folder):
    folder.write_state("failed", 5, {"error": "RuntimeError: out of <luck>"})
    with open(folder.metrics, "a") as file:
        file.write('{"train/global_step": 11, "train/lo')
    assert "out of &lt;luck&gt;" in page(folder)


def test_a_profile_is_a_table(folder):
    folder.profile.mkdir()
    row = {"what": "aten::mm", "self_time_s": 0.25, "share": 0.5, "calls": 77}
    (folder.profile / "table.json").write_text(json.dumps({"steps": [3, 4], "rows": [row]}))
    text = page(folder)
    assert "of steps 3 to 4" in text and '<code>aten::mm</code></th><td class="number">77</td>' in text


def test_a_long_run_is_a_small_page_and_keeps_its_spikes(folder):
    names = ("train/grad_norm", "train/learning_rate", "perf/tokens_per_second", "perf/padded_tokens_per_second",
             "perf/padding_fraction", "train/mean_token_accuracy", "perf/mfu")  # fmt: skip
    lines = [step_line(step, **{name: 1 + math.sin(step) for name in names}) for step in range(1, 10_001)]
    lines[7777]["train/loss"] = 2000.0
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = page(folder)
    assert len(text.encode()) < 300_000
    polyline = re.findall(r'<polyline class="curve s0" points="([^"]*)"', text)[0].split()
    ys = [float(point.split(",")[1]) for point in polyline]
    assert len(polyline) <= MAX_POINTS and min(ys) < 20 and sorted(ys)[1] > 100  # one point stands at the top


def test_points_are_thinned_without_losing_ends_or_extremes():
    points = [(step, float(step % 17)) for step in range(5000)]
    points[1234] = (1234, -50.0)
    kept = thin(points)
    assert len(kept) <= MAX_POINTS and kept[0] == points[0] and kept[-1] == points[-1] and (1234, -50.0) in kept
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert thin(points[:100]) == points[:100]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 5, 10]),
        (1.9, 3.1, [1.5, 2, 2.5, 3, 3.5]),
        (0, 2e-4, [0, 5e-5, 1e-4, 1.5e-4, 2e-4]),
        (5, 5, [4.4, 4.6, 4.8, 5.0, 5.2, 5.4, 5.6]),
        (-3, 3, [-4, -2, 0, 2, 4]),
    ],
)
def test_ticks_are_round_and_enclose(low, high, expected):
    found = ticks(low, high, 4)
    assert found[0] <= low and found[-1] >= high and 2 < len(found) < 8
    if low != high:
        assert found == pytest.approx(expected)


def test_a_chart_stays_inside_its_frame():
    for points, dots in (([(1, 5.0), (9, 5.0)], [(0, -2.0)]), ([(7, 1e-9)], []), ([(0, 0.0), (10_000, 1e12)], [])):
        chart = draw("t", "", [Series("a", points), Series("b", dots, as_dots=True)], restarts=[3, 99_999])
        for x, y in (point for series in chart.series for point in series.xy):
            assert chart.left <= x <= chart.width - chart.right and chart.top <= y <= chart.height - chart.bottom
        assert all(chart.left <= x <= chart.width for x in chart.marks) and len(chart.x_ticks) >= 1
    assert draw("t", "", [Series("a", [])]) is None
    assert "a: 5 at step 1, 5 at step 9" in draw("t", "", [Series("a", [(1, 5.0), (9, 5.0)])]).summary


def test_numbers_have_few_digits():
    assert [tick_text(v) for v in (0, 2e-4, 1.5e-5, 0.25, 1234, 12345, 2_500_000, 3e9)] == [
        "0", "2e-4", "1.5e-5", "0.25", "1234", "12.35k", "2.5M", "3G",
    ]  # fmt: skip
    assert [size(v) for v in (512, 3 * 2**20, 1.29 * 2**20, 79.1 * GIB)] == ["0.5 KiB", "3 MiB", "1.29 MiB", "79.1 GiB"]
    assert [duration(v) for v in (0.00123, 2.5, 75, 3 * 3600 + 61)] == ["1.23 ms", "2.5 s", "1 min 15 s", "3 h 01 min"]
    assert (share(0.123), share(0.0001)) == ("12.3%", "< 0.1%")


def another(folder: RunFolder, name: str, **changes) -> RunFolder:
    other = RunFolder(folder.root.parent / name)
    other.root.mkdir()
    config = RunData(folder).config | changes
    other.config.write_text(json.dumps(config))
    other.write_state("completed", 10, SUMMARY)
    lines = [{**line, "train/loss": line["train/loss"] + 1} for line in folder.read_metrics() if "train/loss" in line]
    other.append_lines(other.metrics, lines)
    return other


def test_runs_are_compared(folder, tmp_path):
    others = [another(folder, f"other{i}", learning_rate=0.5 + i / 10) for i in range(3)]
    write_comparison([folder, *others], tmp_path / "comparison.html")
    text = (tmp_path / "comparison.html").read_text()
    assert re.search(r"<code>learning_rate</code></th><td>0.0002</td><td>0.5</td><td>0.6</td><td>0.7</td>", text)
    assert "<code>lora_r</code>" not in text and "<code>output_dir</code>" not in text
    assert '<td class="number">3.0000</td>' in text and '<td class="number">1.7918</td>' in text
    loss = text[text.index("Training loss") : text.index("</figure>")]
    assert all(f"f{style}" in loss or f"s{style}" in loss for style in range(4))
    with pytest.raises(UserError, match="RUN: 9 are given: at most 8"):
        write_comparison([folder] * 9, tmp_path / "no.html")
    assert not (tmp_path / "no.html").exists()
