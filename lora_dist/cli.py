"""The `lora-dist` command."""

import argparse
import dataclasses
import json
import os
import shlex
import sys
from functools import partial
from pathlib import Path

from lora_dist.cluster.slurm import FLAGS, SlurmOptions
from lora_dist.config import TrainConfig
from lora_dist.embedded import EMBEDDED
from lora_dist.entry import end_process
from lora_dist.errors import UserError, did_you_mean
from lora_dist.flags import parse_config
from lora_dist.parallel.strategies import STRATEGIES


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="lora-dist", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        _add_dashboard, _add_doctor, _add_generate, _add_prepare, _add_push, _add_quantize, _add_report, _add_status,
        _add_strategies, _add_submit,
    ):  # fmt: skip
        add(commands)
    argv, recipe = _split_at_recipe(sys.argv[1:] if argv is None else argv)
    args, args.unknown = parser.parse_known_args(argv)
    args.recipe = recipe
    if args.unknown and args.run not in (_doctor, _submit, _prepare):  # they say more of it
        parser.error(f"unrecognized arguments: {' '.join(args.unknown)}")
    end_process(partial(args.run, args))


def _split_at_recipe(argv: list[str]) -> tuple[list[str], list[str]]:
    """Of `submit` and `prepare`: (the words before the recipe, the recipe and its flags)."""
    if argv[:1] in (["submit"], ["prepare"]):
        for position, word in enumerate(argv):
            if word.endswith(".py"):
                return argv[:position], argv[position:]
    return argv, []


def _add_dashboard(commands) -> None:
    command = commands.add_parser(
        "dashboard", help="make a workspace in Weights & Biases for the runs of a project",
        description="Save a view of a project in Weights & Biases: loss, optimisation, throughput, where the time "
        "goes, memory per rank, data, checkpoints, samples, a comparison of runs. Prints its address.",
        epilog="Example: lora-dist dashboard --entity my-team --project lora-dist",
    )  # fmt: skip
    command.add_argument("--entity", metavar="E", help="user or team that the project belongs to")
    command.add_argument("--project", default="lora-dist", metavar="P", help="default: lora-dist")
    command.add_argument("--url", help="address of an earlier view, to write over instead of making another")
    command.add_argument("--dump", action="store_true", help="print the view as JSON; needs no account")
    command.set_defaults(run=_dashboard)


def _dashboard(args) -> None:
    from lora_dist.tracking import dashboard

    if args.dump:
        print(json.dumps(dashboard.spec(dashboard.build(args.entity or "entity", args.project)), indent=2))
        return
    print(dashboard.apply(args.entity, args.project, args.url))


def _add_doctor(commands) -> None:
    command = commands.add_parser(
        "doctor", help="check data, or the ranks of a job, before training",
        description="With --data: tokenize data as a recipe will, say what is odd in it, and show which tokens are "
        "trained on; takes the recipes' flags too, and with --strict true what is odd is exit code 2. With "
        "--distributed, started on every rank: look at devices, versions, disks and links, and name what is odd.",
        epilog="Examples: lora-dist doctor --data chats.jsonl --model_name_or_path Qwen/Qwen2.5-7B-Instruct "
        "--max_length 2048; torchrun --nproc_per_node 2 -m lora_dist.cli doctor --distributed",
    )  # fmt: skip
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="NAME", help="as a recipe's --dataset_name")
    what.add_argument("--distributed", action="store_true", help="look at the ranks of this job")
    command.add_argument("--run_folder", default="runs", metavar="DIR", help="--distributed: must be seen by all ranks")
    command.add_argument("--json", action="store_true", help="print the counts, warnings and examples as JSON")
    command.set_defaults(run=_doctor)


def _doctor(args) -> None:
    if args.distributed:
        return _doctor_distributed(args)
    config = parse_config(TrainConfig(model_name_or_path=EMBEDDED), ["--dataset_name", args.data, *args.unknown])
    from lora_dist.data.formats import load_tokenizer, marked
    from lora_dist.data.rows import prepare_rows

    tokenizer = load_tokenizer(config.model_name_or_path, config.chat_template)
    data = prepare_rows(config, tokenizer)
    examples = [marked(tokenizer, row["input_ids"], row["labels"]) for row in data.first(2)]
    if args.json:
        counts = {split: dataclasses.asdict(counts) for split, counts in data.counts.items()}
        print(json.dumps({"counts": counts, "warnings": data.warnings(), "examples": examples}))
        return
    print(data.table())
    for number, example in enumerate(examples, 1):
        print(f"\nexample {number}, as {config.model_name_or_path} reads it; trained on between ⟦ and ⟧:\n{example}")


