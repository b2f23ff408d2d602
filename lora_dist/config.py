"""What to train: every setting of a run, its flag, and the checks that need no model.

Flags carry TrainingArguments' names where one exists. A run's settings are its recipe's defaults, overridden by
`--config FILE.yaml`, overridden by flags. This module imports no torch, so a typo is answered in a second.
"""

import dataclasses
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml
from transformers import HfArgumentParser

from lora_dist.errors import UserError, did_you_mean, require


def setting(default, help: str):
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    model_name_or_path: str | None = setting(
        None,
        "Base model: a directory, a hub name, or embedded. Default: the recipe's on a GPU, embedded without one.",
    )
    dataset_name: str | None = setting(
        None,
        "Data set: a hub name, a .json, .jsonl, .csv, .parquet or .txt file, a directory of such files or one that "
        "save_to_disk wrote, embedded, or embedded/complaints. Default: the recipe's on a GPU, embedded without one.",
    )
    dataset_config: str | None = setting(None, "Configuration of a hub data set that has several.")
    dataset_train_split: str = setting("train", "Split to train on.")
    dataset_test_split: str | None = setting(None, "Split to evaluate on, or none. Default: test, where there is one.")
    eval_fraction: float = setting(
        0.05, "Fraction of the rows held out for evaluation where there is no split for it; 0 for none."
    )
    streaming: bool = setting(
        False,
        "Read the data while training instead of before it: for what is too large for the disk. Needs --max_steps.",
    )
    dataset_format: Literal["auto", "text", "prompt_completion", "alpaca", "messages"] = setting(
        "auto",
        "What the columns hold: text; prompt, completion; instruction, input, output; or messages (conversations) of a "
        "chat. auto: told by the columns' names.",
    )
    task_type: Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS"] = setting(
        "CAUSAL_LM",
        "What the base learns, in PEFT's names: to go on, to answer in a decoder, to classify rows or words.",
    )
    dataset_label_field: str | None = setting(
        None, "SEQ_CLS, TOKEN_CLS: column of a row's class, of its several classes, or of its words'."
    )
    num_labels: int | None = setting(None, "SEQ_CLS, TOKEN_CLS: use only so many classes, the most frequent ones.")
    dataset_text_field: str | None = setting(None, "Column that holds the text to train on. Default: text.")
    rename_columns: list[str] | None = setting(
        None, "Columns under other names than --dataset_format's, as OLD=NEW, e.g. question=prompt answer=completion."
    )
    chat_template: str | None = setting(
        None, "Jinja file to render messages with, and to save with the adapter. Default: the tokenizer's."
    )
    train_on_inputs: bool = setting(
        False, "Train on prompts and on all turns of a chat, not on completions and the assistant's turns alone."
    )
    max_length: int = setting(512, "Longest row in tokens.")
    overlong_rows: Literal["truncate", "split", "drop"] = setting(
        "truncate", "What becomes of rows over --max_length: cut off, cut into several rows, or left out."
    )
    packing: bool = setting(
        False, "Fill each row up to --max_length with several documents, which do not see each other."
    )
    train_sampling_strategy: Literal["random", "group_by_length"] = setting(
        "random", "Order of the rows: random, or such that a step's rows are of similar length, for little padding."
    )
    strict: bool = setting(False, "Refuse data that would be warned of.")

    quantization: Literal["int8", "nf4", "nf4_plain", "none"] = setting(
        "int8", "How the frozen base is stored: LLM.int8, NF4 with double quantization or without, or as it is."
    )
    quantized_cache: str | None = setting(
        None, "Directory for the quantized base: written by the first start, read by the next on any number of ranks."
    )
    resident_layers: str = setting(
        "0",
        "fsdp: decoder layers that stay whole on each rank and are never gathered: a number, all, or auto for as many "
        "as the memory allows.",
    )
    shard_size: int | None = setting(
        None,
        "fsdp: ranks that hold one copy of the base together; the others hold further copies. "
        "Default: the ranks of a node, so that the base never crosses nodes.",
    )
    memory_budget_gib: float | None = setting(
        None, "For --resident_layers auto: memory of each rank to plan with. Default: what is free on the device."
    )
    gather_once: bool = setting(
        False,
        "fsdp: keep what is gathered until the optimizer step, one gather a step instead of two a micro-batch; takes "
        "the memory of the whole packed base meanwhile.",
    )
    deepspeed: str | None = setting(
        None, "DeepSpeed config (.json) for the deepspeed launcher; an accelerate config names its own."
    )
    context_parallel_size: int = setting(
        1, "Ranks that share each row, for rows too long for one GPU; each computes a piece of the positions."
    )
    gradient_checkpointing: bool = setting(
        True, "Recompute each layer's activations in backward instead of keeping them."
    )

    lora_r: int = setting(16, "Rank of the adapters.")
    lora_alpha: int = setting(32, "Scale of the adapters: their output is multiplied by lora_alpha / lora_r.")
    lora_dropout: float = setting(0.05, "Dropout on the adapters' input.")
    lora_target_modules: list[str] = setting(
        ["q_proj", "v_proj"], "Names of the linear layers that get an adapter, or all-linear."
    )
    lora_bias: Literal["none", "all", "lora_only"] = setting(
        "none", "Which biases of the base are trained too: none, all, or those of the adapted layers."
    )
    use_rslora: bool = setting(False, "Rank-stabilized LoRA: scale by lora_alpha / sqrt(lora_r).")
    use_dora: bool = setting(False, "DoRA: train the length of each weight's rows beside the adapters.")
    modules_to_save: list[str] | None = setting(
        None, "Names of modules, such as lm_head, that are trained whole and saved with the adapter."
    )
    loraplus_lr_ratio: float | None = setting(
        None, "LoRA+: learning rate of lora_B as a multiple of lora_A's, e.g. 16."
    )

    per_device_train_batch_size: int = setting(4, "Sequences per micro-batch.")
    gradient_accumulation_steps: int = setting(4, "Micro-batches per rank and optimizer step.")
    per_device_eval_batch_size: int = setting(8, "Sequences per evaluation micro-batch.")
    max_steps: int | None = setting(None, "Optimizer steps to train; instead of --num_train_epochs.")
    num_train_epochs: float | None = setting(None, "Passes over the data to train; instead of --max_steps.")
    learning_rate: float = setting(2e-4, "Peak learning rate.")
    warmup_steps: int = setting(100, "Steps of linear warm-up.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = setting(
        "linear", "Schedule after the warm-up."
    )
    optim: Literal["adamw_torch"] = setting("adamw_torch", "Optimizer.")
    weight_decay: float = setting(0.0, "AdamW's weight decay.")
    max_grad_norm: float = setting(1.0, "Clip the gradient of the global batch to this norm; 0 for none.")
    seed: int = setting(42, "Seed of data order, adapter initialisation and dropout.")

    logging_steps: int = setting(1, "Log every this many steps.")
    eval_steps: int = setting(0, "Evaluate every this many steps; 0 for at the start and the end only.")
    save_steps: int = setting(50, "Save a checkpoint every this many steps; 0 for at the end and on a signal only.")
    save_total_limit: int = setting(2, "Newest checkpoints to keep, beside the best one by its held-out loss.")
    output_dir: str | None = setting(None, "Run folder. Default: runs/<recipe>-<date>-<time>.")
    resume_from_checkpoint: str = setting(
        "auto",
        "auto: go on where --output_dir holds a run. Or a checkpoint, or a run folder, to go on from. none: never.",
    )
    allow_config_change: list[str] | None = setting(
        None, "Settings that a run may go on with under another value, e.g. learning_rate max_steps."
    )
    max_bad_steps: int = setting(3, "End the run after so many steps in a row whose loss or gradient is not finite.")
    max_failed_saves: int = setting(3, "End the run after so many checkpoints in a row that could not be written.")
    rank_timeout_s: float = setting(60, "Take a rank for dead that gave no sign of life for so many seconds.")
    prepare_only: bool = setting(
        False, "Download the base, tokenize the data and check both with the other settings, then leave; needs no GPU."
    )
    step_timeout_s: float = setting(
        600, "Take a run for stalled, and end it, where no micro-batch was done for so many seconds; 0 for never."
    )
    report_to: str = setting(
        "wandb",
        "Where metrics.jsonl is mirrored to: none, or some of wandb, tensorboard, trackio and accelerate's other "
        "trackers, with commas between them.",
    )
    wandb_log_adapter: bool = setting(False, "Keep the adapter in Weights & Biases too, as an artifact.")
    sample_prompt: str = setting("", "Complete this prompt at each evaluation; empty for none.")
    num_eval_samples: int = setting(0, "Complete so many held-out rows at each evaluation.")
    profile_steps: str | None = setting(
        None, "FIRST:LAST, e.g. 10:13: write a trace of these steps for each rank, to be opened in Perfetto."
    )
    push_to_hub: bool = setting(False, "Push the adapter to the hub at the end; needs --hub_model_id.")
    hub_model_id: str | None = setting(None, "Repository on the hub to push the adapter to.")

    def __post_init__(self):
        for name in ("max_length", "lora_r", "lora_alpha", "per_device_train_batch_size", "gradient_accumulation_steps",
                     "per_device_eval_batch_size", "max_steps", "logging_steps", "save_total_limit",
                     "max_bad_steps", "max_failed_saves", "shard_size", "context_parallel_size",
                     "num_labels"):  # fmt: skip
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be 1 or more")
        for name in ("warmup_steps", "eval_steps", "save_steps", "weight_decay", "max_grad_norm", "seed",
                     "step_timeout_s", "num_eval_samples"):  # fmt: skip
            require(getattr(self, name) >= 0, name, getattr(self, name), "must be 0 or more")
        require(
            self.rank_timeout_s >= 5, "rank_timeout_s", self.rank_timeout_s, "must be 5 or more: a sign comes a second"
        )
        _check_allowed_changes(self.allow_config_change or ())
        _check_trackers(self.report_to)
        to_wandb = "wandb" in self.report_to.split(",")
        why = "has no effect without --report_to wandb"
        require(to_wandb or not self.wandb_log_adapter, "wandb_log_adapter", True, why)
        first, _, last = (self.profile_steps or "1:1").partition(":")
        fits = first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)
        require(fits, "profile_steps", self.profile_steps, "must be FIRST:LAST, steps from 1, e.g. 10:13")
        for name in ("eval_fraction", "lora_dropout"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "must be at least 0 and below 1")
        grouped = self.train_sampling_strategy == "group_by_length"
        why = "has no effect with --packing true, which leaves next to no padding"
        require(not (grouped and self.packing), "train_sampling_strategy", self.train_sampling_strategy, why)
        require(self.max_length >= 2, "max_length", self.max_length, "must be 2 or more: a token predicts the next")
        for pair in self.rename_columns or ():
            old, _, new = pair.partition("=")
            require(old and new, "rename_columns", pair, "must be OLD=NEW, e.g. question=prompt")
        if self.streaming:
            why = "needs --max_steps: a stream's length is not known before its end"
            require(self.num_train_epochs is None, "streaming", True, why)
        resident, budget, ratio = self.resident_layers, self.memory_budget_gib, self.loraplus_lr_ratio
        valid = resident in ("all", "auto") or resident.isdigit()
        require(valid, "resident_layers", resident, "must be a number, all or auto")
        require(budget is None or budget > 0, "memory_budget_gib", budget, "must be above 0")
        uncached = self.quantized_cache and self.quantization == "none"
        require(not uncached, "quantized_cache", self.quantized_cache, "has no effect with --quantization none")
        auto = resident == "auto"
        require(budget is None or auto, "memory_budget_gib", budget, "has no effect without --resident_layers auto")
        require(ratio is None or ratio > 0, "loraplus_lr_ratio", ratio, "must be above 0, e.g. 16")
        require(
            0 < self.learning_rate < 1,
            "learning_rate",
            self.learning_rate,
            "must be above 0 and below 1, e.g. 2e-4",
        )
        require(
            self.num_train_epochs is None or self.num_train_epochs > 0,
            "num_train_epochs",
            self.num_train_epochs,
            "must be above 0",
        )
        both = self.max_steps is not None and self.num_train_epochs is not None
        require(
            not both,
            "max_steps",
            self.max_steps,
            f"and --num_train_epochs {self.num_train_epochs} exclude each other: give one of them",
        )
        dead = self.max_steps == 1 and self.warmup_steps  # the warm-up starts at a learning rate of 0
        require(not dead, "max_steps", 1, f"trains nothing with --warmup_steps {self.warmup_steps}: give more, or 0")
        require(not self.push_to_hub or self.hub_model_id, "push_to_hub", True, "needs --hub_model_id USER/NAME")
        require(
            self.push_to_hub or not self.hub_model_id,
            "hub_model_id",
            self.hub_model_id,
            "has no effect without --push_to_hub true",
        )


