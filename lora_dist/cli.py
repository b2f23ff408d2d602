"""The `lora-dist` command."""

import argparse
import json
import sys
from pathlib import Path

from lora_dist.config import UserError


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="lora-dist", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_generate, _add_report):
        add(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


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
