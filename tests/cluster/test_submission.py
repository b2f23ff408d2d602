"""What `lora-dist submit` writes into the job folder: copies, and the variables that accelerate would set."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lora_dist import cli, environment
from lora_dist.cluster import slurm, submission
from lora_dist.cluster.recipe import LAUNCHER_PREFIXES
from lora_dist.cluster.slurm import SlurmOptions
from lora_dist.cluster.submission import job_files, job_of, prepare, read_submission, submit, write_job
from lora_dist.errors import UserError
from tests.helpers.ranks import BIN, ROOT

TWO_RANKS = SlurmOptions(ranks_per_node=2)


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.chdir(ROOT)


def read(
    tmp_path, *flags, config_file="accelerate_configs/fsdp.yaml", options=TWO_RANKS, recipe="recipes/opt_quotes.py"
):
    return read_submission(recipe, [*flags, "--output_dir", str(tmp_path / "run")], config_file, options)


OTHERS = ("single", "ddp", "fsdp_offload", "hsdp", "zero3", "pipeline")


@pytest.mark.parametrize("name", ["fsdp", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_the_environment_is_what_accelerate_launch_makes(tmp_path, name):
    num_ranks = 1 if name == "single" else 2
    flags = ["--deepspeed_multinode_launcher", "standard"] if name == "zero3" else []
    script = tmp_path / "environment.py"
    write = f"import json, os; open(f'{tmp_path}/{{os.getpid()}}.json', 'w').write(json.dumps(dict(os.environ)))"
    script.write_text(write)  # written to files, because printed lines of several ranks may mix
    config_file = f"accelerate_configs/{name}.yaml"
    command = [f"{BIN}/accelerate", "launch", "--config_file", config_file, "--num_processes", str(num_ranks), *flags]
    subprocess.run([*command, str(script)], capture_output=True, check=True)
    launched = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(launched) == num_ranks
    expected = {key: value for key, value in launched[0].items() if key.startswith(LAUNCHER_PREFIXES)}
    assert "ACCELERATE_MIXED_PRECISION" in expected
    found = read(tmp_path, config_file=config_file, options=SlurmOptions(ranks_per_node=num_ranks)).env()
    assert found == expected


def test_a_pipeline_is_as_long_as_there_are_ranks(tmp_path):
    options = SlurmOptions(nodes=2, gpus_per_node=8)
    env = read(tmp_path, config_file="accelerate_configs/pipeline.yaml", options=options).env()
    assert (env["ACCELERATE_USE_MEGATRON_LM"], env["MEGATRON_LM_PP_DEGREE"]) == ("true", "16")


def test_the_job_holds_copies_of_all_that_the_checkout_could_change(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_Sentinel")
    monkeypatch.setenv("WANDB_API_KEY", "wandb_Sentinel")
    recipe, template = tmp_path / "mine.py", tmp_path / "chat.jinja"
    recipe.write_text((ROOT / "recipes/opt_quotes.py").read_text())
    (tmp_path / "helper.py").write_text("# beside it\n")
    template.write_text("{{ messages }}")
    submission = read(
        tmp_path, "--lora_r", "4", "--chat_template", str(template), recipe=str(recipe),
        config_file="accelerate_configs/zero3.yaml",
    )  # fmt: skip
    script = write_job(submission, "lora-dist submit", offline=True)
    job = tmp_path / "run/job"
    assert script == job / "job.sbatch" and not (tmp_path / "run/job.partial").exists()
    assert (job / "code/recipes/mine.py").read_text() == recipe.read_text()
    assert (job / "code/recipes/helper.py").read_text() == "# beside it\n"
    assert (job / "code/git_commit").read_text() == (environment.git_commit() or "")
    here = {p.relative_to(ROOT) for p in (ROOT / "lora_dist").rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert {p.relative_to(job / "code") for p in (job / "code/lora_dist").rglob("*") if p.is_file()} == here

    settings = yaml.safe_load((job / "config.yaml").read_text())
    assert (settings["lora_r"], settings["output_dir"]) == (4, str(tmp_path / "run"))
    assert settings["model_name_or_path"] == "embedded"  # no GPU was asked for
    assert settings["chat_template"] == str(job / "chat_template.jinja")
    assert (job / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (job / "deepspeed.json").read_text() == (ROOT / "launch/deepspeed/zero3.json").read_text()
    assert f"deepspeed_config_file: {job}/deepspeed.json" in (job / "accelerate.yaml").read_text()
    sourced = subprocess.run(
        ["bash", "-c", f". {job}/accelerate.env; echo $ACCELERATE_USE_DEEPSPEED $ACCELERATE_DEEPSPEED_CONFIG_FILE"],
        capture_output=True, text=True, env={},
    )  # fmt: skip
    assert sourced.stdout == f"true {job}/deepspeed.json\n"

    everything = b"".join(p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file())
    assert b"_Sentinel" not in everything


def test_with_gpus_it_is_the_recipes_base_and_data_of_a_gpu(tmp_path):
    config = read(tmp_path, "--lora_r", "4", options=SlurmOptions(gpus_per_node=8)).config
    assert (config.model_name_or_path, config.dataset_name) == ("facebook/opt-6.7b", "Abirate/english_quotes")
    named = read(tmp_path, "--model_name_or_path", "embedded", options=SlurmOptions(gpus_per_node=8)).config
    assert (named.model_name_or_path, named.dataset_name) == ("embedded", "Abirate/english_quotes")


@pytest.mark.parametrize(
    ("flags", "offline", "expected"),
    [([], True, True), ([], False, False), (["--push_to_hub", "true", "--hub_model_id", "team/a"], True, False)],
)
def test_ranks_ask_the_hub_only_where_they_must(tmp_path, flags, offline, expected):
    lines = job_of(read(tmp_path, *flags), "lora-dist submit", offline=offline).lines
    assert any("HF_HUB_OFFLINE" in line.text for line in lines) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (SlurmOptions(gpus_per_node=1), "single"),
        (SlurmOptions(gpus_per_node=8), "fsdp"),
        (SlurmOptions(nodes=2, gpus_per_node=1), "fsdp"),
        (SlurmOptions(nodes=2, gpus_per_node=8), "hsdp"),
    ],
)
def test_the_config_by_default(tmp_path, options, expected):
    found = read(tmp_path, config_file=None, options=options).config_file
    assert found == ROOT / f"accelerate_configs/{expected}.yaml"


def test_a_config_that_accelerate_cannot_read_is_one_line(tmp_path):
    (tmp_path / "odd.yaml").write_text("distributed_type: FSDP\nno_such_key: 1\n")
    with pytest.raises(UserError, match=r"^--config_file .*odd.yaml: ") as error:
        read(tmp_path, config_file=str(tmp_path / "odd.yaml")).env()
    assert "\n" not in str(error.value) and "no_such_key" in str(error.value)


def test_a_recipe_that_cannot_be_loaded_is_one_line(tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    with pytest.raises(UserError, match=r"broken.py: No module named 'no_such_module' \(ModuleNotFoundError\)"):
        read(tmp_path, recipe=str(tmp_path / "broken.py"))


def test_prepare_downloads_tokenizes_checks_and_leaves(tmp_path):
    words = "--nodes 2 --ranks-per-node 2 recipes/sft.py --max_steps 4 --warmup_steps 0 --output_dir".split()
    command = [sys.executable, "-m", "lora_dist.cli", "prepare", *words, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("prepared: embedded (4.24 MiB), embedded\n")
    assert not (tmp_path / "run").exists()


GARBAGE = {
    "not UTF-8": b"\xff\xfe\x00",
    "nothing": b"",
    "a list": b"- 1\n",
    "a text": b"hello",
    "deep": b"a: " + b"[" * 100_000,
    "an alias": b"a: &x 1\nb: *x\n",
    "a key twice": b"distributed_type: FSDP\ndistributed_type: NO\n",
    "a type that is a list": b"distributed_type: [FSDP]\n",
    "no such type": b"distributed_type: HSDP\n",
    "processes as text": b"distributed_type: FSDP\nnum_processes: two\n",
    "no processes": b"distributed_type: FSDP\nnum_processes: 0\n",
    "very many machines": b"distributed_type: FSDP\nnum_machines: 99999999999999999999\n",
    "fsdp as a list": b"distributed_type: FSDP\nfsdp_config: [1]\n",
    "deepspeed as true": b"distributed_type: DEEPSPEED\ndeepspeed_config: true\n",
    "megatron as text": b"distributed_type: MEGATRON_LM\nmegatron_lm_config: x\n",
    "a control character": b'distributed_type: FSDP\nfsdp_config: {fsdp_version: "2\\0"}\n',
    "an unknown key": b"distributed_type: FSDP\nno_such_key: 1\n",
    "precision": b"distributed_type: FSDP\nmixed_precision: [bf16]\ndynamo_backend: 3\n",
    "no such deepspeed file": b"distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: /no/such}\n",
    "a device": b"distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: /dev/zero}\n",
}


@pytest.mark.parametrize("what", GARBAGE)
def test_boundary_a_config_of_accelerate_that_is_garbage_is_one_line_and_nothing_is_begun(tmp_path, what):
    file = tmp_path / "odd.yaml"
    file.write_bytes(GARBAGE[what])
    with pytest.raises(UserError, match="^--config_file ") as error:
        write_job(read(tmp_path, config_file=str(file)), "lora-dist submit", offline=True)
    assert str(error.value).isprintable() and len(str(error.value)) < 700
    assert not (tmp_path / "run").exists()


def test_boundary_a_file_that_a_setting_names_is_read_before_anything_is_written(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for flag in ("--chat_template", "--deepspeed"):
        submission = read(tmp_path, flag, str(tmp_path / "fifo"))
        with pytest.raises(UserError, match=f"^{flag} .*: this is not a regular file"):
            write_job(submission, "lora-dist submit", offline=True)
    assert not (tmp_path / "run").exists()


CONFIG = "import lora_dist\nCONFIG = lora_dist.TrainConfig()\n"


@pytest.mark.parametrize(
    "text",
    ["raise SystemExit(3)", "CONFIG = 3", "(", "\0", f"{CONFIG}GPU = EMBEDDED = {{}}\ndef main(): 0",
     f"{CONFIG}GPU = EMBEDDED = dict(model_name_or_path=1, dataset_name=1, x=1)\ndef main(): 0",
     "def f(): f()\nf()", "raise Exception('two\\nlines')"],
)  # fmt: skip
def test_boundary_a_recipe_that_is_none_is_one_line(tmp_path, text):
    (tmp_path / "broken.py").write_text(f"{text}\n")
    with pytest.raises(UserError, match=r"^recipe .*broken.py: ") as error:
        read(tmp_path, recipe=str(tmp_path / "broken.py"))
    assert str(error.value).isprintable()


def test_safety_a_dry_run_shows_the_file_that_is_submitted_and_reads_all_that_a_submission_reads(tmp_path):
    submission = read(tmp_path, "--chat_template", str(tmp_path / "no_such"))
    with pytest.raises(UserError, match="^--chat_template .*no_such: "):
        job_files(submission, "lora-dist submit", offline=True)
    submission = read(tmp_path)
    shown = job_files(submission, "lora-dist submit", offline=True)
    assert not (tmp_path / "run").exists()
    job = write_job(submission, "lora-dist submit", offline=True).parent
    assert {name: (job / name).read_text() for name in shown} == shown and "job.sbatch" in shown
    (tmp_path / "run/notes.txt").write_text("of others")
    (tmp_path / "run/config.yaml").unlink(missing_ok=True)
    with pytest.raises(UserError, match="holds files that no run of lora-dist wrote"):
        job_files(submission, "lora-dist submit", offline=True)


def test_safety_a_second_job_replaces_only_files_of_the_first(tmp_path, capsys):
    submission = read(tmp_path)
    job = write_job(submission, "lora-dist submit", offline=True).parent
    first = {path.relative_to(job) for path in job.rglob("*")}
    for name in ("notes.txt", "code/mine.py", "code/lora_dist/__pycache__/files.cpython-311.pyc"):
        (job / name).parent.mkdir(exist_ok=True)
        (job / name).write_text("of others")
    (job.parent / "job.partial/code").mkdir(parents=True)
    (job.parent / "job.partial/code/half.py").write_text("of a submission that was killed")
    write_job(submission, "lora-dist submit", offline=True)
    assert {path.relative_to(job) for path in job.rglob("*")} == first | {Path("notes.txt"), Path("code/mine.py")}
    assert not list(job.parent.glob("job.*")) and capsys.readouterr().err == ""
    submission.folder.drop_job()
    assert sorted(path.name for path in job.rglob("*") if path.is_file()) == ["mine.py", "notes.txt"]


def test_safety_a_job_that_slurm_refuses_leaves_the_job_before_and_none_in_slurm(tmp_path, monkeypatch):
    submission, asked = read(tmp_path), []
    monkeypatch.setattr(slurm, "submit", lambda script, *_: asked.append(script.name) or str(len(asked)))
    monkeypatch.setattr(slurm, "cancel", lambda job_id: asked.append(f"cancel {job_id}"))
    submit(submission, "first", prepare="no")
    before = {path: path.read_bytes() for path in (tmp_path / "run/job").rglob("*") if path.is_file()}

    def refuse(script, *options):
        asked.append(script.name)
        if script.name == "job.sbatch":
            raise UserError("sbatch: no")
        return "7"

    monkeypatch.setattr(slurm, "submit", refuse)
    with pytest.raises(UserError, match="sbatch: no"):
        submit(submission, "second", prepare="job")
    assert asked == ["job.sbatch", "prepare.sbatch", "job.sbatch", "cancel 7"]
    assert {path: path.read_bytes() for path in (tmp_path / "run/job").rglob("*") if path.is_file()} == before


def test_safety_files_of_others_in_a_job_folder_with_a_manifest_of_others(tmp_path):
    job = tmp_path / "run/job"
    job.mkdir(parents=True)
    (job / "data.csv").write_text("of others")
    (job / "manifest.json").write_text('{"data.csv": {"rows": 1}}')
    (tmp_path / "b/run/job.partial").mkdir(parents=True)
    (tmp_path / "b/run/job.partial/notes.txt").write_text("of others")
    with pytest.raises(UserError, match="holds files that no run of lora-dist wrote .'job'."):
        write_job(read(tmp_path), "lora-dist submit", offline=True)
    assert (job / "data.csv").read_text() == "of others"
    write_job(read(tmp_path / "b"), "lora-dist submit", offline=True)
    assert (tmp_path / "b/run/job.removed/notes.txt").read_text() == "of others"


def test_safety_prepare_hands_every_value_on_as_it_is(tmp_path, monkeypatch):
    config = dataclasses.replace(read(tmp_path).config, sample_prompt="--help $(touch MARK)\n'x'", dataset_config="-o")
    seen = []

    def run(command, *, env, stdout):
        assert command[2] == "--config" and command[4:] == ["--prepare_only", "true"]
        seen.append(yaml.safe_load(Path(command[3]).read_text()))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    prepare(dataclasses.replace(read(tmp_path), config=config))
    assert seen == [dataclasses.asdict(config)]


def test_boundary_a_submission_is_refused_before_anything_is_downloaded_or_written(tmp_path, monkeypatch, capsys):
    """And with a stub of sbatch, the commands that are printed hold the path as one word."""
    monkeypatch.setattr(submission, "prepare", lambda *args, **options: pytest.fail("downloaded"))
    words = ["submit", "--ranks-per-node", "2", "opt_quotes", "--output_dir", str(tmp_path / "a $(touch MARK) b")]
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(UserError, match="^sbatch: not found on this machine; use a machine of the cluster"):
        cli.run(words)
    (tmp_path / "bin").mkdir()
    for name, text in {"sbatch": "echo 12", "scontrol": "echo JobId=12 JobState=RUNNING"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "bin/bash").symlink_to("/bin/bash")
    with pytest.raises(UserError, match="^--chat_template no_such: "):
        cli.run([*words, "--chat_template", "no_such"])
    assert not (tmp_path / "a $(touch MARK) b").exists()
    monkeypatch.setattr(submission, "prepare", lambda *args, **options: None)
    cli.run(words)
    follow, status = capsys.readouterr().out.splitlines()[-2:]
    folder = str(tmp_path / "a $(touch MARK) b")
    assert shlex.split(follow) == ["follow:", "tail", "-F", f"{folder}/logs/12-node0.log"]
    assert shlex.split(status) == ["status:", "lora-dist", "status", folder]
    with pytest.raises(UserError, match="job 12 of this run is RUNNING; scancel 12 first"):
        cli.run(words)
