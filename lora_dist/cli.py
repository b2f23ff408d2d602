"""The `lora-dist` command."""

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path

from lora_dist.config import TrainConfig, UserError, end_process, parse_config
from lora_dist.embedded import EMBEDDED
from lora_dist.strategies import STRATEGIES


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="lora-dist", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_doctor, _add_generate, _add_quantize, _add_report, _add_strategies):
        add(commands)
    args, args.flags = parser.parse_known_args(argv)
    if args.flags and args.run is not _doctor:
        parser.error(f"unrecognized arguments: {' '.join(args.flags)}")
    end_process(partial(args.run, args))


def _add_doctor(commands) -> None:
    command = commands.add_parser(
        "doctor", help="check data before training on it",
        description="Tokenize data as a recipe will, say what is odd in it, and show which tokens are trained on. "
        "Takes the recipes' flags too; with --strict true what is odd is exit code 2.",
        epilog="Example: lora-dist doctor --data chats.jsonl --model_name_or_path Qwen/Qwen2.5-7B-Instruct "
        "--max_length 2048",
    )  # fmt: skip
    command.add_argument("--data", required=True, metavar="NAME", help="as a recipe's --dataset_name")
    command.add_argument("--json", action="store_true", help="print the counts, warnings and examples as JSON")
    command.set_defaults(run=_doctor)


def _doctor(args) -> None:
    config = parse_config(TrainConfig(model_name_or_path=EMBEDDED), ["--dataset_name", args.data, *args.flags])
    from lora_dist.formats import load_tokenizer, marked
    from lora_dist.rows import prepare_rows

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
    from lora_dist import session
    from lora_dist.base_model import meta_model
    from lora_dist.quantized_cache import load_cached_base
    from lora_dist.strategies import Placement, world_size

    dtype = session.DTYPE_OF[args.mixed_precision]
    meta_model(args.model_name_or_path, args.quantization, dtype)  # raises what can be said before anything is read
    accelerator = session.start_ranks()
    load_cached_base(
        args.model_name_or_path, cache=args.output_dir, quantization=args.quantization, dtype=dtype,
        device=accelerator.device, placement=Placement(shard_ranks=world_size()),
    )  # fmt: skip
    accelerator.on_main_process(print)(f"{args.output_dir}: {args.model_name_or_path} in {args.quantization}")


def _add_report(commands) -> None:
    command = commands.add_parser(
        "report",
        help="draw a run folder into report.html",
        description="Draw a run folder into its report.html. Example: lora-dist report runs/short",
    )
    command.add_argument("run_folder", metavar="RUN")
    command.set_defaults(run=_report)


def _report(args) -> None:
    from lora_dist.report import write_report
    from lora_dist.run_folder import RunFolder

    folder = RunFolder(Path(args.run_folder))
    if not folder.config.is_file():
        raise UserError(f"{folder.root}: holds no config.yaml; give a run folder")
    write_report(folder)
    print(folder.report)


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


if __name__ == "__main__":
    main()
