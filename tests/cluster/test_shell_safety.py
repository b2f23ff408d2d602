"""No setting reaches a shell unquoted: each one is given metacharacters, and the job file is run with stub commands."""

import ast
import dataclasses
import os
import shlex
import subprocess
import typing
from pathlib import Path

import pytest
import yaml

from lora_dist.cluster.shell import Bash, assign, comment, directive, quote, text_of, words
from lora_dist.cluster.slurm import SlurmOptions, render, render_prepare
from lora_dist.cluster.submission import job_of, read_submission, write_job
from lora_dist.config import TrainConfig
from lora_dist.errors import UserError
from tests.helpers.ranks import ROOT

TEXTS = [
    "x$(touch MARK)", "`touch MARK`", ";touch MARK", '"; touch MARK; "', "'; touch MARK; '", "a\ntouch MARK\n",
    "&& touch MARK", "x|touch MARK", "> MARK", "x>MARK", "-o", "--help", "$IFS;touch${IFS}MARK", "x$(touch${IFS}MARK)",
    "~", "*", "a b", "ä€", "a\\", 'a"', "a'", "#x", "!x", "{a,b}", "a[$(touch${IFS}MARK)]", "a\x00b", "\x1b[31m", "=x",
    "a:b", "a,b",
    "%x", "a\u2028b", "\udcff", "",
]  # fmt: skip
STUBS = {
    # Starts one task, as Slurm does: without its own options.
    "srun": 'printf "%s\\0" "$@" >"$FOLDER/srun"; while [[ $1 == --* ]]; do shift; done; '
    "export SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_LOCALID=0 SLURM_NTASKS_PER_NODE=2 SLURM_NNODES=1 SLURM_NODEID=0; "
    'exec "$@"',
    "stub": 'printf "%s\\0" "$@" >"$FOLDER/python"; printf "%s\\0" "$NCCL_SOCKET_IFNAME" >"$FOLDER/env"',
    "scontrol": "echo node1",
}


@pytest.fixture
def cwd(tmp_path, monkeypatch) -> Path:
    """An empty folder with stub commands beside it; a command that a value brings along makes MARK in it."""
    for name, text in STUBS.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "cwd"


