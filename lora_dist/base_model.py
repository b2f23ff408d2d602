"""Load a frozen base so that each rank reads, quantizes and holds only its own rows.

transformers' loader does the reading. While the model is still on meta, our quantizer swaps the linears for the frozen
ones and calls `fully_shard`; the loader then slices every DTensor parameter by itself and hands our rows to
`QuantizeRows`. No rank ever sees the whole of a quantized weight.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from lora_dist.config import UserError
from lora_dist.embedded import model_path
from lora_dist.quantization import LINEAR_OF, FrozenLinear, NF4Linear, as_integers

# Routers of experts and the like are small and stay as they are; below this share, something large was left out.
LEAST_QUANTIZED_SHARE = 0.9


@register_quantization_config("frozen")
class FrozenConfig(QuantizationConfigMixin):
    """quantization: int8, nf4 or none. shard_ranks: over how many ranks the base is spread; 1 keeps it whole.

    resident_layers: how many decoder layers stay whole all the same.
    """

    def __init__(self, quantization: str = "int8", shard_ranks: int = 1, resident_layers: int = 0, **kwargs):
        self.quant_method = "frozen"
        self.quantization = quantization
        self.shard_ranks = shard_ranks
        self.resident_layers = resident_layers


class QuantizeRows(ConversionOps):
    """Turns this rank's rows of one float weight into its rows of the packed parts."""

    def convert(self, input_dict, model=None, **kwargs):
        ((name, rows),) = input_dict.items()
        rows = rows[0] if isinstance(rows, list) else rows
        layer, _ = get_module_from_name(model, name)
        group = layer.weight.device_mesh.get_group() if isinstance(layer.weight, DTensor) else None
        parts = layer.quantize(rows, lambda local: _gather_rows(local, layer.out_features, group))
        converted = {}
        for part_name, part in zip(layer.part_names, parts, strict=True):
            if part_name == "nested" and group is not None:  # computed whole on every rank: keep this rank's chunk
                part = _own_chunk(part, group)
            converted[f"{name.rpartition('.')[0]}.{part_name}"] = as_integers(part)
        return converted


def _gather_rows(local: torch.Tensor, total: int, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, int]:
    """All ranks' rows in order, and where this rank's start. Collective: ranks that own no row must call it too."""
    if group is None:
        return local, 0
    most = -(-total // group.size())  # torch.chunk's rule, which fully_shard follows
    counts = [max(0, min(most, total - most * rank)) for rank in range(group.size())]
    padded = nn.functional.pad(local, (0, 0, 0, most - len(local)))
    rows = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(rows, padded, group=group)
    return torch.cat([r[:count] for r, count in zip(rows, counts, strict=True)]), sum(counts[: group.rank()])


def _own_chunk(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    most = -(-len(part) // group.size())
    return part[most * group.rank() : most * (group.rank() + 1)].clone()


def pack_linears(model: PreTrainedModel, quantization: str) -> None:
    """Freeze a model on meta and swap its linears, the head excepted, for packed ones ("none": keep them).

    Raises UserError where a good part of the layers' weights would stay unquantized: never skipped silently.
    """
    model.requires_grad_(False)
    # PEFT chooses its bitsandbytes path by these.
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = quantization == "int8", quantization == "nf4"
    if quantization == "none":
        return
    keep = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and should_convert_module(n, keep)}
    by_size = sorted(linears.values(), key=lambda m: m.weight.numel(), reverse=True)
    smallest_of_type = {type(module): module for module in by_size}  # the last one of a type stays
    is_linear = {kind: kind is nn.Linear or _computes_linear(module) for kind, module in smallest_of_type.items()}
    for name, module in linears.items():
        if is_linear[type(module)]:
            frozen = LINEAR_OF[quantization](module.in_features, module.out_features, module.bias is not None)
            model.set_submodule(name, frozen)
    share, left = quantized_share(model)
    if share < LEAST_QUANTIZED_SHARE:
        raise UserError(
            f"--quantization {quantization}: only {share:.0%} of the layers' weights of a {model.config.model_type} "
            f"can be quantized, not {' '.join(sorted(left))}; use none"
        )


def _computes_linear(module: nn.Linear) -> bool:
    """Whether a subclass of nn.Linear, such as Falcon's, computes x @ W.T + b: tried on random numbers."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):  # the caller builds the model on meta
        params = {name: torch.randn(param.shape, generator=generator) for name, param in module.named_parameters()}
        x = torch.randn(3, module.in_features, generator=generator)
        expected = nn.functional.linear(x, params["weight"], params.get("bias"))
        return torch.allclose(torch.func.functional_call(module, params, (x,)), expected, rtol=1e-4, atol=1e-3)


def quantized_share(model: nn.Module) -> tuple[float, set[str]]:
    """Of the frozen matrices inside the decoder layers: the share that is packed, and the names of the others."""
    packed, left = 0, {}
    for layer in decoder_layers(model):
        packed += sum(m.in_features * m.out_features for m in layer.modules() if isinstance(m, FrozenLinear))
        for name, param in layer.named_parameters():
            if param.dim() >= 2 and param.is_floating_point() and not param.requires_grad:
                left[name] = left.get(name, 0) + param.numel()
    return packed / (packed + sum(left.values())), set(left)


@register_quantizer("frozen")
class FrozenQuantizer(HfQuantizer):
    requires_calibration = False
    is_trainable = True

    def is_serializable(self, *args, **kwargs):
        return False

    def param_needs_quantization(self, model, param_name, **kwargs):
        layer, part_name = get_module_from_name(model, param_name)
        return isinstance(layer, FrozenLinear) and part_name != "bias"

    def get_quantize_ops(self):
        return QuantizeRows()

    def _process_model_before_weight_loading(self, model, **kwargs):
        """The model is on meta: swap the linears, tie, then shard."""
        pack_linears(model, self.quantization_config.quantization)
        if model.config.tie_word_embeddings:  # not tied yet here: the root group would gather the embedding twice
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        if self.quantization_config.shard_ranks > 1:
            shard(model, self.quantization_config.shard_ranks, self.quantization_config.resident_layers)

    def _process_model_after_weight_loading(self, model, **kwargs):
        model.requires_grad_(False)  # the loader made new parameters of those that are not sharded
        for param in model.parameters():
            if isinstance(param, DTensor):
                _drop_whole_storage(param)
        for module in model.modules():
            if isinstance(module, NF4Linear):
                module.mark_for_peft()  # again: the loader replaced the parameter
        return model


def _drop_whole_storage(param: DTensor) -> None:
    """On CPU a slice that needed no conversion is a view that keeps the whole tensor alive: copy it."""
    local = param._local_tensor
    if local.untyped_storage().nbytes() > local.nbytes:
        param._local_tensor = local.clone()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks that are sharded, gathered and recomputed one at a time: transformers' checkpointing layers."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"model type {model.config.model_type}: transformers marks no checkpointing layers in it, "
            "so it cannot be sharded layer by layer"
        )
    return layers


class CountingAllGather:
    """FSDP's default all-gather, counting the bytes it produces. One instance serves all layers of a model."""

    def __init__(self):
        self.num_bytes = 0

    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        self.num_bytes += output_tensor.nbytes
        return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


def shard(model: PreTrainedModel, shard_ranks: int, resident_layers: int) -> None:
    """Spread what is outside the decoder layers, and each layer but the last `resident_layers`, over `shard_ranks`.

    The last ones are the residents because memory peaks at the head, where a gathered layer would come on top.
    """
    # One dimension named "fsdp": PEFT takes any other name for tensor parallelism and builds LoRA for the local rows.
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (shard_ranks,), mesh_dim_names=("fsdp",))
    layers, model_class = decoder_layers(model), type(model)
    num_sharded = len(layers) - resident_layers
    for layer in layers[:num_sharded]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params={p for layer in layers[num_sharded:] for p in layer.parameters()})
    # fully_shard made a class of its own of it, which transformers takes for custom code, whose checkpoints it renames
    # no weights of: GPT-NeoX's head would silently stay random.
    type(model).__name__, type(model).__module__ = model_class.__name__, model_class.__module__
    counter = CountingAllGather()
    for module in sharded_modules(model):
        module.set_custom_all_gather(counter)
        module.all_gather = counter


