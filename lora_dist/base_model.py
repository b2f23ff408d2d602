"""Load a frozen base so that each rank reads, quantizes and holds only its own rows.

transformers' loader does the reading. While the model is still on meta, our quantizer swaps the weights for packed ones
and shards them; the loader then slices every DTensor parameter by itself and hands our rows to `QuantizeRows`. No rank
ever sees the whole of a quantized weight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from lora_dist.config import UserError, require
from lora_dist.embedded import model_path
from lora_dist.quantization import (
    KIND_OF,
    FrozenLinear,
    NF4Linear,
    as_integers,
    experts_forward,
    make_frozen_linear,
    pack,
    packed_weights,
    read_bitsandbytes,
)
from lora_dist.sharding import decoder_layers, shard
from lora_dist.strategies import Placement
from lora_dist.weights import LazyTensor, open_weights, weight_files

# Routers of experts and the like are small and stay as they are; below this share, something large was left out.
LEAST_QUANTIZED_SHARE = 0.9

ALL_EXPERTS_FUNCTIONS.register("frozen", experts_forward)


@register_quantization_config("frozen")
class FrozenConfig(QuantizationConfigMixin):
    """Carries what `load_base` was asked to its quantizer, through transformers' loader."""

    def __init__(self, load: "BaseLoad | None" = None, **kwargs):
        self.quant_method = "frozen"
        self.load = load


@dataclass
class BaseLoad:
    """One load of a base: what `load_base` was asked, and the tensors on disk."""

    quantization: str
    placement: Placement
    device: torch.device
    tensors: dict[str, LazyTensor]
    stored: "StoredFormat | None"
    is_trained: Callable[[str], bool]

    def __deepcopy__(self, memo):  # transformers copies configs
        return self


class QuantizeRows(ConversionOps):
    """Turns this rank's rows of one float weight into its rows of the packed parts."""

    def __init__(self, device: torch.device):
        self.device = device

    def convert(self, input_dict, model=None, **kwargs):
        ((name, rows),) = input_dict.items()
        rows = rows[0] if isinstance(rows, list) else rows
        module, weight_name = get_module_from_name(model, name)
        packed = packed_weights(module)[weight_name]
        holder = getattr(module, packed.names[0])
        group = holder.device_mesh.get_group() if isinstance(holder, DTensor) else None
        parts = packed.kind.quantize(rows.to(self.device), lambda local: _gather_rows(local, packed.shape[0], group))
        converted = {}
        for part_name, part in zip(packed.names, parts, strict=True):
            if part_name.endswith("_nested") and group is not None:  # whole on every rank: keep this rank's chunk
                part = _own_chunk(part, group)
            converted[f"{name.rpartition('.')[0]}.{part_name}"] = as_integers(part).to(rows.device)
        return converted


class StackExperts(MergeModulelist):
    """MergeModulelist for a rank that owns no expert of a layer: an empty stack of the right shape."""

    def convert(self, input_dict, model=None, full_layer_name=None, **kwargs):
        if any(input_dict.values()):
            return super().convert(input_dict, **kwargs)
        module, name = get_module_from_name(model, full_layer_name)
        packed = packed_weights(module).get(name)
        _, out_features, in_features = packed.shape if packed else getattr(module, name).shape
        rows = out_features // len(input_dict)  # gate and up are concatenated to one afterwards
        stacks = {pattern: [torch.empty(rows, in_features)] for pattern in input_dict}
        return {pattern: stack[:0] for pattern, stack in super().convert(stacks, **kwargs).items()}


