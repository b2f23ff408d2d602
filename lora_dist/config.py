"""What to train: every setting of a run, and the checks that need no model.

Settings carry TrainingArguments' names where one exists. They are grouped as `--help` shows them: one dataclass per
group, which also checks its own settings. This module imports no torch, so a typo is answered in a second; `flags.py`
reads the settings from a command line and a YAML file.
"""

import dataclasses
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from lora_dist.errors import did_you_mean, require

# accelerate's trackers that may be named beside Weights & Biases; each needs its package.
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio")


def setting(default, help: str, *, resume: Literal["fixed", "ask", "free"] = "fixed"):
    """A field of a config class.

    `resume` says whether a run that is continued may use another value. "free": yes, because it changes nothing about
    the training. "ask": only if --allow_config_change names it. "fixed": no, because it would alter the shape of the
    saved state or the order of the data.
    """
    metadata = {"help": help, "resume": resume}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _check_at_least(config, minimum: float, names: Iterable[str]) -> None:
    for name in names:
        value = getattr(config, name)
        require(value is None or value >= minimum, name, value, f"must be {minimum} or more")


@dataclass(frozen=True)
class DataSettings:
    """Data"""

    dataset_name: str | None = setting(
        None,
        "Data set: a hub name; a .json, .jsonl, .csv, .parquet or .txt file; a directory of such files or one that "
        "save_to_disk wrote; embedded or embedded/complaints. Default: the recipe's choice with or without a GPU.",
        resume="ask",
    )
    dataset_config: str | None = setting(None, "Configuration of a hub data set that has several.", resume="ask")
    dataset_train_split: str = setting("train", "Split to train on.", resume="ask")
    dataset_test_split: str | None = setting(
        None, "Split to evaluate on, or none. Default: test, if the data set has one.", resume="ask"
    )
    eval_fraction: float = setting(
        0.05, "Fraction of the rows to hold out for evaluation if there is no split for it; 0 for none.", resume="ask"
    )
    streaming: bool = setting(
        False, "Read the data while training, for data that is too large for the disk. Needs --max_steps."
    )
    dataset_format: Literal["auto", "text", "prompt_completion", "alpaca", "messages"] = setting(
        "auto",
        "What the columns hold: text; prompt and completion; instruction, input and output; or the messages of a "
        "chat. auto: decided by the names of the columns.",
        resume="ask",
    )
    dataset_label_field: str | None = setting(
        None,
        "SEQ_CLS: column that holds the class of a row, or a list of its classes. TOKEN_CLS: column that holds the "
        "classes of a row's words.",
    )
    num_labels: int | None = setting(None, "SEQ_CLS, TOKEN_CLS: use only this many classes, the most frequent ones.")
    dataset_text_field: str | None = setting(
        None, "Column that holds the text to train on. Default: text.", resume="ask"
    )
    rename_columns: list[str] | None = setting(
        None, "Rename columns, as OLD=NEW, to the names that --dataset_format expects, e.g. question=prompt.",
        resume="ask",
    )  # fmt: skip
    chat_template: str | None = setting(
        None, "Jinja file that renders messages; it is saved with the adapter. Default: the tokenizer's template.",
        resume="ask",
    )  # fmt: skip
    train_on_inputs: bool = setting(
        False, "Train on prompts and on every turn of a chat, not only on completions and the assistant's turns.",
        resume="ask",
    )  # fmt: skip
    max_length: int = setting(512, "Longest row, in tokens.", resume="ask")
    overlong_rows: Literal["truncate", "split", "drop"] = setting(
        "truncate", "What to do with rows longer than --max_length: cut the end off, split them, or leave them out.",
        resume="ask",
    )  # fmt: skip
    packing: bool = setting(
        False, "Fill each row up to --max_length with several documents, which do not see each other.", resume="ask"
    )
    train_sampling_strategy: Literal["random", "group_by_length"] = setting(
        "random", "Order of the rows: random, or rows of similar length in the same step, which saves padding.",
        resume="ask",
    )  # fmt: skip
    strict: bool = setting(False, "Refuse data that would otherwise cause a warning.", resume="free")

    def check(self) -> None:
        _check_at_least(self, 1, ("max_length", "num_labels"))
        require(self.max_length >= 2, "max_length", self.max_length, "must be 2 or more: a token predicts the next one")
        fraction = self.eval_fraction
        require(0 <= fraction < 1, "eval_fraction", fraction, "must be at least 0 and below 1")
        grouped = self.train_sampling_strategy == "group_by_length"
        why = "has no effect with --packing true, which leaves almost no padding"
        require(not (grouped and self.packing), "train_sampling_strategy", self.train_sampling_strategy, why)
        for pair in self.rename_columns or ():
            old, _, new = pair.partition("=")
            require(old and new, "rename_columns", pair, "must be OLD=NEW, e.g. question=prompt")


