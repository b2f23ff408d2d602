"""Faults of a run: ranks that die, fail or hang, losses that are not finite, full disks, and other users."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from lora_dist.config import TrainConfig
from lora_dist.data.formats import load_tokenizer
from lora_dist.data.micro_batches import MicroBatches
from lora_dist.data.rows import prepare_rows
from lora_dist.flags import parse_config
from lora_dist.run.folder import RunFolder
from lora_dist.tracking.metrics import MetricsLog
from lora_dist.training import loop
from tests.helpers.ranks import BIN, PATIENCE_S, ROOT, fork_ranks, forked_ranks, wait_for_step

FLAGS = ("--max_steps", "200", "--warmup_steps", "2", "--max_length", "64", "--per_device_train_batch_size", "2")
FLAGS += ("--gradient_accumulation_steps", "2", "--eval_fraction", "0", "--save_steps", "2", "--report_to", "none")
FLAGS += ("--sample_prompt", "")


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def steps_logged(folder: RunFolder) -> int:
    lines = folder.metrics.read_text().splitlines() if folder.metrics.exists() else []
    return max([json.loads(line)["train/global_step"] for line in lines if line.endswith("}")], default=0)


def wait_for(ranks, gone: int, timeout_s: float) -> tuple[float, list]:
    """(seconds until all ranks except `gone` have ended, how each of them ended)."""
    started = time.monotonic()
    ended = ranks.wait(timeout_s)
    return time.monotonic() - started, [end for rank, end in enumerate(ended) if rank != gone]


@pytest.mark.parametrize(("dead", "strategy"), [pytest.param(1, "fsdp", marks=pytest.mark.slow), (0, "ddp")])
def test_a_dead_rank_is_named_and_the_others_leave(dead, strategy, folder):
    with forked_ranks(*FLAGS, "--output_dir", str(folder.root), num_ranks=3, strategy=strategy) as ranks:
        wait_for_step(folder, 3)
        os.kill(ranks.processes[dead].pid, signal.SIGKILL)
        seconds, others = wait_for(ranks, dead, 30)
    assert seconds < 10
    assert [code for code, _, _ in others] == [1, 1]
    said = "".join(err for _, _, err in others)
    line = f"rank {dead} ({socket.gethostname()}) is gone; last completed step: "
    assert said.count(line) == 1
    assert "Traceback" not in said
    state = folder.read_state()
    assert state["status"] == "failed" and line in state["summary"]["error"]
    assert folder.newest_whole_checkpoint()[0] is not None


def test_a_silent_rank_is_named_and_the_others_leave(folder):
    flags = ("--output_dir", str(folder.root), "--rank_timeout_s", "5")
    with forked_ranks(*FLAGS, *flags, num_ranks=3, strategy="fsdp") as ranks:
        wait_for_step(folder, 3)
        os.kill(ranks.processes[1].pid, signal.SIGSTOP)
        started = time.monotonic()
        for rank in (0, 2):
            ranks.processes[rank].join(30)
        seconds = time.monotonic() - started
        codes = [ranks.processes[rank].exitcode for rank in (0, 2)]
        said = ranks.texts(0)[1] + ranks.texts(2)[1]
    assert codes == [1, 1] and 3.5 <= seconds < 15  # the last sign of life is up to a second old
    assert said.count(f"rank 1 ({socket.gethostname()}) gave no sign of life for ") == 1


def fails_on(rank_that_fails: int, step: int, how, turn: int = 0):
    """A patch: one rank calls `how` when it reads its `turn`-th micro-batch of a step."""

    def patch(rank: int) -> None:
        import lora_dist.training.step as step_module

        original = step_module.read_micro_batch

        def read_micro_batch(run, at, at_turn):
            if (rank, at, at_turn) == (rank_that_fails, step, turn):
                how()
            return original(run, at, at_turn)

        step_module.read_micro_batch = read_micro_batch

    return patch


def sits_there():
    time.sleep(600)


def test_a_signal_is_obeyed_after_the_step_it_comes_in(folder):
    """One rank gets the signal while it reads its last micro-batch; the reduction of that step tells the others."""

    def signals_itself():
        os.kill(os.getpid(), signal.SIGUSR1)

    flags = ("--output_dir", str(folder.root), "--save_steps", "100", "--per_device_train_batch_size", "2")
    ended = fork_ranks(*FLAGS, *flags, num_ranks=3, strategy="fsdp", patch=fails_on(2, 4, signals_itself, turn=1))
    assert [code for code, _, _ in ended] == [0, 0, 0], ended[0][2]
    state = folder.read_state()
    assert (state["status"], state["step"]) == ("preempted", 5)
    assert folder.newest_whole_checkpoint() == (folder.checkpoint(5), [])
    assert steps_logged(folder) == 5


def out_of_memory():
    raise MemoryError("CUDA out of memory, say")


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_fails_is_named_and_the_others_leave(rank, folder):
    patch = fails_on(rank, 3, out_of_memory)
    started = time.monotonic()
    ended = fork_ranks(*FLAGS, "--output_dir", str(folder.root), num_ranks=3, strategy="fsdp", patch=patch)
    assert time.monotonic() - started < 30
    assert [code for code, _, _ in ended] == [1, 1, 1]
    said = "".join(err for _, _, err in ended)
    line = f"rank {rank} ({socket.gethostname()}) failed: MemoryError: CUDA out of memory, say; last completed step: 3"
    assert said.count(line) == 1
    assert said.count("Traceback") == 1  # of the rank that failed
    assert "MemoryError" in folder.read_state()["summary"]["error"]


def test_a_stalled_step_is_named_with_all_stacks(folder):
    patch = fails_on(1, 3, sits_there)
    flags = ("--output_dir", str(folder.root), "--step_timeout_s", "4")
    ended = fork_ranks(*FLAGS, *flags, num_ranks=3, strategy="fsdp", patch=patch)
    assert [code for code, _, _ in ended] == [1, 1, 1]
    said = "".join(err for _, _, err in ended)
    assert said.count("step 4 stalled: no progress for 4 s") == 1
    assert f"ranks that do not wait for others: rank 1 ({socket.gethostname()}) in step.py:" in said
    stacks = [path.read_text() for path in sorted(folder.root.glob("stacks-rank-*.txt"))]
    assert len(stacks) == 3
    assert ["in sits_there" in text for text in stacks] == [False, True, False]  # where it sleeps


def not_finite(at_step: int, index: int, what: str):
    """A patch: the loss of a micro-batch, or one gradient, is not finite. `at_step` -1: in each step from the third."""

    def patch(rank: int) -> None:
        import torch

        import lora_dist.training.step as step_module

        now = {}
        read, loss_of, flatten = step_module.read_micro_batch, step_module.forward_loss, step_module.flatten_gradients

        def hits() -> bool:
            return now["index"] == index and (now["step"] == at_step or (at_step == -1 and now["step"] >= 2))

        def read_micro_batch(run, step, turn):
            now.update(step=step, index=run.read.indices[turn])
            return read(run, step, turn)

        def forward_loss(run, batch):
            loss, correct = loss_of(run, batch)
            return loss + float("nan") if what == "loss" and hits() else loss, correct  # its gradient stays finite

        def flatten_gradients(params, grads, extras, num_ranks):
            if what == "gradient" and hits():
                grads = [torch.full_like(grads[0], float("inf")), *grads[1:]]
            return flatten(params, grads, extras, num_ranks)

        step_module.read_micro_batch, step_module.forward_loss = read_micro_batch, forward_loss
        step_module.flatten_gradients = flatten_gradients

    return patch


def rows_of_step(folder: RunFolder, step: int) -> list:
    config = parse_config(TrainConfig(), ["--config", str(folder.config)])
    rows = prepare_rows(config, load_tokenizer("embedded")).train
    batches = MicroBatches(rows, pad_token_id=1, seed=config.seed, sequences=2, per_step=4)
    return [batches.row_ids(step, index) for index in range(4)]


def adapter(folder: RunFolder) -> bytes:
    return (folder.adapter / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("what", ["loss", pytest.param("gradient", marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_is_skipped_by_all_ranks(what, tmp_path):
    adapters = []
    for num_ranks, accumulation in ((2, "2"), (1, "4")):
        folder = RunFolder(tmp_path / f"on{num_ranks}")
        flags = (*FLAGS, "--max_steps", "5", "--gradient_accumulation_steps", accumulation)
        ended = fork_ranks(*flags, "--output_dir", str(folder.root), num_ranks=num_ranks, patch=not_finite(3, 2, what))
        assert [code for code, _, _ in ended] == [0] * num_ranks, ended[0]
        assert ended[0][2].count("warning: step 4: loss ") == 1
        lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
        steps = {m["train/global_step"]: m for m in lines if "train/skipped_steps" in m}
        assert [m["train/skipped_steps"] for m in steps.values()] == [0, 0, 0, 1, 1]
        assert ("train/loss" in steps[4], "train/grad_norm" in steps[4]) == (what == "gradient", what == "loss")
        (bad,) = [json.loads(line) for line in folder.bad_steps.read_text().splitlines()]
        assert bad["step"] == 4 and [batch["index"] for batch in bad["micro_batches"]] == [0, 1, 2, 3]
        assert [batch["loss_sum"] for batch in bad["micro_batches"]].count("nan") == (what == "loss")
        assert all(len(batch["rows"]) == 2 for batch in bad["micro_batches"])
        assert (bad["micro_batches"][2]["loss_sum"] == "nan") == (what == "loss")
        assert [batch["rows"] for batch in bad["micro_batches"]] == rows_of_step(folder, 3)
        adapters.append(adapter(folder))
    assert adapters[0] == adapters[1]


def test_too_many_bad_steps_in_a_row_end_the_run(folder):
    flags = ("--output_dir", str(folder.root), "--max_bad_steps", "2")
    ended = fork_ranks(*FLAGS, *flags, patch=not_finite(-1, 0, "loss"))
    assert [code for code, _, _ in ended] == [1, 1]
    (line,) = [line for line in ended[0][2].splitlines() if line.startswith("error: ")]
    assert line.startswith("error: step 4: loss nan, gradient norm ")
    assert ": nothing was updated, 2 steps in a row; their rows are in " in line
    assert "Traceback" not in ended[0][2] + ended[1][2]
    assert folder.newest_whole_checkpoint()[0] == folder.checkpoint(2)
    assert folder.read_state()["status"] == "failed"


def test_a_dead_adapter_is_an_error(folder):
    flags = ("--output_dir", str(folder.root), "--max_steps", "2", "--warmup_steps", "0", "--max_bad_steps", "5")
    ended = fork_ranks(
        *FLAGS, *flags, num_ranks=1, patch=lambda rank: [not_finite(step, 0, "loss")(rank) for step in (0, 1)]
    )
    assert ended[0][0] == 1
    assert "error: every lora_B of the adapter is zero" in ended[0][2]
    assert not folder.adapter.exists() and folder.read_state()["status"] == "failed"


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MB that a test can fill."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk]).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk: Path) -> Path:
    """Fill the free space. Call it again: saves that failed or were pruned make room."""
    filler = disk / "filler"
    with open(filler, "ab", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            return filler


@pytest.mark.slow
def test_a_disk_that_turns_read_only_costs_no_step(small_disk):
    """Only the folder of the checkpoints: a mount that holds a file open for writing cannot become read-only."""
    folder = RunFolder(small_disk / "run")
    flags = ("--output_dir", str(folder.root), "--max_steps", "80", "--max_failed_saves", "100")
    with forked_ranks(*FLAGS, *flags, num_ranks=2) as ranks:
        wait_for_step(folder, 4)
        subprocess.run(["mount", "--bind", folder.checkpoints, folder.checkpoints], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder.checkpoints], check=True)
        try:
            deadline = time.monotonic() + PATIENCE_S
            while "Read-only file system" not in ranks.texts(0)[1]:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            subprocess.run(["umount", folder.checkpoints], check=True)
        ended = ranks.wait(60)
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2][-2000:]
    assert folder.newest_whole_checkpoint()[0] == folder.checkpoint(80)


def test_a_full_disk_costs_no_step_and_no_checkpoint(small_disk):
    folder = RunFolder(small_disk / "run")
    flags = ("--output_dir", str(folder.root), "--max_steps", "40", "--max_failed_saves", "100")
    with forked_ranks(*FLAGS, *flags, num_ranks=2) as ranks:
        wait_for_step(folder, 4)
        deadline, warnings = (
            time.monotonic() + 30,
            ("could not save", "its lines are kept in memory until there is room"),
        )
        while not all(warning in ranks.texts(0)[1] for warning in warnings) and time.monotonic() < deadline:
            filler = fill(small_disk)
            time.sleep(0.02)
        kept, _ = folder.newest_whole_checkpoint()
        assert kept is not None
        filler.unlink()
        ended = ranks.wait(60)
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2][-2000:]
    assert "No space left on device" in ended[0][2] and all(warning in ended[0][2] for warning in warnings)
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [m["train/global_step"] for m in lines if "train/loss" in m] == list(range(1, 41))
    assert folder.newest_whole_checkpoint()[0] == folder.checkpoint(40)
    assert not list(folder.checkpoints.glob("*.partial"))


def test_too_many_failed_saves_end_the_run(small_disk):
    folder = RunFolder(small_disk / "run")
    with forked_ranks(*FLAGS, "--output_dir", str(folder.root), "--max_failed_saves", "2", num_ranks=2) as ranks:
        wait_for_step(folder, 4)
        deadline = time.monotonic() + PATIENCE_S
        while any(process.is_alive() for process in ranks.processes) and time.monotonic() < deadline:
            fill(small_disk)
            time.sleep(0.02)
        ended = ranks.wait(1)
    assert [code for code, _, _ in ended] == [1, 1]
    said = ended[0][2] + ended[1][2]
    assert said.count(f"error: the last 2 checkpoint(s) could not be written to {folder.checkpoints}; ") == 1
    assert "gone" not in said and folder.checkpoints.exists()
    assert "Traceback" not in said
    assert folder.newest_whole_checkpoint()[0] is not None


def test_a_second_run_on_the_folder_is_refused(folder):
    def impatient(rank: int) -> None:
        import lora_dist.run.folder as run_folder

        run_folder.LOCK_PATIENCE_S = 0.5

    with forked_ranks(*FLAGS, "--output_dir", str(folder.root), num_ranks=2) as first:
        wait_for_step(folder, 1)
        ended = fork_ranks(*FLAGS, "--output_dir", str(folder.root), num_ranks=2, patch=impatient)
        holder = f"process {first.processes[0].pid} on {socket.gethostname()}"
        assert all(process.is_alive() for process in first.processes)
    assert [code for code, _, _ in ended] == [2, 2]
    assert ended[0][2].splitlines()[-1] == (
        f"error: --output_dir {folder.root}: is in use by {holder}; give another folder"
    )
    assert not ended[1][2]


def listening(pid: int) -> list[str]:
    """Addresses, in hex, on which a process listens."""
    links = [path.readlink() for path in Path(f"/proc/{pid}/fd").iterdir()]
    inodes = {str(link)[len("socket:[") : -1] for link in links if str(link).startswith("socket:")}
    rows = [
        line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()
    ]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]


def test_what_is_open_and_what_is_written(folder):
    """No file holds a key, all files obey the user's umask, and no port is open to other machines."""
    secrets = {"HF_TOKEN": "hf_SentinelSentinelSentinel", "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567"}
    flags = ("--output_dir", str(folder.root), "--report_to", "wandb")
    env = secrets | {"WANDB_MODE": "offline", "GLOO_SOCKET_IFNAME": ""}
    with forked_ranks(
        *FLAGS, *flags, num_ranks=2, patch=lambda rank: (os.umask(0o027), env_of_a_user()), env=env
    ) as ranks:
        wait_for_step(folder, 3)
        ports = [listening(process.pid) for process in ranks.processes]
        os.kill(ranks.processes[1].pid, signal.SIGTERM)
        ended = ranks.wait(60)
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2]
    loopback = "0100007F"
    assert {address for addresses in ports for address in addresses} == {loopback}  # also torch's store, on rank 0
    files = [path for path in folder.root.rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        content = path.read_bytes()
        assert not [name for name, secret in secrets.items() if secret.encode() in content], path
        if "wandb" not in path.parts:
            assert path.stat().st_mode & 0o777 == 0o640, path


def env_of_a_user():
    os.environ.pop("GLOO_SOCKET_IFNAME")


@pytest.mark.slow
def test_torchrun_starts_a_run_again_that_lost_a_rank(folder):
    flags = (*FLAGS, "--max_steps", "16", "--output_dir", str(folder.root))
    command = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--max_restarts", "2", "recipes/opt_quotes.py", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for_step(folder, 5)
        os.kill(int((folder.root / ".lock").read_text().split()[1]), signal.SIGKILL)
        said, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 0, said[-3000:]
    assert "is gone; last completed step: " in said
    assert "continuing from " in said
    state = folder.read_state()
    assert (state["status"], state["step"], state["restarts"]) == ("completed", 16, 1)
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [m["train/global_step"] for m in lines if "train/loss" in m] == list(range(1, 17))


class Gone:
    """A tracker whose process has died."""

    def log(self, values, step):
        raise ConnectionResetError("Connection lost")

    def finish(self, why=None):
        raise ConnectionResetError("Connection lost")


def test_metrics_go_on_where_wandb_is_gone(folder, capsys):
    folder.root.mkdir()
    with MetricsLog(folder, "none", rank=0, start={}, hosts=["here"]) as metrics:
        metrics.wandb = metrics.trackers["tensorboard"] = Gone()
        for step in (1, 2):
            metrics.log({"train/loss": 2.5}, step)
    assert [json.loads(line)["train/global_step"] for line in folder.metrics.read_text().splitlines()] == [1, 2]
    gone = "failed (ConnectionResetError: Connection lost); the run continues, and metrics.jsonl has all metrics"
    assert capsys.readouterr().err == f"warning: wandb {gone}\nwarning: tensorboard {gone}\n"  # once


def late_reader(rank):
    """A patch: rank 1 reads the saved adapter a second later than rank 0, as a rank on another machine may."""

    verify = loop.verify_adapter

    def late(*args, **kwargs):
        if rank == 1:
            time.sleep(1)
        verify(*args, **kwargs)

    loop.verify_adapter = late


def test_the_adapter_gets_its_name_when_all_ranks_have_read_it(folder):
    ended = fork_ranks(
        *FLAGS, "--output_dir", str(folder.root), "--max_steps", "2", "--warmup_steps", "0", patch=late_reader
    )
    assert [code for code, _, _ in ended] == [0, 0], ended
