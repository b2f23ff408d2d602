"""How a run will be made: decided from settings, the launcher and the model's config, before anything is loaded."""

import dataclasses
import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import get_token
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_dist.config import TrainConfig, check_project, check_text, check_warmup
from lora_dist.data.formats import encode_prompt
from lora_dist.data.micro_batches import MicroBatches
from lora_dist.data.packing import check_packing
from lora_dist.data.rows import PreparedData, Rows, RowStream
from lora_dist.data.tasks import Task, task_of
from lora_dist.embedded import model_path
from lora_dist.environment import bf16_slowdown, cpu_has_bf16, has_gpu
from lora_dist.errors import UserError, require
from lora_dist.files import free_bytes
from lora_dist.model.adapters import (
    check_first_adapter,
    check_first_classes,
    check_targets,
    is_trained_parameter,
    linear_names,
)
from lora_dist.model.files.configs import load_generation_config, load_model_config
from lora_dist.model.files.lazy_weights import open_checkpoint
from lora_dist.model.load import BaseOptions, check_weights, meta_model
from lora_dist.model.memory import Expected, adapter_numel, expected_memory
from lora_dist.model.placement import choose_placement
from lora_dist.model.positions import longest_prompt, positions_of
from lora_dist.model.quantization import quantized_weights
from lora_dist.model.quantized_cache import check_cache
from lora_dist.parallel.strategies import Launch, Placement, world_size
from lora_dist.tracking.flops import BaseWork, base_work
from lora_dist.training.evaluation import MAX_NEW_TOKENS
from lora_dist.units import size

DTYPE_OF = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(config: TrainConfig, launch: Launch) -> tuple[TrainConfig, str]:
    """The config with the precision to compute in instead of "auto", and why it is that one.

    Warns if the user asks for bf16 on a CPU that has to emulate it. Raises UserError if it is not possible here.
    """
    asked, emulated = config.mixed_precision, not has_gpu() and not cpu_has_bf16()
    if asked == "auto":
        where, precision, why = "accelerate config mixed_precision", launch.mixed_precision, "as the launcher says"
        if precision == "bf16" and emulated:
            precision, why = "no", "fp32, because this CPU has no bf16 instructions"
    else:
        where, precision, why = "--mixed_precision", asked, "as asked"
        if precision == "bf16" and emulated and os.environ.get("RANK", "0") == "0":
            what = "this CPU has no bf16 instructions: a matrix product takes"
            hint = "--mixed_precision no trains in fp32"
            print(f"warning: {what} {bf16_slowdown():.0f} times as long in bf16 as in fp32; {hint}", file=sys.stderr)
    if precision not in DTYPE_OF or (precision == "fp16" and not has_gpu()):
        works = " or ".join(p for p in DTYPE_OF if has_gpu() or p != "fp16")
        raise UserError(f"{where}: {precision}: not supported {'here' if has_gpu() else 'without a GPU'}; use {works}")
    return dataclasses.replace(config, mixed_precision=precision), why


def check_names(config: TrainConfig) -> None:
    """Raises UserError if there is no such base or its files are damaged, or nobody is logged in to push to the hub."""
    for name in ("model_name_or_path", "dataset_name"):
        require(getattr(config, name), name, None, "none is given")
    pushes = config.push_to_hub
    why = "no hub token here; log in with `hf auth login`, or set HF_TOKEN"
    require(not pushes or get_token(), "push_to_hub", True, why)
    if config.adapter_name_or_path and not _holds_a_run(config):
        check_first_adapter(config)
    if config.reference_adapter:  # a run that continues needs it too
        check_first_adapter(config, "reference_adapter")
    if "wandb" in config.report_to.split(","):
        for variable in {"WANDB_PROJECT", "WANDB_NAME", "WANDB_ENTITY"} & os.environ.keys():
            check = check_project if variable == "WANDB_PROJECT" else check_text
            check(variable, os.environ[variable])
    load_model_config(config.model_name_or_path)
    load_generation_config(config.model_name_or_path)
    if Path(model_path(config.model_name_or_path)).is_dir():  # before the data; others are downloaded after it
        open_checkpoint(config.model_name_or_path)


def _holds_a_run(config: TrainConfig) -> bool:
    """True if the run folder holds a run."""
    return bool(config.output_dir and (Path(config.output_dir) / "state.json").exists())


