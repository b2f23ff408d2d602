"""The text of the pages, from files that are complete, cut off or missing. test_report_browser.py renders them."""

import json
import math
import re

import pytest

from lora_dist.errors import UserError
from lora_dist.run.folder import STEP, RunFolder
from lora_dist.tracking.charts import MAX_DOTS, MAX_POINTS, Series, draw, smoothed, thin, tick_text, ticks
from lora_dist.tracking.record import RunRecord
from lora_dist.tracking.report import time_spent, write_comparison
from lora_dist.tracking.report_sections import memory_bars
from lora_dist.units import duration, percent, size
from tests.helpers.reported_runs import AGAIN, GIB, START, SUMMARY, another, make_folder, page, step_line


@pytest.fixture
def folder(tmp_path, config) -> RunFolder:
    return make_folder(tmp_path / "run", config)


def test_the_figures_are_those_of_the_files(folder):
    text = page(folder)
    for figure in ("2.900 → 2.000", "2.708 → 1.792", "15.00 → 6.00", "1,234", "50% of 100 MiB", "3 GiB", "49,152"):
        assert f"<b>{figure}</b>" in text, figure
    assert "<b>2 min 01 s</b>" in text  # from the first start to the last logged line
    assert "step 10 of 10" in text and "fsdp on 2 ranks" in text and "1 restart<" in text


def test_a_recipes_scores_are_shown_and_a_classifiers_loss_has_its_own_unit(folder):
    assert "nats per token" in page(folder) and "macro f1" not in page(folder)
    folder.write_state("completed", 10, SUMMARY | {"macro_f1_base": 0.25, "macro_f1": 0.75})
    folder.config.write_text(folder.config.read_text().replace("task_type: CAUSAL_LM", "task_type: SEQ_CLS"))
    text = page(folder)
    assert "<b>0.250 → 0.750</b>" in text and "macro f1, base to base + adapter" in text
    assert "nats per row or class" in text and "nats per token" not in text


def test_text_of_users_is_text(folder):
    text = page(folder)
    assert "Two &lt;things&gt;" in text and "after &lt;b&gt;all&lt;/b&gt;" in text and "are &amp; were" in text
    assert "<b>all" not in text and "<things>" not in text
    assert text.index("before") < text.index("between")  # in the details, below the first and the last completion
    assert "1 in between" in text


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
    assert "restarted from this step" in text and "killed" in text and "3 × fsdp" in text
    assert "2.13.1 (earlier: 2.13.0)" in text


def test_where_the_time_went_adds_up(folder):
    spent = time_spent(RunRecord(folder))
    seconds = {row["what"]: row["seconds"] for row in spent["rows"]}
    assert seconds == {
        "waiting for data": pytest.approx(1.0), "gathering layers": pytest.approx(2.0), "forward": pytest.approx(3.0),
        "backward": pytest.approx(5.0), "reducing gradients": pytest.approx(1.0), "updating": pytest.approx(0.5),
        "the rest of the steps": pytest.approx(2.5), "evaluating": 5.0, "saving": 0.5,
        "loading the base, last start": 2.0,
    }  # fmt: skip
    assert spent["total"] == pytest.approx(22.5) and spent["all_logged"]
    assert sum(row["fraction"] for row in spent["rows"]) == pytest.approx(1)
    assert "rank 0 100 ms, rank 1 300 ms" in page(folder)
    folder.metrics.write_text(folder.metrics.read_text().replace("perf/rank1/", "other/"))
    assert "waits least" not in page(folder)  # there is only one rank


def test_steps_that_were_not_logged_are_as_those_that_were(folder):
    lines = [line for line in folder.read_metrics() if line[STEP] % 5 == 0]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    spent = time_spent(RunRecord(folder))
    seconds = {row["what"]: row["seconds"] for row in spent["rows"]}
    assert seconds["forward"] == pytest.approx(3.0) and seconds["evaluating"] == 5.0 and not spent["all_logged"]
    assert "are counted as if they took as long as the logged ones" in page(folder)


def test_memory_is_drawn_beside_what_was_expected(folder):
    drawn = memory_bars(RunRecord(folder))
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
    drawn = memory_bars(RunRecord(folder))
    assert [row["name"] for row in drawn["rows"]] == ["least: rank 0", "median: rank 32", "greatest: rank 9"]
    assert not drawn["on_cpu"] and drawn["rows"][2]["grown"] == 100 and drawn["rows"][0]["expected"] is None