def _doctor_distributed(args) -> None:
    if args.unknown:
        raise UserError(f"{args.unknown[0]}: no flag of doctor --distributed; it has --run_folder and --json")
    from lora_dist.cluster.preflight import inspect_ranks, joined_ranks

    with joined_ranks() as device:
        report = inspect_ranks(Path(args.run_folder), device)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(report.as_dict()) if args.json else report.table(), flush=True)


def _add_generate(commands) -> None:
    command = commands.add_parser(
        "generate", help="complete a prompt with an adapter",
        description="Complete a prompt with an adapter on its base.",
        epilog='Example: lora-dist generate --adapter runs/short/adapter "Two things are infinite: "',
    )  # fmt: skip
    command.add_argument("prompt")
    command.add_argument(
        "--adapter", required=True, metavar="DIR", help="adapter in PEFT's format, as a run folder's adapter/"
    )
    command.add_argument("--max_new_tokens", type=int, default=48, help="stop after this many tokens (default: 48)")
    command.add_argument("--json", action="store_true", help="print {prompt, completion} as JSON")
    command.set_defaults(run=_generate)


def _generate(args) -> None:
    folder = Path(args.adapter)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"--adapter {folder}: holds no adapter_config.json; give a run folder's adapter/")
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoPeftModelForCausalLM.from_pretrained(
        folder, dtype="auto" if device == "cuda" else torch.float32, device_map=device
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # The space that ends a prompt belongs to the next word's token: leave it to the model.
    inputs = tokenizer(args.prompt.rstrip(), return_tensors="pt", return_token_type_ids=False).to(device)
    out = model.generate(
        **inputs, max_new_tokens=args.max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    completion = tokenizer.decode(out[0], skip_special_tokens=True)
    print(json.dumps({"prompt": args.prompt, "completion": completion}) if args.json else completion)


def _add_prepare(commands) -> None:
    command = commands.add_parser(
        "prepare", help="download and check all that a recipe needs, before a job burns GPU time", allow_abbrev=False,
        description="Download the base, tokenize the data, and check both with a recipe's settings and the job's "
        "ranks, without a GPU. Everything after the recipe is its flags. With the recipe's defaults of a GPU, unless "
        "--ranks-per-node is given without --gpus-per-node.",
        epilog="Example: lora-dist prepare --gpus-per-node 8 recipes/opt_quotes.py --quantization nf4",
        usage="lora-dist prepare [OPTIONS] RECIPE [FLAGS]",
    )  # fmt: skip
    _add_slurm_options(command)
    command.set_defaults(run=_prepare, also=[])


def _prepare(args) -> None:
    from lora_dist.cluster.submission import prepare

    if args.gpus_per_node == 0 and args.ranks_per_node is None:
        args.gpus_per_node = 1
    prepare(_read_submission(args))


def _add_slurm_options(command) -> None:
    command.add_argument(
        "--config_file", metavar="FILE.yaml",
        help="accelerate's config (default: accelerate_configs/hsdp.yaml on several machines with several ranks, "
        "single.yaml for one rank, else fsdp.yaml)",
    )  # fmt: skip
    for field in dataclasses.fields(SlurmOptions):
        text = field.metadata["help"]
        more = {"action": "append"} if field.name in ("sbatch", "setup") else {}
        more["default"] = [] if more else field.default
        more["type"] = int if isinstance(field.default, int) or field.name == "ranks_per_node" else str
        if field.default not in (None, dataclasses.MISSING):
            text = f"{text} Default: {field.default}."
        command.add_argument(f"--{FLAGS[field.name]}", help=text, **more)


def _read_submission(args):
    from lora_dist.cluster.submission import read_submission

    valid = ["--config_file", *(f"--{flag}" for flag in FLAGS.values()), *args.also]
    for word in args.unknown:
        every = f"the options before the recipe are {' '.join(valid)}"
        raise UserError(f"{word}: no such option; {did_you_mean(word.partition('=')[0], valid, every)}")
    if not args.recipe:
        raise UserError("recipe: none is given; end with e.g. recipes/opt_quotes.py and its flags")
    options = SlurmOptions(**{field.name: getattr(args, field.name) for field in dataclasses.fields(SlurmOptions)})
    recipe, *flags = args.recipe
    return read_submission(recipe, flags, args.config_file, options)


def _add_push(commands) -> None:
    command = commands.add_parser(
        "push", help="replay a run folder into one new run of Weights & Biases",
        description="Log all of a run folder's metrics.jsonl and samples.jsonl into one new run of Weights & Biases: "
        "for a run that was trained without it, or whose uploads went wrong. Prints its address.",
        epilog="Example: lora-dist push runs/a --project lora-dist",
    )  # fmt: skip
    command.add_argument("run_folder", metavar="RUN")
    command.add_argument("--project", metavar="P", help="default: WANDB_PROJECT, or lora-dist")
    command.add_argument("--entity", metavar="E", help="user or team; default: the account's")
    command.set_defaults(run=_push)


def _push(args) -> None:
    from lora_dist.run.folder import RunFolder
    from lora_dist.tracking.wandb_run import push

    print(push(RunFolder(Path(args.run_folder)), args.project, args.entity))


def _add_quantize(commands) -> None:
    command = commands.add_parser(
        "quantize", help="write a quantized base that any number of ranks can load",
        description="Write a quantized base that any number of ranks, and transformers, can load. Under torchrun each "
        "rank quantizes and writes its own rows.",
        epilog="Example: torchrun --nproc_per_node 2 -m lora_dist.cli quantize facebook/opt-6.7b "
        "--quantization nf4 --output_dir bases/opt-6.7b-nf4",
    )  # fmt: skip
    command.add_argument("model_name_or_path", help="model directory or hub name")
    command.add_argument("--output_dir", required=True, metavar="DIR", help="folder to write, its own")
    command.add_argument("--quantization", default="int8", choices=("int8", "nf4", "nf4_plain"), help="default: int8")
    command.add_argument(
        "--mixed_precision", default="bf16", choices=("no", "bf16", "fp16"),
        help="what it will be trained in: the dtype of what is not quantized (default: bf16)",
    )  # fmt: skip
    command.set_defaults(run=_quantize)


def _quantize(args) -> None:
    from lora_dist.model.load import meta_model
    from lora_dist.model.quantized_cache import load_cached_base
    from lora_dist.parallel.ranks import start_ranks
    from lora_dist.parallel.strategies import Placement, world_size
    from lora_dist.training.plan import DTYPE_OF

    dtype = DTYPE_OF[args.mixed_precision]
    meta_model(args.model_name_or_path, args.quantization, dtype)  # raises what can be said before anything is read
    accelerator = start_ranks()
    load_cached_base(
        args.model_name_or_path, cache=args.output_dir, quantization=args.quantization, dtype=dtype,
        device=accelerator.device, placement=Placement(shard_ranks=world_size()),
    )  # fmt: skip
    accelerator.on_main_process(print)(f"{args.output_dir}: {args.model_name_or_path} in {args.quantization}")


def _add_report(commands) -> None:
    command = commands.add_parser(
        "report",
        help="draw a run folder, or a comparison of several, into one page",
        description="Draw a run folder into its report.html; or several into a page that compares them.",
        epilog="Example: lora-dist report runs/a runs/b --output comparison.html",
    )
    command.add_argument("run_folders", nargs="+", metavar="RUN")
    command.add_argument("--output", metavar="FILE.html", help="default: RUN/report.html; of several, comparison.html")
    command.set_defaults(run=_report)


def _report(args) -> None:
    from lora_dist.run.folder import RunFolder
    from lora_dist.tracking.report import write_comparison, write_report

    folders = [RunFolder(Path(root)) for root in args.run_folders]
    for folder in folders:
        if not folder.config.is_file() or not folder.state.is_file():
            raise UserError(f"{folder.root}: holds no config.yaml and state.json; give a run folder")
    if len(folders) == 1:
        path = Path(args.output) if args.output else folders[0].report
        write_report(folders[0], path)
    else:
        path = Path(args.output or "comparison.html")
        write_comparison(folders, path)
    print(path)


def _add_status(commands) -> None:
    command = commands.add_parser(
        "status", help="say how far a run is, and what its job does",
        description="Say how far a run is, how fast it goes, when it will be done, and what Slurm says of its job. "
        "Several runs, of a sweep, become a table.",
        epilog="Example: lora-dist status runs/nf4",
    )  # fmt: skip
    command.add_argument("run_folders", nargs="+", metavar="RUN")
    command.add_argument("--json", action="store_true", help="print it as JSON, a list where several runs are given")
    command.set_defaults(run=_status)


def _status(args) -> None:
    from lora_dist.cluster.status import comparison, read_status

    found = [read_status(Path(folder)) for folder in args.run_folders]
    if args.json:
        rows = [status.as_dict() for status in found]
        print(json.dumps(rows if len(rows) > 1 else rows[0], indent=2))
    else:
        print(comparison(found) if len(found) > 1 else found[0].text())


def _add_strategies(commands) -> None:
    command = commands.add_parser(
        "strategies", help="list the ways to place the base",
        description="List the ways to place the base, one file of accelerate_configs/ each.",
        epilog="Example: lora-dist strategies --json",
    )  # fmt: skip
    command.add_argument("--json", action="store_true", help="print the table as JSON")
    command.set_defaults(run=_strategies)


def _strategies(args) -> None:
    rows = [dataclasses.asdict(row) for row in STRATEGIES.values()]
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(f"{row['name']}: {row['summary']}")
        print(f"  engine {row['engine']} | base per rank {row['base_per_rank']} | offloads {row['offloads']}")
        print(f"  moves in a step: {row['traffic_per_step']}")
        refuses = f" | refuses {' '.join(row['refuses'])}" if row["refuses"] else ""
        print(f"  quantization {' '.join(row['quantizations'])}{refuses}")


def _add_submit(commands) -> None:
    command = commands.add_parser(
        "submit", help="submit a recipe to Slurm", allow_abbrev=False,
        description="Write a plain sbatch file for a recipe into its run folder, with copies of the code and of all "
        "settings, and give it to Slurm. The job saves before its time is up and requeues itself until the run is "
        "completed. Everything after the recipe is its flags.",
        epilog="Example: lora-dist submit --nodes 2 --gpus-per-node 8 --time 4:00:00 --partition gpu "
        "recipes/opt_quotes.py --output_dir runs/a",
        usage="lora-dist submit [OPTIONS] RECIPE [FLAGS]",
    )  # fmt: skip
    _add_slurm_options(command)
    command.add_argument(
        "--prepare", default="here", choices=("here", "job", "no"),
        help="download and check what the run needs before it is submitted, in a job without GPUs that it waits for, "
        "or not at all. Default: here.",
    )  # fmt: skip
    command.add_argument(
        "--dry-run", action="store_true", help="print the file and what Slurm thinks of it; submit nothing"
    )
    command.add_argument("--json", action="store_true", help="print {job_id, log, ...} as JSON")
    command.set_defaults(run=_submit, also=["--prepare", "--dry-run", "--json"])


def _submit(args) -> None:
    from lora_dist.cluster import slurm, submission

    asked = _read_submission(args)
    command = f"lora-dist {shlex.join(word for word in sys.argv[1:] if word != '--dry-run')}"
    if args.dry_run:
        text = slurm.render(submission.job_of(asked, command, offline=args.prepare != "no"))
        print(text, end="", flush=True)
        print(slurm.expected_start(text), file=sys.stderr)
        return
    if args.prepare == "here":
        submission.prepare(asked, quiet=args.json)
    submitted = submission.submit(asked, command, prepare=args.prepare)
    if args.json:
        print(json.dumps(submitted))
        return
    run = asked.config.output_dir
    print(f"job {submitted['job_id']}: {run}/job/job.sbatch")
    print(f"log: {submitted['log']}")
    print(f"follow: tail -F {submitted['log']}")
    print(f"status: lora-dist status {run}")


if __name__ == "__main__":
    main()