def check_length(config: TrainConfig, data: PreparedData) -> None:
    """Raises UserError if a new run would be too short for its warm-up, and warns if it ends within it.

    Raises UserError as well if the held-out loss should decide something, but no rows are held out, or if the run ends
    before it can.

    A run that is continued has the micro-batches per step of its first start, which was checked.
    """
    require(config.max_steps or config.num_train_epochs, "max_steps", None, "give this, or --num_train_epochs")
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        value = getattr(config, name)
        require(data.held_out or not value, name, value, "needs held-out rows, and there are none; see --eval_fraction")
    if _holds_a_run(config) or config.resume_from_checkpoint not in ("auto", "none"):
        return
    every, patience = config.eval_steps, config.early_stopping_patience
    # The first evaluation is the best so far, and one at the last step comes too late to end the run.
    evaluations = {"early_stopping_patience": patience and patience + 1, "load_best_model_at_end": 1}
    needed = {name: count * every for name, count in evaluations.items() if getattr(config, name)}
    num_steps = config.max_steps or _num_steps(config, data.train, max(config.warmup_steps, *needed.values(), 0))
    for name, steps in needed.items():
        why = f"has no effect: with --eval_steps {every}, the run of {num_steps} steps ends before it can act"
        require(num_steps > steps, name, getattr(config, name), f"{why}; evaluate every fewer steps, or leave it out")
    if isinstance(data.train, RowStream):
        return
    check_warmup(config, num_steps)
    if num_steps <= config.warmup_steps and config.lr_scheduler_type != "constant":
        what = f"--warmup_steps {config.warmup_steps} is as long as the run of {num_steps} steps"
        share = f"reaches {(num_steps - 1) / config.warmup_steps:.0%} of --learning_rate {config.learning_rate}"
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: {what}: the learning rate only rises, and {share}", file=sys.stderr)


def _num_steps(config: TrainConfig, rows: Rows, enough: int) -> int:
    """Number of steps that the epochs make; or a smaller one that is above `enough`."""
    sequences, per_step = config.per_device_train_batch_size, config.gradient_accumulation_steps * world_size()
    pack_to = config.max_length if config.packing else None
    fewest = math.ceil(rows.lengths.sum() / pack_to) if pack_to else len(rows) // task_of(config).rows_per_example
    fewest_steps = math.ceil(fewest * config.num_train_epochs / (sequences * per_step))
    if not pack_to or fewest_steps > enough:  # packing many rows takes seconds, and is done later again
        return fewest_steps
    batches = MicroBatches(
        rows, pad_token_id=0, seed=config.seed, sequences=sequences, per_step=per_step,
        num_epochs=config.num_train_epochs, pack_to=pack_to,
    )  # fmt: skip
    return batches.num_steps


def check_rank(model: PreTrainedModel, config: TrainConfig) -> None:
    """Raises UserError if the adapters' rank is larger than each layer that gets one. Call it after `check_targets`."""
    names = config.lora_target_modules
    names = linear_names(model) if names == ["all-linear"] else names
    modules = [module for name, module in model.named_modules() if name.rpartition(".")[2] in names]
    weights = [quantized_weights(module).get("weight") or module.weight for module in modules]
    widest = max(min(weight.shape) for weight in weights)
    why = f"is above the width of every layer that gets an adapter; give at most {widest}"
    require(config.lora_r <= widest, "lora_r", config.lora_r, why)


def check_disk(model: PreTrainedModel, config: TrainConfig) -> None:
    """Raises UserError if the disk of a new run's folder has no room for the adapter and one checkpoint.

    Only rank 0 writes there. A checkpoint has the adapter too, and AdamW's two moments.
    """
    if os.environ.get("RANK", "0") != "0" or _holds_a_run(config):
        return
    folder = config.output_dir or "runs"
    needed_bytes, free = 4 * torch.float32.itemsize * adapter_numel(model, config), free_bytes(Path(folder).absolute())
    why = f"the adapter and a checkpoint need {size(needed_bytes)}, and its disk has {size(free)} free"
    require(needed_bytes <= free, "output_dir", folder, f"{why}; give another folder")


@dataclass(frozen=True)
class BasePlan:
    """How the base will be loaded."""

    dtype: torch.dtype  # of what is not quantized
    placement: Placement
    task: Task
    classes: list[str] | None
    expected: Expected
    work: BaseWork | None


