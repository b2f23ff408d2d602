"""What the commands of `lora-dist` do. `cli.py` describes their flags; each function here has its command's name.

A function takes the parsed words (argparse.Namespace) and prints its result; it may return an exit code. `args.recipe`
holds the recipe and its flags, `args.unknown` the words that the command does not know. Imports are inside the
functions, so that `lora-dist --help` and a mistyped flag are answered at once.
"""

import dataclasses
import json
import os
import shlex
import sys
import warnings
from pathlib import Path

from lora_dist.boundary import boundary, read_json
from lora_dist.errors import UserError, did_you_mean


def train(args) -> int:
    from lora_dist.cluster.launcher import train

    return train(args.words)


def generate(args) -> None:
    folder = Path(args.adapter)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"--adapter {folder}: holds no adapter_config.json; give the adapter/ of a run folder")
    if others := [path.name for path in folder.iterdir() if not path.is_file() and not path.is_dir()]:
        raise UserError(f"--adapter {folder}: {others[0]} in it is no file; reading it could wait for ever")
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from lora_dist.model.adapters import check_adapter, check_loaded_adapter
    from lora_dist.model.files.configs import load_generation_config
    from lora_dist.model.positions import longest_prompt

    check_adapter(folder)
    disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with boundary(f"--adapter {folder}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of missing keys: `check_loaded_adapter` refuses them
        model = AutoPeftModelForCausalLM.from_pretrained(
            folder, dtype="auto" if device == "cuda" else torch.float32, device_map=device, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    check_loaded_adapter(model, folder)
    base = model.get_base_model()
    base.generation_config = load_generation_config(base.name_or_path) or base.generation_config
    prompt, as_chat = _prompt_tokens(tokenizer, args.prompt, folder, bare=args.bare)
    room = longest_prompt(model, args.max_new_tokens)
    if room is not None and len(prompt) > room:
        has = f"the base has {room + args.max_new_tokens} positions, and the prompt {len(prompt)} tokens"
        raise UserError(f"--max_new_tokens {args.max_new_tokens}: {has}; generate fewer, or shorten the prompt")
    prompt_BT = torch.tensor([prompt], device=device)
    out = model.generate(
        input_ids=prompt_BT, attention_mask=torch.ones_like(prompt_BT), max_new_tokens=args.max_new_tokens,
        do_sample=False, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    completion = tokenizer.decode(out[0, len(prompt) if as_chat else 0 :], skip_special_tokens=True)
    print(json.dumps({"prompt": args.prompt, "completion": completion}) if args.json else completion)


def _prompt_tokens(tokenizer, prompt: str, adapter: Path, *, bare: bool) -> tuple[list[int], bool]:
    """Token ids of the prompt, and whether it was put into the chat template as a user's message.

    It is, unless `bare`, if the tokenizer has a template and the run did not train on rows of another format than
    chats. The state.json of the run is looked for beside the adapter and above its checkpoint.
    """
    from lora_dist.data.chat_template import MAX_RENDER_BYTES, MAX_RENDER_S, bounds, check_that_it_ends
    from lora_dist.data.formats import encode_prompt

    runs = [run for run in (adapter.parent, *adapter.absolute().parents[2:3]) if (run / "state.json").is_file()]
    facts = read_json(runs[0] / "state.json", f"{runs[0]}/state.json").get("facts") if runs else None
    rows = facts.get("format") if isinstance(facts, dict) else None
    if bare or not tokenizer.chat_template or rows not in (None, "messages"):
        return encode_prompt(tokenizer, prompt), False
    print("note: the prompt is sent through the tokenizer's chat template; --bare leaves it out", file=sys.stderr)
    check_that_it_ends(tokenizer, f"--adapter {adapter}: its chat template")
    with (
        boundary(f"--adapter {adapter}", "its chat template cannot be used; give --bare"),
        bounds(MAX_RENDER_S, MAX_RENDER_BYTES),
    ):
        message = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False), True


def doctor(args) -> None:
    if args.distributed:
        return _check_ranks(args)
    from lora_dist.config import TrainConfig
    from lora_dist.data.formats import load_tokenizer, mark_trained
    from lora_dist.data.rows import prepare_rows
    from lora_dist.embedded import EMBEDDED
    from lora_dist.flags import parse_config

    config = parse_config(TrainConfig(model_name_or_path=EMBEDDED), ["--dataset_name", *args.data, *args.unknown])
    tokenizer = load_tokenizer(config.model_name_or_path, config.chat_template)
    data = prepare_rows(config, tokenizer)
    examples = [mark_trained(tokenizer, row["input_ids"], row["labels"]) for row in data.first_rows(2)]
    if args.json:
        counts = {split: dataclasses.asdict(counts) for split, counts in data.counts.items()}
        print(json.dumps({"counts": counts, "warnings": data.warnings(), "examples": examples}))
        return
    print(data.table())
    names = ("example 1, chosen", "example 1, rejected") if config.has_pairs else ("example 1", "example 2")
    for name, example in zip(names, examples, strict=False):
        print(f"\n{name}, as {config.model_name_or_path} reads it; trained on between ⟦ and ⟧:\n{example}")


def _check_ranks(args) -> None:
    if args.unknown:
        raise UserError(f"{args.unknown[0]}: no flag of doctor --distributed; it has --run_folder and --json")
    from lora_dist.cluster.preflight import inspect_ranks, joined_ranks

    with joined_ranks() as device:
        report = inspect_ranks(Path(args.run_folder), device)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(report.as_dict()) if args.json else report.table(), flush=True)


def report(args) -> None:
    from lora_dist.boundary import boundary
    from lora_dist.run.folder import RunFolder
    from lora_dist.tracking.report import require_page, write_comparison, write_report

    folders = [RunFolder(Path(root)) for root in args.run_folders]
    for folder in folders:
        if not any(os.path.lexists(path) for path in (folder.config, folder.state)):
            raise UserError(f"{folder.root}: holds no config.yaml and state.json; give a run folder")
    path = Path(args.output) if args.output else folders[0].report if len(folders) == 1 else Path("comparison.html")
    with boundary(f"--output {path}", "give another file name"):
        require_page(path)
        problems = write_report(folders[0], path) if len(folders) == 1 else write_comparison(folders, path)
    for problem in problems:
        print(f"warning: cannot be read: {problem}", file=sys.stderr)
    print(path)


def status(args) -> None:
    from lora_dist.cluster.status import comparison, read_status

    found = [read_status(Path(folder)) for folder in args.run_folders]
    if args.json:
        rows = [status.as_dict() for status in found]
        print(json.dumps(rows if len(rows) > 1 else rows[0], indent=2))
    else:
        print(comparison(found) if len(found) > 1 else found[0].text())


def strategies(args) -> None:
    from lora_dist.parallel.strategies import STRATEGIES

    rows = [dataclasses.asdict(row) for row in STRATEGIES.values()]
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(f"{row['name']}: {row['summary']}")
        print(f"  engine {row['engine']} | base per rank {row['base_per_rank']} | offloads {row['offloads']}")
        print(f"  traffic per step: {row['traffic_per_step']}")
        refuses = f" | refuses {' '.join(row['refuses'])}" if row["refuses"] else ""
        print(f"  quantization {' '.join(row['quantizations'])}{refuses}")


def quantize(args) -> None:
    from lora_dist.model.load import BaseOptions, check_weights, meta_model
    from lora_dist.model.quantized_cache import check_cache, load_cached_base
    from lora_dist.parallel.ranks import start_ranks
    from lora_dist.parallel.strategies import Placement, world_size
    from lora_dist.training.plan import DTYPE_OF

    dtype = DTYPE_OF[args.mixed_precision]
    skeleton = meta_model(args.model_name_or_path, args.quantization, dtype)  # bad input, before any weight is read
    check_cache(skeleton, args.output_dir, "--output_dir")
    accelerator = start_ranks()
    options = BaseOptions(args.quantization, dtype, accelerator.device, Placement(shard_ranks=world_size()))
    check_weights(args.model_name_or_path, options)
    load_cached_base(args.model_name_or_path, options, cache=args.output_dir, setting="--output_dir")
    accelerator.on_main_process(print)(f"{args.output_dir}: {args.model_name_or_path} in {args.quantization}")


def prepare(args) -> None:
    from lora_dist.cluster.submission import prepare

    if args.gpus_per_node == 0 and args.ranks_per_node is None:
        args.gpus_per_node = 1
    prepare(_read_submission(args))


def submit(args) -> None:
    from lora_dist.cluster import slurm, submission

    asked = _read_submission(args)
    options = [word for word in args.words[: -len(args.recipe)] if word != "--dry-run"]
    command = f"lora-dist {shlex.join([*options, *args.recipe])}"
    if args.dry_run:
        text = submission.job_files(asked, command, offline=args.prepare != "no")["job.sbatch"]
        print(text, end="", flush=True)
        print(slurm.expected_start(text), file=sys.stderr)
        return
    slurm.check_sbatch()
    submission.job_files(asked, command, offline=False)  # what it refuses is refused before the download
    if args.prepare == "here":
        submission.prepare(asked, quiet=args.json)
    submitted = submission.submit(asked, command, prepare=args.prepare)
    if args.json:
        print(json.dumps(submitted))
        return
    run_folder = asked.config.output_dir
    print(f"job {submitted['job_id']}: {run_folder}/job/job.sbatch")
    print(f"log: {submitted['log']}")
    print(f"follow: {shlex.join(['tail', '-F', submitted['log']])}")
    print(f"status: {shlex.join(['lora-dist', 'status', run_folder])}")


def _read_submission(args):
    from lora_dist.cluster.slurm import FLAGS, SlurmOptions
    from lora_dist.cluster.submission import read_submission

    valid = ["config_file", *FLAGS.values(), *args.other_options]
    for word in args.unknown:
        every = f"the options before the recipe are {' '.join(f'--{name}' for name in valid)}"
        guess = did_you_mean(word.lstrip("-").partition("=")[0], valid, every, prefix="--")
        raise UserError(f"{word}: no such option; {guess}")
    if not args.recipe:
        raise UserError("recipe: none is given; end with e.g. recipes/opt_quotes.py and its flags")
    options = SlurmOptions(**{field.name: getattr(args, field.name) for field in dataclasses.fields(SlurmOptions)})
    recipe, *flags = args.recipe
    return read_submission(recipe, flags, args.config_file, options)


def push(args) -> None:
    from lora_dist.run.folder import RunFolder
    from lora_dist.tracking.wandb_run import push

    print(push(RunFolder(Path(args.run_folder)), args.project, args.entity))


def dashboard(args) -> None:
    from lora_dist.tracking import dashboard

    if args.dump:
        print(json.dumps(dashboard.spec(dashboard.build(args.entity or "entity", args.project)), indent=2))
        return
    print(dashboard.apply(args.entity, args.project, args.url))
