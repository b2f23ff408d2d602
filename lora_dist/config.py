"""What to train: every setting of a run, and the checks that need no model.

Settings carry TrainingArguments' names where one exists. They are grouped as `--help` shows them: one dataclass per
group, which also checks its own settings. This module imports no torch, so a typo is answered in a second; `flags.py`
reads the settings from a command line and a YAML file.
"""

import dataclasses
import importlib.util
import re
import typing
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from lora_dist.errors import MAX_VALUE_CHARS, UserError, did_you_mean, in_one_line, require

# accelerate's trackers that may be named beside Weights & Biases; each needs its package.
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio")

MAX_TEXT_CHARS = 4096  # of a name or a path; Linux takes no longer path
MAX_PROMPT_CHARS = 100_000  # also of the names of many data files
MAX_STEPS = 10_000_000
MAX_TOKENS = 2**30  # of a rank and step, if every row is as long as --max_length
WEEK_S = 7 * 24 * 3600


@dataclass(frozen=True)
class Bounds:
    """The numbers that a setting may be."""

    low: float
    high: float
    unit: str = ""  # in the plural
    without: str = ""  # the ends that are not allowed themselves: "low", "high" or "low and high"

    def hold(self, value: float) -> bool:
        ends = (self.low if "low" in self.without else None, self.high if "high" in self.without else None)
        return self.low <= value <= self.high and value not in ends  # False for nan

    def __str__(self) -> str:
        low = f"above {self.low:,}" if "low" in self.without else f"{self.low:,} or more"
        high = f"below {self.high:,}" if "high" in self.without else f"at most {self.high:,}"
        return f"{low} and {high} {self.unit}".rstrip()


STEPS, STEPS_OR_0 = Bounds(1, MAX_STEPS, "steps"), Bounds(0, MAX_STEPS, "steps")
RANKS, SEQUENCES = Bounds(1, 65_536, "ranks"), Bounds(1, 65_536, "sequences")
CHECKPOINTS = Bounds(1, 1_000_000, "checkpoints")


def setting(default, help: str, bounds: Bounds | None = None, *, resume: Literal["fixed", "ask", "free"] = "fixed"):
    """A field of a config class. Every number has bounds.

    `resume` says whether a run that is continued may use another value. "free": yes, because it changes nothing about
    the training. "ask": only if --allow_config_change names it. "fixed": no, because it would alter the shape of the
    saved state or the order of the data.
    """
    metadata = {"help": help, "resume": resume, "bounds": bounds}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _check_value(name: str, value, annotation, bounds: Bounds | None) -> None:
    """Raises UserError unless a setting's value has its type, is within its bounds, and is text of one line."""
    if value is None and type(None) in typing.get_args(annotation):
        return
    kinds = [kind for kind in typing.get_args(annotation) or (annotation,) if kind is not type(None)]
    if bounds:
        kind = "a whole number" if int in kinds else "a number"
        numeric = isinstance(value, int if int in kinds else (int, float)) and not isinstance(value, bool)
        require(numeric, name, value, f"must be {kind}, {bounds}")
        require(bounds.hold(value), name, value, f"must be {bounds}")
    elif bool in kinds:
        require(isinstance(value, bool), name, value, "must be true or false")
    elif list[str] in kinds or annotation == list[str]:
        require(isinstance(value, list), name, value, "must be a list of words")
        for word in value:
            check_text(f"--{name}", word)
            require(not word.startswith("-"), name, word, "must not start with a dash: it would be read as a flag")
    elif str in kinds:
        many_files = name == "dataset_name" and isinstance(value, str) and " " in value
        most = MAX_PROMPT_CHARS if name == "sample_prompt" or many_files else MAX_TEXT_CHARS
        check_text(f"--{name}", value, most=most, many_lines=name == "sample_prompt")
    else:  # Literal
        require(value in kinds, name, value, f"must be one of {', '.join(kinds)}")