def _gather_rows(local: torch.Tensor, total: int, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, int]:
    """All ranks' rows in order, and where this rank's start. Collective: ranks that own no row must call it too."""
    if group is None:
        return local, 0
    most = -(-total // group.size())  # torch.chunk's rule, which fully_shard follows
    counts = [max(0, min(most, total - most * rank)) for rank in range(group.size())]
    padded = local.new_zeros((most, *local.shape[1:]))
    padded[: len(local)] = local
    rows = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(rows, padded, group=group)
    return torch.cat([r[:count] for r, count in zip(rows, counts, strict=True)]), sum(counts[: group.rank()])


def _own_chunk(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    most = -(-len(part) // group.size())
    return part[most * group.rank() : most * (group.rank() + 1)].clone()


@dataclass(frozen=True)
class StoredFormat:
    """How a checkpoint that is quantized already is: its `--quantization`, and the modules it left as they were."""

    quantization: str
    skip_modules: list[str] | None  # None: transformers' own choice, the head


def pack_model(model: PreTrainedModel, quantization: str, stored: StoredFormat | None = None) -> None:
    """Freeze a model on meta and swap its linears and experts, the head excepted, for packed ones ("none": keep them).

    Raises UserError where a good part of the layers' weights would stay unquantized: never skipped silently. Of a
    checkpoint that is quantized already, it is as `stored` says.
    """
    model.requires_grad_(False)
    # PEFT chooses its bitsandbytes path by these.
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = quantization == "int8", quantization in ("nf4", "nf4_plain")
    if quantization == "none":
        return
    keep = HfQuantizer.get_modules_to_not_convert(model, stored and stored.skip_modules, model._keep_in_fp32_modules)
    modules = {n: m for n, m in model.named_modules() if should_convert_module(n, keep)}
    by_size = sorted((m for m in modules.values() if isinstance(m, nn.Linear)), key=lambda m: -m.weight.numel())
    smallest_of_type = {type(module): module for module in by_size}  # the last one of a type stays
    is_linear = {kind: kind is nn.Linear or _computes_linear(module) for kind, module in smallest_of_type.items()}
    for name, module in modules.items():
        if isinstance(module, Conv1D):
            frozen = make_frozen_linear(quantization, *module.weight.shape, module.bias is not None)
            frozen.stored_transposed = True
            model.set_submodule(name, frozen)
        elif is_linear.get(type(module)):
            has_bias = module.bias is not None
            frozen = make_frozen_linear(quantization, module.in_features, module.out_features, has_bias)
            model.set_submodule(name, frozen)
        elif _has_plain_experts(module):
            for weight_name, param in list(module.named_parameters(recurse=False)):
                if param.dim() == 3:
                    pack(module, weight_name, KIND_OF[quantization], tuple(param.shape))
            model.set_experts_implementation("frozen")
    share, left = quantized_share(model)
    if share < LEAST_QUANTIZED_SHARE and stored is None:
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


def _has_plain_experts(module: nn.Module) -> bool:
    """Whether a module follows transformers' experts interface, with each expert's weight as (O, I)."""
    interface = vars(module)
    return interface.get("is_transposed") is False and not interface["has_post_expert_norm"]


def quantized_share(model: nn.Module) -> tuple[float, set[str]]:
    """Of the frozen matrices inside the decoder layers: the share that is packed, and the names of the others."""
    num_packed, left = 0, {}
    for layer in decoder_layers(model):
        num_packed += sum(torch.Size(p.shape).numel() for m in layer.modules() for p in packed_weights(m).values())
        for name, param in layer.named_parameters():
            if param.dim() >= 2 and param.is_floating_point() and not param.requires_grad:
                left[name] = left.get(name, 0) + param.numel()
    return num_packed / (num_packed + sum(left.values())), set(left)


def keep_norms_in_fp32(model: nn.Module) -> None:
    """Hold the parameters of norms in fp32, as PEFT's `prepare_model_for_kbit_training` does.

    A norm still answers in the dtype it was asked in, so activations stay in 16 bit. So do embeddings, heads and the
    biases of linears: their fp32 copies would hold the same numbers, and be rounded to 16 bit before each use.
    """
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 1 and weight.is_floating_point() and weight.dtype != torch.float32:
            module.float()
            module.register_forward_hook(_answer_in_dtype_of_input, with_kwargs=True)


def _answer_in_dtype_of_input(module, args, kwargs, output):
    return output.to((*args, *kwargs.values())[0].dtype)


@register_quantizer("frozen")
class FrozenQuantizer(HfQuantizer):
    requires_calibration = False
    is_trainable = True

    def is_serializable(self, *args, **kwargs):
        return False

    def param_needs_quantization(self, model, param_name, **kwargs):
        module, weight_name = get_module_from_name(model, param_name)
        return self.quantization_config.load.stored is None and weight_name in packed_weights(module)

    def get_quantize_ops(self):
        return QuantizeRows(self.quantization_config.load.device)

    def update_weight_conversions(self, weight_conversions, model):
        """transformers stacks the experts that a rank owns, and fails where it owns none: replace that step."""
        for converter in weight_conversions:
            if isinstance(converter, WeightConverter):
                converter.operations = [
                    StackExperts(op.dim) if type(op) is MergeModulelist else op for op in converter.operations
                ]
        return weight_conversions

    def _process_model_before_weight_loading(self, model, **kwargs):
        """The model is on meta: swap the linears, tie, then shard."""
        load = self.quantization_config.load
        pack_model(model, load.quantization, load.stored)
        if model.config.tie_word_embeddings:  # not tied yet here: the root group would gather the embedding twice
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        keep_norms_in_fp32(model)
        _transpose(model, load)
        if load.placement.shard_ranks > 1:
            trained = {param for name, param in model.named_parameters() if load.is_trained(name)}
            shard(model, load.placement, load.device, trained)

    def _process_model_after_weight_loading(self, model, **kwargs):
        model.requires_grad_(False)  # the loader made new parameters of those that are not sharded
        for module in model.modules():
            if isinstance(module, NF4Linear):
                module.mark_for_peft()  # again: the loader replaced the parameter
        return model


def _transpose(model: PreTrainedModel, load: BaseLoad) -> None:
    """Present the float weights of GPT-2's Conv1D, which are (I, O) on disk, as (O, I)."""
    wanted = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, FrozenLinear) and m.stored_transposed}
    if not wanted or load.stored is not None:  # bitsandbytes stores them as (O, I)
        return
    mapping, names = get_model_conversion_mapping(model), model.state_dict()
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    for stored_name, tensor in load.tensors.items():
        name, _ = rename_source_key(stored_name, renamings, converters, model.base_model_prefix, names)
        if name in wanted:
            load.tensors[stored_name] = tensor.transposed()


def load_base(
    name: str,
    *,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
    placement: Placement,
    is_trained: Callable[[str], bool] = lambda name: False,
) -> PreTrainedModel:
    """The frozen base, placed as `placement` says. `dtype`: of what is neither quantized nor in a norm.

    `is_trained` says of a parameter's name whether it will be trained: such stay whole on each rank. A checkpoint that
    bitsandbytes quantized is taken as it is. Raises UserError where there is no such model, or it cannot be quantized
    or sharded. Collective.
    """
    config = load_model_config(name)
    if getattr(config, "layerdrop", 0) and placement.shard_ranks > 1:  # ranks would skip different layers
        raise UserError(f"--model_name_or_path {name}: its layerdrop is {config.layerdrop}; a sharded base needs 0")
    stored = stored_format(name, config, quantization)
    tensors = read_bitsandbytes(open_weights(weight_files(name)))
    load = BaseLoad(quantization, placement, device, tensors, stored, is_trained)
    model, loaded = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=config, dtype=dtype, device_map={"": "cpu" if placement.offload else device},
        state_dict=load.tensors, output_loading_info=True, quantization_config=FrozenConfig(load),
    )  # fmt: skip
    missing = sorted(loaded["missing_keys"])
    if missing:  # transformers would go on with random numbers in their place
        raise UserError(f"--model_name_or_path {name}: its checkpoint lacks {' '.join(missing[:4])}")
    if placement.offload:  # what is not sharded computes where it lies
        for tensor in (*model.parameters(), *model.buffers()):
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(device)
    model.config.name_or_path = model.name_or_path = model_path(name)
    del model.config.quantization_config
    try:
        model.generation_config = GenerationConfig.from_pretrained(model_path(name))
    except OSError:
        pass  # many have none; transformers made one from the model's config
    return model