# Of a run that goes on. These change nothing of the training, so they may differ from start to start:
FREE_ON_RESUME = set(
    "quantized_cache resident_layers shard_size memory_budget_gib gather_once deepspeed gradient_checkpointing strict "
    "per_device_eval_batch_size logging_steps eval_steps save_steps save_total_limit output_dir resume_from_checkpoint "
    "allow_config_change max_bad_steps max_failed_saves rank_timeout_s step_timeout_s report_to sample_prompt "
    "wandb_log_adapter num_eval_samples profile_steps push_to_hub hub_model_id prepare_only".split()
)
# These do, and may where --allow_config_change names them; mixed_precision is the launcher's. What is in neither set
# gives the state another shape, or the data another order.
ASK_ON_RESUME = set(
    "mixed_precision dataset_name dataset_config dataset_train_split dataset_test_split eval_fraction dataset_format "
    "dataset_text_field rename_columns chat_template train_on_inputs max_length overlong_rows packing "
    "train_sampling_strategy context_parallel_size lora_dropout max_steps num_train_epochs learning_rate warmup_steps "
    "lr_scheduler_type weight_decay max_grad_norm".split()
)


# Those of accelerate, beside Weights & Biases: each wants its package.
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio")


def _check_trackers(report_to: str) -> None:
    names = report_to.split(",")
    valid = ("wandb", *TRACKERS)
    for name in names if report_to != "none" else ():
        every = f"give none, or some of {','.join(valid)}"
        require(name in valid, "report_to", report_to, f"no tracker {name!r}; {did_you_mean(name, valid, every)}")
        missing = name in TRACKERS and importlib.util.find_spec(name) is None
        require(not missing, "report_to", report_to, f"needs a package: pip install {name}")
    require(len(set(names)) == len(names), "report_to", report_to, "names one twice")