@dataclass(frozen=True)
class BaseSettings:
    """Base model and its placement"""

    model_name_or_path: str | None = setting(
        None,
        "Base model: a directory, a hub name, or embedded (a small OPT that ships with lora-dist). "
        "Default: the recipe's choice with or without a GPU.",
    )
    task_type: Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS"] = setting(
        "CAUSAL_LM",
        "Task, in PEFT's names: continue a text, answer with a decoder, classify rows, or classify words.",
    )
    quantization: Literal["int8", "nf4", "nf4_plain", "none"] = setting(
        "int8",
        "How the frozen base is stored: int8 (LLM.int8), nf4 (with double quantization), nf4_plain (without), or none "
        "(as the checkpoint has it).",
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = setting(
        "auto",
        "Precision to compute in. auto: what the launcher's config says, except that bf16 becomes no (fp32) on a CPU "
        "that has no bf16 instructions.",
        resume="ask",
    )
    quantized_cache: str | None = setting(
        None,
        "Directory for the quantized base: the first start writes it, later ones read it, on any number of ranks.",
        resume="free",
    )
    resident_layers: str = setting(
        "0",
        "fsdp: number of decoder layers that each rank keeps whole and never gathers; or all; or auto for as many as "
        "the memory allows.",
        resume="free",
    )
    shard_size: int | None = setting(
        None,
        "hsdp: number of ranks that share one copy of the base. Default: the ranks of a node, so that the base never "
        "crosses nodes.",
        resume="free",
    )
    memory_budget_gib: float | None = setting(
        None, "Memory per rank that --resident_layers auto plans with. Default: what is free on the device.",
        resume="free",
    )  # fmt: skip
    gather_once: bool = setting(
        False,
        "fsdp: gather once per optimizer step instead of twice per micro-batch. Holds the whole quantized base in "
        "between.",
        resume="free",
    )
    deepspeed: str | None = setting(
        None, "DeepSpeed config (.json) for the deepspeed launcher; an accelerate config names its own.", resume="free"
    )
    context_parallel_size: int = setting(
        1, "Number of ranks that share each row, for rows that are too long for one GPU.", resume="ask"
    )
    gradient_checkpointing: bool = setting(
        True, "Recompute each layer's activations in the backward pass instead of keeping them.", resume="free"
    )

    def check(self) -> None:
        _check_at_least(self, 1, ("shard_size", "context_parallel_size"))
        resident, budget = self.resident_layers, self.memory_budget_gib
        valid = resident in ("all", "auto") or resident.isdigit()
        require(valid, "resident_layers", resident, "must be a number, all or auto")
        require(budget is None or budget > 0, "memory_budget_gib", budget, "must be above 0")
        auto = resident == "auto"
        require(budget is None or auto, "memory_budget_gib", budget, "has no effect without --resident_layers auto")
        useless = self.quantized_cache and self.quantization == "none"
        require(not useless, "quantized_cache", self.quantized_cache, "has no effect with --quantization none")


@dataclass(frozen=True)
class LoraSettings:
    """LoRA"""

    lora_r: int = setting(16, "Rank of the adapters.")
    lora_alpha: int = setting(32, "Scale of the adapters: their output is multiplied by lora_alpha / lora_r.")
    lora_dropout: float = setting(0.05, "Dropout on the input of the adapters.", resume="ask")
    lora_target_modules: list[str] = setting(
        ["q_proj", "v_proj"], "Names of the linear layers that get an adapter, or all-linear."
    )
    lora_bias: Literal["none", "all", "lora_only"] = setting(
        "none", "Biases of the base to train: none, all, or those of the layers that have an adapter."
    )
    use_rslora: bool = setting(False, "Rank-stabilized LoRA: scale by lora_alpha / sqrt(lora_r).")
    use_dora: bool = setting(False, "DoRA: also train the magnitude of each weight's rows.")
    modules_to_save: list[str] | None = setting(
        None, "Names of modules, such as lm_head, that are trained whole and saved with the adapter."
    )
    loraplus_lr_ratio: float | None = setting(
        None, "LoRA+: learning rate of lora_B as a multiple of the learning rate of lora_A, e.g. 16."
    )

    def check(self) -> None:
        _check_at_least(self, 1, ("lora_r", "lora_alpha"))
        dropout, ratio = self.lora_dropout, self.loraplus_lr_ratio
        require(0 <= dropout < 1, "lora_dropout", dropout, "must be at least 0 and below 1")
        require(ratio is None or ratio > 0, "loraplus_lr_ratio", ratio, "must be above 0, e.g. 16")


@dataclass(frozen=True)
class OptimizationSettings:
    """Batches and optimization"""

    per_device_train_batch_size: int = setting(4, "Sequences per micro-batch.")
    gradient_accumulation_steps: int = setting(4, "Micro-batches per rank and optimizer step.")
    per_device_eval_batch_size: int = setting(8, "Sequences per evaluation micro-batch.", resume="free")
    max_steps: int | None = setting(
        None, "Number of optimizer steps; give this or --num_train_epochs, not both.", resume="ask"
    )
    num_train_epochs: float | None = setting(
        None, "Number of passes over the data; give this or --max_steps, not both.", resume="ask"
    )
    learning_rate: float = setting(2e-4, "Highest learning rate.", resume="ask")
    warmup_steps: int = setting(100, "Number of steps of linear warm-up.", resume="ask")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = setting(
        "linear", "Schedule of the learning rate after the warm-up.", resume="ask"
    )
    optim: Literal["adamw_torch"] = setting("adamw_torch", "Optimizer.")
    weight_decay: float = setting(0.0, "AdamW's weight decay.", resume="ask")
    max_grad_norm: float = setting(
        1.0, "Clip the gradient of the whole batch to this norm; 0 for no clipping.", resume="ask"
    )
    seed: int = setting(42, "Seed of the data order, the initial adapters and dropout.")
    max_bad_steps: int = setting(
        3, "End the run after this many steps in a row whose loss or gradient is not finite.", resume="free"
    )

    def check(self) -> None:
        _check_at_least(self, 1, ("per_device_train_batch_size", "gradient_accumulation_steps",
                                  "per_device_eval_batch_size", "max_steps", "max_bad_steps"))  # fmt: skip
        _check_at_least(self, 0, ("warmup_steps", "weight_decay", "max_grad_norm", "seed"))
        rate, epochs = self.learning_rate, self.num_train_epochs
        require(0 < rate < 1, "learning_rate", rate, "must be above 0 and below 1, e.g. 2e-4")
        require(epochs is None or epochs > 0, "num_train_epochs", epochs, "must be above 0")
        both = self.max_steps is not None and epochs is not None
        why = f"and --num_train_epochs {epochs} exclude each other: give one of them"
        require(not both, "max_steps", self.max_steps, why)
        dead = self.max_steps == 1 and self.warmup_steps  # the warm-up starts at a learning rate of 0
        why = f"trains nothing with --warmup_steps {self.warmup_steps}: give more steps, or --warmup_steps 0"
        require(not dead, "max_steps", 1, why)


@dataclass(frozen=True)
class RunSettings:
    """Run folder, checkpoints and faults"""

    output_dir: str | None = setting(None, "Run folder. Default: runs/<recipe>-<date>-<time>.", resume="free")
    save_steps: int = setting(
        50, "Save a checkpoint every this many steps; 0 for only at the end and on a signal.", resume="free"
    )
    save_total_limit: int = setting(
        2, "Number of newest checkpoints to keep, beside the one with the lowest held-out loss.", resume="free"
    )
    resume_from_checkpoint: str = setting(
        "auto",
        "auto: continue the run that --output_dir holds, if it holds one. Or a checkpoint or run folder to continue "
        "from. none: never continue.",
        resume="free",
    )
    allow_config_change: list[str] | None = setting(
        None, "Settings that may have another value when a run is continued, e.g. learning_rate max_steps.",
        resume="free",
    )  # fmt: skip
    max_failed_saves: int = setting(
        3, "End the run after this many checkpoints in a row that could not be written.", resume="free"
    )
    rank_timeout_s: float = setting(
        60, "Seconds without a sign of life after which a rank counts as dead.", resume="free"
    )
    step_timeout_s: float = setting(
        600, "Seconds without a finished micro-batch after which the run counts as stalled and ends; 0 for never.",
        resume="free",
    )  # fmt: skip
    prepare_only: bool = setting(
        False, "Download the base, tokenize the data, check both against the settings, then leave. Needs no GPU.",
        resume="free",
    )  # fmt: skip

    def check(self) -> None:
        _check_at_least(self, 1, ("save_total_limit", "max_failed_saves"))
        _check_at_least(self, 0, ("save_steps", "step_timeout_s"))
        timeout_s = self.rank_timeout_s
        require(timeout_s >= 5, "rank_timeout_s", timeout_s, "must be 5 or more: ranks give a sign of life each second")
        _check_allowed_changes(self.allow_config_change or ())


@dataclass(frozen=True)
class TrackingSettings:
    """Logging, evaluation and publishing"""

    logging_steps: int = setting(1, "Log every this many steps.", resume="free")
    eval_steps: int = setting(0, "Evaluate every this many steps; 0 for only at the start and the end.", resume="free")
    report_to: str = setting(
        "wandb",
        "Where metrics go beside metrics.jsonl: none, or some of wandb, tensorboard, trackio and accelerate's other "
        "trackers, separated by commas.",
        resume="free",
    )
    wandb_log_adapter: bool = setting(
        False, "Also store the adapter in Weights & Biases, as an artifact.", resume="free"
    )
    sample_prompt: str = setting("", "Prompt to complete at each evaluation; empty for none.", resume="free")
    num_eval_samples: int = setting(0, "Number of held-out rows to complete at each evaluation.", resume="free")
    profile_steps: str | None = setting(
        None, "FIRST:LAST, e.g. 10:13: write a trace of these steps for each rank, to be opened in Perfetto.",
        resume="free",
    )  # fmt: skip
    push_to_hub: bool = setting(False, "Push the adapter to the hub at the end; needs --hub_model_id.", resume="free")
    hub_model_id: str | None = setting(None, "Repository on the hub to push the adapter to.", resume="free")

    def check(self) -> None:
        _check_at_least(self, 1, ("logging_steps",))
        _check_at_least(self, 0, ("eval_steps", "num_eval_samples"))
        _check_trackers(self.report_to)
        to_wandb = "wandb" in self.report_to.split(",")
        why = "has no effect without --report_to wandb"
        require(to_wandb or not self.wandb_log_adapter, "wandb_log_adapter", True, why)
        first, _, last = (self.profile_steps or "1:1").partition(":")
        fits = first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)
        require(fits, "profile_steps", self.profile_steps, "must be FIRST:LAST, steps counted from 1, e.g. 10:13")
        require(not self.push_to_hub or self.hub_model_id, "push_to_hub", True, "needs --hub_model_id USER/NAME")
        why = "has no effect without --push_to_hub true"
        require(self.push_to_hub or not self.hub_model_id, "hub_model_id", self.hub_model_id, why)


