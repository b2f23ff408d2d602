"""Where the base lies: the strategy's row and the dials of the config, turned into a `Placement`."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from lora_dist.config import TrainConfig
from lora_dist.data.tasks import TASKS
from lora_dist.errors import UserError, require
from lora_dist.model.load import base_bytes
from lora_dist.model.quantization import packed_weights
from lora_dist.parallel.context import check_context_parallel
from lora_dist.parallel.deepspeed_config import idle_keys
from lora_dist.parallel.exact_sum import block
from lora_dist.parallel.fsdp import decoder_layers
from lora_dist.parallel.strategies import Launch, Placement
from lora_dist.parallel.zero import check_zero


def choose_placement(
    launch: Launch, config: TrainConfig, skeleton: nn.Module, *, num_ranks: int, dtype: torch.dtype
) -> Placement:
    """Raises UserError where a dial cannot be had, or has no effect. `skeleton`: the packed model on meta."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    for name in launch.strategy.refuses:
        value, why = getattr(config, name), f"cannot be had under {launch.strategy.name}; use fsdp"
        require(value == defaults[name], name, value, why)
    classes = TASKS[config.task_type].has_classes  # with a head that is trained whole
    why = f"cannot be had under {launch.strategy.name}; use fsdp"
    require(not (classes and "modules_to_save" in launch.strategy.refuses), "task_type", config.task_type, why)
    if config.context_parallel_size > 1:
        check_context_parallel(skeleton, config, num_ranks)
    placement = _choose_engine(launch, config, skeleton, num_ranks, dtype)
    return dataclasses.replace(placement, context_ranks=config.context_parallel_size)


def _choose_engine(
    launch: Launch, config: TrainConfig, skeleton: nn.Module, num_ranks: int, dtype: torch.dtype
) -> Placement:
    strategy = launch.strategy
    if strategy.engine == "FSDP2":
        return _choose_fsdp(launch, config, skeleton, num_ranks, dtype)
    why = f"has no effect under {strategy.name}; it is a dial of fsdp"
    require(config.resident_layers == "0", "resident_layers", config.resident_layers, why)
    require(config.shard_size is None, "shard_size", config.shard_size, why)
    require(not config.gather_once, "gather_once", config.gather_once, why)
    if launch.deepspeed:
        check_zero(launch.deepspeed, skeleton)
    if strategy.engine == "pipeline":
        num_layers = len(decoder_layers(skeleton))
        if num_layers < num_ranks:
            raise UserError(f"accelerate config num_processes: {num_ranks}: the model has {num_layers} layers")
        return Placement(stages=num_ranks)
    if strategy.engine == "ZeRO-3":
        return Placement(num_ranks, offload=launch.offload, deepspeed=launch.deepspeed)
    return Placement(deepspeed=launch.deepspeed)


def _choose_fsdp(
    launch: Launch, config: TrainConfig, skeleton: nn.Module, num_ranks: int, dtype: torch.dtype
) -> Placement:
    resident, gather_once, strategy = config.resident_layers, config.gather_once, launch.strategy
    require(not (gather_once and resident == "all"), "gather_once", gather_once, "has no effect: nothing is gathered")
    one_copy = strategy.base_per_rank == "1/N"
    why = f"has no effect under {strategy.name}, where all ranks share one copy; use accelerate_configs/hsdp.yaml"
    require(config.shard_size is None or not one_copy, "shard_size", config.shard_size, why)
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
    shard_size = num_ranks if one_copy else config.shard_size or per_node
    require(num_ranks % shard_size == 0, "shard_size", shard_size, f"must divide the {num_ranks} ranks")
    require(shard_size > 1, "shard_size", shard_size, "shards nothing; give 2 or more, or --resident_layers all")
    if resident == "all":
        why = "leaves nothing to offload, as the accelerate config's fsdp_offload_params asks; give fewer"
        require(not launch.offload, "resident_layers", resident, why)
        return Placement()
    num_layers = len(decoder_layers(skeleton))
    if resident == "auto":
        budget = memory_budget_bytes(config)
        num_resident = layers_that_fit(skeleton, config, shard_size, dtype, budget)
        if num_resident == num_layers:
            require(
                not launch.offload, "resident_layers", resident,
                "finds room for the whole base, so nothing is left to offload as fsdp_offload_params asks; "
                "leave one out",
            )  # fmt: skip
            return Placement()
    else:
        num_resident = int(resident)
        fits = num_resident < num_layers
        require(fits, "resident_layers", resident, f"the model has {num_layers} layers; give fewer, or all")
    return Placement(shard_size, num_resident, launch.offload, gather_once)


def memory_budget_bytes(config: TrainConfig) -> int:
    """`--memory_budget_gib`, or what is free: on the GPU, or this rank's part of the host's."""
    if config.memory_budget_gib:
        return int(config.memory_budget_gib * 2**30)
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", 0)))[0]
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def layers_that_fit(skeleton: nn.Module, config: TrainConfig, shard_size: int, dtype: torch.dtype, budget: int) -> int:
    """The most resident layers whose estimated peak is within `budget` bytes; all of them: the base is whole.

    Raises UserError where none fits.
    """
    peaks = [
        peak_bytes(skeleton, config, shard_size, dtype, resident)
        for resident in range(len(decoder_layers(skeleton)) + 1)
    ]
    least = min(peaks)
    require(
        least <= budget, "memory_budget_gib", f"{budget / 2**30:.3g}",
        f"the base shared by {shard_size} ranks needs an estimated {least / 2**30:.3g} GiB at the least; "
        "lower --per_device_train_batch_size or --max_length, or use more ranks",
    )  # fmt: skip
    return max(resident for resident, peak in enumerate(peaks) if peak <= budget)


