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
from lora_dist.parallel.ranks import check_same_on_all_ranks
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