# In the order of --help. A dataclass takes the fields of its last parent first.
GROUPS = (BaseSettings, DataSettings, LoraSettings, OptimizationSettings, RunSettings, TrackingSettings)


@dataclass(frozen=True)
class TrainConfig(*reversed(GROUPS)):
    """All settings of a run. Raises UserError if one of them is not valid."""

    def __post_init__(self):
        for group in GROUPS:
            group.check(self)
        if self.streaming:
            why = "needs --max_steps: the length of a stream is not known before its end"
            require(self.num_train_epochs is None, "streaming", True, why)


def _named(resume: str) -> frozenset[str]:
    return frozenset(f.name for f in dataclasses.fields(TrainConfig) if f.metadata["resume"] == resume)


FREE_ON_RESUME, ASK_ON_RESUME = _named("free"), _named("ask")


def _check_trackers(report_to: str) -> None:
    names = report_to.split(",")
    valid = ("wandb", *TRACKERS)
    for name in names if report_to != "none" else ():
        every = f"give none, or some of {','.join(valid)}"
        require(name in valid, "report_to", report_to, f"no tracker {name!r}; {did_you_mean(name, valid, every)}")
        missing = name in TRACKERS and importlib.util.find_spec(name) is None
        require(not missing, "report_to", report_to, f"needs a package: pip install {name}")
    require(len(set(names)) == len(names), "report_to", report_to, "names a tracker twice")


def _check_allowed_changes(names: Iterable[str]) -> None:
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    able = f"these settings can change: {' '.join(sorted(ASK_ON_RESUME))}"
    for name in names:
        require(name in known, "allow_config_change", name, f"no such setting; {did_you_mean(name, known, able)}")
        require(name not in FREE_ON_RESUME, "allow_config_change", name, "may change without being named here")
        require(name in ASK_ON_RESUME, "allow_config_change", name, f"cannot change in a run; {able}")
