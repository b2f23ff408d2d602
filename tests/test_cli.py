"""The `lora-dist` command: what it prints without a command, and the one line that answers a mistyped word."""

import subprocess
import sys
from random import Random

import pytest

import lora_dist
from lora_dist import commands
from lora_dist.cli import build_parser, run
from lora_dist.errors import UserError
from tests.helpers.ranks import launch


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as error:
        run(list(words))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_without_a_command_it_lists_them(capsys):
    assert run([]) == 2
    text = capsys.readouterr().out
    _, parsers = build_parser()
    assert len(parsers.choices) == 11
    assert all(f"\n    {name}" in text for name in parsers.choices) and "lora-dist train opt_quotes" in text


def test_each_command_has_its_function_and_an_example():
    _, parsers = build_parser()
    for name, parser in parsers.choices.items():
        assert callable(getattr(commands, name))
        assert "Example" in parser.epilog and f"lora-dist {name}" in parser.epilog.replace(
            "-m lora_dist.cli", "lora-dist"
        )


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        run(["--version"])
    assert capsys.readouterr().out == f"lora-dist {lora_dist.__version__}\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trian", "sft"], "lora-dist trian: no such command; did you mean train?"),
        (["zzz"], "lora-dist zzz: no such command; the commands are train generate doctor"),
        (["--versoin"], "--versoin: no such flag; did you mean --version?"),
        (["status", "--jsn", "a"], "--jsn: no such flag; did you mean --json?"),
        (["generate", "--adaptr", "a", "text"], "--adaptr: no such flag; did you mean --adapter?"),
        (["dashboard", "--foo=1"], "--foo: no such flag; lora-dist dashboard has --help --entity --project --url"),
        (["generate", "text"], "the following arguments are required: --adapter; see lora-dist generate --help"),
        (["strategies", "x"], "x: one word too many for lora-dist strategies"),
        (["quantize", "m", "--output_dir", "d", "--quantization", "int4"], "--quantization int4: must be one of"),
        (["prepare", "--qoss", "a", "opt_quotes"], "--qoss: no such option; did you mean --qos?"),
        (["doctor"], "one of the arguments --data --distributed is required; see lora-dist doctor --help"),
        (
            ["doctor", "--distributed", "--jsn"],
            "--jsn: no flag of doctor --distributed; it has --run_folder and --json",
        ),
    ],
)
def test_a_mistyped_word_is_one_line(words, line):
    assert refusal(*words).startswith(line)


def test_the_process_ends_with_2_and_prints_nothing_else():
    done = launch("lora-dist", "trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: lora-dist trian: no such command; did you mean train?\n"


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["train", "sft", "--help"], ["strategies"]])
def test_help_imports_no_torch(words):
    code = (
        "import os, sys; from lora_dist.cli import main\n"
        "def leave(code): sys.stdout.flush(); os.write(2, b'torch' if 'torch' in sys.modules else b'light')\n"
        "os._exit = leave\n"
        f"try: main({words})\nexcept SystemExit as end: leave(end.code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "light" and len(done.stdout) > 500


def test_a_recipe_may_be_named_before_its_flags(monkeypatch):
    seen = []
    monkeypatch.setattr(commands, "prepare", seen.append)
    run("prepare --gpus-per-node 8 --job-name sft --setup=x opt_quotes --quantization nf4".split())
    assert seen[0].recipe == ["opt_quotes", "--quantization", "nf4"] and seen[0].gpus_per_node == 8


def wrong_uses() -> list[tuple[str, str, list[str]]]:
    """(command, flag, words): each flag of each command with words that argparse itself refuses."""
    _, parsers = build_parser()
    found = []
    for name, parser in parsers.choices.items():
        for action in parser._actions:
            flag = action.option_strings[-1] if action.option_strings else None
            if flag is None or flag == "--help" or name == "train":
                continue
            if action.nargs == 0:
                found.append((name, flag, [f"{flag}=x"]))
                continue
            found.append((name, flag, [flag]))
            if action.type is int or action.choices:
                found += [(name, flag, [f"{flag}={value}"]) for value in ("x", "", "1.5", "a\nb", "9" * 5000)]
    return found


def test_boundary_what_argparse_refuses_is_said_as_the_recipes_say_it():
    uses = wrong_uses()
    assert {flag for _, flag, _ in uses} >= {"--nodes", "--prepare", "--json", "--sbatch", "--quantization", "--data"}
    for name, flag, words in uses:
        line = refusal(name, *words)
        assert line.startswith(flag) and "argument" not in line, line
        assert f"; see lora-dist {name} --help" in line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["submit", "--nodes", "x", "sft"], "--nodes x: must be a whole number; see lora-dist submit --help"),
        (["submit", "--prepare", "x", "sft"], "--prepare x: must be one of "),
        (["submit", "--nodes"], "--nodes: needs a value; see lora-dist submit --help"),
        (["submit", "--json=1", "sft"], "--json '1': takes no value; see lora-dist submit --help"),
        (["doctor", "--distributed", "--data", "x"], "--data: cannot be given together with --distributed; see"),
        (["submit", "--gpus-per-node", "1", "a\nb"], "recipe 'a\\nb': the name must be printable characters"),
        (["submit", "--gpus-per-node", str(10**12), "sft"], "--gpus-per-node 1000000000000: must be 0 or more and"),
    ],
)
def test_boundary_of_submit_and_doctor(words, line):
    assert refusal(*words).startswith(line)


