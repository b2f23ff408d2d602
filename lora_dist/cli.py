"""Fine-tunes adapters on a quantized base that is sharded over GPUs."""

import argparse
import dataclasses
import importlib
import re
import sys
from functools import partial

import lora_dist
from lora_dist.cluster.slurm import FLAGS, SlurmOptions
from lora_dist.config import Bounds, check_project, check_text
from lora_dist.entry import end_process
from lora_dist.errors import UserError, did_you_mean, require

# The commands whose words after the recipe, or all of them, are the settings of a recipe.
NEW_TOKENS = Bounds(1, 1_000_000, "tokens")
READ_RECIPE_FLAGS = ("doctor", "prepare", "submit", "train")
EPILOG = """\
start here:
  lora-dist train opt_quotes                a small model on this machine, with or without a GPU
  lora-dist train sft --help                all settings
  lora-dist COMMAND --help                  an example of each command"""
# What argparse says about a flag, and the line that the recipes say about one of theirs.
REWORDED = (
    (r"^argument (.*?): invalid int value: '(.*)'$", r"\1 \2: must be a whole number"),
    (r"^argument (.*?): invalid choice: '(.*)' \(choose from (.*)\)$", r"\1 \2: must be one of \3"),
    (r"^argument (.*?): expected (?:one|at least one) argument$", r"\1: needs a value"),
    (r"^argument (.*?): not allowed with argument (.*)$", r"\1: cannot be given together with \2"),
    (r"^argument (.*?): ignored explicit argument (.*)$", r"\1 \2: takes no value"),
    (r"^argument (.*?): ", r"\1: "),
)


class _Parser(argparse.ArgumentParser):
    """Raises UserError, which is one line, where argparse would print the usage as well."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        for argparse_says, ours in REWORDED:
            message = re.sub(argparse_says, ours, message, count=1, flags=re.DOTALL)
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: list[str] | None = None) -> None:
    """The `lora-dist` command; ends the process."""
    end_process(partial(run, sys.argv[1:] if argv is None else argv))


def run(words: list[str]) -> int | None:
    """Run a command; returns its exit code, or None for 0. Raises UserError."""
    parser, commands = build_parser()
    if not words:
        parser.print_help()
        return 2
    name, *rest = words
    if name.startswith("-"):
        _check_flags(words[:1], parser, "lora-dist")
    elif name not in commands.choices:
        every = f"the commands are {' '.join(commands.choices)}"
        raise UserError(f"lora-dist {name}: no such command; {did_you_mean(name, commands.choices, every)}")
    elif name not in READ_RECIPE_FLAGS:
        _check_flags(rest, commands.choices[name], f"lora-dist {name}")
    if name == "train" and rest[:1] not in (["-h"], ["--help"]):  # what follows is the recipe's, --help as well
        args, unknown = argparse.Namespace(words=rest), []
    else:
        recipe = []
        if name in ("prepare", "submit"):
            rest, recipe = _split_at_recipe(rest, commands.choices[name])
        args, unknown = parser.parse_known_args([name, *rest])
        _check_values(args)
        args.unknown, args.recipe, args.words = unknown, recipe, words
    if unknown and name not in READ_RECIPE_FLAGS:
        raise UserError(f"{unknown[0]}: one word too many for lora-dist {name}; see lora-dist {name} --help")
    return getattr(importlib.import_module("lora_dist.commands"), name)(args)


def _check_values(args: argparse.Namespace) -> None:
    """Raises UserError for a value that is no text of one line, or a number out of its bounds."""
    for name, value in vars(args).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                check_text(f"--{FLAGS.get(name, name)}", text, many_lines=name == "prompt")
    if "max_new_tokens" in args:
        fits = NEW_TOKENS.hold(args.max_new_tokens)
        require(fits, "max_new_tokens", args.max_new_tokens, f"must be {NEW_TOKENS}")
    if "project" in args and args.project is not None:
        check_project("--project", args.project)


def _split_at_recipe(words: list[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """(the options before the recipe, the recipe and its flags). The recipe is the first word that is no option's."""
    without_value = {flag for action in parser._actions if action.nargs == 0 for flag in action.option_strings}
    is_value = False
    for position, word in enumerate(words):
        if word.startswith("-"):
            is_value = word not in without_value and "=" not in word
        elif is_value:
            is_value = False
        else:
            return words[:position], words[position:]
    return words, []


