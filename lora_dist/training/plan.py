"""How a run will be made: decided from settings, the launcher and the model's config, before anything is loaded."""

import dataclasses
import os
import sys
from dataclasses import dataclass

import torch
from huggingface_hub import get_token
from transformers import PreTrainedTokenizerBase

from lora_dist.config import TrainConfig
from lora_dist.data.packing import check_packing
from lora_dist.data.tasks import TASKS, Task
from lora_dist.environment import bf16_slowdown, cpu_has_bf16, has_gpu
from lora_dist.errors import UserError, require
from lora_dist.model.adapters import check_targets
from lora_dist.model.load import load_model_config, meta_model
from lora_dist.model.memory import Expected, expected_memory
from lora_dist.model.placement import choose_placement
from lora_dist.parallel.strategies import Launch, Placement, world_size
from lora_dist.tracking.flops import BaseWork, base_work

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
    """Raises UserError if there is no such base, or nobody is logged in to push to the hub."""
    for name in ("model_name_or_path", "dataset_name"):
        require(getattr(config, name), name, None, "none is given")
    pushes = config.push_to_hub
    why = "no hub token here; log in with `hf auth login`, or set HF_TOKEN"
    require(not pushes or get_token(), "push_to_hub", True, why)
    load_model_config(config.model_name_or_path)


@dataclass(frozen=True)
class BasePlan:
    """How the base will be loaded."""

    dtype: torch.dtype  # of what is not quantized
    placement: Placement
    task: Task
    classes: list[str] | None
    expected: Expected
    work: BaseWork | None


def plan_base(
    config: TrainConfig, launch: Launch, tokenizer: PreTrainedTokenizerBase, classes: list[str] | None = None
) -> BasePlan:
    """Decide how to load the base, from its config alone. `classes`: names of the classes of a classifier, in order.

    Raises UserError if the base does not allow what the settings or the launcher ask.
    """
    dtype, task = DTYPE_OF[config.mixed_precision], TASKS[config.task_type]
    skeleton = meta_model(config.model_name_or_path, config.quantization, dtype, task, classes)
    check_targets(skeleton, config)
    num_embeddings = skeleton.get_input_embeddings().num_embeddings
    why = f"its tokenizer has {len(tokenizer)} tokens, and the model embeds {num_embeddings}"
    require(len(tokenizer) <= num_embeddings, "model_name_or_path", config.model_name_or_path, why)
    if config.packing:
        check_packing(skeleton, config)
    placement = choose_placement(launch, config, skeleton, num_ranks=world_size(), dtype=dtype)
    expected = expected_memory(skeleton, config, placement, dtype)
    return BasePlan(dtype, placement, task, classes, expected, base_work(skeleton, config))