def layer_bytes(skeleton: nn.Module) -> tuple[int, list[int]]:
    """(bytes of the base outside its layers, of each layer)."""
    layers = [base_bytes(layer).total for layer in decoder_layers(skeleton)]
    return base_bytes(skeleton).total - sum(layers), layers


def held_bytes(outside: int, layers: list[int], shard_size: int, resident: int) -> int:
    """Of the base, on each of `shard_size` ranks that share it, with that many resident layers; all: it is whole."""
    if resident == len(layers):
        return outside + sum(layers)
    whole = sum(layers[len(layers) - resident :])
    return int((outside + sum(layers) - whole) / shard_size + whole)


@dataclass(frozen=True)
class Expected:
    """Bytes on a rank, reckoned before anything is loaded; None where this placement is not reckoned."""

    base_bytes_per_rank: int | None
    peak_bytes_per_rank: int | None  # an upper estimate


def expected_memory(skeleton: nn.Module, config: TrainConfig, placement: Placement, dtype: torch.dtype) -> Expected:
    if placement.stages > 1:
        return Expected(None, None)
    resident = len(decoder_layers(skeleton)) if placement.shard_ranks == 1 else placement.resident_layers
    held = held_bytes(*layer_bytes(skeleton), placement.shard_ranks, resident)
    if placement.zero_stage == 3 or placement.offload or placement.context_ranks > 1 or placement.gather_once:
        return Expected(held, None)
    return Expected(held, peak_bytes(skeleton, config, placement.shard_ranks, dtype, resident))


def peak_bytes(skeleton: nn.Module, config: TrainConfig, shard_size: int, dtype: torch.dtype, resident: int) -> int:
    """A rank's estimated peak in a step with that many resident layers: an upper estimate, the base's part by count.

    base at rest + what is gathered (the root group twice, two layers twice) + one dequantized weight + adapters with
    gradients, AdamW's moments and the reduction's buffers + activations of the longest micro-batch.
    """
    outside, layers = layer_bytes(skeleton)
    gathered = 2 * outside + 4 * max(layers) if resident < len(layers) else 0  # whole: nothing is gathered
    held = held_bytes(outside, layers, shard_size, resident)
    matrices = [p.shape for m in skeleton.modules() for p in packed_weights(m).values()]
    matrices += [m.weight.shape for m in skeleton.modules() if isinstance(m, nn.Linear)]
    dequantized = max(shape[-2] * shape[-1] for shape in matrices) * dtype.itemsize
    adapters = 4 * _adapter_numel(skeleton, config) * (4 + 2 + (config.gradient_accumulation_steps).bit_length())
    return int(held + gathered + dequantized + adapters + _activation_bytes(skeleton, config, dtype))


def _adapter_numel(skeleton: nn.Module, config: TrainConfig) -> int:
    return sum(
        config.lora_r * (module.in_features + module.out_features)
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear)
        and (config.lora_target_modules == ["all-linear"] or name.rpartition(".")[2] in config.lora_target_modules)
    )


def _activation_bytes(skeleton: nn.Module, config: TrainConfig, dtype: torch.dtype) -> int:
    """Logits in `dtype`, in fp32, their log-softmax and its gradient; a layer's input each; and one layer's inside."""
    tokens, model_config = config.per_device_train_batch_size * config.max_length, skeleton.config
    logits = tokens * model_config.vocab_size * (dtype.itemsize + 3 * 4)
    layers = decoder_layers(skeleton)
    inputs = len(layers) * tokens * model_config.hidden_size * dtype.itemsize
    # Of each linear: its output, and the copy of its input in fp32 that an adapter keeps.
    inside = max(
        sum(m.out_features * dtype.itemsize + m.in_features * 4 for m in layer.modules() if isinstance(m, nn.Linear))
        for layer in layers
    )
    return logits + inputs + tokens * inside * (1 if config.gradient_checkpointing else len(layers))


def agree(placement: Placement) -> Placement:
    """The same on all ranks: of their choices the one that holds least, where `auto` found other memory. Collective."""
    if not dist.is_initialized():
        return placement
    choices = [placement] * dist.get_world_size()
    dist.all_gather_object(choices, placement)
    return min(choices, key=lambda choice: (choice.shard_ranks == 1, choice.resident_layers))


def describe(placement: Placement, num_layers: int, num_ranks: int) -> str:
    where = _describe_base(placement, num_layers, num_ranks)
    return where + (f"; {placement.context_ranks} ranks share each row" if placement.context_ranks > 1 else "")


def _describe_base(placement: Placement, num_layers: int, num_ranks: int) -> str:
    if placement.stages > 1:
        sizes = [len(block(num_layers, placement.stages, stage)) for stage in range(placement.stages)]
        return f"{' + '.join(map(str, sizes))} layers on {placement.stages} ranks, one after the other"
    if placement.shard_ranks == 1:
        return "whole on each rank"
    if placement.zero_stage == 3:
        zero = placement.deepspeed["zero_optimization"]
        words = [f"partitioned over {num_ranks} ranks by DeepSpeed"]
        if placement.offload:
            words.append(f"partitions on {zero['offload_param']['device']}")
        if idle := idle_keys(placement.deepspeed):
            words.append(f"with nothing to act on for {' '.join(idle)}, as the base has no gradients")
        return ", ".join(words)
    copies = num_ranks // placement.shard_ranks
    words = [f"shared by {placement.shard_ranks} ranks" + (f", {copies} copies" if copies > 1 else "")]
    words.append(f"{placement.resident_layers} of {num_layers} layers whole on each rank")
    if placement.offload:
        words.append("shards in host memory")
    if placement.gather_once:
        words.append("gathered once a step")
    return ", ".join(words)