def load_base(
    name: str,
    *,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
    shard_ranks: int,
    resident_layers: int = 0,
) -> PreTrainedModel:
    """The frozen base, spread over `shard_ranks` ranks, or whole where that is 1. `dtype`: of what is not quantized.

    `resident_layers` decoder layers stay whole on every rank and are never gathered.
    Raises UserError where there is no such model, or it cannot be quantized or sharded. Collective.
    """
    config = load_model_config(name)
    if getattr(config, "layerdrop", 0) and shard_ranks > 1:  # ranks would skip different layers, gathers mismatch
        raise UserError(f"--model_name_or_path {name}: its layerdrop is {config.layerdrop}; a sharded base needs 0")
    model, loaded = AutoModelForCausalLM.from_pretrained(
        model_path(name), config=config, dtype=dtype, device_map={"": device}, output_loading_info=True,
        quantization_config=FrozenConfig(quantization, shard_ranks, resident_layers),
    )  # fmt: skip
    missing = sorted(loaded["missing_keys"])
    if missing:  # transformers would go on with random numbers in their place
        raise UserError(f"--model_name_or_path {name}: its checkpoint lacks {' '.join(missing[:4])}")
    return model


def meta_model(name: str, quantization: str) -> PreTrainedModel:
    """The base as `load_base` will make it, without its weights: to check and count before anything is read."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_model_config(name))
    pack_linears(model, quantization)
    return model


def load_model_config(name: str):
    """transformers' config of a model directory or hub name. Raises UserError where there is none."""
    if not Path(model_path(name)).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(
            f"--model_name_or_path {name}: no such directory; "
            "give a model directory or a hub name such as facebook/opt-6.7b"
        )
    try:
        return AutoConfig.from_pretrained(model_path(name))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--model_name_or_path {name}: {reason} Give a model directory or a hub name such as facebook/opt-6.7b"
        ) from None


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
    quantized = {id(getattr(m, part)) for m in model.modules() if isinstance(m, FrozenLinear) for part in m.part_names}
    for param in model.parameters():  # tied parameters come once
        if param.requires_grad:
            continue
        local = param.to_local() if isinstance(param, DTensor) else param
        held = local.untyped_storage().nbytes()
        total, per_rank = total + param.nbytes, per_rank + held
        if id(param) in quantized:
            quantized_total, quantized_per_rank = quantized_total + param.nbytes, quantized_per_rank + held
    return BaseBytes(total, per_rank, quantized_total, quantized_per_rank)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def gathered_bytes(model: nn.Module) -> int:
    """All-gather output bytes on this rank since loading; 0 where nothing is sharded."""
    return next((module.all_gather.num_bytes for module in sharded_modules(model)), 0)


def release(model: nn.Module) -> None:
    """Free what FSDP keeps gathered after a forward without backward (the root group, after evaluation)."""
    for module in sharded_modules(model):
        module.reshard()
