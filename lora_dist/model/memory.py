"""Bytes of the base and of training on a rank: counted once it is loaded, estimated before."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lora_dist.config import TrainConfig
from lora_dist.errors import require
from lora_dist.model.quantization import packed_weights
from lora_dist.parallel.fsdp import decoder_layers
from lora_dist.parallel.strategies import Placement
from lora_dist.parallel.zero import partitioned_bytes, whole_shape


@dataclass(frozen=True)
class BaseBytes:
    """Bytes of the frozen base: of all ranks' distinct parameters, and as held here (padding of shards included)."""

    total: int
    per_rank: int
    quantized_total: int
    quantized_per_rank: int


def base_bytes(model: nn.Module) -> BaseBytes:
    """Counts storages as they are now; call it while nothing is gathered (after loading, or after `reshard`)."""
    total = per_rank = quantized_total = quantized_per_rank = 0
    quantized = {id(part) for m in model.modules() for packed in packed_weights(m).values() for part in packed.parts(m)}
    for param in model.parameters():  # tied parameters come once
        if param.requires_grad:
            continue
        local = param.to_local() if isinstance(param, DTensor) else param
        held = partitioned_bytes(param) or local.untyped_storage().nbytes()
        whole = whole_shape(param).numel() * param.dtype.itemsize
        total, per_rank = total + whole, per_rank + held
        if id(param) in quantized:
            quantized_total, quantized_per_rank = quantized_total + whole, quantized_per_rank + held
    return BaseBytes(total, per_rank, quantized_total, quantized_per_rank)


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


def base_bytes_per_rank(outside: int, layers: list[int], shard_size: int, resident: int) -> int:
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
    held = base_bytes_per_rank(*layer_bytes(skeleton), placement.shard_ranks, resident)
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
    held = base_bytes_per_rank(outside, layers, shard_size, resident)
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
