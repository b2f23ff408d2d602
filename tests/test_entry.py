"""How a command or a recipe ends its process: exit code, one line, and what its launcher reads."""

import json
import os
import subprocess
import sys

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


def end(body: str, **env: str) -> subprocess.CompletedProcess:
    imports = "from lora_dist.entry import end_process\nfrom lora_dist.errors import *"
    code = f"{imports}\ndef work(): {body}\nend_process(work)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("pass", (0, "", "")),
        ("return 3", (3, "", "")),
        ("raise UserError('--x 1: no')", (2, "", "error: --x 1: no\n")),
        ("raise RunFailed('the disk is full')", (1, "", "error: the disk is full\n")),
        ("raise NothingToDo('done already')", (0, "done already\n", "")),
        ("raise KeyboardInterrupt", (130, "", "")),  # Ctrl-C is no traceback
    ],
)
def test_exit_code_and_one_line(body, expected):
    done = end(body)
    assert (done.returncode, done.stdout, done.stderr) == expected


def test_only_rank_0_prints_but_every_rank_tells_its_launcher(tmp_path):
    file = tmp_path / "error.json"
    done = end("raise UserError('--x 1: no')", RANK="1", TORCHELASTIC_ERROR_FILE=str(file))
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=2, error_file=str(file))  # as torchrun reads it
    assert failure.message["extraInfo"]["py_callstack"] == "error: --x 1: no" and failure.timestamp > 0
    assert json.loads(file.read_text())["message"]["message"] == "error: --x 1: no"


def test_a_folder_of_the_error_file_that_is_gone_costs_nothing(tmp_path):
    done = end("raise UserError('--x 1: no')", TORCHELASTIC_ERROR_FILE=str(tmp_path / "gone/error.json"))
    assert (done.returncode, done.stderr) == (2, "error: --x 1: no\n")