def check_text(what: str, text, *, most: int = MAX_TEXT_CHARS, many_lines: bool = False) -> None:
    """Raises UserError unless it is text that can be a name: not empty, not too long, and in one line.

    `what` names it in the error: "--output_dir". With `many_lines`, it may also be empty or have several lines.
    """

    def check(condition, rule: str) -> None:
        if not condition:
            raise UserError(f"{what} {in_one_line(text, MAX_VALUE_CHARS)}: {rule}")

    check(isinstance(text, str), "must be text")
    check(text != "--", "must not be two dashes: argparse leaves them out")
    check(len(text) <= most, f"has {len(text):,} characters; it must have at most {most:,}")
    check(text.strip() or many_lines, "is empty; give a value, or leave it out")
    kinds = ("Cs",) if many_lines else ("Cc", "Cs", "Zl", "Zp")
    broken = next((c for c in text if unicodedata.category(c) in kinds or c == "\0"), None)
    found = "bytes that are not UTF-8" if str(broken) >= "\ud800" else f"the character {broken!r}"
    check(broken is None, f"has {found}; leave it out")


def check_project(what: str, name: str) -> None:
    """Raises UserError unless it can be the name of a Weights & Biases project."""
    check_text(what, name, most=128)
    odd = sorted(set(name) & set("/\\#?%:"))
    if odd:
        raise UserError(f"{what} {name}: has {' '.join(odd)}, which no project of Weights & Biases may have")


@dataclass(frozen=True)
class DataSettings:
    """Data"""

    dataset_name: str | None = setting(
        None,
        "Data set: a hub name; one or several .json, .jsonl, .csv, .tsv, .txt, .parquet or .arrow files, or a pattern "
        "for them in quotes; a directory of such files or one that save_to_disk wrote; embedded, "
        "embedded/complaints or embedded/preferences. Default: the recipe's choice with or without a GPU.",
        resume="ask",
    )
    dataset_config: str | None = setting(None, "Configuration of a hub data set that has several.", resume="ask")
    dataset_train_split: str = setting("train", "Split to train on.", resume="ask")
    dataset_test_split: str | None = setting(
        None, "Split to evaluate on; none: use --eval_fraction. Default: test, if the data set has one.", resume="ask"
    )
    eval_fraction: float = setting(
        0.05,
        "Fraction of the rows to hold out for evaluation if there is no split for it; 0 for none.",
        Bounds(0, 1, without="high"),
        resume="ask",
    )
    streaming: bool = setting(
        False, "Read the data while training, for data that is too large for the disk. Needs --max_steps."
    )
    dataset_format: Literal["auto", "text", "prompt_completion", "alpaca", "messages", "preference"] = setting(
        "auto",
        "What the columns hold: text; prompt and completion; instruction, input and output; the messages of a chat; or "
        "a chosen and a rejected answer. auto: decided by the names of the columns.",
        resume="ask",
    )
    dataset_label_field: str | None = setting(
        None,
        "SEQ_CLS: column that holds the class of a row, or a list of its classes. TOKEN_CLS: column that holds the "
        "classes of a row's words.",
    )
    num_labels: int | None = setting(
        None, "SEQ_CLS, TOKEN_CLS: use only this many classes, the most frequent ones.", Bounds(1, 1_000_000, "classes")
    )
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
    max_length: int = setting(512, "Longest row, in tokens.", Bounds(2, 2**24, "tokens"), resume="ask")
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
        grouped = self.train_sampling_strategy == "group_by_length"
        why = "has no effect with --packing true, which leaves almost no padding"
        require(not (grouped and self.packing), "train_sampling_strategy", self.train_sampling_strategy, why)
        for pair in self.rename_columns or ():
            old, _, new = pair.partition("=")
            require(old and new, "rename_columns", pair, "must be OLD=NEW, e.g. question=prompt")
        pairs = [pair.split("=", 1) for pair in self.rename_columns or ()]
        for end, names in (("from", [old for old, _ in pairs]), ("to", [new for _, new in pairs])):
            twice = next((name for name in names if names.count(name) > 1), None)
            shown = " ".join(self.rename_columns or ())
            require(twice is None, "rename_columns", shown, f"renames {end} {twice} twice; name each column once")


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
        RANKS,
        resume="free",
    )
    memory_budget_gib: float | None = setting(
        None, "Memory per rank that --resident_layers auto plans with. Default: what is free on the device.",
        Bounds(0, 1_000_000, "GiB", without="low"), resume="free",
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
        1, "Number of ranks that share each row, for rows that are too long for one GPU.", RANKS, resume="ask"
    )
    gradient_checkpointing: bool = setting(
        True, "Recompute each layer's activations in the backward pass instead of keeping them.", resume="free"
    )

    def check(self) -> None:
        resident, budget = self.resident_layers, self.memory_budget_gib
        valid = resident in ("all", "auto") or re.fullmatch("[0-9]{1,6}", resident)
        require(valid, "resident_layers", resident, "must be a number, all or auto")
        auto = resident == "auto"
        require(budget is None or auto, "memory_budget_gib", budget, "has no effect without --resident_layers auto")
        useless = self.quantized_cache and self.quantization == "none"
        require(not useless, "quantized_cache", self.quantized_cache, "has no effect with --quantization none")


