"""The `lora-dist` command: what it prints without a command, and the one line that answers a mistyped word."""

import subprocess
import sys

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
        (["quantize", "m", "--output_dir", "d", "--quantization", "int4"], "argument --quantization: invalid choice"),
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