def _warn_of_stored_dtype(config: TrainConfig, dtype: torch.dtype) -> None:
    """Say so if a base that was quantized before holds the rest of its weights in another type than is computed in."""
    stored = load_model_config(config.model_name_or_path)
    if getattr(stored, "quantization_config", None) and stored.dtype not in (None, dtype):
        what = f"{config.model_name_or_path} was quantized with the rest of its weights in {stored.dtype}"
        then = f"this run computes in {dtype}, which does not bring back what was rounded off"
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: {what}; {then}", file=sys.stderr)


def check_positions(
    model: PreTrainedModel, config: TrainConfig, data: PreparedData, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises UserError if a row or `--sample_prompt` is too long for the model's table of positions.

    Warns of rows beyond rotary positions. Only rows that are there count, so a large `--max_length` alone is fine. A
    stream's rows are not known yet.
    """
    limit, is_table = positions_of(model)
    splits = [rows for rows in (data.train, data.held_out) if isinstance(rows, Rows)]
    longest = max((np.max(n, initial=0) for rows in splits for n in (rows.lengths, rows.label_lengths)), default=0)
    what = f"the longest row has {longest} tokens"
    if len(splits) < 2 or (config.packing and is_table):  # padding behind packed documents has positions too
        longest, what = config.max_length, f"rows have up to {config.max_length} tokens"
    if padding := -longest % config.context_parallel_size:
        longest, what = longest + padding, f"{what} and {padding} of padding for --context_parallel_size"
    name = config.model_name_or_path
    if is_table and longest > limit:
        why = f"{what}, and {name} has only {limit} positions; give --max_length {limit}"
        raise UserError(f"--max_length {config.max_length}: {why}, or a model with more")
    if limit and longest > limit and os.environ.get("RANK", "0") == "0":
        hint = f"--max_length {limit} stays within them"
        print(f"warning: {what}, and {name} was made for {limit} positions: {hint}", file=sys.stderr)
    room = longest_prompt(model, MAX_NEW_TOKENS)
    if config.sample_prompt and room is not None:
        count = len(encode_prompt(tokenizer, config.sample_prompt))
        why = f"has {count} tokens; {name} has {limit} positions, and {MAX_NEW_TOKENS} tokens are generated: shorten it"
        require(count <= room, "sample_prompt", config.sample_prompt, why)


def plan_base(config: TrainConfig, launch: Launch, tokenizer: PreTrainedTokenizerBase, data: PreparedData) -> BasePlan:
    """Decide how to load the base, from its config and the headers of its weights.

    Raises UserError if the base does not allow what the settings, the data or the launcher ask.
    """
    dtype, task, classes = DTYPE_OF[config.mixed_precision], task_of(config), data.classes
    skeleton = meta_model(config.model_name_or_path, config.quantization, dtype, task, classes)
    trained = partial(is_trained_parameter, config)
    meta = BaseOptions(config.quantization, dtype, torch.device("meta"), Placement(), trained, task, classes)
    check_weights(config.model_name_or_path, meta)
    allows = not config.gradient_checkpointing or skeleton.supports_gradient_checkpointing
    why = f"transformers does not support it for a {skeleton.config.model_type}; give false"
    require(allows, "gradient_checkpointing", config.gradient_checkpointing, why)
    check_targets(skeleton, config)
    check_rank(skeleton, config)
    check_disk(skeleton, config)
    if config.quantized_cache:
        check_cache(skeleton, config.quantized_cache, "--quantized_cache")
    _warn_of_stored_dtype(config, dtype)
    num_embeddings = skeleton.get_input_embeddings().num_embeddings
    why = f"its tokenizer has {len(tokenizer)} tokens, and the model embeds {num_embeddings}"
    require(len(tokenizer) <= num_embeddings, "model_name_or_path", config.model_name_or_path, why)
    if config.packing:
        check_packing(skeleton, config)
    if config.adapter_name_or_path and classes and not _holds_a_run(config):
        check_first_classes(config, classes)
    check_positions(skeleton, config, data, tokenizer)
    placement = choose_placement(launch, config, skeleton, num_ranks=world_size(), dtype=dtype)
    expected = expected_memory(skeleton, config, placement, dtype)
    return BasePlan(dtype, placement, task, classes, expected, base_work(skeleton, config))
