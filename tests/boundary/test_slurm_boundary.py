"""Whatever Slurm's commands print is shown, or refused in one line."""

import json
import subprocess

from hypothesis import strategies as st

from lora_dist.cluster import slurm
from lora_dist.cluster.status import read_status
from lora_dist.run.folder import RunFolder
from tests.helpers.properties import answered, counts, holds, words

fields = st.sampled_from(["JobState", "Reason", "StartTime", "NodeList", "RunTime", "TimeLimit", "Restarts", "JobId"])
printed = st.one_of(
    st.lists(st.tuples(fields | words, st.sampled_from(["RUNNING", "PENDING", "12"]) | words), max_size=8).map(
        lambda pairs: " ".join(f"{name}={value}" for name, value in pairs)
    ),
    st.text(max_size=200),
)


@counts
def test_any_answer_of_slurm(count, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.job.mkdir()
    submitted = folder.job / "submitted.json"
    submitted.write_text(json.dumps({"job_id": "12", "log": "/logs/12.log"}))
    monkeypatch.setattr(slurm.shutil, "which", lambda name: f"/usr/bin/{name}")

    def check(answer):
        code, out, err = answer
        monkeypatch.setattr(slurm, "_ask", lambda *command, **_: subprocess.CompletedProcess(command, code, out, err))
        with answered(tmp_path):
            status = read_status(tmp_path)
            (line,) = [line for line in status.text().splitlines() if line.startswith("job: ")]
            assert line.isprintable()
            json.dumps(status.as_dict())
        with answered(tmp_path):
            assert slurm.submit(tmp_path / "job.sbatch").isdigit()
        with answered(tmp_path):
            assert slurm.expected_start("").isprintable()

    holds(count, st.tuples(st.integers(0, 1), printed, printed), check)
