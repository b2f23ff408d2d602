import dataclasses

from lora_dist.report import Chart, render

SUMMARY = {
    "loss_first": 3.0, "loss_last": 2.0, "eval_loss": None, "world_size": 2, "base_bytes_per_rank": 50,
    "base_bytes_total": 100, "tokens_per_second": 1234.5, "trainable_params": 7, "strategy": "fsdp",
    "samples": {"before": "", "after": "<b>bold</b>"},
}  # fmt: skip


def test_the_page_shows_what_was_measured_and_escapes_text(config):
    metrics = [{"train/global_step": s, "train/loss": 3 - s / 10} for s in range(1, 6)]
    page = render("run", dataclasses.asdict(config), {"status": "completed", "step": 5, "summary": SUMMARY}, metrics)
    assert "3.000 → 2.000" in page and "50%" in page and "1,234" in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page and "<b>bold" not in page
    assert page.count("<svg") == 1  # charts of metrics that were not logged are left out
    assert "held-out loss" not in page and "before" not in page
    assert "://" not in page  # nothing is fetched


def test_a_failed_run_has_a_page_too(config):
    state = {"status": "failed", "step": 0, "summary": {"error": "RuntimeError: out of luck"}}
    assert "out of luck" in render("run", dataclasses.asdict(config), state, [])


def test_a_chart_stays_inside_its_frame():
    chart = Chart.of("t", [(1, 5.0), (9, 5.0)], [(0, -2.0)])
    for x, y in chart.line + chart.dots:
        assert chart.left <= x <= chart.width and 0 <= y <= chart.height
    assert Chart.of("t", [(1, 5.0)], []) is not None  # one point, no range
    assert Chart.of("t", [], []) is None
