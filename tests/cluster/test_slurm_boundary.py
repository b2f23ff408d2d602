"""What the commands of Slurm print: read, or answered with one line. The commands are stubs that print anything."""

import json

import pytest

from lora_dist.cluster import slurm
from lora_dist.cluster.slurm import SlurmOptions, expected_start, job_fields
from lora_dist.cluster.status import RunStatus, read_status
from lora_dist.cluster.submission import open_job
from lora_dist.errors import UserError
from lora_dist.run.folder import RunFolder

OUTPUTS = [
    b"", b"\n\n", b"garbage", b"\xff\xfe", b"JobState", b"=", b"JobState=", b"JobState=RUNNING",
    b"JobId=12 JobState=PENDING", b"JobId=12 JobState=RUNNING Restarts=x NodeList",
    b"JobState=PENDING Reason=\x1b[31m StartTime", b"slurm_load_jobs error", b"=" * 1000, b"\0",
    b"JobState=COMPLETED WorkDir=/a JobState=RUNNING b=c", b"x" * 10**6, b"JobState=" + b"y" * 10**5,
]  # fmt: skip


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """stub(name, text, code): a command that prints this."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")

    def write(name: str, text: bytes, code: int = 0, stream: int = 1) -> None:
        (tmp_path / f"{name}.out").write_bytes(text)
        file = tmp_path / "bin" / name
        file.write_text(
            f'#!/bin/bash\nprintf "%s\\0" "$@" >{tmp_path}/{name}.argv\n'
            f"cat {tmp_path}/{name}.out >&{stream}\nexit {code}\n"
        )
        file.chmod(0o755)

    return write


@pytest.mark.parametrize("code", [0, 1])
@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: ascii(output[:30]))
def test_status_shows_a_job_whatever_scontrol_prints(tmp_path, stub, output, code):
    stub("scontrol", output, code)
    (tmp_path / "job").mkdir()
    (tmp_path / "job/submitted.json").write_text('{"job_id": "12", "log": "/logs/12-node0.log"}')
    found: RunStatus = read_status(tmp_path)
    (line,) = [line for line in found.text().splitlines() if line.startswith("job: ")]
    assert line.startswith("job: 12") and line.isprintable()
    json.dumps(found.as_dict())
    if output.startswith(b"JobState=COMPLETED") and not code:
        assert found.job["JobState"] == "COMPLETED"


@pytest.mark.parametrize("job_id", [None, "", "--help", "-d", {}, [1], 3.5, "1; touch MARK", "1\n2", "x" * 1000, True])
def test_slurm_is_not_asked_about_what_is_no_job_id(tmp_path, stub, job_id):
    stub("scontrol", b"JobState=RUNNING")
    assert job_fields(job_id) == {}
    assert not (tmp_path / "scontrol.argv").exists()
    (tmp_path / "job").mkdir()
    (tmp_path / "job/submitted.json").write_text(json.dumps({"job_id": job_id}))
    assert open_job(RunFolder(tmp_path)) is None


def test_a_submitted_json_of_others_is_one_line(tmp_path):
    (tmp_path / "job").mkdir()
    for text in ("", "[]", "{", "\x00"):
        (tmp_path / "job/submitted.json").write_text(text)
        with pytest.raises(UserError, match="^--output_dir .*: job/submitted.json: ") as error:
            open_job(RunFolder(tmp_path))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: ascii(output[:30]))
def test_what_sbatch_prints_is_a_job_id_or_one_line(tmp_path, stub, output):
    stub("sbatch", output)
    with pytest.raises(UserError, match="^sbatch: printed .*, which is no job id") as error:
        slurm.submit(tmp_path / "job.sbatch")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    stub("sbatch", output, 1, 2)
    with pytest.raises(UserError, match="^sbatch: ") as error:
        slurm.submit(tmp_path / "job.sbatch")
    assert expected_start("") and "\n" not in expected_start("")


@pytest.mark.parametrize(("output", "job_id"), [(b"12\n", "12"), (b"12;cluster\n", "12"), (b"note: a\n7;c", "7")])
def test_the_job_id_that_sbatch_prints(tmp_path, stub, output, job_id):
    stub("sbatch", output)
    assert slurm.submit(tmp_path / "a $(touch MARK).sbatch", "--dependency=afterok:3") == job_id
    argv = (tmp_path / "sbatch.argv").read_text().split("\0")[:-1]
    assert argv == ["--parsable", "--dependency=afterok:3", str(tmp_path / "a $(touch MARK).sbatch")]


def test_a_command_of_slurm_that_does_not_end_is_one_line(tmp_path, stub, monkeypatch):
    stub("sbatch", b"")
    (tmp_path / "bin/sbatch").write_text("#!/bin/bash\nexec sleep 20\n")
    monkeypatch.setattr(slurm, "PATIENCE_S", 0.2)
    with pytest.raises(UserError, match="^sbatch: .*timed out.*; scontrol ping tells"):
        slurm.submit(tmp_path / "job.sbatch")


HUGE = [10**9, 2**63, 10**30]


@pytest.mark.parametrize("name", ["nodes", "gpus_per_node", "ranks_per_node", "grace", "max_requeues"])
def test_counts_have_bounds(name):
    for value in [-1, *HUGE]:
        with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} {value}: must be "):
            SlurmOptions(**{"ranks_per_node": 2, name: value})


@pytest.mark.parametrize("command", ["", " ", "echo 'a", "if true", "echo )", 'x="', "a\0b", "\udcff", "a \\"])
def test_a_setup_that_is_no_command_is_refused(command):
    with pytest.raises(UserError, match="^--setup .*: must be a complete command of bash$") as error:
        SlurmOptions(ranks_per_node=2, setup=[command])
    assert str(error.value).isprintable()
    SlurmOptions(ranks_per_node=2, setup=["module load cuda; export A='b c'", "f() {\n  :\n}"])
