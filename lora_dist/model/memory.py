"""Memory of a rank: the bytes of a loaded base, counted; and the bytes that a run will need, estimated beforehand."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lora_dist.config import TrainConfig
from lora_dist.data.tasks import task_of
from lora_dist.errors import require
from lora_dist.model.quantization import quantized_weights
from lora_dist.parallel.fsdp import decoder_layers
from lora_dist.parallel.strategies import Placement
from lora_dist.parallel.zero import partitioned_bytes, whole_shape


@dataclass(frozen=True)
class BaseBytes:
    """Bytes of the frozen base. `held`: on this rank, with the padding of its shards. `total`: of the whole base."""

    total: int
    held: int
    quantized_total: int
    quantized_held: int


def base_bytes(model: nn.Module) -> BaseBytes:
    """Count the memory of the frozen parameters. Call it when nothing is gathered: after loading or `release`."""
    total = held = quantized_total = quantized_held = 0
    quantized = {id(part) for m in model.modules() for w in quantized_weights(m).values() for part in w.parts(m)}
    for param in model.parameters():  # tied parameters come once
        if param.requires_grad:
            continue
        local = param.to_local() if isinstance(param, DTensor) else param
        held_here = partitioned_bytes(param) or local.untyped_storage().nbytes()
        whole = whole_shape(param).numel() * param.dtype.itemsize
        total, held = total + whole, held + held_here
        if id(param) in quantized:
            quantized_total, quantized_held = quantized_total + whole, quantized_held + held_here
    return BaseBytes(total, held, quantized_total, quantized_held)


def memory_budget_bytes(config: TrainConfig) -> int:
    """Bytes of `--memory_budget_gib`. Default: the GPU's free memory, or the host's divided by the ranks on it."""
    if config.memory_budget_gib:
        return int(config.memory_budget_gib * 2**30)
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", 0)))[0]
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def layers_that_fit(skeleton: nn.Module, config: TrainConfig, shard_size: int, dtype: torch.dtype, budget: int) -> int:
    """The largest number of resident layers whose estimated peak is at most `budget` bytes.

    If that is all layers, the base is not sharded. Raises UserError if no number fits.
    """
    peaks = [
        peak_bytes(skeleton, config, shard_size, dtype, resident)
        for resident in range(len(decoder_layers(skeleton)) + 1)
    ]
    least = min(peaks)
    require(
        least <= budget, "memory_budget_gib", f"{budget / 2**30:.3g}",
        f"a base that {shard_size} ranks share needs at least {least / 2**30:.3g} GiB per rank, by estimate; "
        "lower --per_device_train_batch_size or --max_length, or use more ranks",
    )  # fmt: skip
    return max(resident for resident, peak in enumerate(peaks) if peak <= budget)


def layer_bytes(skeleton: nn.Module) -> tuple[int, list[int]]:
    """(bytes of the base outside of its decoder layers, bytes of each decoder layer)."""
    layers = [base_bytes(layer).total for layer in decoder_layers(skeleton)]
    return base_bytes(skeleton).total - sum(layers), layers


def expected_base_bytes(outside: int, layers: list[int], shard_size: int, resident: int) -> int:
    """Bytes of the base on each of `shard_size` ranks that share it. If all layers are resident, it is not sharded.

    `outside` and `layers`: from `layer_bytes`. `resident`: number of resident layers.
    """
    if resident == len(layers):
        return outside + sum(layers)
    whole = sum(layers[len(layers) - resident :])
    return int((outside + sum(layers) - whole) / shard_size + whole)


@dataclass(frozen=True)
class Expected:
    """Bytes on a rank, estimated before anything is loaded; None if there is no estimate for this placement."""

    base_bytes_per_rank: int | None
    peak_bytes_per_rank: int | None  # the measured peak should be below


def expected_memory(skeleton: nn.Module, config: TrainConfig, placement: Placement, dtype: torch.dtype) -> Expected:
    """`skeleton`: the quantized model on meta. `dtype`: of what is not quantized."""
    if placement.stages > 1:
        return Expected(None, None)
    resident = len(decoder_layers(skeleton)) if placement.shard_ranks == 1 else placement.resident_layers
    held = expected_base_bytes(*layer_bytes(skeleton), placement.shard_ranks, resident)
    if placement.zero_stage == 3 or placement.offload or placement.context_ranks > 1 or placement.gather_once:
        return Expected(held, None)
    return Expected(held, peak_bytes(skeleton, config, placement.shard_ranks, dtype, resident))


def peak_bytes(skeleton: nn.Module, config: TrainConfig, shard_size: int, dtype: torch.dtype, resident: int) -> int:
    """Upper estimate of a rank's peak in a step, with `resident` resident layers, in bytes.

    It is the sum of: the base that this rank holds, counted; what is gathered (the root group twice, two layers twice);
    one dequantized weight; the adapters with their gradients, AdamW's moments and the buffers of the reduction; and the
    activations of the longest micro-batch.
    """
    outside, layers = layer_bytes(skeleton)
    gathered = 2 * outside + 4 * max(layers) if resident < len(layers) else 0  # not sharded: no gathers
    held = expected_base_bytes(outside, layers, shard_size, resident)
    shapes = [weight.shape for m in skeleton.modules() for weight in quantized_weights(m).values()]
    shapes += [m.weight.shape for m in skeleton.modules() if isinstance(m, nn.Linear)]
    dequantized = max(shape[-2] * shape[-1] for shape in shapes) * dtype.itemsize
    adapters = 4 * adapter_numel(skeleton, config) * (4 + 2 + (config.gradient_accumulation_steps).bit_length())
    return int(held + gathered + dequantized + adapters + _activation_bytes(skeleton, config, dtype))


def adapter_numel(skeleton: nn.Module, config: TrainConfig) -> int:
    """Number of elements of lora_A and lora_B. `skeleton`: the model on meta."""
    return sum(
        config.lora_r * (module.in_features + module.out_features)
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear)
        and (config.lora_target_modules == ["all-linear"] or name.rpartition(".")[2] in config.lora_target_modules)
    )


def _activation_bytes(skeleton: nn.Module, config: TrainConfig, dtype: torch.dtype) -> int:
    """Logits in `dtype` and fp32, their log-softmax and its gradient; the input of each layer; one layer's inside.

    Without gradient checkpointing the inside of every layer is kept.
    """
    rows, model_config = config.per_device_train_batch_size * task_of(config).rows_per_example, skeleton.config
    tokens = rows * config.max_length
    logits = tokens * model_config.vocab_size * (dtype.itemsize + 3 * 4)
    layers = decoder_layers(skeleton)
    inputs = len(layers) * tokens * model_config.hidden_size * dtype.itemsize
    # For each linear: its output, and the fp32 copy of its input that an adapter keeps.
    inside = max(
        sum(m.out_features * dtype.itemsize + m.in_features * 4 for m in layer.modules() if isinstance(m, nn.Linear))
        for layer in layers
    )
    return logits + inputs + tokens * inside * (1 if config.gradient_checkpointing else len(layers))