def run(script: Path, folder: Path) -> dict[str, list[str]]:
    """Runs a job file; returns what each stub was given."""
    env = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "FOLDER": str(folder)}
    slurm = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node1", "SLURM_NNODES": "1"}
    done = subprocess.run(["bash", str(script)], env=env | slurm, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done
    files = [folder / name for name in ("srun", "python", "env")]
    return {file.name: file.read_text().split("\0")[:-1] for file in files if file.exists()}


def accepted(make, names: list[str], text: str) -> dict[str, str]:
    """Those settings that may have this text; the others are refused with one line."""
    found = {}
    for name in names:
        try:
            make(**{name: text})
            found[name] = text
        except UserError as error:
            message = str(error)
            assert message.startswith(f"--{name.replace('_', '-')} ") or message.startswith(f"--{name} ")
            assert message.isprintable(), message
    return found


def string_fields(settings: type) -> list[str]:
    return [name for name, kind in typing.get_type_hints(settings).items() if kind in (str, str | None)]


def options_with(text: str, folder: Path, launcher: str) -> SlurmOptions:
    def make(**asked):
        return SlurmOptions(**{"ranks_per_node": 2, "launcher": launcher, "preflight": "false", **asked})

    found = accepted(make, string_fields(SlurmOptions), text)
    try:
        found["sbatch"] = [f"comment={text}"]
        make(**found)
    except UserError as error:
        assert str(error).startswith("--sbatch ") and str(error).isprintable()
        del found["sbatch"]
    return make(**found | {"python": f"{folder}/bin/stub"})


def directives(text: str) -> list[str]:
    """The options in the head of a job file, without the quotes that sbatch takes away."""
    lines = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    return [word for line in lines for word in shlex.split(line)]


@pytest.mark.parametrize("launcher", ["srun", "accelerate"])
@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_options_reach_the_shell_as_they_are(cwd, text, launcher):
    options = options_with(text, cwd.parent, launcher)
    submission = read_submission(str(ROOT / "recipes/opt_quotes.py"), ["--output_dir", "run"], None, options)
    job = job_of(submission, f"lora-dist submit {text}", offline=True)
    job = dataclasses.replace(job, lines=() if launcher == "srun" else job.lines)
    (cwd / "job.sbatch").write_text(render(job), encoding="utf-8")
    got = run(cwd / "job.sbatch", cwd.parent)
    (cwd / "prepare.sbatch").write_text(render_prepare(job), encoding="utf-8")
    run(cwd / "prepare.sbatch", cwd.parent)
    assert not (cwd / "MARK").exists()
    if options.container_image:
        assert f"--container-image={options.container_image}" in got["srun"]
        mounts = ["", f",{options.container_mounts}"][bool(options.container_mounts)]
        assert f"--container-mounts={cwd}/run:{cwd}/run,{cwd}:{cwd}{mounts}" in got["srun"]
    assert got["env"] == [options.network_interface or ""]
    wanted = [f"--{name}={getattr(options, name)}" for name in ("partition", "account", "qos", "constraint")
              if getattr(options, name)]  # fmt: skip
    assert set(wanted) | {f"--{pair}" for pair in options.sbatch} <= set(directives(render(job)))


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_the_names_of_the_run_folder_and_the_recipe_reach_the_shell_as_they_are(cwd, text):
    options = SlurmOptions(ranks_per_node=2, python=f"{cwd.parent}/bin/stub", preflight="false")
    recipe = cwd / "opt_quotes.py"
    try:
        named = cwd / f"{text}.py"
        named.write_text((ROOT / "recipes/opt_quotes.py").read_text())
        recipe = Path(read_submission(str(named), [], None, options).recipe)
    except (ValueError, OSError) as error:  # UserError is a ValueError; the others: no file can have this name
        assert str(error).isprintable()
        recipe.write_text((ROOT / "recipes/opt_quotes.py").read_text())
    try:
        submission = read_submission(str(recipe), [f"--output_dir={cwd}/run/{text}"], None, options)
    except UserError as error:
        assert "--output_dir" in str(error) and str(error).isprintable()
        return
    folder = submission.folder.root
    got = run(write_job(submission, f"lora-dist submit {text}", offline=True), cwd.parent)
    assert not list(cwd.rglob("MARK"))
    assert folder == cwd / "run" / text if text else True
    assert got["python"] == [f"{folder}/job/code/recipes/{recipe.name}", "--config", f"{folder}/job/config.yaml"]
    assert f"--output={folder}/logs/12-node%n.log" in got["srun"]
    script = (folder / "job/job.sbatch").read_text()
    assert f"--output={folder}/logs/%j-node0.log" in directives(script)
    assert not set(" %\"'\\") & set(next(word for word in directives(script) if word.startswith("--job-name=")))


@pytest.mark.parametrize("text", [text for text in TEXTS if text.isprintable()], ids=ascii)
def test_all_other_settings_are_read_from_the_job_folder_and_by_no_shell(cwd, text):
    files = {name: cwd / f"f{text}" for name in ("deepspeed", "chat_template")}
    names = [name for name in string_fields(TrainConfig) if name not in ("output_dir", *files)]
    for file in files.values():
        file.write_text("{}")
    options = SlurmOptions(ranks_per_node=2, python=f"{cwd.parent}/bin/stub", preflight="false")
    submission = read_submission(str(ROOT / "recipes/opt_quotes.py"), ["--output_dir", "run"], None, options)
    asked = accepted(lambda **values: dataclasses.replace(submission.config, **values), names, text)
    assert len(asked) >= (5 if text else 1)  # most names must not be empty
    config = dataclasses.replace(submission.config, **asked, **{name: str(file) for name, file in files.items()})
    submission = dataclasses.replace(submission, config=config)
    run(write_job(submission, "lora-dist submit", offline=True), cwd.parent)
    assert not list(cwd.rglob("MARK"))
    written = yaml.safe_load((cwd / "run/job/config.yaml").read_text())
    assert {name: written[name] for name in asked} == asked
    copies = {name: Path(written[name]) for name in files}
    assert all(copy.parent == cwd / "run/job" and copy.read_text() == "{}" for copy in copies.values())


def test_bash_gets_each_value_as_one_word(cwd):
    texts = [text for text in TEXTS if text.isprintable()] + ["a\nb", "\x1b"]
    lines = [assign(one=text) + Bash('; printf "%s\\0" "$one"') for text in texts]
    lines += [
        assign(many=tuple(texts)) + Bash('; printf "%s\\0" "${many[@]}"'),
        comment("a\ntouch MARK\r$(touch MARK)"),
    ]
    done = subprocess.run(["bash"], input=text_of(lines), capture_output=True, text=True)
    assert (done.stdout.split("\0")[:-1], done.stderr) == (texts * 2, "")
    assert not list(cwd.iterdir())
    assert words("a b", Bash("$x")).text == "'a b' $x" and quote(3).text == "3"
    with pytest.raises(AssertionError):
        directive("comment", "a\ntouch MARK")


def test_only_literals_become_bash():
    """`Bash(value)` would put a value into a job file without quotes."""
    files = [*(ROOT / "lora_dist").rglob("*.py"), ROOT / "launch/slurm/write.py"]
    calls = [
        (file.name, ast.unparse(node.args[0]))
        for file in files
        if file.name != "shell.py"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Bash") and not _is_literal(node.args[0])
    ]
    assert calls == [("slurm.py", "Path(__file__).with_name('job_body.sh').read_text(encoding='utf-8').rstrip()")]


def _is_literal(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant)


def test_no_command_is_run_through_a_shell():
    """No `shell=True` and no `os.system` anywhere in the package."""
    for file in (ROOT / "lora_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("os.system", "os.popen", "subprocess.getoutput"), (file, node.lineno)
                assert not any(keyword.arg == "shell" for keyword in node.keywords), (file, node.lineno)