WORDS = [
    "--nodes", "--nodes=2", "--gpus-per-node", "8", "--dry-run", "--json", "--time", "4:00:00", "-1", "--", "-", "",
    "a b", "$(touch MARK)", "sft", "opt_quotes", "recipes/sft.py", "--sbatch", "array=0-3", "--setup", "true", "x\ny",
    "--config_file", "fsdp", "--output_dir", "runs/a", "--lora_r", "\udcff", "é", "-x", "=", "--=", "0",
]  # fmt: skip


@pytest.mark.parametrize("command", ["submit", "prepare", "doctor", "status"])
def test_boundary_any_words_are_taken_or_refused_with_one_line(command, monkeypatch, tmp_path):
    """The words are checked as far as the command's own work, which is left out."""
    from lora_dist.cluster import submission

    for name in ("prepare", "submit"):
        monkeypatch.setattr(submission, name, lambda *args, **options: None)
    monkeypatch.setattr(submission, "job_files", lambda *args, **options: {"job.sbatch": ""})
    monkeypatch.setattr("lora_dist.cluster.slurm.expected_start", lambda text: "")
    if command == "doctor":
        monkeypatch.setattr(commands, "doctor", lambda args: None)
    random, taken = Random(0), 0
    for number in range(60):
        words = ["--dry-run"] * (command == "submit") + ["--gpus-per-node=8", "sft"] * (number % 2)
        words += ["--distributed"] * (command == "doctor")
        words += random.choices(WORDS, k=random.randint(0, 6))
        monkeypatch.chdir(tmp_path)
        try:
            run([command, *words])
            taken += 1
        except UserError as error:
            assert str(error) and "argument " not in str(error), words
    assert taken or command == "status"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["generate", "--adapter", "a", "--max_new_tokens", "0", "x"], "--max_new_tokens 0: must be 1 or more"),
        (["generate", "--adapter", "a", "--max_new_tokens", "100000000", "x"], "--max_new_tokens 100000000: must be"),
        (["generate", "--adapter", "", "x"], "--adapter : is empty; give a value, or leave it out"),
        (["dashboard", "--entity", "me", "--project", "a/b"], "--project a/b: has /, which no project of Weights"),
        (["dashboard", "--entity", "two\nlines"], "--entity two lines: has the character '\\n'"),
        (["push", "runs/a", "--project", "x" * 200], "--project " + "x" * 130),
        (["report", "a", "nul\0"], "--run_folders nul : has the character '\\x00'"),
        (["quantize", "m", "--output_dir", "x" * 10_000], "--output_dir xxx"),
    ],
)
def test_boundary_values_of_commands(words, line):
    assert refusal(*words).startswith(line)
