"""Called by transformers' loader while it reads a base: quantize and shard on meta, then quantize each rank's rows."""

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
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
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from lora_dist.data.tasks import CAUSAL_LM, Task
from lora_dist.model.bitsandbytes_format import StoredQuantization
from lora_dist.model.files.lazy_weights import LazyTensor
from lora_dist.model.quantization import FrozenLinear, NF4Linear, as_integers, quantized_weights
from lora_dist.model.quantize_model import keep_norms_in_fp32, quantize_model
from lora_dist.parallel.fsdp import shard
from lora_dist.parallel.pipeline import build_stage, remove_other_layers
from lora_dist.parallel.strategies import Placement
from lora_dist.parallel.zero import split_rows


def no_parameter(name: str) -> bool:
    return False


@dataclass(frozen=True)
class BaseOptions:
    """How to load a base. `lora_dist.load_base` describes the first three."""

    quantization: str
    dtype: torch.dtype
    device: torch.device
    placement: Placement
    will_be_trained: Callable[[str], bool] = no_parameter
    task: Task = CAUSAL_LM
    classes: list[str] | None = None

    @property
    def storage_device(self) -> torch.device:
        """Where the shards are stored. They are quantized and computed with on `device`."""
        return torch.device("cpu") if self.placement.offload else self.device


@dataclass
class BaseLoad:
    """One load of a base. `FrozenConfig` carries it through transformers' loader to `FrozenQuantizer`."""

    options: BaseOptions
    tensors: dict[str, LazyTensor]  # of the checkpoint, by name
    stored: StoredQuantization | None  # None if the checkpoint is not quantized
    other_layers: dict[str, nn.Module] = field(default_factory=dict)  # of other pipeline stages, by name: not loaded

    def __deepcopy__(self, memo):  # transformers copies configs
        return self


@register_quantization_config("frozen")
class FrozenConfig(QuantizationConfigMixin):
    """Carries a `BaseLoad` through transformers' loader, which makes a `FrozenQuantizer` of it."""

    def __init__(self, load: BaseLoad | None = None, **kwargs):
        self.quant_method = "frozen"
        self.load = load


@register_quantizer("frozen")
class FrozenQuantizer(HfQuantizer):
    """Quantizes and shards a base while transformers loads it. The methods override HfQuantizer's."""

    requires_calibration = False
    is_trainable = True

    def is_serializable(self, *args, **kwargs):
        return False

    def param_needs_quantization(self, model, param_name, **kwargs):
        module, weight_name = get_module_from_name(model, param_name)
        weight, load = quantized_weights(module).get(weight_name), self.quantization_config.load
        if weight is None or load.stored is None:
            return weight is not None
        # transformers' bitsandbytes integration leaves experts in 16 bits; our own cache holds them quantized.
        return len(weight.shape) == 3 and f"{param_name}{weight.format.suffixes[1]}" not in load.tensors

    def get_quantize_ops(self):
        return QuantizeRows(self.quantization_config.load.options.device)

    def update_weight_conversions(self, weight_conversions, model):
        """Use `StackExperts` instead of transformers' own step, which fails on a rank that owns no expert."""
        device = self.quantization_config.load.options.storage_device
        for converter in weight_conversions:
            if isinstance(converter, WeightConverter):
                converter.operations = [
                    StackExperts(op.dim, device) if type(op) is MergeModulelist else op for op in converter.operations
                ]
        return weight_conversions

    def _process_model_before_weight_loading(self, model, **kwargs):
        """The model is on meta: quantize it, tie its parameters, then shard it."""
        load = self.quantization_config.load
        quantize_model(model, load.options.quantization, load.stored)
        _tie(model)
        keep_norms_in_fp32(model)
        _transpose_conv1d(model, load)
        _shard_on_meta(model, load)

    def _process_model_after_weight_loading(self, model, **kwargs):
        options, other_layers = self.quantization_config.load.options, self.quantization_config.load.other_layers
        if other_layers:
            build_stage(model, other_layers, options.placement.stages, options.device)
        model.requires_grad_(False)  # the loader made new parameters for those that are not sharded
        mark_for_peft(model)
        return model


def _shard_on_meta(model: PreTrainedModel, load: BaseLoad) -> None:
    """Prepare a model on meta for its placement, so that the loader reads only this rank's rows or layers."""
    options, placement = load.options, load.options.placement
    if placement.zero_stage == 3:
        split_rows(model, options.device)
    elif placement.stages > 1:
        load.other_layers = remove_other_layers(model, placement.stages)
        ignored = model._keys_to_ignore_on_load_unexpected or set()
        other_keys = {rf"(^|\.){re.escape(name)}\." for name in load.other_layers}
        model._keys_to_ignore_on_load_unexpected = {*ignored, *other_keys}
    elif placement.shard_ranks > 1:
        trained = {param for name, param in model.named_parameters() if options.will_be_trained(name)}
        shard(model, placement, options.device, trained)


