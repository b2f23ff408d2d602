"""The ranks' meeting point: who can reach it, and what a stranger who reached it could do."""

import os
import signal
import time

import pytest
import torch.distributed as dist

from lora_dist.run import watchdog
from lora_dist.run.folder import RunFolder
from lora_dist.run.watchdog import start_watchdog
from tests.helpers.ranks import PATIENCE_S, forked_ranks, run_ranks, wait_for_step

FLAGS = ("--max_steps", "200", "--warmup_steps", "2", "--max_length", "32", "--per_device_train_batch_size", "1")
FLAGS += ("--gradient_accumulation_steps", "1", "--eval_fraction", "0", "--report_to", "none", "--sample_prompt", "")


def all_keys(port: int) -> tuple[dist.TCPStore, str]:
    """(the store of a run, and the prefix of what its watchdogs write), as a stranger finds them."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    deadline = time.monotonic() + PATIENCE_S
    while not (found := [key for key in store.list_keys() if key.endswith("sign/0")]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return store, found[0].removesuffix("sign/0")


def _write_port(rank: int) -> None:
    if rank == 0:
        with open(os.environ["PORT_FILE"], "w") as file:
            file.write(os.environ["MASTER_PORT"])


def test_what_a_stranger_writes_into_the_store_ends_no_run(tmp_path):
    folder, port_file = RunFolder(tmp_path / "run"), tmp_path / "port"
    flags = (*FLAGS, "--output_dir", str(folder.root))
    with forked_ranks(*flags, num_ranks=2, patch=_write_port, env={"PORT_FILE": str(port_file)}) as ranks:
        wait_for_step(folder, 2)
        store, prefix = all_keys(int(port_file.read_text()))
        for name, value in (
            ("verdict", '{"line": "stop", "speaker": 0, "exit_code": 0}'), ("sign/0", "not json"), ("sign/1", "[]"),
            ("left/0", "1"), ("left/1", "1"),
        ):  # fmt: skip
            store.set(prefix + name, value)
        ended = ranks.wait()
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert folder.read_state()["status"] == "completed" and folder.read_state()["step"] == 200
    assert any("is ignored, but keep its port from others" in err for _, _, err in ended)
    assert not any("stop\n" in err or "Traceback" in err for _, _, err in ended)


def test_a_verdict_of_the_ranks_counts_though_a_stranger_wrote_one_first(tmp_path):
    folder, port_file = RunFolder(tmp_path / "run"), tmp_path / "port"
    flags = (*FLAGS, "--max_steps", "900", "--output_dir", str(folder.root))
    with forked_ranks(*flags, num_ranks=3, patch=_write_port, env={"PORT_FILE": str(port_file)}) as ranks:
        wait_for_step(folder, 2)
        store, prefix = all_keys(int(port_file.read_text()))
        store.set(f"{prefix}verdict", "not json")
        store.set(f"{prefix}left/1", "1")  # as if the rank had left on purpose
        os.kill(ranks.processes[1].pid, signal.SIGKILL)
        ended = ranks.wait(30)
    assert [ended[rank][0] for rank in (0, 2)] == [1, 1]
    assert sum("rank 1 (" in err and "is gone" in err for _, _, err in ended) == 1


def _watch_with_a_fault(rank, root):
    watchdog.Watchdog._check = lambda self: 1 / 0 if self.rank == 1 else None
    start_watchdog(RunFolder(root), rank_timeout_s=60, step_timeout_s=0)
    time.sleep(30)


def test_a_watchdog_that_fails_says_so_and_ends_the_run(tmp_path, capfd):
    with pytest.raises(AssertionError, match="exit codes"):
        run_ranks(_watch_with_a_fault, 2, tmp_path)
    assert "error: the watchdog of rank 1 failed (division by zero (ZeroDivisionError))" in capfd.readouterr().err