@dataclass(frozen=True)
class LoraSettings:
    """LoRA"""

    lora_r: int = setting(16, "Rank of the adapters.", Bounds(1, 65_536))
    lora_alpha: int = setting(
        32, "Scale of the adapters: their output is multiplied by lora_alpha / lora_r.", Bounds(1, 1_000_000)
    )
    lora_dropout: float = setting(
        0.05, "Dropout on the input of the adapters.", Bounds(0, 1, without="high"), resume="ask"
    )
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
        None,
        "LoRA+: learning rate of lora_B as a multiple of the learning rate of lora_A, e.g. 16.",
        Bounds(1e-6, 1_000_000),
    )

    adapter_name_or_path: str | None = setting(
        None,
        "Directory of a PEFT adapter to go on training from, made with the same LoRA settings. Default: a new one.",
    )

    def check(self) -> None:
        require(self.lora_target_modules, "lora_target_modules", "", "is empty; give names, or all-linear")


@dataclass(frozen=True)
class OptimizationSettings:
    """Batches and optimization"""

    per_device_train_batch_size: int = setting(4, "Sequences per micro-batch.", SEQUENCES)
    gradient_accumulation_steps: int = setting(
        4, "Micro-batches per rank and optimizer step.", Bounds(1, 1_000_000, "micro-batches")
    )
    per_device_eval_batch_size: int = setting(8, "Sequences per evaluation micro-batch.", SEQUENCES, resume="free")
    max_steps: int | None = setting(
        None, "Number of optimizer steps; give this or --num_train_epochs, not both.", STEPS, resume="ask"
    )
    num_train_epochs: float | None = setting(
        None,
        "Number of passes over the data; give this or --max_steps, not both.",
        Bounds(0, 10_000, "epochs", without="low"),
        resume="ask",
    )
    learning_rate: float = setting(  # fp32 holds nothing that is much smaller
        2e-4, "Highest learning rate.", Bounds(1e-30, 1, without="high"), resume="ask"
    )
    warmup_steps: int = setting(100, "Number of steps of linear warm-up.", STEPS_OR_0, resume="ask")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = setting(
        "linear", "Schedule of the learning rate after the warm-up.", resume="ask"
    )
    optim: Literal["adamw_torch"] = setting("adamw_torch", "Optimizer.")
    weight_decay: float = setting(0.0, "AdamW's weight decay.", Bounds(0, 1_000), resume="ask")
    max_grad_norm: float = setting(
        1.0, "Clip the gradient of the whole batch to this norm; 0 for no clipping.", Bounds(0, 1_000_000), resume="ask"
    )
    seed: int = setting(42, "Seed of the data order, the initial adapters and dropout.", Bounds(0, 2**32 - 1))
    max_bad_steps: int = setting(
        3, "End the run after this many steps in a row whose loss or gradient is not finite.", STEPS, resume="free"
    )

    def check(self) -> None:
        rate, epochs = self.learning_rate, self.num_train_epochs
        both = self.max_steps is not None and epochs is not None
        why = f"and --num_train_epochs {epochs} exclude each other: give one of them"
        require(not both, "max_steps", self.max_steps, why)
        if self.max_steps:
            check_warmup(self, self.max_steps)
        norm = self.max_grad_norm
        require(norm == 0 or norm >= 1e-6, "max_grad_norm", norm, "must be 0, for no clipping, or 1e-6 or more")
        ratio = self.loraplus_lr_ratio or 1
        why = f"times --learning_rate {rate} is {rate * ratio:.3g}, the rate of lora_B; it must be below 1"
        require(rate * ratio < 1, "loraplus_lr_ratio", ratio, why)
        why = f"times --learning_rate {rate} is {rate * self.weight_decay:.3g}; it must be below 1"
        require(rate * self.weight_decay < 1, "weight_decay", self.weight_decay, why)


