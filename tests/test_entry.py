"""How a command ends its process."""

import subprocess
import sys


def test_ctrl_c_of_a_command_is_no_traceback():
    code = "from lora_dist.entry import end_process\ndef work(): raise KeyboardInterrupt\nend_process(work)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
