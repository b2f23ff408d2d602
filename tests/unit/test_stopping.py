"""What asks a run to stop, and what is made of numbers that stand out."""

import signal
import subprocess
import sys
import time

import pytest

from lora_dist import signals
from lora_dist.training.loop import SPIKE_MIN_LOSSES, is_spike


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_second_signal_leaves_at_once(number):
    code = "import time; from lora_dist import signals; signals.REPEAT_S = 0.2; signals.install_handlers()\n"
    code += "print('ready', flush=True)\nwhile True: time.sleep(0.01)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    time.sleep(0.4)
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(10) == -number


def test_a_spike_stands_out_of_the_recent_losses():
    recent = [2.0 + 0.1 * (i % 3) for i in range(SPIKE_MIN_LOSSES)]
    assert is_spike(4.0, recent) and not is_spike(2.3, recent) and not is_spike(1.0, recent)
    assert not is_spike(4.0, recent[1:])  # too few to tell


def test_the_signals_are_those_of_clusters():
    assert set(signals.SIGNALS) == {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


def test_ctrl_c_of_a_command_is_no_traceback():
    code = "from lora_dist.entry import end_process\ndef work(): raise KeyboardInterrupt\nend_process(work)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
