"""What `lora-dist status` prints for a run folder and a job."""

import dataclasses
import json
import time

import pytest
import yaml

from lora_dist.cluster import status
from lora_dist.cluster.status import comparison, read_status
from lora_dist.errors import UserError
from lora_dist.run.folder import STEP, RunFolder

RUNNING = {
    "JobState": "RUNNING", "NodeList": "node[1-2]", "RunTime": "01:02:03", "TimeLimit": "04:00:00", "Restarts": "2",
}  # fmt: skip
PENDING = {"JobState": "PENDING", "Reason": "Resources", "StartTime": "2026-11-25T04:00:00", "Restarts": "0"}


@pytest.fixture
def folder(tmp_path, config, monkeypatch):
    """A run at step 30 of 200, saved at 25. Its steps took 0.5 s each, except for one that took 9 s."""
    monkeypatch.setattr(status, "job_fields", lambda job_id: {})
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    folder.num_steps, folder.restarts = 200, 2
    folder.write_config(dataclasses.replace(config, output_dir=str(folder.root)))
    folder.write_state("running", 25)
    lines = [{"train/global_step": 0, "time": 0, "eval/loss": 2.7}]
    for step in range(1, 31):
        took = 9.0 if step == 29 else 0.5
        rate = {"perf/step_time_s": took, "perf/tokens_per_second": 1000.0}
        lines.append({"train/global_step": step, "time": time.time(), "train/loss": 3 - step / 100, **rate})
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"train/global_st')
    return folder


def test_a_running_run(folder):
    found = read_status(folder.root)
    assert (found.status, found.step, found.saved_step, found.num_steps, found.restarts) == ("running", 30, 25, 200, 2)
    assert found.step_time_s == 0.5 and found.time_left_s == 170 * 0.5
    assert found.text().splitlines() == [
        f"run: {folder.root}: running, step 30 of 200, 2 restarts",
        "saved: step 25",
        "rate: 0.50 s per step, 1000 tokens per second; 0:01:25 left",
        "loss: 2.7000 training, 2.7000 held-out",
    ]
    assert json.loads(json.dumps(found.as_dict()))["num_steps"] == 200


def test_a_run_that_fell_silent_is_doubted(folder):
    with open(folder.metrics, "w") as file:
        file.write(json.dumps({"train/global_step": 30, "time": time.time() - 200}) + "\n")
    assert "warning: nothing was logged for 0:03:20; the run may have ended" in read_status(folder.root).text()


@pytest.mark.parametrize(
    ("job", "line"),
    [
        (RUNNING, "job: 12 RUNNING on node[1-2], 01:02:03 of 04:00:00, 2 requeues"),
        (PENDING, "job: 12 PENDING (Resources), expected to start 2026-11-25T04:00:00"),
        ({}, "job: 12, which Slurm does not know here, or no longer knows"),
    ],
)
def test_its_job(folder, monkeypatch, job, line):
    monkeypatch.setattr(status, "job_fields", lambda job_id: job if job_id == "12" else None)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    folder.write_state("running", 25)
    assert line in read_status(folder.root).text().splitlines()


def test_failed_and_offline(folder):
    folder.record_failure("rank 3 (node2) is gone", rank_lost=True)
    (folder.root / "wandb/offline-run-1-abc").mkdir(parents=True)
    text = read_status(folder.root).text()
    assert "failed, step 30 of 200" in text and "error: rank 3 (node2) is gone" in text and "left" not in text
    assert f"wandb: upload with: wandb sync {folder.root}/wandb/offline-run-1-abc" in text
    assert folder.read_state()["rank_lost"] is True


@pytest.mark.parametrize("step_time_s", [1.5, 1e90])
def test_a_run_that_is_longer_than_it_says_has_no_time_left(folder, step_time_s):
    folder.num_steps = 1
    folder.write_state("running", 0)
    line = {STEP: 31, "time": time.time(), "perf/step_time_s": step_time_s, "perf/tokens_per_second": 1.0}
    folder.metrics.write_text(json.dumps(line) + "\n")
    assert " left" not in read_status(folder.root).text()


def test_a_job_that_did_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr(status, "job_fields", lambda job_id: PENDING)
    (tmp_path / "job").mkdir()
    (tmp_path / "job/submitted.json").write_text('{"job_id": "12", "log": "/logs/12-node0.log"}')
    assert read_status(tmp_path).text().splitlines() == [
        f"run: {tmp_path}: waiting, step 0, 0 restarts",
        "saved: step 0",
        "job: 12 PENDING (Resources), expected to start 2026-11-25T04:00:00",
        "log: /logs/12-node0.log",
    ]


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="holds no run: no state.json, no job/submitted.json"):
        read_status(tmp_path)


def test_several_runs_are_a_table_with_what_differs(folder, tmp_path):
    found = [read_status(folder.root)]
    for rate, loss in ((1e-3, 2.5), (1e-4, None)):
        settings = yaml.safe_load(folder.config.read_text()) | {"learning_rate": rate, "output_dir": str(rate)}
        found.append(dataclasses.replace(found[0], run=f"lr-{rate}", config=settings, eval_loss=loss))
    rows = [line.split() for line in comparison(found).splitlines()]
    assert rows == [
        ["run", "status", "step", "learning_rate", "loss", "held-out"],
        ["lr-0.001", "running", "30", "0.001", "2.7000", "2.5000"],
        [str(folder.root), "running", "30", "0.0002", "2.7000", "2.7000"],
        ["lr-0.0001", "running", "30", "0.0001", "2.7000"],
    ]
