"""The real client with an emulated server: what the server gets if the run or the server fails."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lora_dist.run.folder import STEP, RunFolder
from tests.helpers.ranks import PATIENCE_S, fork_ranks, forked_ranks, wait_for_step
from tests.helpers.wandb_files import FLAGS, OFFLINE, history

pytestmark = pytest.mark.wandb
NO_EVAL = (*FLAGS, "--eval_fraction", "0", "--eval_steps", "0", "--num_eval_samples", "0")


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def impatient(rank: int) -> None:
    """A patch: W&B sends every second, and waits at most three seconds at the end."""
    from lora_dist.tracking import wandb_run

    wandb_run.SEND_EVERY_S, wandb_run.FINISH_S = 1, 3


def the_run(server):
    (run,) = server.runs.values()
    return run


def steps_of(run) -> list[int]:
    return [row[STEP] for row in run.history if STEP in row]


def killed_after_13(folder: RunFolder, *flags: str, env: dict) -> None:
    with forked_ranks(*flags, num_ranks=2, env=env, patch=impatient) as ranks:
        wait_for_step(folder, 13)
        for process in ranks.processes:
            os.kill(process.pid, signal.SIGKILL)


def test_a_run_arrives_whole(folder, fake_wandb):
    flags = (*FLAGS, "--wandb_log_adapter", "true", "--output_dir", str(folder.root))
    ended = fork_ranks(*flags, num_ranks=2, env=fake_wandb.env)
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2]
    run = the_run(fake_wandb)
    assert steps_of(run) == list(range(25)) and run.complete and run.exit_code == 0
    lines = {line[STEP]: line for line in folder.read_metrics() if "train/loss" in line}
    for row in run.history[1:]:
        logged = lines[row[STEP]]
        assert {name: row[name] for name in logged if name != "time"} == {
            k: v for k, v in logged.items() if k != "time"
        }
    assert [row[STEP] for row in run.history if "eval/samples" in row] == [0, 10, 20, 24]
    config = run.config
    assert config["config"]["lora_r"] == 16 and config["strategy"] == "ddp" and config["num_ranks"] == 2
    assert config["versions"]["torch"] and config["trainable_params"] == 49152 and len(config["rows"]) == 64
    assert run.display_name == "run"
    tables = [path for path in fake_wandb.files if path.endswith(".table.json")]
    assert tables and any(b"completion" in fake_wandb.files[path] for path in tables)
    assert ("model", f"adapter-{folder.read_state()['wandb_run_id']}") in fake_wandb.artifacts


@pytest.mark.slow
def test_killed_and_gone_on_with_is_one_run_with_every_step_once(folder, fake_wandb):
    flags = (*NO_EVAL, "--output_dir", str(folder.root))
    killed_after_13(folder, *flags, env=fake_wandb.env)
    ended = fork_ranks(*flags, num_ranks=3, strategy="fsdp", env=fake_wandb.env)
    assert [code for code, _, _ in ended] == [0, 0, 0], ended[0][2]
    run = the_run(fake_wandb)
    assert steps_of(run) == list(range(1, 25)) and run.complete and run.exit_code == 0
    losses = [line["train/loss"] for line in folder.read_metrics() if "train/loss" in line]
    assert [row["train/loss"] for row in run.history] == losses


@pytest.mark.slow
def test_begun_offline_and_gone_on_with_online_it_is_whole_there(folder, fake_wandb):
    flags = (*NO_EVAL, "--output_dir", str(folder.root))
    killed_after_13(folder, *flags, env=fake_wandb.env | OFFLINE)
    assert not fake_wandb.requests and folder.wandb_sync_command()
    ended = fork_ranks(*flags, num_ranks=2, env=fake_wandb.env)
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2]
    assert steps_of(the_run(fake_wandb)) == list(range(1, 25))
    assert folder.wandb_sync_command() is None  # otherwise the first steps would be sent twice


@pytest.mark.slow
def test_begun_online_and_gone_on_with_offline_no_step_is_sent_twice(folder, fake_wandb):
    """Steps that the killed process had not sent are missing; `lora-dist push` can add them."""
    flags = (*NO_EVAL, "--output_dir", str(folder.root))
    killed_after_13(folder, *flags, env=fake_wandb.env)
    ended = fork_ranks(*flags, num_ranks=2, env=fake_wandb.env | OFFLINE)
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2]
    there, here = steps_of(the_run(fake_wandb)), [row[STEP] for row in history(folder)]
    assert len(folder.wandb_directories()) == 2 and len(folder.wandb_pending()) == 1
    assert max(there, default=0) < min(here) <= 17 and here == list(range(min(here), 25))


def test_a_server_that_is_down_is_not_waited_for(folder, fake_wandb):
    env = fake_wandb.env | {"WANDB_BASE_URL": "http://127.0.0.1:9"}
    ended = fork_ranks(*NO_EVAL, "--output_dir", str(folder.root), num_ranks=2, env=env)
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2]
    assert "wandb: offline; upload with: wandb sync " in ended[0][1]
    assert _waited_s(folder) < 10


def _waited_s(folder: RunFolder) -> float:
    """Seconds from the start of the trackers to the end of the first step."""
    first = next(line for line in folder.read_metrics() if "train/loss" in line)
    return first["time"] - folder.read_lines(folder.starts)[0]["time"]


@pytest.mark.parametrize(
    "mode", [{}, pytest.param({"WANDB_MODE": "online"}, marks=pytest.mark.slow)], ids=["default", "insisted on"]
)
@pytest.mark.parametrize(
    "fault", [{"code": 500}, pytest.param({"hang_s": 30}, marks=pytest.mark.slow)], ids=["fails", "hangs"]
)
def test_a_server_that_fails_at_the_start_is_not_waited_for(folder, fake_wandb, fault, mode):
    fake_wandb.fault("graphql", **fault)
    ended = fork_ranks(*NO_EVAL, "--output_dir", str(folder.root), num_ranks=2, env=fake_wandb.env | mode)
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2]
    assert "wandb: offline; upload with: wandb sync " in ended[0][1]
    assert _waited_s(folder) < 20 and not fake_wandb.runs
    assert ("no answer from the server" in ended[0][1]) == bool(
        mode
    )  # by default the server is tested first, and not used


@pytest.mark.slow
def test_a_server_that_fails_under_way_costs_nothing_and_a_bounded_exit(folder, fake_wandb):
    fake_wandb.fault("file_stream", code=500)
    started = time.monotonic()
    flags = (*NO_EVAL, "--output_dir", str(folder.root))
    ended = fork_ranks(*flags, num_ranks=2, env=fake_wandb.env, patch=impatient)
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2]
    assert time.monotonic() - started < 30
    assert (
        f"the server did not take all data within 3 s: upload the run with: lora-dist push {folder.root}" in ended[0][1]
    )
    assert [line[STEP] for line in folder.read_metrics() if "train/loss" in line] == list(range(1, 25))


def in_a_script_without_handlers(rank: int) -> None:
    """A patch: no signal handlers. W&B's own stop function would then end rank 0 alone, by KeyboardInterrupt."""
    from lora_dist import entry

    entry.install_handlers = lambda: None
    impatient(rank)


