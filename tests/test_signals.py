"""The signals that ask a run to stop."""

import signal
import subprocess
import sys
import time

import pytest

from lora_dist import signals


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


def test_the_signals_are_those_of_clusters():
    assert set(signals.SIGNALS) == {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
