"""The line that says how far a run is: redrawn on a terminal, now and then in a log."""

import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios
import time
from types import SimpleNamespace

from lora_dist.training import terminal as terminal_module
from lora_dist.training.terminal import ProgressLine
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


def test_a_terminal_has_one_line_that_is_redrawn():
    child, terminal = pty.fork()
    if not child:
        fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # rows and columns: it has none yet
        sys.stderr = open(2, "w", closefd=False)
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
    lines = drawn.decode().split("\r")
    assert drawn.count(b"\n") == 1 and sum("step 2/3" in line for line in lines) == 1
    assert "100%|" in lines[-2] and "step 3/3  loss 1.2346  2,500 tokens/s  peak 1.00 GiB  0:00:00 left" in lines[-2]


def test_what_was_waited_for_gathers_is_not_counted_twice():
    import torch

    waited = [5.0]
    watch = Stopwatch(torch.device("cpu"), lambda: waited[0])
    with watch.part("forward"):
        waited[0] += 1000.0
    with watch.part("forward"):
        pass
    seconds = watch.seconds()
    assert seconds["gather"] == 1000.0 and -1000.1 < seconds["forward"] < -999.9
    assert "gather" not in Stopwatch(torch.device("cpu"), lambda: None).seconds()