@pytest.mark.slow
def test_the_stop_button_stops_both_ranks_after_a_step(folder, fake_wandb):
    flags = (*NO_EVAL, "--max_steps", "4000", "--output_dir", str(folder.root))
    with forked_ranks(
        *flags, num_ranks=2, strategy="fsdp", env=fake_wandb.env, patch=in_a_script_without_handlers
    ) as ranks:
        wait_for_step(folder, 5)
        fake_wandb.stop_runs()
        ended = ranks.wait(60)
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2]
    state = folder.read_state()
    assert state["status"] == "preempted" and 5 <= state["step"] < 4000
    assert folder.newest_whole_checkpoint()[0] == folder.checkpoint(state["step"])
    assert any("preempted" in title for title, _ in fake_wandb.alerts)


def test_a_loss_that_is_no_number_is_an_alert(folder, fake_wandb):
    def nan_at_step_3(rank: int) -> None:
        from lora_dist.training import step

        original, now = step.read_micro_batch, {}

        def read_micro_batch(run, at, turn):
            now["step"] = at
            return original(run, at, turn)

        loss_of = step.forward_loss

        def forward_loss(run, batch):
            loss, correct = loss_of(run, batch)
            return loss * (float("nan") if now["step"] == 3 else 1), correct

        step.read_micro_batch, step.forward_loss = read_micro_batch, forward_loss

    flags = (*NO_EVAL, "--max_steps", "6", "--output_dir", str(folder.root))
    ended = fork_ranks(*flags, num_ranks=2, env=fake_wandb.env, patch=nan_at_step_3)
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2]
    ((title, text),) = fake_wandb.alerts
    assert title == "run: loss or gradient is not finite" and text.startswith("step 4: loss nan")