def _check_flags(words: list[str], parser: argparse.ArgumentParser, command: str) -> None:
    """Raises UserError for the first word that looks like a flag and is none of the command's."""
    valid = [flag for action in parser._actions for flag in action.option_strings]
    for word in words:
        flag = word.partition("=")[0]
        if flag.startswith("-") and flag not in valid and " " not in word:  # a prompt may begin with a dash
            names = [name.lstrip("-") for name in valid if name.startswith("--")]
            every = f"{command} has {' '.join(f'--{name}' for name in names)}"
            raise UserError(f"{flag}: no such flag; {did_you_mean(flag.lstrip('-'), names, every, prefix='--')}")


def build_parser() -> tuple[argparse.ArgumentParser, argparse._SubParsersAction]:
    formatter = partial(argparse.RawDescriptionHelpFormatter, max_help_position=30)
    parser = _Parser(prog="lora-dist", description=__doc__, epilog=EPILOG, formatter_class=formatter)
    parser.add_argument("--version", action="version", version=f"lora-dist {lora_dist.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        _add_train, _add_generate, _add_doctor, _add_report, _add_status, _add_strategies, _add_quantize, _add_prepare,
        _add_submit, _add_push, _add_dashboard,
    ):  # fmt: skip
        add(commands)
    return parser, commands


# Each function below describes one command; lora_dist/commands.py has a function of the command's name that runs it.


def _add_train(commands) -> None:
    command = commands.add_parser(
        "train", help="train a recipe on this machine: on all its GPUs, or on 2 CPU ranks if it has none",
        description="Train a recipe on this machine. RECIPE is the name of a recipe that ships (sft, opt_quotes, "
        "bloomz_complaints, quotes_tags, dpo) or a file. Every other word is one of the recipe's settings: see "
        "lora-dist train RECIPE --help. Exit code: 0 if the run is completed, or preempted and saved; 2 for bad input; "
        "1 for a run that failed.",
        epilog="Examples: lora-dist train opt_quotes; lora-dist train sft --model_name_or_path "
        "Qwen/Qwen2.5-7B-Instruct --dataset_name chats.jsonl; lora-dist train my_recipe.py --config_file zero3 "
        "--num_processes 4",
        usage="lora-dist train RECIPE [--config_file NAME|FILE.yaml] [--num_processes N] [--SETTING VALUE ...]",
    )  # fmt: skip
    command.add_argument(
        "--config_file", metavar="NAME|FILE.yaml",
        help="accelerate config: how the base is placed. A name that lora-dist strategies lists, or a file. Default: "
        "fsdp for several ranks, single for one",
    )  # fmt: skip
    command.add_argument(
        "--num_processes", metavar="N", help="number of ranks. Default: the number of GPUs, or 2 without a GPU"
    )


def _add_generate(commands) -> None:
    command = commands.add_parser(
        "generate", help="complete a prompt with an adapter",
        description="Complete a prompt with an adapter on its base.",
        epilog='Example: lora-dist generate --adapter runs/short/adapter "Two things are infinite: "',
    )  # fmt: skip
    command.add_argument("prompt")
    command.add_argument(
        "--adapter", required=True, metavar="DIR", help="adapter in PEFT's format, e.g. the adapter/ of a run folder"
    )
    command.add_argument("--max_new_tokens", type=int, default=48, help="stop after this many tokens (default: 48)")
    command.add_argument(
        "--bare", action="store_true",
        help="do not put the prompt into the tokenizer's chat template, which is done for adapters trained on chats",
    )  # fmt: skip
    command.add_argument("--json", action="store_true", help="print {prompt, completion} as JSON")