def _check_allowed_changes(names: Iterable[str]) -> None:
    known = {field.name for field in dataclasses.fields(TrainConfig)} | ASK_ON_RESUME
    able = f"these can change in a run: {' '.join(sorted(ASK_ON_RESUME))}"
    for name in names:
        require(name in known, "allow_config_change", name, f"no such setting; {did_you_mean(name, known, able)}")
        require(name not in FREE_ON_RESUME, "allow_config_change", name, "may change without being named here")
        require(name in ASK_ON_RESUME, "allow_config_change", name, f"cannot change in a run; {able}")


def fill_in(config: TrainConfig, defaults: TrainConfig, chosen: dict) -> TrainConfig:
    """With the base and data of `chosen` where no flag names them.

    `chosen` holds settings: those of the data (dataset_...) take effect where no flag names the data, the others where
    no flag names the base; all of them only in place of the recipe's `defaults`.
    """
    for name in ("model_name_or_path", "dataset_name"):
        if getattr(config, name) is None:
            of_data = name == "dataset_name"
            fitting = {key: value for key, value in chosen.items() if key.startswith("dataset") == of_data}
            unset = {key: value for key, value in fitting.items() if getattr(config, key) == getattr(defaults, key)}
            config = dataclasses.replace(config, **unset)
    return config


