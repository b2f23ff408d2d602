"""What rank 0 prints: the progress line, redrawn on a terminal and now and then in a log; and the closing lines."""

import contextlib
import dataclasses
import fcntl
import math
import os
import pty
import shlex
import struct
import sys
import termios
import time
from types import SimpleNamespace

import pytest
import torch

from lora_dist.config import TrainConfig
from lora_dist.run.folder import RunFolder
from lora_dist.training import terminal as terminal_module
from lora_dist.training.run import Progress
from lora_dist.training.terminal import ProgressLine, closing_lines
from lora_dist.training.timing import Stopwatch

RESULT = SimpleNamespace(loss=1.23456, num_tokens=500)


def test_a_log_file_gets_a_line_now_and_then(monkeypatch, capsys):
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(terminal_module.time, "monotonic", lambda: next(now))
    line = ProgressLine(20, 0, shown=True)
    for step in range(1, 11):
        line.update(step, RESULT, step_time_s=0.5, peak_bytes=3 * 2**29)
    line.close()
    out, err = capsys.readouterr()
    first, *more = out.splitlines()
    assert first == "step 3/20  loss 1.2346  1,000 tokens/s  peak 1.50 GiB  0:00:08 left"
    assert len(more) in (1, 2) and "\r" not in out and not err


def test_other_ranks_are_silent(monkeypatch, capsys):
    monkeypatch.setattr(terminal_module, "LINE_INTERVAL_S", 0.0)
    line = ProgressLine(20, 0, shown=False)
    line.update(1, RESULT, step_time_s=0.5, peak_bytes=0)
    line.close()
    assert capsys.readouterr() == ("", "")


def drawn_in_terminal(rows: int, columns: int) -> bytes:
    """What three steps draw in a terminal of this size."""
    child, terminal = pty.fork()
    if not child:
        fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        sys.stderr = open(2, "w", closefd=False)  # pytest's is not the terminal
        line = ProgressLine(3, 0, shown=True)
        for step in (1, 2, 3):
            time.sleep(0.15)
            line.update(step, RESULT, step_time_s=0.2, peak_bytes=2**30)
        line.close()
        os._exit(0)
    drawn = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while more := os.read(terminal, 10000):
            drawn += more
    os.close(terminal)
    assert os.waitpid(child, 0)[1] == 0
    return drawn


@pytest.mark.parametrize(("rows", "columns"), [(24, 120), (24, 80), (0, 0)], ids=["wide", "80 columns", "no size"])
def test_a_terminal_has_one_line_that_is_redrawn(rows, columns):
    drawn = drawn_in_terminal(rows, columns)
    lines = drawn.decode().split("\r")
    assert drawn.count(b"\n") == 1 and sum("step 2/3" in line for line in lines) == 1
    assert "100%|" in lines[-2] and "step 3/3  loss 1.2346  2,500 tokens/s  peak 1.00 GiB  0:00:00 left" in lines[-2]
    assert all(len(line) <= (columns or 80) for line in lines)


def progress_of(losses: list[float]) -> Progress:
    progress = Progress()
    for loss in losses:
        counts = dict(num_tokens=1, num_trained_tokens=1, skipped=False)
        progress.count(SimpleNamespace(loss=loss, bad=math.isnan(loss), **counts), 1.0)
    return progress


def test_the_losses_are_means_over_the_first_and_the_last_steps():
    losses = [float(loss) for loss in range(100)]
    assert progress_of(losses).mean_losses() == (4.5, 94.5, 10)
    assert progress_of([math.nan, *losses]).mean_losses() == (4.5, 94.5, 10)  # a bad step has no loss
    assert progress_of(losses[:7]).mean_losses() == (1.0, 5.0, 3)
    assert progress_of([3.0]).mean_losses() == (3.0, 3.0, 1)
    summary = progress_of(losses).summary(100)
    assert (summary["loss_first"], summary["loss_last"]) == (0.0, 99.0)  # state.json keeps single steps
    assert Progress(**dataclasses.asdict(progress_of(losses))).mean_losses() == (4.5, 94.5, 10)  # after a resume


SUMMARY = {
    "loss_first": 3.0, "eval_loss": None, "tokens_per_second": None, "peak_memory_bytes_per_rank": [2**30],
    "memory_before_bytes_per_rank": [2**29],
}  # fmt: skip


def closing_lines_of(tmp_path, monkeypatch, step: int, **settings) -> list[str]:
    monkeypatch.setattr(terminal_module, "_held", lambda run: "1 of 2 MiB")
    config = TrainConfig(**settings)
    progress = progress_of([3.0, 2.0, 1.5, 1.0][:step])
    run = SimpleNamespace(
        config=config, folder=RunFolder(tmp_path / "my run"), progress=progress, is_complete=step == 4, scores={},
        training=SimpleNamespace(num_steps=4), device=torch.device("cpu"),
        base=SimpleNamespace(expected=SimpleNamespace(peak_bytes_per_rank=None)),
    )  # fmt: skip
    return closing_lines(run, SUMMARY | {"steps": step}).splitlines()


def test_a_completed_run_names_its_adapter_its_report_and_the_next_command(tmp_path, monkeypatch):
    root = tmp_path / "my run"
    lines = closing_lines_of(tmp_path, monkeypatch, 4, sample_prompt="Who's there? ")
    assert lines[0] == "loss: 2.5000 (mean of the first 2 steps), 1.2500 (mean of the last 2 steps)"
    assert lines[-4:-1] == [f"run folder: {root}", f"report: {root}/report.html", f"adapter: {root}/adapter"]
    words = shlex.split(lines[-1].removeprefix("try it: "))
    assert words == ["lora-dist", "generate", "--adapter", f"{root}/adapter", "Who's there? "]
    classifier = closing_lines_of(tmp_path, monkeypatch, 4, task_type="SEQ_CLS")
    assert classifier[-1] == f"adapter: {root}/adapter"  # generate completes texts


def test_a_preempted_run_ends_with_how_to_go_on(tmp_path, monkeypatch):
    lines = closing_lines_of(tmp_path, monkeypatch, 2)
    assert lines[-2] == "preempted: nothing to save yet, 2 of 4 steps"
    assert lines[-1] == f"to go on: the same command with --output_dir '{tmp_path}/my run'"
    assert not any(line.startswith(("adapter:", "try it:")) for line in lines)


def test_what_was_waited_for_gathers_is_not_counted_twice():
    waited = [5.0]
    watch = Stopwatch(torch.device("cpu"), lambda: waited[0])
    with watch.part("forward"):
        waited[0] += 1000.0
    with watch.part("forward"):
        pass
    seconds = watch.seconds()
    assert seconds["gather"] == 1000.0 and -1000.1 < seconds["forward"] < -999.9
    assert "gather" not in Stopwatch(torch.device("cpu"), lambda: None).seconds()