def _add_doctor(commands) -> None:
    command = commands.add_parser(
        "doctor", help="check data, or the ranks of a job, before training",
        description="With --data: tokenize data as a recipe would, name what looks wrong with it, and show which "
        "tokens are trained. It takes the recipes' settings too; with --strict true, a warning ends it with exit code "
        "2. With --distributed, started on every rank: check devices, versions, disks and links, and name what looks "
        "wrong.",
        epilog="Examples: lora-dist doctor --data chats.jsonl --model_name_or_path Qwen/Qwen2.5-7B-Instruct "
        "--max_length 2048; torchrun --nproc_per_node 2 -m lora_dist.cli doctor --distributed",
    )  # fmt: skip
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="NAME", nargs="+", help="a data set, as --dataset_name of a recipe takes it")
    what.add_argument("--distributed", action="store_true", help="check the ranks of this job")
    command.add_argument(
        "--run_folder", default="runs", metavar="DIR", help="with --distributed: a folder that all ranks must see"
    )
    command.add_argument("--json", action="store_true", help="print the counts, warnings and examples as JSON")


def _add_report(commands) -> None:
    command = commands.add_parser(
        "report", help="draw a run folder, or a comparison of several, as one page",
        description="Draw a run folder as its report.html, or several run folders as one page that compares them.",
        epilog="Example: lora-dist report runs/a runs/b --output comparison.html",
    )  # fmt: skip
    command.add_argument("run_folders", nargs="+", metavar="RUN")
    command.add_argument(
        "--output", metavar="FILE.html", help="default: RUN/report.html, or comparison.html for several runs"
    )


def _add_status(commands) -> None:
    command = commands.add_parser(
        "status", help="show how far a run is, and what its Slurm job does",
        description="Show how far a run is, how fast it trains, when it will be done, and what Slurm says about its "
        "job. Several runs, e.g. of a sweep, are shown as a table.",
        epilog="Example: lora-dist status runs/nf4",
    )  # fmt: skip
    command.add_argument("run_folders", nargs="+", metavar="RUN")
    command.add_argument("--json", action="store_true", help="print it as JSON; a list if several runs are given")


def _add_strategies(commands) -> None:
    command = commands.add_parser(
        "strategies", help="list the ways to place the base",
        description="List the ways to place the base. Each is a file in accelerate_configs/ and a name for "
        "lora-dist train --config_file.",
        epilog="Example: lora-dist strategies --json",
    )  # fmt: skip
    command.add_argument("--json", action="store_true", help="print the table as JSON")


def _add_quantize(commands) -> None:
    command = commands.add_parser(
        "quantize", help="write a quantized base that any number of ranks can load",
        description="Write a quantized base that any number of ranks, and transformers, can load. Under torchrun each "
        "rank quantizes and writes its own rows.",
        epilog="Example: torchrun --nproc_per_node 2 -m lora_dist.cli quantize facebook/opt-6.7b "
        "--quantization nf4 --output_dir bases/opt-6.7b-nf4",
    )  # fmt: skip
    command.add_argument("model_name_or_path", help="model directory or hub name")
    command.add_argument("--output_dir", required=True, metavar="DIR", help="folder for the quantized base only")
    command.add_argument("--quantization", default="int8", choices=("int8", "nf4", "nf4_plain"), help="default: int8")
    command.add_argument(
        "--mixed_precision", default="bf16", choices=("no", "bf16", "fp16"),
        help="precision that it will be trained in; it decides the dtype of the tensors that are not quantized "
        "(default: bf16)",
    )  # fmt: skip


