"""Reads settings from a command line and from `--config FILE.yaml`."""

import copy
import dataclasses
import re
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from pathlib import Path

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from lora_dist.config import GROUPS, TrainConfig
from lora_dist.errors import UserError, did_you_mean, require

# Flags that users of other tools type, and what does the same here.
SAME_AS = {
    "lr": "--learning_rate", "epochs": "--num_train_epochs", "steps": "--max_steps", "max_seq_length": "--max_length",
    "max_seq_len": "--max_length", "cutoff_len": "--max_length", "sequence_len": "--max_length",
    "batch_size": "--per_device_train_batch_size", "micro_batch_size": "--per_device_train_batch_size",
    "train_batch_size": "--per_device_train_batch_size", "eval_batch_size": "--per_device_eval_batch_size",
    "grad_accum": "--gradient_accumulation_steps", "bf16": "--mixed_precision bf16", "fp16": "--mixed_precision fp16",
    "fp32": "--mixed_precision no", "precision": "--mixed_precision", "load_in_4bit": "--quantization nf4",
    "load_in_8bit": "--quantization int8", "bits": "--quantization nf4 or int8", "model": "--model_name_or_path",
    "base_model": "--model_name_or_path", "dataset": "--dataset_name", "data": "--dataset_name",
    "train_file": "--dataset_name", "r": "--lora_r", "rank": "--lora_r", "lora_rank": "--lora_r",
    "alpha": "--lora_alpha", "dropout": "--lora_dropout", "target_modules": "--lora_target_modules",
    "lora_target": "--lora_target_modules", "sample_packing": "--packing true", "wandb": "--report_to wandb",
    "resume": "--resume_from_checkpoint", "output": "--output_dir", "gradient_clipping": "--max_grad_norm",
    "max_samples": "--max_steps", "group_by_length": "--train_sampling_strategy group_by_length",
    "fsdp": "accelerate launch --config_file accelerate_configs/fsdp.yaml",
    "num_processes": "accelerate launch --num_processes N, before the recipe",
}  # fmt: skip


METAVARS = {int: "N", float: "X", string_to_bool: "true|false"}
RULES = {"int": "must be a whole number", "float": "must be a number"}


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows each flag once: `--lora_r N`, although `--lora-r` is accepted too; keeps the lines of the description."""

    def _format_action_invocation(self, action):
        if not action.option_strings or "-h" in action.option_strings:
            return super()._format_action_invocation(action)
        values = self._format_args(action, self._get_default_metavar_for_optional(action)) if action.nargs != 0 else ""
        return f"{action.option_strings[0]} {values}".rstrip()

    def _get_help_string(self, action):
        return action.help if action.default in (None, "") else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    def _parse_dataclass_field(self, parser, field):
        """Called by the constructor for each setting; puts it into the group of its class."""
        title = next(group.__doc__ for group in GROUPS if field.name in group.__dataclass_fields__)
        found = [group for group in self._action_groups if group.title == title]
        group = found[0] if found else self.add_argument_group(title)
        field = copy.copy(field)
        field.metadata = {"help": field.metadata["help"]}
        before = len(self._actions)
        super()._parse_dataclass_field(group, field)
        for action in self._actions[before:]:
            if action.choices is None:
                action.metavar = METAVARS.get(action.type, "VALUE")
            if action.option_strings[0].startswith("--no_"):  # the negation that HfArgumentParser adds
                action.help = SUPPRESS

    def error(self, message):  # argparse would print its usage and exit here, on every rank
        message = re.sub(r"^argument (--\w+)(/--[\w-]+)?: ", r"\1: ", message)  # a flag has two spellings
        if wrong := re.fullmatch(r"(--\w+): invalid (int|float) value: '(.*)'", message):
            message = f"{wrong[1]} {wrong[3]}: {RULES[wrong[2]]}"
        elif wrong := re.match(r"(--\w+): Truthy value expected: got (.*) but expected", message):
            message = f"{wrong[1]} {wrong[2]}: must be true or false"
        raise UserError(message)


def _parser(defaults: TrainConfig, description: str, prog: str | None = None) -> _Parser:
    usage = "%(prog)s [--config FILE.yaml] [--SETTING VALUE ...]"
    parser = _Parser(
        TrainConfig, prog=prog, description=description, usage=usage, allow_abbrev=False, formatter_class=_HelpFormatter
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="Settings from a file, e.g. the config.yaml of an earlier run; flags override it.",
    )
    parser.set_defaults(**dataclasses.asdict(defaults))
    return parser


def parse_config(
    defaults: TrainConfig, argv: list[str], *, description: str = "", prog: str | None = None
) -> TrainConfig:
    """The recipe's defaults, overridden by `--config FILE.yaml`, overridden by flags. Raises UserError.

    `description` and `prog`, the command that --help shows, are for --help, which prints the settings and exits.
    """
    parser = _parser(defaults, description, prog)
    file = parser.parse_known_args(argv)[0].config
    settings = _read_yaml(Path(file)) if file else {}
    if file:
        _check_file(_parser(defaults, description), file, settings)
    for name, other in (("max_steps", "num_train_epochs"), ("num_train_epochs", "max_steps")):
        if f"--{name}" in argv:  # a flag replaces the other one in the file
            settings.pop(other, None)
        if f"--{name}" in argv or settings.get(name) is not None:
            parser.set_defaults(**{other: None})
    argv = as_flags(settings) + argv
    config, _, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise UserError(f"{unknown[0]}: no such flag; {hint(unknown[0].lstrip('-').partition('=')[0])}")
    return config


def parse_recipe_config(
    defaults: TrainConfig, argv: list[str], *, gpu: dict, embedded: dict, on_gpu: bool, description: str = ""
) -> TrainConfig:
    """`parse_config`, with the base and data that the recipe uses with or without a GPU where no flag names them.

    `gpu` and `embedded` are settings. Their `dataset_...` settings are the defaults for their `dataset_name`, and their
    other ones for their `model_name_or_path`, whether these were chosen here or named by a flag.
    """
    asked = parse_config(defaults, argv, description=description)
    chosen, fitting = gpu if on_gpu else embedded, {}
    for name in ("model_name_or_path", "dataset_name"):
        value = getattr(asked, name) or chosen[name]
        for known in (gpu, embedded):
            if known[name] == value:
                of_data = name == "dataset_name"
                fitting |= {key: v for key, v in known.items() if key.startswith("dataset_") == of_data}
    return parse_config(dataclasses.replace(defaults, **fitting), argv, description=description)


def hint(name: str) -> str:
    """What to type instead of a setting that does not exist."""
    name = name.replace("-", "_").lower()
    if name in SAME_AS:
        return f"use {SAME_AS[name]}"
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    return did_you_mean(name, [*names, "config"], "--help lists them", prefix="--")


def _read_yaml(path: Path) -> dict:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: cannot be read: {' '.join(str(error).split())}") from None
    require(isinstance(settings, dict), "config", path, "must hold one `name: value` per line")
    return settings


def _check_file(parser: _Parser, file: str, settings: dict) -> None:
    """Raises UserError, which names the file, if it holds an unknown setting or a value of the wrong type."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    for name in settings:
        require(name in names, "config", f"{file}: {name}", f"no such setting; {hint(str(name))}")
    try:
        parser.parse_known_args(as_flags(settings))
    except UserError as error:
        raise UserError(f"--config {file}: {error}") from None


def as_flags(settings: dict) -> list[str]:
    """{"lora_r": 8} as ["--lora_r", "8"], so that a file is read with the types and errors of the command line."""
    flags = []
    for name, value in settings.items():
        if value is not None:
            flags += [f"--{name}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return flags