def _tie(model: PreTrainedModel) -> None:
    """Make tied parameters one object, or the root group would gather them twice.

    transformers' own `tie_weights` does nothing while it loads.
    """
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        module, _, name = target.rpartition(".")
        setattr(model.get_submodule(module), name, model.get_parameter(source))


def _transpose_conv1d(model: PreTrainedModel, load: BaseLoad) -> None:
    """Transpose the float weights of GPT-2's Conv1D, which are (I, O) in the checkpoint, to (O, I)."""
    transposed = {
        f"{n}.weight" for n, m in model.named_modules() if isinstance(m, FrozenLinear) and m.stored_transposed
    }
    if not transposed or load.stored is not None:  # bitsandbytes stores them as (O, I)
        return
    mapping, names = get_model_conversion_mapping(model), model.state_dict()
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    for stored_name, tensor in load.tensors.items():
        name, _ = rename_source_key(stored_name, renamings, converters, model.base_model_prefix, names)
        if name in transposed:
            load.tensors[stored_name] = tensor.transposed()


def mark_for_peft(model: nn.Module) -> None:
    """Mark the NF4 weights for PEFT again, because their parameters were replaced."""
    for module in model.modules():
        if isinstance(module, NF4Linear):
            module.mark_for_peft()


class QuantizeRows(ConversionOps):
    """Quantizes this rank's rows of one float weight into its rows of the parts."""

    def __init__(self, device: torch.device):
        self.device = device

    def convert(self, input_dict, model=None, **kwargs):
        ((name, rows),) = input_dict.items()
        rows = rows[0] if isinstance(rows, list) else rows
        module, weight_name = get_module_from_name(model, name)
        weight = quantized_weights(module)[weight_name]
        if rows.is_meta:  # `check_weights` wants to know the names
            return {f"{name.rpartition('.')[0]}.{part}": getattr(module, part) for part in weight.part_names}
        codes = getattr(module, weight.part_names[0])
        group = codes.device_mesh.get_group() if isinstance(codes, DTensor) else None
        parts = weight.format.quantize(rows.to(self.device), lambda own: _gather_rows(own, weight.shape[0], group))
        converted = {}
        for part_name, part in zip(weight.part_names, parts, strict=True):
            if part_name.endswith("_nested") and group is not None:  # each rank has computed the whole part
                part = _own_chunk(part, group)
            converted[f"{name.rpartition('.')[0]}.{part_name}"] = as_integers(part).to(rows.device)
        if rows.device.type == "cpu":
            # The freed float rows lie between the shards, which stay, so the C library does not return their memory to
            # the system by itself (1.3 GB resident instead of 0.44 GB).
            ctypes.CDLL(None).malloc_trim(0)
        return converted


class StackExperts(MergeModulelist):
    """MergeModulelist that also works on a rank that owns no expert of a layer: an empty stack of the right shape."""

    def __init__(self, dim: int, device: torch.device):
        super().__init__(dim)
        self.device = device

    def convert(self, input_dict, model=None, full_layer_name=None, **kwargs):
        if any(input_dict.values()):
            return super().convert(input_dict, **kwargs)
        module, name = get_module_from_name(model, full_layer_name)
        weight, param = quantized_weights(module).get(name), getattr(module, name)
        (_, out_features, in_features), dtype = (weight.shape, None) if weight else (param.shape, param.dtype)
        rows = out_features // len(input_dict)  # gate and up are concatenated afterwards
        stacks = {pattern: [torch.empty(rows, in_features, dtype=dtype, device=self.device)] for pattern in input_dict}
        return {pattern: stack[:0] for pattern, stack in super().convert(stacks, **kwargs).items()}


def _gather_rows(own: torch.Tensor, num_rows: int, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, int]:
    """All ranks' rows in order, `num_rows` together, and the index of this rank's first row.

    Collective in the group: ranks that own no row must call it too.
    """
    if group is None:
        return own, 0
    most = -(-num_rows // group.size())  # torch.chunk's rule, which fully_shard follows
    counts = [max(0, min(most, num_rows - most * rank)) for rank in range(group.size())]
    padded = own.new_zeros((most, *own.shape[1:]))
    padded[: len(own)] = own
    rows = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(rows, padded, group=group)
    return torch.cat([r[:count] for r, count in zip(rows, counts, strict=True)]), sum(counts[: group.rank()])


def _own_chunk(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's chunk of a part, by torch.chunk's rule."""
    most = -(-len(part) // group.size())
    return part[most * group.rank() : most * (group.rank() + 1)].clone()