def _add_prepare(commands) -> None:
    command = commands.add_parser(
        "prepare", help="download and check all that a recipe needs, before a job uses GPU time",
        description="Download the base, tokenize the data, and check both against a recipe's settings and the job's "
        "ranks, without a GPU. Everything after the recipe is its flags. Uses the recipe's GPU defaults, unless you "
        "give --ranks-per-node without --gpus-per-node (then its CPU defaults).",
        epilog="Example: lora-dist prepare --gpus-per-node 8 opt_quotes --quantization nf4",
        usage="lora-dist prepare [OPTIONS] RECIPE [--SETTING VALUE ...]",
    )  # fmt: skip
    _add_slurm_options(command)
    command.set_defaults(other_options=[])


def _add_submit(commands) -> None:
    command = commands.add_parser(
        "submit", help="submit a recipe to Slurm",
        description="Write a plain sbatch file for a recipe into its run folder, with copies of the code and of all "
        "settings, and submit it to Slurm. The job saves before its time is up and requeues itself until the run is "
        "completed. Everything after the recipe is its flags.",
        epilog="Example: lora-dist submit --nodes 2 --gpus-per-node 8 --time 4:00:00 --partition gpu "
        "recipes/opt_quotes.py --output_dir runs/a",
        usage="lora-dist submit [OPTIONS] RECIPE [--SETTING VALUE ...]",
    )  # fmt: skip
    _add_slurm_options(command)
    command.add_argument(
        "--prepare", default="here", choices=("here", "job", "no"),
        help="here: download and check what the run needs before submitting; job: in a job without GPUs that runs "
        "first; no: not at all. Default: here.",
    )  # fmt: skip
    command.add_argument(
        "--dry-run", action="store_true", help="print the sbatch file and Slurm's estimate of the start; submit nothing"
    )
    command.add_argument("--json", action="store_true", help="print {job_id, log, ...} as JSON")
    command.set_defaults(other_options=["prepare", "dry-run", "json"])


def _add_slurm_options(command) -> None:
    command.add_argument(
        "--config_file", metavar="NAME|FILE.yaml",
        help="accelerate config: a name that lora-dist strategies lists, or a file. Default: hsdp on several machines "
        "with several ranks each, single for one rank, otherwise fsdp.",
    )  # fmt: skip
    for field in dataclasses.fields(SlurmOptions):
        text = field.metadata["help"]
        more = {"action": "append"} if field.name in ("sbatch", "setup") else {}
        more["default"] = [] if more else field.default
        more["type"] = int if isinstance(field.default, int) or field.name == "ranks_per_node" else str
        if field.default not in (None, dataclasses.MISSING):
            text = f"{text} Default: {field.default}."
        command.add_argument(f"--{FLAGS[field.name]}", help=text, **more)


def _add_push(commands) -> None:
    command = commands.add_parser(
        "push", help="upload a run folder to Weights & Biases as a new run",
        description="Upload the metrics.jsonl and samples.jsonl of a run folder to Weights & Biases as one new run: "
        "for a run that was trained without it, or whose uploads failed. Prints the address of the new run.",
        epilog="Example: lora-dist push runs/a --project lora-dist",
    )  # fmt: skip
    command.add_argument("run_folder", metavar="RUN")
    command.add_argument("--project", metavar="P", help="default: WANDB_PROJECT, or lora-dist")
    command.add_argument("--entity", metavar="E", help="user or team (default: the account's)")


def _add_dashboard(commands) -> None:
    command = commands.add_parser(
        "dashboard", help="make a workspace in Weights & Biases for the runs of a project",
        description="Save a view of a project in Weights & Biases: loss, optimization, throughput, where the time "
        "goes, memory per rank, data, checkpoints, samples, a comparison of runs. Prints its address.",
        epilog="Example: lora-dist dashboard --entity my-team --project lora-dist",
    )  # fmt: skip
    command.add_argument("--entity", metavar="E", help="user or team that the project belongs to")
    command.add_argument("--project", default="lora-dist", metavar="P", help="default: lora-dist")
    command.add_argument("--url", help="address of an existing view to overwrite")
    command.add_argument("--dump", action="store_true", help="print the view as JSON; needs no account")


if __name__ == "__main__":
    main()
