"""The text of the sbatch files, and their bash with a stub of srun: which outcomes are requeued."""

import dataclasses
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from lora_dist.cli import main
from lora_dist.cluster.shell import Bash
from lora_dist.cluster.slurm import Job, SlurmOptions, render, render_prepare, seconds
from lora_dist.errors import UserError
from tests.helpers.ranks import ROOT

HERE = Path(__file__).parent


def job(**asked) -> Job:
    return Job(
        name="a", options=SlurmOptions(**asked), run="/runs/a", recipe=(Bash('"$run/job/code/recipes/opt_quotes.py"'),),
        logs="/runs/a/logs/%j-node%n.log", python="/env/bin/python", about="lora-dist submit recipes/opt_quotes.py",
        lines=(Bash('. "$run/job/accelerate.env"'),),
    )  # fmt: skip


GOLDEN = {
    "one_node": job(gpus_per_node=8, time="4:00:00"),
    "64_nodes": job(
        nodes=64, gpus_per_node=8, time="1-00:00:00", partition="large", account="team", qos="high", constraint="h100",
        mem="0", network_interface="ib0", setup=["module load cuda/12"], sbatch=["exclusive=user", "switches=1"],
    ),
    "accelerate_in_a_container": job(
        nodes=2, gpus_per_node=8, launcher="accelerate", container_image="/images/lora-dist.sqsh",
        container_mounts="/data:/data", preflight="false", max_requeues=20, grace=300,
    ),
}  # fmt: skip


def golden(name: str, text: str) -> str:
    """The text of the golden file. LORA_DIST_WRITE_GOLDEN=1 pytest ... writes it anew; then review the changes."""
    file = HERE / f"golden/{name}.sbatch"
    if os.environ.get("LORA_DIST_WRITE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return file.read_text()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    text = render(GOLDEN[name])
    assert text == golden(name, text)
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_golden_of_the_job_that_prepares():
    text = render_prepare(GOLDEN["64_nodes"])
    assert text == golden("prepare", text)


def test_a_flag_of_two_lines_is_no_bash():
    two_lines = dataclasses.replace(GOLDEN["one_node"], about="lora-dist submit --sample_prompt 'a\nrm -r b'")
    for text in (render(two_lines), render_prepare(two_lines)):
        assert text.splitlines()[1] == "# lora-dist submit --sample_prompt 'a rm -r b'"


def test_ready_scripts_are_what_is_rendered():
    spec = importlib.util.spec_from_file_location("write", ROOT / "launch/slurm/write.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    files = {path.stem: path.read_text() for path in (ROOT / "launch/slurm").glob("*.sbatch")}
    assert files == {name: render(script) for name, script in module.SCRIPTS.items()}, "python launch/slurm/write.py"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 5400), ("90:30", 5430), ("4:00:00", 14400), ("1-12", 129600), ("1-2:30", 95400), ("2-0:0:1", 172801)],
)
def test_time_limits_in_all_forms_of_sbatch(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "--ranks-per-node 0: must be 1 or more; or give --gpus-per-node"),
        ({"gpus_per_node": 8, "nodes": 0}, "--nodes 0: must be 1 or more"),
        ({"gpus_per_node": -1}, "--gpus-per-node -1: must be 0 or more"),
        ({"gpus_per_node": 8, "time": "4h"}, "--time 4h: must be MINUTES, "),
        ({"gpus_per_node": 8, "time": "3"}, "--time 3: must be at least twice --grace 120 s"),
        ({"gpus_per_node": 8, "mem": "500 GB"}, "--mem 500 GB: must be a number and K, M, G or T"),
        ({"gpus_per_node": 8, "partition": "a b"}, "--partition 'a b': must be one word"),
        ({"gpus_per_node": 8, "launcher": "mpirun"}, "--launcher mpirun: must be srun or accelerate"),
        ({"gpus_per_node": 8, "sbatch": ["reservation"]}, "--sbatch reservation: must be KEY=VALUE"),
        ({"gpus_per_node": 8, "sbatch": ["output=x"]}, "--sbatch output=x: is set by submit"),
        ({"gpus_per_node": 8, "sbatch": ["time=10"]}, "--sbatch time=10: is set by submit; use --time"),
    ],
)  # fmt: skip
def test_options_are_checked_before_submission(asked, message):
    with pytest.raises(UserError) as error:
        SlurmOptions(**asked)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--gpu-per-node 8 recipes/opt_quotes.py", "--gpu-per-node: no such option; did you mean --gpus-per-node?"),
        ("--zzz 8 recipes/opt_quotes.py", "no such option; the options before the recipe are --config_file --nodes"),
        ("--gpus-per-node 8", "recipe: none is given"),
        ("--gpus-per-node 8 recipes/opt_quote.py", "recipe recipes/opt_quote.py: no such file"),
        ("--gpus-per-node 8 lora_dist/config.py", "lora_dist/config.py: has no CONFIG, GPU, EMBEDDED, main"),
        ("--gpus-per-node 8 recipes/opt_quotes.py --lora_rr 8", "--lora_rr: no such flag; did you mean --lora_r?"),
        ("--gpus-per-node 8 --config_file no.yaml recipes/opt_quotes.py", "--config_file no.yaml: no such file"),
        ("--gpus-per-node 8 recipes/opt_quotes.py --output_dir a%b", "must be printable characters, without % and"),
    ],
)
def test_what_submit_refuses_is_one_line(monkeypatch, capfd, words, expected):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(os, "_exit", _raise_exit)
    with pytest.raises(SystemExit) as exit:
        main(["submit", "--dry-run", *words.split()])
    captured = capfd.readouterr()
    assert (exit.value.code, captured.out) == (2, "")
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert expected in captured.err