class _Parser(HfArgumentParser):
    def error(self, message):  # argparse would print its usage and exit here, on every rank
        raise UserError(message.removeprefix("argument "))


def parse_config(defaults: TrainConfig, argv: list[str], *, description: str = "") -> TrainConfig:
    """The recipe's defaults, overridden by `--config FILE.yaml`, overridden by flags. Raises UserError."""
    parser = _Parser(TrainConfig, description=description, allow_abbrev=False)
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="Settings from a file, e.g. the config.yaml of an earlier run; flags override it.",
    )
    parser.set_defaults(**dataclasses.asdict(defaults))
    file = parser.parse_known_args(argv)[0].config
    settings = _read_yaml(Path(file)) if file else {}
    for name, other in (
        ("max_steps", "num_train_epochs"),
        ("num_train_epochs", "max_steps"),
    ):  # the newest word wins
        if f"--{name}" in argv:
            settings.pop(other, None)
        if f"--{name}" in argv or settings.get(name) is not None:
            parser.set_defaults(**{other: None})
    argv = as_flags(settings) + argv
    config, _, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        names = [f.name for f in dataclasses.fields(TrainConfig)] + ["config"]
        every = f"the flags are {' '.join('--' + n for n in names)}"
        hint = did_you_mean(unknown[0].lstrip("-").replace("-", "_"), names, every, prefix="--")
        raise UserError(f"{unknown[0]}: no such flag; {hint}")
    return config


def _read_yaml(path: Path) -> dict:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: cannot be read: {' '.join(str(error).split())}") from None
    require(isinstance(settings, dict), "config", path, "must hold one `name: value` per line")
    return settings


def as_flags(settings: dict) -> list[str]:
    """{"lora_r": 8} as ["--lora_r", "8"], so that a file is read with the types and errors of the command line."""
    flags = []
    for name, value in settings.items():
        if value is not None:
            flags += [f"--{name}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return flags
