"""Trackers other than Weights & Biases, which accelerate provides, read back with their own readers."""

import json
import subprocess
import sys

import pytest
from accelerate import PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lora_dist.config import TrainConfig
from lora_dist.errors import UserError
from lora_dist.run.folder import RunFolder
from lora_dist.tracking.metrics import MetricsLog


@pytest.fixture
def folder(config, tmp_path):
    PartialState(cpu=True)
    folder = RunFolder(tmp_path / "a")
    folder.root.mkdir()
    folder.write_config(config)
    folder.write_state("running", 0)
    yield folder
    PartialState._reset_state()  # otherwise ranks forked from this process would inherit it


def log_steps(folder: RunFolder, report_to: str, steps: range, rank: int = 0) -> None:
    with MetricsLog(folder, report_to, rank=rank, start={}, hosts=["here"]) as metrics:
        for step in steps:
            metrics.log({"train/loss": 3 - step / 10, "perf/slowest_rank": "rank 1 (here)"}, step)


def tensorboard_steps(folder: RunFolder) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder.root / "tensorboard"))
    events.Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars("train/loss")]


def test_tensorboard_holds_every_step_once_also_after_a_kill(folder):
    log_steps(folder, "tensorboard", range(1, 8))
    folder.resume_from = folder.checkpoint(5)
    folder.trim_metrics(5)
    log_steps(folder, "tensorboard", range(6, 10))
    assert tensorboard_steps(folder) == [(step, 3 - step / 10) for step in range(1, 10)]
    assert [line["train/global_step"] for line in folder.read_metrics()] == list(range(1, 10))


def test_trackio_holds_every_step(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    log_steps(folder, "tensorboard,trackio", range(1, 4))
    assert "token" not in capsys.readouterr().out
    command = [sys.executable, "-m", "trackio.cli", "get", "metric", "--project", "lora-dist", "--run", "a"]
    shown = subprocess.run([*command, "--metric", "train/loss", "--json"], capture_output=True, text=True)
    rows = json.loads(shown.stdout)
    assert [(row["step"], row["value"]) for row in rows["values"]] == [
        (s, pytest.approx(3 - s / 10)) for s in (1, 2, 3)
    ]
    assert len(tensorboard_steps(folder)) == 3


def test_only_rank_0_writes(folder):
    log_steps(folder, "tensorboard", range(1, 4), rank=1)
    assert not folder.metrics.exists() and not folder.starts.exists() and not (folder.root / "tensorboard").exists()


@pytest.mark.parametrize(
    ("report_to", "rule"),
    [
        ("tensorbord", "no tracker 'tensorbord'; did you mean tensorboard?"),
        ("wandb,none", "no tracker 'none'; give none, or some of wandb,aim,clearml"),
        ("wandb,wandb", "names a tracker twice"),
        ("mlflow", "needs a package: pip install mlflow"),
    ],
)
def test_trackers_that_cannot_be_used_are_refused(report_to, rule):
    with pytest.raises(UserError) as error:
        TrainConfig(report_to=report_to)
    assert str(error.value).startswith(f"--report_to {report_to}: {rule}")