def stored_format(name: str, config, quantization: str) -> StoredFormat | None:
    """Of a checkpoint that bitsandbytes quantized already; None of any other.

    Takes the entry out of `config`: transformers would bring bitsandbytes' own quantizer. Raises UserError where it is
    not quantized as `quantization` says.
    """
    entry = vars(config).pop("quantization_config", None)
    if entry is None:
        return None
    entry = entry if isinstance(entry, dict) else entry.to_dict()
    kind = f"by {entry.get('quant_method')}"
    if entry.get("load_in_8bit"):
        kind = "int8"
    elif entry.get("load_in_4bit"):
        kind = "nf4" if entry.get("bnb_4bit_use_double_quant") else "nf4_plain"
    require(
        kind == quantization, "quantization", quantization, f"{name} is quantized already, "
        + (f"as {kind}: give that" if kind in KIND_OF else f"{kind}: take the unquantized model"),
    )  # fmt: skip
    return StoredFormat(kind, entry.get("llm_int8_skip_modules"))


def meta_model(name: str, quantization: str, dtype: torch.dtype) -> PreTrainedModel:
    """The base as `load_base` will make it, without its weights: to check and count before anything is read."""
    config = load_model_config(name)
    require(type(config) in MODEL_FOR_CAUSAL_LM_MAPPING, "model_name_or_path", name, "is not a causal language model")
    stored = stored_format(name, config, quantization)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    pack_model(model, quantization, stored)
    keep_norms_in_fp32(model)
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
    quantized = {id(part) for m in model.modules() for packed in packed_weights(m).values() for part in packed.parts(m)}
    for param in model.parameters():  # tied parameters come once
        if param.requires_grad:
            continue
        local = param.to_local() if isinstance(param, DTensor) else param
        held = local.untyped_storage().nbytes()
        total, per_rank = total + param.nbytes, per_rank + held
        if id(param) in quantized:
            quantized_total, quantized_per_rank = quantized_total + param.nbytes, quantized_per_rank + held
    return BaseBytes(total, per_rank, quantized_total, quantized_per_rank)
