"""The signals that ask a run to stop."""

import signal
import subprocess
import sys
import time

import pytest

from lora_dist import signals

START = "import time; from lora_dist import signals; signals.REPEAT_S = 0.2; signals.install_handlers()\n"
SLEEP = "print('ready', flush=True)\nwhile True: time.sleep(0.01)"
# A wait in C++, in which Python runs no signal handler.
WAIT_FOR_RANKS = """
import datetime, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print('ready', flush=True)
store.wait(["what nobody sets"], datetime.timedelta(seconds=60))
"""


def started(code: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", START + code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_second_signal_leaves_at_once(number):
    process = started("signals.begin_training()\n" + SLEEP)
    process.send_signal(number)
    time.sleep(0.4)
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(10) == -number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("code", [SLEEP, WAIT_FOR_RANKS])
def test_before_training_a_signal_ends_the_process_at_once(number, code):
    process = started("signals.call_before_leaving(lambda: print('left', flush=True))\n" + code)
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(10) == -number and time.monotonic() - began < 2
    assert process.stdout.read() == "left\n"


def test_before_training_a_rank_of_srun_ends_with_a_code_below_that_of_a_refusal(monkeypatch):
    """srun gives the job the highest code of its ranks."""
    monkeypatch.setenv("SLURM_PROCID", "1")
    process = started("signals.call_before_leaving(lambda: print('left', flush=True))\n" + WAIT_FOR_RANKS)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 1 and process.stdout.read() == "left\n"


def test_before_training_slurms_signal_is_noted():
    process = started("print('ready', flush=True)\nwhile not signals.stop_asked(): time.sleep(0.01)\nprint('noted')")
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=10)[0].endswith("noted\n") and process.returncode == 0


def test_a_signal_to_a_fork_is_not_one_to_its_parent():
    """A pool ends its workers by SIGTERM; these must die of it, and the process that tokenizes must not."""
    code = "import os, signal\nif not (child := os.fork()): time.sleep(60)\n"
    code += "time.sleep(0.2)\nos.kill(child, signal.SIGTERM)\n"
    code += "print('ready', os.waitpid(child, 0)[1], signals.stop_asked(), flush=True)"
    done = subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, f"ready {signal.SIGTERM.value} False\n")


def test_the_signals_are_those_of_clusters():
    assert set(signals.SIGNALS) == {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
