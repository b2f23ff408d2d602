"""Runs without a W&B server: the content of W&B's files, read back with its own reader."""

import json
import os
import signal
from collections import Counter

import pytest

from lora_dist import signals
from lora_dist.run.folder import STEP, RunFolder
from tests.helpers.ranks import fork_ranks, forked_ranks, wait_for_step
from tests.helpers.wandb_files import FLAGS, OFFLINE, history, inspect

pytestmark = pytest.mark.wandb


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[RunFolder, str]:
    folder = RunFolder(tmp_path_factory.mktemp("whole") / "run")
    ended = fork_ranks(*FLAGS, "--output_dir", str(folder.root), num_ranks=2, env=OFFLINE)
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2]
    return folder, ended[0][1]


def test_one_run_of_both_ranks_with_every_step(whole):
    folder, said = whole
    (directory,) = folder.wandb_pending()
    assert f"wandb: offline; upload with: wandb sync {directory}\n" in said
    assert said.count("upload with") == 2  # at the start and at the end
    rows = history(folder)
    assert [row[STEP] for row in rows] == list(range(25))
    assert all(row["memory/rank1/peak_allocated_gib"] > 0 for row in rows[1:])
    assert [row[STEP] for row in rows if "eval/loss" in row] == [0, 10, 20, 24]
    assert [row[STEP] for row in rows if "eval/samples.nrows" in row] == [0, 10, 20, 24]
    assert rows[10]["eval/samples.nrows"] == 1
    lines = [line for line in folder.read_metrics() if "train/loss" in line]
    assert [row["train/loss"] for row in rows[1:]] == [line["train/loss"] for line in lines]
    exits = [record["exit"] for record in inspect(directory) if "exit" in record]
    assert len(exits) == 1 and not exits[0].get("exit_code")


def test_its_config_says_how_it_was_made(whole):
    folder, _ = whole
    (run,) = [record["run"] for record in inspect(folder.wandb_pending()[0]) if "run" in record][:1]
    text = json.dumps(run)
    for word in ("lora_r", "git_commit", "versions", "ddp", "num_ranks", "trainable_params", "device", "rows"):
        assert word in text, word


def test_killed_and_gone_on_with_every_step_is_there_once(whole, tmp_path):
    """Killed after step 13, saved at 10: W&B's first file has some of steps 11 to 13, and the second has the others."""
    folder = RunFolder(tmp_path / "run")
    flags = (*FLAGS, "--output_dir", str(folder.root))
    with forked_ranks(*flags, num_ranks=2, env=OFFLINE) as ranks:
        wait_for_step(folder, 13)
        for process in ranks.processes:
            os.kill(process.pid, signal.SIGKILL)
    ended = fork_ranks(*flags, num_ranks=2, env=OFFLINE)
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2]
    assert f"wandb sync {' '.join(map(str, folder.wandb_pending()))}\n" in ended[0][1]
    assert len(folder.wandb_pending()) == 2
    rows, undisturbed = history(folder), history(whole[0])
    assert Counter(row[STEP] for row in rows) == Counter(range(25))
    for ours, theirs in zip(rows, undisturbed, strict=True):
        same = ("train/loss", "eval/loss", "eval/samples.nrows", "train/tokens_seen")
        assert [ours.get(name) for name in same] == [theirs.get(name) for name in same]
    first, second = folder.read_lines(folder.starts)
    assert first["previous"] is None and (first["step"], second["step"]) == (0, 10)
    assert second["previous"] == {"status": "running", "error": None}
    assert folder.samples.read_text() == whole[0].samples.read_text()
    runs = [record["run"] for path in folder.wandb_pending() for record in inspect(path) if "run" in record]
    assert {run["run_id"] for run in runs} == {folder.read_state()["wandb_run_id"]}


@pytest.mark.slow
def test_stopped_and_gone_on_with_every_step_is_there_once(whole, tmp_path):
    """Stopped at the step of an evaluation: the next start evaluates, after W&B has closed the row of that step."""
    folder = RunFolder(tmp_path / "run")
    flags = (*FLAGS, "--output_dir", str(folder.root))

    def stop_at_10(rank: int) -> None:
        from lora_dist.training import step

        original = step.read_micro_batch

        def read_micro_batch(run, at, turn):
            if at == 9:
                signals.ask_to_stop()
            return original(run, at, turn)

        step.read_micro_batch = read_micro_batch

    ended = fork_ranks(*flags, num_ranks=2, env=OFFLINE, patch=stop_at_10)
    assert [code for code, _, _ in ended] == [0, 0] and folder.read_state()["status"] == "preempted"
    ended = fork_ranks(*flags, num_ranks=2, env=OFFLINE)
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2]
    rows = history(folder)
    assert Counter(row[STEP] for row in rows) == Counter(range(25))
    losses = [row["eval/loss"] for row in rows if "eval/loss" in row]
    assert losses == [row["eval/loss"] for row in history(whole[0]) if "eval/loss" in row]