def test_what_went_wrong_is_listed(folder):
    folder.append_lines(folder.bad_steps, [{"step": 3, "loss": "nan", "grad_norm": "1.0", "micro_batches": []}])
    folder.append_lines(folder.metrics, [{STEP: 10, "time": 1, "checkpoint/failed_saves": 1, "train/loss_spikes": 2}])
    text = page(folder)
    assert (
        "step 3 was skipped: loss nan" in text
        and "1 checkpoint could not" in text
        and "2 steps with a loss far above" in text
    )
    folder.write_state("completed", 10, {**SUMMARY, "skipped_steps": 4})
    assert "3 more steps skipped" in page(folder)


def faults(folder: RunFolder) -> str:
    return page(folder).split("Faults and restarts</h2>")[1].split("<h2>")[0]


def test_a_run_has_no_faults_only_where_it_had_none(folder):
    folder.starts.unlink()
    assert "1 restart, with no details recorded" in faults(folder)
    folder.restarts = 0
    folder.write_state("completed", 10, SUMMARY)
    assert "None." in faults(folder)
    folder.write_state("failed", 5, {"error": "RuntimeError: out of luck"}, rank_lost=True)
    assert "the run failed because a rank or its machine was gone; saved until step 5" in faults(folder)
    folder.write_state("preempted", 5, SUMMARY)
    assert "the run was preempted; saved until step 5" in faults(folder) and "None." not in faults(folder)


def test_settings_stand_beside_their_defaults(folder):
    changed, others = page(folder).split("Settings that differ")[1].split("settings have their default")
    assert re.search(r"<code>lora_r</code></th><td>7</td><td class=\"dim\">16</td>", changed)
    assert "lora_alpha" not in changed and "lora_alpha" in others


def test_a_run_that_has_only_begun_has_a_page(folder):
    for path in (folder.metrics, folder.samples, folder.starts):
        path.unlink()
    folder.write_state("running", 0)
    text = page(folder)
    assert "running" in text and "<svg" not in text and "Where the time went" not in text


@pytest.mark.parametrize("missing", [*SUMMARY, "expected.peak_bytes_per_rank", "expected.base_bytes_per_rank"])
def test_a_summary_may_lack_anything(folder, missing):
    summary = {name: value for name, value in SUMMARY.items() if name != missing}
    expected = {name: None if missing.endswith(name) else size for name, size in SUMMARY["expected"].items()}
    folder.write_state("completed", 10, summary | ({"expected": expected} if "expected" in summary else {}))
    assert "completed" in page(folder)


@pytest.mark.parametrize("missing", START)
def test_a_start_may_lack_anything(folder, missing):
    starts = [{name: value for name, value in start.items() if name != missing} for start in (START, AGAIN)]
    folder.starts.write_text("".join(json.dumps(start) + "\n" for start in starts))
    assert "Faults and restarts" in page(folder)


def test_of_what_is_not_known_nothing_is_said(folder):
    for path in (folder.starts, folder.samples):
        path.unlink()
    folder.config.write_text("{}")
    folder.state.write_text(json.dumps({"status": "completed", "step": 10, "summary": {"strategy": "ddp"}}))
    text = page(folder)
    assert "None" not in text.split("<h2>")[0] and "Samples" not in text


def test_what_is_no_number_is_not_drawn(folder):
    lines = [step_line(11, **{"train/loss": math.inf, "train/grad_norm": math.nan, "perf/mfu": "much"})]
    folder.append_lines(folder.metrics, [*lines, {STEP: 12, "time": 1.0, "eval/loss": 900.0}])
    text = page(folder)
    assert "2.900 → 2.000" in text and "held-out loss" in text
    assert "Gradient norm" not in text and "Model FLOP" not in text


def test_what_was_held_out_is_the_bases_only_at_step_0(folder):
    lines = [line for line in folder.read_metrics() if line[STEP] > 0]
    lines.insert(5, {STEP: 5, "time": 1.0, "eval/loss": 2.0})
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = page(folder)
    assert "held-out loss, step 5 to step 10" in text and "base to base" not in text
    assert "held-out perplexity" not in text  # one of the two has none


def test_rows_with_one_prompt_are_not_mixed(folder):
    folder.samples.unlink()
    row = {"prompt": "same"}
    samples = [{STEP: s, **row, "reference": f"r{i}", "completion": f"s{s}r{i}"} for s in (0, 10) for i in (0, 1)]
    folder.append_lines(folder.samples, samples)
    first, second = (sample.split("</div>\n</div>")[0] for sample in page(folder).split("<h3>prompt</h3>")[1:])
    for text, i in ((first, 0), (second, 1)):
        assert (
            f"<h4>base</h4><p>s0r{i}</p>" in text and f"<h4>step 10</h4><p>s10r{i}</p>" in text and f"r{i}</p>" in text
        )
    assert "in between" not in page(folder)
    folder.samples.write_text(json.dumps({STEP: 5, "prompt": "p", "reference": None, "completion": "c"}) + "\n")
    assert "<h4>step 5</h4><p>c</p>" in page(folder) and "<h4>base</h4>" not in page(folder)


