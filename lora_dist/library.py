"""The sharded base for scripts of one's own: transformers' Trainer, TRL, a plain loop. See docs/library.md."""

import functools
import os

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import LoraConfig
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import deepspeed_config
from transformers.utils.quantization_config import QuantizationMethod

from lora_dist.data.tasks import TASKS, Task
from lora_dist.environment import cpu_has_bf16, env_count, has_gpu
from lora_dist.errors import UserError
from lora_dist.model.adapters import trains_parameter
from lora_dist.model.load import BaseOptions, load_with
from lora_dist.model.quantization import FORMATS
from lora_dist.parallel.deepspeed_config import env_is_true
from lora_dist.parallel.fsdp import check_fsdp_variables
from lora_dist.parallel.ranks import keep_to_one_machine, meet, num_ranks
from lora_dist.parallel.replicas import keep_replicas_equal
from lora_dist.parallel.strategies import Placement, check_rank_variables, fsdp_strategy, world_size


def load_base(
    name_or_path: str,
    *,
    quantization: str = "int8",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    peft_config: LoraConfig | None = None,
    num_labels: int | None = None,
    shard_ranks: int | None = None,
    resident_layers: int = 0,
    offload: bool | None = None,
) -> PreTrainedModel:
    """Load a frozen base, quantized and spread over the ranks, for `peft.get_peft_model`, Trainer or TRL. Collective.

        model = lora_dist.load_base("facebook/opt-6.7b", quantization="nf4")
        trainer = DPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)

    Works in every process that `accelerate launch`, `torchrun` or `deepspeed` started; joins the ranks if the script
    has not. Call it before an `Accelerator` is made, which would shard the base again.

    name_or_path: a model directory, a hub name, or "embedded". A checkpoint that bitsandbytes quantized, or that
        `lora-dist quantize` wrote, is used as it is.
    quantization: "int8" (LLM.int8, arXiv 2208.07339), "nf4" (QLoRA with double quantization, arXiv 2305.14314),
        "nf4_plain" (without double quantization) or "none".
    dtype: of the weights that are neither quantized nor in a norm; norms are fp32. Default: bf16, or fp32 on a CPU
        without bf16 instructions.
    device: where the base computes. Default: the GPU number LOCAL_RANK, or the CPU if there is no GPU.
    peft_config: needed only if it trains more than adapters (`modules_to_save`, `bias`) or is for another task than a
        causal language model (`task_type`, such as SEQ_CLS for TRL's RewardTrainer). Weights that are trained whole are
        not sharded.
    num_labels: of a classifier. Default: what the checkpoint says. A head that the checkpoint lacks is made anew.
    shard_ranks: number of consecutive ranks that hold one copy together; 1: each rank holds all of it. Default: with an
        accelerate config that shards inside nodes, the ranks of a node; otherwise all ranks.
    resident_layers: number of decoder layers, the last ones, that are not sharded, so that they need no gathering.
    offload: keep the shards in host memory. Default: what an accelerate config with FSDP says; otherwise False.

    Returns a transformers model of which this rank holds its rows. No parameter requires a gradient; sharded ones are
    DTensors of the quantized integers. Raises UserError if there is no such model, if it cannot be quantized or
    sharded, or if a launcher asked for something else than FSDP2 or plain data parallelism.
    """
    valid = (*FORMATS, "none")
    _check(quantization in valid, f"quantization {quantization!r}: must be one of {', '.join(valid)}")
    task_type = (peft_config and peft_config.task_type) or "CAUSAL_LM"
    _check(task_type in TASKS, f"peft_config.task_type {task_type!r}: must be one of {', '.join(TASKS)}")
    _check(num_labels is None or num_labels > 0, f"num_labels {num_labels}: must be 1 or more")
    placement = _placement(shard_ranks, resident_layers, offload)
    _join_ranks()
    device = torch.device(device) if device is not None else _default_device()
    dtype = dtype or (torch.bfloat16 if device.type != "cpu" or cpu_has_bf16() else torch.float32)
    classes = None if num_labels is None else [f"LABEL_{i}" for i in range(num_labels)]
    trained = functools.partial(_is_trained_whole, peft_config, TASKS[task_type])
    options = BaseOptions(quantization, dtype, device, placement, trained, TASKS[task_type], classes)
    return _ready_for_trainers(load_with(name_or_path, options), quantization)


def _check(condition: object, message: str) -> None:
    if not condition:
        raise UserError(message)


