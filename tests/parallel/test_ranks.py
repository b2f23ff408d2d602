"""Ranks wait a long time for each other at the start, but not later; and they compare what must be the same."""

import dataclasses
import os
import subprocess
import sys

import pytest
from accelerate import Accelerator

from lora_dist.data.formats import load_tokenizer
from lora_dist.data.rows import prepare_rows
from lora_dist.errors import UserError
from lora_dist.parallel.ranks import _listener, check_same_on_all_ranks
from lora_dist.parallel.strategies import STRATEGIES, Launch
from lora_dist.training.session import what_must_be_the_same
from tests.helpers.ranks import PATIENCE_S, ROOT, run_ranks

RANK = """
import datetime, os, time
from lora_dist.parallel import ranks
ranks.COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=1)
if os.environ["RANK"] == "1":
    time.sleep(3)  # longer than a collective may take
accelerator = ranks.start_ranks()
import torch, torch.distributed as dist
ones = torch.ones(1)
dist.all_reduce(ones)
print("met", int(ones), flush=True)
if os.environ["RANK"] == "1":
    time.sleep(4)
else:
    started = time.monotonic()
    try:
        dist.all_reduce(ones)
    except RuntimeError as error:
        print("gave up", time.monotonic() - started < 3, flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_ranks_wait_for_a_late_one_and_not_for_one_that_stays_away():
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29900 + os.getpid() % 90), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK], cwd=ROOT, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=PATIENCE_S) for rank in ranks]
    assert outputs[0][0] == "met 2\ngave up True\n", outputs
    assert outputs[1][0] == "met 2\n", outputs


def _compare_on_rank(rank, config, texts):
    """The error if the data file holds `texts[rank]` on each rank, as on machines without a shared disk."""
    Accelerator(cpu=True)
    folder = f"{config.output_dir}/{rank}"
    os.makedirs(folder)
    os.chdir(folder)
    with open("data.jsonl", "w") as file:
        file.write(texts[rank])
    data = prepare_rows(dataclasses.replace(config, dataset_name="data.jsonl"), load_tokenizer("embedded"))
    try:
        launch = Launch(STRATEGIES["ddp"], "no")
        check_same_on_all_ranks(what_must_be_the_same(data.config, launch, data) | {"--output_dir": "any"})
    except UserError as error:
        return str(error)


def test_other_rows_on_another_machine_are_refused(config, tmp_path):
    rows = ['{"quote": "a lamp"}', '{"quote": "a bell"}']
    for name, second, expected in (
        ("same", rows, None),
        ("other", rows[::-1], "the rows of --dataset_name data.jsonl: "),
    ):
        settings = dataclasses.replace(config, output_dir=str(tmp_path / name), eval_fraction=0.0)
        found = run_ranks(_compare_on_rank, 2, settings, ["\n".join(rows), "\n".join(second)])
        assert found == [None, None] if expected is None else all(expected in line for line in found)


def test_safety_the_meeting_point_listens_on_one_address_unless_that_keeps_other_machines_out():
    with _listener("127.0.0.1", 0, others_connect=False) as listener:
        address, port = listener.getsockname()
        assert address == "127.0.0.1"
        with pytest.raises(UserError, match=f"^MASTER_PORT {port}: another process listens on it"):
            _listener("127.0.0.1", port, others_connect=False)
    for own_name in ("127.0.1.1", "localhost"):  # what a machine's /etc/hosts may say of its own name
        assert _listener(own_name, 0, others_connect=True) is None
    assert _listener("192.0.2.1", 0, others_connect=True) is None  # RFC 5737: no machine has it


def test_safety_another_device_is_listened_on_alone():
    """In a network namespace that has an address of its own."""
    code = (
        "import socket; from lora_dist.parallel.ranks import _listener;"
        "print(_listener('10.9.8.7', 29501, others_connect=True).getsockname())"
    )
    setup = "ip link set lo up; ip addr add 10.9.8.7/32 dev lo"
    command = ["unshare", "--net", "sh", "-c", f'{setup}; "$0" -c "$1"', sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE_S)
    if "unshare" in done.stderr or "ip: not found" in done.stderr or "RTNETLINK" in done.stderr:
        pytest.skip(f"no network namespace here: {done.stderr}")
    assert done.stdout == "('10.9.8.7', 29501)\n", done.stderr