def test_memory_of_a_run_that_goes_on_is_its_last_line(folder):
    folder.write_state("running", 5)
    ranks = {f"memory/rank{rank}/peak_allocated_gib": 1.0 + rank for rank in (0, 1, 10, 2)}
    folder.append_lines(folder.metrics, [{STEP: 11, "time": 1.0, **ranks}, {STEP: 12, "time": 1.0}])
    drawn = memory_bars(RunRecord(folder))
    found = [(row["name"], row["peak"], row["expected"]) for row in drawn["rows"]]
    assert found[0] == ("rank 0", "1 GiB", None) and found[3] == ("rank 10", "11 GiB", None) and len(found) == 4
    assert "peak until step 11" in page(folder)
    many = {f"memory/{what}_peak_allocated_gib": gib for what, gib in (("min", 1.0), ("mean", 2.0), ("max", 4.0))}
    folder.append_lines(folder.metrics, [{STEP: 13, "time": 1.0, **many}])
    rows = [(row["name"], row["grown"]) for row in memory_bars(RunRecord(RunFolder(folder.root)))["rows"]]
    assert rows == [("least", 25), ("mean", 50), ("greatest", 100)]


def test_parts_of_the_time_look_different(folder):
    folder.append_lines(folder.metrics, [step_line(11, **{"perf/wait_time_s": 0.1})])
    text = page(folder)
    looks = re.findall(
        r'<span class="key (f\d)"( style="; background-image[^"]*")?></span>', text.split("Where the time")[1]
    )
    assert len(looks) == len(set(looks)) == 11


def test_a_failed_run_says_why_and_a_half_written_line_is_left_out(folder):
    folder.write_state("failed", 5, {"error": "RuntimeError: out of <luck>"})
    with open(folder.metrics, "a") as file:
        file.write('{"train/global_step": 11, "train/lo')
    text = page(folder)
    assert "out of &lt;luck&gt;" in text
    assert "<span>fsdp on 3 ranks</span>" in text  # of the last start, because there is no summary


def test_a_profile_is_a_table(folder):
    folder.profile.mkdir()
    row = {"what": "aten::mm", "self_time_s": 0.25, "share": 0.5, "calls": 77}
    (folder.profile / "table.json").write_text(json.dumps({"steps": [3, 4], "rows": [row]}))
    text = page(folder)
    assert "of steps 3 to 4" in text and '<code>aten::mm</code></th><td class="number">77</td>' in text


def write_long(folder: RunFolder) -> None:
    """10 000 steps, an evaluation of four prompts after each 10, and 200 starts."""
    names = ("train/grad_norm", "train/learning_rate", "perf/tokens_per_second", "perf/padded_tokens_per_second",
             "perf/padding_fraction", "train/mean_token_accuracy", "perf/mfu")  # fmt: skip
    lines = [step_line(step, **{name: 1 + math.sin(step) for name in names}) for step in range(1, 10_001)]
    lines[7777]["train/loss"] = 2000.0
    evaluations = [
        {STEP: step, "time": 1.0, "eval/loss": 2 + math.sin(step), "eval/mean_token_accuracy": 0.5}
        for step in range(0, 10_001, 10)
    ]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines + evaluations))
    samples = [
        {STEP: line[STEP], "prompt": f"p{i}", "completion": "word " * 999} for line in evaluations for i in range(4)
    ]
    folder.samples.write_text("".join(json.dumps(line) + "\n" for line in samples))
    failed = {**AGAIN, "previous": {"status": "failed", "error": "word " * 999}}
    folder.starts.write_text("".join(json.dumps(line) + "\n" for line in [START, *[failed] * 200]))


def test_of_many_samples_and_starts_the_page_says_how_many_it_leaves_out(folder):
    write_long(folder)
    text = page(folder)
    assert "999 in between; 8 of them are shown" in text and "starts.jsonl holds 171 earlier starts" in text
    assert text.count('<circle class="dot') <= 3 * MAX_DOTS + 6  # loss wide and narrow, accuracy; and their legends
    prompts = [{STEP: 0, "prompt": f"p{i}", "completion": "c"} for i in range(23)]
    folder.samples.write_text("".join(json.dumps(line) + "\n" for line in prompts))
    assert "samples.jsonl holds 3 more prompts" in page(folder)