@dataclass(frozen=True)
class LossSettings:
    """Loss"""

    loss_type: Literal["nll", "sigmoid", "hinge", "ipo", "robust"] = setting(
        "nll",
        "nll: the negative log-likelihood of the trained tokens. Losses of pairs of a chosen and a rejected answer: "
        "sigmoid (DPO), hinge (SLiC), ipo, or robust (DPO for labels that may be wrong).",
        resume="ask",
    )
    beta: float = setting(
        0.1,
        "Losses of pairs: how closely the model is held to the reference; a larger value holds it closer.",
        Bounds(0, 1_000, without="low"),
        resume="ask",
    )
    label_smoothing: float = setting(
        0.0,
        "sigmoid and robust: probability that a pair's answers are the wrong way round.",
        Bounds(0, 0.5, without="high"),
        resume="ask",
    )
    reference_adapter: str | None = setting(
        None,
        "Losses of pairs: directory of a PEFT adapter with the same LoRA settings; the base with it is the reference. "
        "Default: the base alone.",
        resume="ask",
    )

    @property
    def has_pairs(self) -> bool:
        """True if the loss compares a chosen answer with a rejected one."""
        return self.loss_type != "nll"

    def check(self) -> None:
        loss, smoothing = self.loss_type, self.label_smoothing
        for name, default in (("beta", 0.1), ("reference_adapter", None)):
            value, why = getattr(self, name), "has no effect with --loss_type nll; use sigmoid, hinge, ipo or robust"
            require(self.has_pairs or value == default, name, value, why)
        smooths = loss in ("sigmoid", "robust")
        why = f"has no effect with --loss_type {loss}; use sigmoid or robust"
        require(smooths or not smoothing, "label_smoothing", smoothing, why)
        require(loss != "robust" or smoothing, "loss_type", loss, "needs --label_smoothing, e.g. 0.1")


def check_warmup(config: "OptimizationSettings", num_steps: int) -> None:
    """Raises UserError if every step of the run has a learning rate of 0. A warm-up begins there."""
    dead = num_steps == 1 and config.warmup_steps and config.lr_scheduler_type != "constant"
    name = "max_steps" if config.max_steps else "num_train_epochs"
    what = "trains nothing" if config.max_steps else "is 1 step, which trains nothing"
    why = f"{what} with --warmup_steps {config.warmup_steps}: give more steps, or --warmup_steps 0"
    require(not dead, name, getattr(config, name), why)


@dataclass(frozen=True)
class RunSettings:
    """Run folder, checkpoints and faults"""

    output_dir: str | None = setting(None, "Run folder. Default: runs/<recipe>-<date>-<time>.", resume="free")
    save_steps: int = setting(
        50, "Save a checkpoint every this many steps; 0 for only at the end and on a signal.", STEPS_OR_0, resume="free"
    )
    save_total_limit: int = setting(
        2,
        "Number of newest checkpoints to keep, beside the one with the lowest held-out loss.",
        CHECKPOINTS,
        resume="free",
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
        3, "End the run after this many checkpoints in a row that could not be written.", CHECKPOINTS, resume="free"
    )
    rank_timeout_s: float = setting(
        60,
        "Seconds without a sign of life after which a rank counts as dead.",
        Bounds(5, WEEK_S, "seconds"),
        resume="free",
    )
    step_timeout_s: float = setting(
        600, "Seconds without a finished micro-batch after which the run counts as stalled and ends; 0 for never.",
        Bounds(0, WEEK_S, "seconds"), resume="free",
    )  # fmt: skip
    prepare_only: bool = setting(
        False, "Download the base, tokenize the data, check both against the settings, then leave. Needs no GPU.",
        resume="free",
    )  # fmt: skip

    def check(self) -> None:
        _check_allowed_changes(self.allow_config_change or ())