def _raise_exit(code):
    raise SystemExit(code)


# The lower half of the file runs with stubs of srun and scontrol, which produce the outcome that a test asks for.
STUBS = {
    "srun": 'trap : USR1; [[ "$*" = *doctor* ]] && what=doctor || what=recipe; echo $what >>"$FOLDER/calls"; '
    '[ -z "$STATE" ] || echo "$STATE" >"$FOLDER/run/state.json"; '
    '[ -z "$SIGNAL" ] || { kill -USR1 $PPID; sleep 0.3; }; exit "$CODE"',
    "scontrol": 'if [ "$1" = show ]; then [ "$3" = none ] && exit 1; [ "$3" = empty ] || echo node1; else '
    'echo "$@" >>"$FOLDER/requeued"; exit "$SCONTROL"; fi',
    "sleep": 'exec /bin/sleep 0.1',
}  # fmt: skip


def run_body(folder: Path, *, code: int, status: str | None = "running", rank_lost: bool = False, signal: bool = False,
             starts: str | None = None, restarts: int = 0, scontrol: int = 0, step: int | str = 7,
             preflight: str = "false", slurm: dict | None = None):  # fmt: skip
    """(exit code of the job, whether it was requeued, what it said)."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "run").mkdir(exist_ok=True)
    for name, text in STUBS.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    state = status and f'{{\n  "status": "{status}",\n  "step": {step},\n  "rank_lost": {str(rank_lost).lower()}\n}}'
    if restarts:
        (folder / "run/state.json").write_text(state or "")
        (folder / "run/.starts").write_text(f"{starts}\n")
    script = dataclasses.replace(job(ranks_per_node=2, preflight=preflight), run=str(folder / "run"), lines=())
    env = {
        "PATH": f"{folder}/bin:{os.environ['PATH']}", "FOLDER": str(folder), "STATE": state or "", "CODE": str(code),
        "SIGNAL": "1" if signal else "", "SCONTROL": str(scontrol), "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node1",
    } | (slurm or {})  # fmt: skip
    if restarts:
        env["SLURM_RESTART_COUNT"] = str(restarts)
    done = subprocess.run(
        ["bash"], input=render(script), env=env, cwd=folder, capture_output=True, text=True, timeout=20
    )
    assert not (folder / "MARK").exists()
    requeued = (folder / "requeued").exists() and (folder / "requeued").read_text() == "requeue 12\n"
    return done.returncode, requeued, done.stdout


@pytest.mark.parametrize(
    ("outcome", "requeued"),
    [
        (dict(code=0, status="completed"), False),
        (dict(code=0, status="preempted", signal=True), True),
        (dict(code=0, status="completed", signal=True), False),  # the signal came in the last step
        (dict(code=0, status="preempted"), False),  # somebody told the run itself to stop
        (dict(code=2, status=None), False),  # bad input
        (dict(code=2, status="failed", rank_lost=True), False),
        (dict(code=1, status="failed"), False),  # not finite, or an error in the code: it would fail again
        (dict(code=1, status="failed", signal=True), False),
        (dict(code=1, status="failed", rank_lost=True), True),
        (dict(code=137, status="running"), True),  # killed before anyone could say so
        (dict(code=137, status=None), False),  # before there was a run
        (dict(code=1, status="running"), False),
        (dict(code=138, status="running", signal=True), True),
    ],
)  # fmt: skip
def test_what_is_requeued(tmp_path, outcome, requeued):
    code, was_requeued, said = run_body(tmp_path, **outcome)
    assert was_requeued == requeued, said
    assert code == (1 if requeued else outcome["code"]), said  # requeued, Slurm would have ended it


def test_a_job_that_gets_nowhere_is_not_requeued_for_ever(tmp_path):
    code, requeued, said = run_body(tmp_path, code=0, restarts=9, starts="7 5", step=7)
    assert (code, requeued) == (1, False)
    assert "error: 6 requeues in a row found no newer checkpoint than step 7" in said
    assert not (tmp_path / "calls").exists()  # nothing was started


def test_any_number_of_requeues_while_it_gets_on(tmp_path):
    code, _, said = run_body(tmp_path, code=0, status="completed", restarts=900, starts="6 5", step=7)
    assert (code, (tmp_path / "run/.starts").read_text()) == (0, "7 0\n"), said


def test_where_slurm_refuses_the_requeue_it_says_what_to_do(tmp_path):
    code, _, said = run_body(tmp_path, code=0, status="preempted", signal=True, scontrol=1)
    assert code == 1 and "cannot be requeued; give this file to sbatch again: the run continues from there" in said


def test_a_failed_preflight_trains_nothing(tmp_path):
    code, requeued, said = run_body(tmp_path, code=1, status=None, preflight="true")
    assert (code, requeued) == (1, False) and "the preflight failed (1): nothing was trained" in said
    assert (tmp_path / "calls").read_text() == "doctor\n"


NO_COUNTS = ("x", "-1", "1.5", "08", "9" * 30, "a[$(touch MARK)]", "1 2", "1;touch MARK")


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_NNODES"])
@pytest.mark.parametrize("value", NO_COUNTS)
def test_boundary_what_slurm_says_must_be_a_number(tmp_path, name, value):
    code, requeued, said = run_body(tmp_path, code=0, slurm={name: value})
    assert (code, requeued) == (2, False)
    assert (
        f"error: {name} '{value}': must be a whole number; give this file to sbatch" in said and said.count("\n") == 1
    )
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize("slurm", [{"SLURM_JOB_ID": ""}, {"SLURM_JOB_NODELIST": ""}, {"SLURM_JOB_NODELIST": "empty"}])
def test_boundary_without_a_job_of_slurm_nothing_is_started(tmp_path, slurm):
    code, _, said = run_body(tmp_path, code=0, slurm=slurm)
    assert code == 2 and "error: SLURM_JOB_ID" in said and said.count("\n") == 1
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize("step", NO_COUNTS)
def test_safety_no_text_in_a_run_folder_is_run(tmp_path, step):
    """bash runs a command that is in the index of an array, in the text of a number that it computes with."""
    code, _, said = run_body(tmp_path, code=0, status="completed", restarts=1, starts=f"{step} {step}", step=step)
    assert code == 0 and "start 2 on node1" in said and "at step 0" in said
    assert (tmp_path / "run/.starts").read_text() in ("0 0\n", "0 1\n")


def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck here")
    # info only, left out: words in single quotes are the ranks' shell's; functions that traps call; A && B || C
    command = ["shellcheck", "--shell=bash", "--exclude=SC2016,SC2317,SC2015,SC2034,SC1091,SC2154", "-"]
    for name, script in GOLDEN.items():
        done = subprocess.run(command, input=render(script), capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stdout}"