def test_a_long_run_is_a_small_page_and_keeps_its_spikes(folder):
    write_long(folder)
    text = page(folder)
    assert len(text.encode()) < 300_000
    polyline = re.findall(r'<polyline class="curve s0 faint" points="([^"]*)"', text)[0].split()
    ys = [float(point.split(",")[1]) for point in polyline]
    assert len(polyline) <= MAX_POINTS and min(ys) < 20 and sorted(ys)[1] > 100  # one point stands at the top


def test_the_loss_is_smoothed_and_its_own_values_are_behind(folder):
    assert "running mean" not in page(folder) and " faint" not in page(folder).split("</style>")[1]
    write_long(folder)
    chart = page(folder).split('<figure class="wide">')[1].split("</figure>")[0]
    faint, line = chart.index('class="curve s0 faint"'), chart.index('class="curve s0"')
    assert faint < line and "training, running mean" in chart


def test_a_running_mean_keeps_straight_lines_and_averages_noise():
    assert smoothed([(0, 1.0), (1, 5.0)]) == [(0, 1.0), (1, 5.0)]  # too few to average
    line = [(step, 3.0 * step) for step in range(200)]
    assert [value for _, value in smoothed(line)][5:-5] == pytest.approx([value for _, value in line][5:-5])
    assert smoothed(line)[0] == (0, 7.5) and smoothed(line)[-1] == (199, 3 * 199 - 7.5)
    noise = smoothed([(step, float(step % 2)) for step in range(200)])
    assert all(0.4 < value < 0.6 for _, value in noise) and [step for step, _ in noise] == list(range(200))


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


@pytest.mark.parametrize(
    "values", [(12342.0, 12349.0), (2.00012, 2.00019), (1.93e-4, 2e-4), (123456.0, 123456.9), (0.99991, 0.99999)]
)
def test_ticks_say_what_they_are(values):
    chart = draw("t", "", [Series("a", list(enumerate(values)))])
    factors = {"k": 1e3, "M": 1e6, "G": 1e9}
    said = [float(text.rstrip("kMG")) * factors.get(text[-1], 1) for _, text in chart.y_ticks]
    assert said == pytest.approx(ticks(*values, 4), rel=1e-12)
    assert chart.left > 6.5 * max(len(text) for _, text in chart.y_ticks)  # they have room


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
    assert (percent(0.123), percent(0.0001)) == ("12.3%", "< 0.1%")


def test_runs_are_compared(folder, tmp_path):
    others = [another(folder, f"other{i}", learning_rate=0.5 + i / 10) for i in range(3)]
    write_comparison([folder, *others], tmp_path / "comparison.html")
    text = (tmp_path / "comparison.html").read_text()
    assert re.search(r"<code>learning_rate</code></th><td>0.0002</td><td>0.5</td><td>0.6</td><td>0.7</td>", text)
    assert "<code>lora_r</code>" not in text and "<code>output_dir</code>" not in text
    assert '<td class="number">3.0000</td>' in text and '<td class="number">1.7918</td>' in text
    for title in ("Training loss", "Held-out loss"):  # lines have dashes, while dots differ only in colour
        chart = text[text.index(f"<figcaption>{title}") :].split("</figure>")[0]
        assert all(f'<polyline class="curve s{style}"' in chart for style in range(4)) and "<circle" not in chart
    with pytest.raises(UserError, match="RUN: 9 are given, but a chart can tell at most 8 apart; give fewer"):
        write_comparison([folder] * 9, tmp_path / "no.html")
    assert not (tmp_path / "no.html").exists()


def test_compared_runs_have_names_and_settings_apart(folder, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    same = [another(folder, "a/run", lora_alpha=1), another(folder, "b/run", lora_alpha=1, new_setting=3)]
    write_comparison(same, tmp_path / "comparison.html")
    text = (tmp_path / "comparison.html").read_text()
    assert 'class="name">a/run</th>' in text and 'class="name">b/run</th>' in text
    assert re.search(r"<code>new_setting</code></th><td>not set</td><td>3</td>", text) and "lora_alpha" not in text


def test_eight_long_runs_are_a_small_page(folder, tmp_path):
    write_long(folder)
    write_comparison([folder] * 8, tmp_path / "comparison.html")
    assert (tmp_path / "comparison.html").stat().st_size < 300_000
