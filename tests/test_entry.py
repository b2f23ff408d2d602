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


def test_a_command_whose_reader_is_gone_ends_without_a_word():
    """As in `lora-dist status | head -1`."""
    code = (
        "from lora_dist.entry import end_process\ndef work():\n    for i in range(100_000): print(i)\nend_process(work)"
    )
    command = f"exec 3>&1; {{ '{sys.executable}' -c '{code}'; echo $? >&3; }} | head -1 >/dev/null"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_a_training_whose_reader_is_gone_goes_on(tmp_path):
    code = f"""import sys
from lora_dist.entry import end_process, go_on_without_reader
go_on_without_reader()
def work():
    for i in range(100_000): print(i)
    print("not read either", file=sys.stderr)
    open("{tmp_path}/end", "w").write("done")
end_process(work)"""
    command = f"exec 3>&1; {{ '{sys.executable}' -c '{code}'; echo $? >&3; }} 2>&1 | head -1 >/dev/null"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.stdout, done.stderr, (tmp_path / "end").read_text()) == ("0\n", "", "done")


def test_a_rank_that_is_no_number_still_says_what_is_wrong():
    done = end("raise UserError('RANK x: must be a whole number')", RANK="x")
    assert (done.returncode, done.stderr) == (2, "error: RANK x: must be a whole number\n")