@dataclass(frozen=True)
class TrackingSettings:
    """Logging, evaluation and publishing"""

    logging_steps: int = setting(1, "Log every this many steps.", STEPS, resume="free")
    eval_steps: int = setting(
        0, "Evaluate every this many steps; 0 for only at the start and the end.", STEPS_OR_0, resume="free"
    )
    load_best_model_at_end: bool = setting(
        False,
        "Make adapter/ from the checkpoint with the lowest held-out loss instead of the last step. Needs --eval_steps "
        "and --save_steps.",
        resume="free",
    )
    early_stopping_patience: int = setting(
        0, "End the run after this many evaluations in a row without a lower held-out loss; 0 for never.",
        Bounds(0, 1_000_000, "evaluations"), resume="ask",
    )  # fmt: skip
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
    num_eval_samples: int = setting(
        0, "Number of held-out rows to complete at each evaluation.", Bounds(0, 100_000, "rows"), resume="free"
    )
    profile_steps: str | None = setting(
        None, "FIRST:LAST, e.g. 10:13: write a trace of these steps for each rank, to be opened in Perfetto.",
        resume="free",
    )  # fmt: skip
    push_to_hub: bool = setting(False, "Push the adapter to the hub at the end; needs --hub_model_id.", resume="free")
    hub_model_id: str | None = setting(None, "Repository on the hub to push the adapter to.", resume="free")

    def check(self) -> None:
        for name in ("load_best_model_at_end", "early_stopping_patience"):
            value = getattr(self, name)
            require(self.eval_steps or not value, name, value, "needs --eval_steps N, to evaluate while it trains")
        _check_trackers(self.report_to)
        to_wandb = "wandb" in self.report_to.split(",")
        why = "has no effect without --report_to wandb"
        require(to_wandb or not self.wandb_log_adapter, "wandb_log_adapter", True, why)
        steps = re.fullmatch("([0-9]{1,8}):([0-9]{1,8})", self.profile_steps or "1:1")
        fits = steps and 1 <= int(steps[1]) <= int(steps[2])
        require(fits, "profile_steps", self.profile_steps, "must be FIRST:LAST, steps counted from 1, e.g. 10:13")
        require(not self.push_to_hub or self.hub_model_id, "push_to_hub", True, "needs --hub_model_id USER/NAME")
        why = "has no effect without --push_to_hub true"
        require(self.push_to_hub or not self.hub_model_id, "hub_model_id", self.hub_model_id, why)
        name = re.fullmatch(r"([\w.-]{1,96}/)?[\w.-]{1,96}", self.hub_model_id or "any", re.ASCII)
        require(name, "hub_model_id", self.hub_model_id, "must be USER/NAME, of letters, digits, -, _ and .")


# In the order of --help. A dataclass takes the fields of its last parent first.
GROUPS = (BaseSettings, DataSettings, LoraSettings, LossSettings, OptimizationSettings, RunSettings, TrackingSettings)


@dataclass(frozen=True)
class TrainConfig(*reversed(GROUPS)):
    """All settings of a run. Raises UserError if one of them is not valid."""

    def __post_init__(self):
        for f in dataclasses.fields(self):
            _check_value(f.name, getattr(self, f.name), f.type, f.metadata["bounds"])
        for group in GROUPS:
            group.check(self)
        tokens = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.max_length
        counts = f"--gradient_accumulation_steps {self.gradient_accumulation_steps} --max_length {self.max_length}"
        why = f"with {counts}: {tokens:,} tokens per rank and step; it must be at most {MAX_TOKENS:,}"
        require(tokens <= MAX_TOKENS, "per_device_train_batch_size", self.per_device_train_batch_size, why)
        why = "needs --save_steps N: the adapter is taken from a checkpoint"
        require(self.save_steps or not self.load_best_model_at_end, "load_best_model_at_end", True, why)
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
