"""The watchdog of one process: reports of the main thread, and the frame it blames. test_faults.py has real ranks."""

import multiprocessing
import sys
import threading
import time
from pathlib import Path

import pytest

import lora_dist
from lora_dist.run import watchdog
from lora_dist.run.folder import RunFolder

PACKAGE = Path(lora_dist.__file__).parent


def where_while(work) -> str:
    """`_where()` as the watchdog's thread finds it while the main thread is in `work(wait)`."""
    found, asked = [], threading.Event()

    def ask():
        found.append(watchdog._where())
        asked.set()

    threading.Timer(0.1, ask).start()
    work(lambda: asked.wait(10))
    return found[0]


def function_of(file: Path):
    """A function `work(wait)` whose code claims to be in this file; it waits in its second line."""
    names = {}
    exec(compile("def work(wait):\n    wait()", str(file), "exec"), names)
    return names["work"]


@pytest.mark.parametrize("file", ["training/step.py", "data/micro_batches.py", "entry.py"])
def test_a_stall_is_blamed_on_the_innermost_frame_of_this_package(file):
    assert (PACKAGE / file).exists()
    assert where_while(function_of(PACKAGE / file)) == f"{Path(file).name}:2 (work)"


def test_without_a_frame_of_this_package_the_innermost_frame_is_blamed():
    assert where_while(function_of(PACKAGE.parent / "elsewhere/step.py")).startswith("threading.py:")


def test_only_what_was_reported_as_progress_can_stall(monkeypatch):
    monkeypatch.setattr(watchdog, "_report", watchdog._Report())
    watchdog.report_activity()
    assert watchdog._report.time_s is None  # loading may take any time
    watchdog.report_progress(3, "evaluation")
    first = watchdog._report
    watchdog.report_activity()
    assert (watchdog._report.step, watchdog._report.doing) == (3, "evaluation")
    assert watchdog._report.time_s > first.time_s
    watchdog.stop_watching()
    watchdog.report_activity()
    assert (watchdog._report.step, watchdog._report.time_s) == (3, None)


def stalls(folder: RunFolder) -> None:
    """Stalls, so that the watchdog ends this process after a second."""
    sys.stderr = open(folder.root / "stderr", "w")
    watchdog.INTERVAL_S = 0.1
    watchdog.call_on_failure((folder.root / "told").write_text)
    watchdog.start_watchdog(folder, rank_timeout_s=5, step_timeout_s=1)
    watchdog.report_progress(3, "micro-batch 1 of 4")
    function_of(PACKAGE / "training/step.py")(lambda: time.sleep(30))


def test_a_stall_is_told_printed_and_recorded(tmp_path, config):
    folder = RunFolder(tmp_path)
    folder.begin(config)
    process = multiprocessing.get_context("fork").Process(target=stalls, args=(folder,))
    process.start()
    process.join(20)
    assert process.exitcode == 1
    line = (tmp_path / "told").read_text()
    assert line.startswith(
        "step 4 stalled: no progress for 1 s (micro-batch 1 of 4); ranks that do not wait for others: "
    )
    assert " in step.py:2 (work); last completed step: 3; " in line
    assert line in (tmp_path / "stderr").read_text()
    state = folder.read_state()
    assert (state["status"], state["rank_lost"], state["summary"]) == ("failed", False, {"error": line})
    assert "in stalls" in (tmp_path / "stacks-rank-00000.txt").read_text()
