"""Reads settings from a command line and from `--config FILE.yaml`; names the likely flag for a mistyped one."""

import ast
import copy
import dataclasses
import itertools
import re
import shlex
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from lora_dist.boundary import boundary, read_json, read_yaml_settings
from lora_dist.config import GROUPS, TrainConfig
from lora_dist.environment import shipped
from lora_dist.errors import UserError, did_you_mean, require

# What to type here for the names of other tools (TRL, axolotl, LLaMA-Factory, torchtune).
SAME_AS = {
    name: here
    for here, names in {
        "--model_name_or_path": "model base_model model_name model_id",
        "--dataset_name": "dataset datasets data data_path train_file",
        "--output_dir": "output out_dir run_name",
        "--max_length": "max_seq_length max_seq_len seq_len cutoff_len sequence_len block_size",
        "--learning_rate": "lr",
        "--num_train_epochs": "epochs num_epochs",
        "--max_steps": "steps max_steps_per_epoch",
        "--warmup_steps": "warmup warmup_ratio num_warmup_steps",
        "--lr_scheduler_type": "lr_scheduler scheduler",
        "--per_device_train_batch_size": "batch_size micro_batch_size train_batch_size",
        "--per_device_eval_batch_size": "eval_batch_size",
        "--gradient_accumulation_steps": "grad_accum accumulation_steps",
        "--max_grad_norm": "gradient_clipping clip_grad_norm grad_clip",
        "--gradient_checkpointing": "activation_checkpointing enable_activation_checkpointing",
        "--optim": "optimizer",
        "--mixed_precision": "precision dtype torch_dtype compute_type",
        "--mixed_precision bf16": "bf16 pure_bf16",
        "--mixed_precision fp16": "fp16",
        "--mixed_precision no": "fp32",
        "--quantization nf4": "load_in_4bit qlora",
        "--quantization int8": "load_in_8bit",
        "--quantization nf4 or --quantization int8": "bits quantization_bit",
        "--lora_r": "r rank lora_rank",
        "--lora_alpha": "alpha",
        "--lora_dropout": "dropout",
        "--lora_target_modules": "target_modules lora_target lora_attn_modules",
        "--lora_target_modules all-linear": "lora_target_linear",
        "--chat_template FILE.jinja": "template",
        "--packing true": "sample_packing neat_packing",
        "--train_sampling_strategy group_by_length": "group_by_length",
        "--train_on_inputs true": "train_on_prompt train_on_input",
        "--train_on_inputs false": "completion_only_loss assistant_only_loss",
        "--eval_fraction": "val_set_size val_size test_size",
        "--eval_steps N": "eval_strategy evaluation_strategy do_eval",
        "--save_steps N": "save_strategy",
        "--resume_from_checkpoint": "resume lora_model_dir",
        "another --output_dir": "overwrite_output_dir",
        "--report_to wandb": "wandb use_wandb",
        "the variables WANDB_PROJECT and WANDB_ENTITY": "wandb_project wandb_entity",
        "lora-dist train RECIPE --config_file fsdp, or accelerate launch": "fsdp config_file",
        "lora-dist train RECIPE --num_processes N, or accelerate launch": "num_processes nproc_per_node",
    }.items()
    for name in names.split()
}

LENGTHS = ("max_steps", "num_train_epochs")  # of which a run has one
METAVARS = {int: "N", float: "X"}
RULES = {"int": "must be a whole number", "float": "must be a number", "_truth": "must be true or false"}
BOOLEANS = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False, "1": True, "0": False}


def _truth(word: str) -> bool:
    if word.lower() not in BOOLEANS:
        raise ValueError
    return BOOLEANS[word.lower()]


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
    """The flags of all settings, in groups. Raises UserError for a wrong value."""

    def _parse_dataclass_field(self, parser, field):
        """Adds the flag of a setting to the group of its class. HfArgumentParser calls it for each setting."""
        title = next(group.__doc__ for group in GROUPS if field.name in group.__dataclass_fields__)
        found = [group for group in self._action_groups if group.title == title]
        group = found[0] if found else self.add_argument_group(title)
        field = copy.copy(field)
        bounds = field.metadata["bounds"]
        field.metadata = {"help": field.metadata["help"] + (f" It must be {bounds}." if bounds else "")}
        before = len(self._actions)
        super()._parse_dataclass_field(group, field)
        for action in self._actions[before:]:
            if action.type is string_to_bool:
                action.type, action.metavar = _truth, "true|false"
            elif action.choices is None:
                action.metavar = METAVARS.get(action.type, "VALUE")
            if action.option_strings[0].startswith("--no_"):  # the negation that HfArgumentParser adds
                action.help = SUPPRESS

    def error(self, message):
        """Raises UserError; argparse would print its usage and exit, on every rank."""
        message = re.sub(r"^argument (--\w+)(/--[\w-]+)?: ", r"\1: ", message)  # names the flag in two spellings
        if wrong := re.fullmatch(r"(--\w+): invalid (int|float|_truth) value: (.*)", message, re.DOTALL):
            message = f"{wrong[1]} {ast.literal_eval(wrong[3])}: {RULES[wrong[2]]}"
        raise UserError(message)

    def convert(self, name: str, value: str | list | dict | None) -> object:
        """The value of a setting, as YAML holds it, with the setting's type. Raises UserError, as for a flag.

        It does not go through the command line, so that a value that starts with a dash is never taken for a flag.
        """
        action = next(action for action in self._actions if action.dest == name)
        optional = TrainConfig.__dataclass_fields__[name].default is None
        require(value is not None or optional, name, "", "has no value; give one, or leave the line out")
        words = value if isinstance(value, list) and action.nargs == "+" else [value]
        kind = "one value or a list of values" if action.nargs == "+" else "one value"
        for word in words if value is not None else ():
            require(isinstance(word, str), name, word, f"must be {kind}")
        if value is None:
            return None
        try:
            values = [self._get_value(action, word) for word in words]
            for checked in values:
                self._check_value(action, checked)
        except ArgumentError as error:
            self.error(str(error))
        return values if action.nargs == "+" else values[0]