@pytest.mark.slow
def test_a_stalled_step_is_an_alert_and_a_failed_run(folder, fake_wandb):
    def stalls(rank: int) -> None:
        from lora_dist.training import step

        original = step.read_micro_batch

        def read_micro_batch(run, at, turn):
            if (rank, at) == (1, 3):
                time.sleep(600)
            return original(run, at, turn)

        step.read_micro_batch = read_micro_batch

    flags = (*NO_EVAL, "--step_timeout_s", "5", "--output_dir", str(folder.root))
    started = time.monotonic()
    ended = fork_ranks(*flags, num_ranks=2, strategy="fsdp", env=fake_wandb.env, patch=stalls)
    assert time.monotonic() - started < 60 and [code for code, _, _ in ended] == [1, 1]
    ((title, text),) = fake_wandb.alerts
    # On a busy machine rank 1 may end before rank 0's watchdog has read the verdict; then it is the second text.
    assert title == "run: failed" and text.startswith(("step 4 stalled: no progress for 5 s", "RuntimeError: "))
    run = the_run(fake_wandb)
    assert run.exit_code == 1 and steps_of(run) == [1, 2, 3]


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_offline_sends_nothing(folder, fake_wandb, mode):
    flags = (*NO_EVAL, "--max_steps", "4", "--output_dir", str(folder.root))
    ended = fork_ranks(*flags, num_ranks=2, env=fake_wandb.env | {"WANDB_MODE": mode})
    assert [(code, err) for code, _, err in ended] == [(0, ""), (0, "")]
    assert not fake_wandb.requests and len(folder.wandb_directories()) == (mode == "offline")


def test_a_client_that_cannot_start_costs_the_mirror_and_not_the_run(folder):
    def without(rank: int) -> None:
        from lora_dist.tracking import wandb_run

        def fails(*args, **kwargs):
            raise OSError("no such service")

        wandb_run.wandb.init = fails

    ended = fork_ranks(*NO_EVAL, "--max_steps", "4", "--output_dir", str(folder.root), num_ranks=2, patch=without)
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2]
    assert ended[0][2] == (
        "warning: wandb failed (OSError: no such service); the run continues, and metrics.jsonl has all metrics\n"
    )
    assert len([line for line in folder.read_metrics() if "train/loss" in line]) == 4


@pytest.mark.slow
def test_push_replays_a_run_into_one_that_is_whole(folder, fake_wandb):
    ended = fork_ranks(*FLAGS, "--report_to", "none", "--output_dir", str(folder.root), num_ranks=2)
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2]
    env = os.environ | fake_wandb.env
    command = [sys.executable, "-m", "lora_dist.cli", "push", str(folder.root), "--project", "p"]
    pushed = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert pushed.returncode == 0, pushed.stderr
    ((name, run),) = fake_wandb.runs.items()
    assert name.split("/")[1] == "p" and pushed.stdout.strip().endswith(name.split("/")[2])
    assert steps_of(run) == list(range(25)) and run.complete and run.exit_code == 0
    evals = [row["eval/loss"] for row in run.history if "eval/loss" in row]
    assert evals == [line["eval/loss"] for line in folder.read_metrics() if "eval/loss" in line]
    assert run.config["num_ranks"] == 2
    nobody = subprocess.run(command, env=env | {"WANDB_BASE_URL": "http://127.0.0.1:9"}, capture_output=True, text=True)
    assert nobody.returncode == 2 and len(nobody.stderr.splitlines()) == 1
    assert nobody.stderr.startswith("error: WANDB_BASE_URL http://127.0.0.1:9: no key, or no answer")
    assert json.dumps(nobody.stdout) == '""'
