"""Chooses the `Placement` of the base from the strategy and the settings, and describes it."""

import dataclasses
import os

import torch
from torch import nn

from lora_dist.config import TrainConfig
from lora_dist.data.tasks import TASKS
from lora_dist.errors import UserError, require
from lora_dist.model.memory import layers_that_fit, memory_budget_bytes
from lora_dist.parallel.context import check_context_parallel
from lora_dist.parallel.deepspeed_config import keys_without_effect
from lora_dist.parallel.exact_sum import block
from lora_dist.parallel.fsdp import check_fsdp_variables, decoder_layers
from lora_dist.parallel.ranks import gather
from lora_dist.parallel.strategies import Launch, Placement
from lora_dist.parallel.zero import check_zero


def choose_placement(
    launch: Launch, config: TrainConfig, skeleton: nn.Module, *, num_ranks: int, dtype: torch.dtype
) -> Placement:
    """Where the base will be. `skeleton`: the quantized model on meta. `dtype`: of what is not quantized.

    Raises UserError if the strategy does not support a setting, or if a setting would have no effect.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    unsupported, why = launch.strategy.refuses, f"is not supported under {launch.strategy.name}; use fsdp"
    for name in unsupported:
        value = getattr(config, name)
        require(value == defaults[name], name, value, why)
    has_classes = TASKS[config.task_type].has_classes  # the head of a classifier is trained whole, as modules_to_save
    require(not (has_classes and "modules_to_save" in unsupported), "task_type", config.task_type, why)
    if config.context_parallel_size > 1:
        check_context_parallel(skeleton, config, num_ranks)
    placement = _choose_engine(launch, config, skeleton, num_ranks, dtype)
    return dataclasses.replace(placement, context_ranks=config.context_parallel_size)


def _choose_engine(
    launch: Launch, config: TrainConfig, skeleton: nn.Module, num_ranks: int, dtype: torch.dtype
) -> Placement:
    strategy = launch.strategy
    if strategy.engine == "FSDP2":
        check_fsdp_variables()
        return _choose_fsdp(launch, config, skeleton, num_ranks, dtype)
    why = f"has no effect under {strategy.name}; it is a setting of fsdp"
    require(config.resident_layers == "0", "resident_layers", config.resident_layers, why)
    require(config.shard_size is None, "shard_size", config.shard_size, why)
    require(not config.gather_once, "gather_once", config.gather_once, why)
    if launch.deepspeed:
        check_zero(launch.deepspeed, skeleton)
    if strategy.engine == "pipeline":
        num_layers = len(decoder_layers(skeleton))
        if num_layers < num_ranks:
            raise UserError(
                f"accelerate config num_processes: {num_ranks}: the model has {num_layers} layers, "
                f"and each rank of a pipeline needs one or more; use {num_layers} ranks or fewer"
            )
        return Placement(stages=num_ranks)
    if strategy.engine == "ZeRO-3":
        return Placement(num_ranks, offload=launch.offload, deepspeed=launch.deepspeed)
    return Placement(deepspeed=launch.deepspeed)


def _choose_fsdp(
    launch: Launch, config: TrainConfig, skeleton: nn.Module, num_ranks: int, dtype: torch.dtype
) -> Placement:
    resident, gather_once, strategy = config.resident_layers, config.gather_once, launch.strategy
    why = "has no effect with --resident_layers all, which gathers nothing"
    require(not (gather_once and resident == "all"), "gather_once", gather_once, why)
    one_copy = strategy.base_per_rank == "1/N"
    why = f"has no effect under {strategy.name}: all ranks share one copy; use accelerate_configs/hsdp.yaml"
    require(config.shard_size is None or not one_copy, "shard_size", config.shard_size, why)
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
    shard_size = num_ranks if one_copy else config.shard_size or per_node
    require(num_ranks % shard_size == 0, "shard_size", shard_size, f"must divide the {num_ranks} ranks")
    require(shard_size > 1, "shard_size", shard_size, "must be 2 or more; --resident_layers all does not shard")
    if resident == "all":
        why = "leaves nothing to offload, but the accelerate config says fsdp_offload_params: true; give fewer layers"
        require(not launch.offload, "resident_layers", resident, why)
        return Placement()
    num_layers = len(decoder_layers(skeleton))
    if resident == "auto":
        budget = memory_budget_bytes(config)
        num_resident = layers_that_fit(skeleton, config, shard_size, dtype, budget)
        if num_resident == num_layers:
            require(
                not launch.offload, "resident_layers", resident,
                "finds room for the whole base, so nothing is left to offload, but the accelerate config says "
                "fsdp_offload_params: true; leave one of them out",
            )  # fmt: skip
            return Placement()
    else:
        num_resident = int(resident)
        fits = num_resident < num_layers
        require(fits, "resident_layers", resident, f"the model has {num_layers} layers; give fewer, or all")
    return Placement(shard_size, num_resident, launch.offload, gather_once)


def agree_on_placement(placement: Placement) -> Placement:
    """The choice of the rank that can hold the least: with `auto` each rank looks at its own memory. Collective."""
    return min(gather(placement), key=lambda choice: (choice.shard_ranks == 1, choice.resident_layers))


def describe_placement(placement: Placement, num_layers: int, num_ranks: int) -> str:
    """The banner's words for it."""
    words = _describe_base(placement, num_layers, num_ranks)
    return words + (f"; {placement.context_ranks} ranks share each row" if placement.context_ranks > 1 else "")


def _describe_base(placement: Placement, num_layers: int, num_ranks: int) -> str:
    if placement.stages > 1:
        sizes = [len(block(num_layers, placement.stages, stage)) for stage in range(placement.stages)]
        return f"{' + '.join(map(str, sizes))} layers on {placement.stages} ranks, in this order"
    if placement.shard_ranks == 1:
        return "whole on each rank"
    if placement.zero_stage == 3:
        zero = placement.deepspeed["zero_optimization"]
        words = [f"partitioned over {num_ranks} ranks by DeepSpeed"]
        if placement.offload:
            words.append(f"partitions on {zero['offload_param']['device']}")
        if useless := keys_without_effect(placement.deepspeed):
            words.append(f"{' '.join(useless)} without effect, because the base has no gradients")
        return ", ".join(words)
    copies = num_ranks // placement.shard_ranks
    words = [f"shared by {placement.shard_ranks} ranks" + (f", {copies} copies" if copies > 1 else "")]
    words.append(f"{placement.resident_layers} of {num_layers} layers whole on each rank")
    if placement.offload:
        words.append("shards in host memory")
    if placement.gather_once:
        words.append("gathered once per step")
    return ", ".join(words)