def _default_device() -> torch.device:
    return torch.device("cuda", env_count("LOCAL_RANK", 0)) if has_gpu() else torch.device("cpu")


def _is_trained_whole(peft_config: LoraConfig | None, task: Task, name: str) -> bool:
    """True if PEFT will train the base's parameter of this name itself, and not only adapters beside it."""
    modules = list(getattr(peft_config, "modules_to_save", None) or ())
    bias = getattr(peft_config, "bias", "none")
    return trains_parameter(name, modules, has_classes=task.has_classes, biases=bias != "none")


def _placement(shard_ranks: int | None, resident_layers: int, offload: bool | None) -> Placement:
    """The arguments, completed by what the launcher asked for. Raises UserError."""
    total = world_size()
    copy_ranks, offloads = _take_over_sharding(total)
    shard_ranks = copy_ranks if shard_ranks is None else shard_ranks
    offload = offloads if offload is None else offload
    fits = 1 <= shard_ranks <= total and total % shard_ranks == 0
    _check(fits, f"shard_ranks {shard_ranks}: must divide the {total} ranks")
    _check(resident_layers >= 0, f"resident_layers {resident_layers}: must be 0 or more")
    why = "has no effect, because each rank holds the whole base"
    _check(shard_ranks > 1 or not resident_layers, f"resident_layers {resident_layers}: {why}")
    _check(shard_ranks > 1 or not offload, f"offload {offload}: {why}")
    return Placement(shard_ranks, resident_layers, offload)


@functools.cache  # the first base takes the launcher's variables away, and a second one is placed like it
def _take_over_sharding(total: int) -> tuple[int, bool]:
    """(ranks that share a copy, whether shards are in host memory), as the launcher says of `total` ranks.

    Afterwards an Accelerator, such as that of Trainer, sees plain data parallelism, and does not shard the base again.
    Raises UserError.
    """
    check_rank_variables()
    if env_is_true("ACCELERATE_USE_DEEPSPEED") or deepspeed_config():
        raise UserError(
            "accelerate config distributed_type: DEEPSPEED: load_base shards the base itself; use "
            "accelerate_configs/fsdp.yaml or ddp.yaml, or torchrun"
        )
    for engine in ("MEGATRON_LM", "PARALLELISM_CONFIG"):
        if env_is_true(f"ACCELERATE_USE_{engine}"):
            raise UserError(
                f"accelerate config {engine.lower()}: is not supported by load_base; use fsdp.yaml or torchrun"
            )
    offload = env_is_true("FSDP_OFFLOAD_PARAMS")
    if not env_is_true("ACCELERATE_USE_FSDP"):
        return total, False
    if AcceleratorState._shared_state.get("distributed_type") == DistributedType.FSDP:
        raise UserError("load_base: an Accelerator was made before it, and would shard the base again; call it first")
    copy_ranks = total
    if total > 1:
        check_fsdp_variables()
        one_copy = fsdp_strategy(total, offload).base_per_rank == "1/N"
        copy_ranks = total if one_copy else env_count("LOCAL_WORLD_SIZE", total, least=1)
    del os.environ["ACCELERATE_USE_FSDP"]
    return copy_ranks, offload and total > 1


def _join_ranks() -> None:
    """Join the process group that the launcher described, if this process has not. Collective. Raises UserError."""
    if not has_gpu():  # without this, accelerate lets each rank of a machine without a GPU train alone
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if world_size() > 1 and not dist.is_initialized():
        keep_to_one_machine()
        meet(has_gpu())
        PartialState(cpu=not has_gpu())
    known = PartialState._shared_state
    if known and world_size() > 1 and known["distributed_type"] == DistributedType.NO:
        raise UserError(
            "TrainingArguments use_cpu False: without a GPU, each rank would train alone; give use_cpu=True, or make "
            "them after load_base"
        )
    if num_ranks() != world_size():
        raise UserError(
            f"WORLD_SIZE {world_size()}: this process is in a group of {num_ranks()}; start it with accelerate launch, "
            "torchrun or deepspeed"
        )


def _ready_for_trainers(model: PreTrainedModel, quantization: str) -> PreTrainedModel:
    """Tell Trainer and TRL what they ask a model. (`generate` asks whether FSDP2 manages it, which torch says.)"""
    model.is_quantized = quantization != "none"
    # As a model of bitsandbytes says it: Trainer leaves it on its device, and casting it to another dtype is refused.
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES if model.is_quantized else None
    if num_ranks() > 1:
        keep_replicas_equal(model)
    return model