def _parser(defaults: TrainConfig, description: str, prog: str | None = None) -> _Parser:
    usage = "%(prog)s [--config FILE.yaml] [--SETTING VALUE ...]"
    parser = _Parser(
        TrainConfig, prog=prog, description=description, usage=usage, allow_abbrev=False, formatter_class=_HelpFormatter
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="Settings from a file, e.g. the config.yaml of an earlier run; or the name of a file in recipes/configs, "
        "e.g. llama3_8b. Flags override it.",
    )
    parser.set_defaults(**dataclasses.asdict(defaults))
    return parser


def parse_config(
    defaults: TrainConfig, argv: list[str], *, description: str = "", prog: str | None = None
) -> TrainConfig:
    """The recipe's defaults, overridden by `--config FILE.yaml`, overridden by flags. Raises UserError.

    `description` and `prog`, the command that --help shows, are for --help, which prints the settings and exits.
    """
    parser, argv = _parser(defaults, description, prog), _with_one_name(argv)
    file = parser.parse_known_args(argv)[0].config
    settings = _read_file(parser, file) if file is not None else {}
    given = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    for name, other in (LENGTHS, LENGTHS[::-1]):
        if name in given:  # a flag replaces the other one in the file
            settings.pop(other, None)
        if name in given or settings.get(name) is not None:
            parser.set_defaults(**{other: None})
    parser.set_defaults(**settings)
    config, _, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise UserError(f"{unknown[0]}: no such flag; {hint(unknown[0].lstrip('-').partition('=')[0])}")
    return config


def _with_one_name(argv: list[str]) -> list[str]:
    """The words after --dataset_name, for example the files that a shell makes of a pattern, as one quoted value."""
    starts = [i for i, word in enumerate(argv) if word in ("--dataset_name", "--dataset-name")]
    for start in reversed(starts):
        rest = argv[start + 1 :]
        names = list(itertools.takewhile(lambda word: not word.startswith("--"), rest))
        if len(names) > 1:
            argv = [*argv[: start + 1], shlex.join(names), *rest[len(names) :]]
    return argv


def parse_recipe_config(
    defaults: TrainConfig,
    argv: list[str],
    *,
    gpu: dict,
    embedded: dict,
    on_gpu: Callable[[], bool],
    description: str = "",
) -> TrainConfig:
    """`parse_config`, plus the recipe's base and data for this machine if no flag names them. Raises UserError.

    `gpu` and `embedded` are the settings for a machine with a GPU and for one without. Each names a base and a data
    set. Its `dataset_...` settings become the defaults whenever its data set is used, and its other settings whenever
    its base is used, even if a flag named them. A flag always wins over these defaults.
    `on_gpu()` is asked after the flags have been checked, because it may import torch.
    """
    asked = parse_config(defaults, argv, description=description)
    chosen, fitting = gpu if on_gpu() else embedded, {}
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


def other_batch(argv: list[str], config: TrainConfig, num_ranks: int) -> str | None:
    """A warning if `--config` names a run's config.yaml, and a step of that run had more or fewer sequences.

    The file alone does not say it: the number of micro-batches in a step depends on the number of ranks too.
    """
    file = _parser(config, "").parse_known_args(argv)[0].config
    folder = Path(file or "").resolve().parent
    if file is None or (config.output_dir and Path(config.output_dir).resolve() == folder):  # it continues that run
        return None
    try:
        facts = read_json(folder / "state.json", "state.json")["facts"]
        old_ranks, per_step, strategy = facts["num_ranks"], int(facts["micro_batches_per_step"]), facts.get("strategy")
    except (UserError, LookupError, TypeError, ValueError):  # the folder holds no run
        return None
    new = config.gradient_accumulation_steps * num_ranks
    if per_step == new:
        return None
    had, has = per_step * config.per_device_train_batch_size, new * config.per_device_train_batch_size
    under = f" under {strategy}" if strategy else ""
    fits = per_step % num_ranks == 0
    same = f"--gradient_accumulation_steps {per_step // num_ranks}" if fits else f"{old_ranks} rank(s)"
    what = f"that run had {had} sequences a step, on {old_ranks} rank(s){under}; this one has {has}, on {num_ranks}"
    return f"warning: --config {file}: {what}; {same} makes them equal"


def _read_file(parser: _Parser, file: str) -> dict:
    """The settings in a YAML file, with their types. Raises UserError, which names the file."""
    path = shipped("recipes") / "configs" / f"{file}.yaml"
    what = f"--config {file}"
    with boundary(what):
        path = path if path.is_file() else Path(file)
    settings = {}
    for name, value in read_yaml_settings(path, what, as_text=True).items():
        require(name in TrainConfig.__dataclass_fields__, "config", f"{file}: {name}", f"no such setting; {hint(name)}")
        try:
            settings[name] = parser.convert(name, value)
        except UserError as error:
            raise UserError(f"{what}: {error}") from None
    # null means that the other one says how long to train. If both are null, the recipe decides.
    return {name: value for name, value in settings.items() if value is not None or name not in LENGTHS}


def as_flags(settings: dict) -> list[str]:
    """{"lora_r": 8} as ["--lora_r=8"]. Settings without a value are left out."""
    flags = []
    for name, value in settings.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={value}")
    return flags
