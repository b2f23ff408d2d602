"""Load a frozen base so that each rank reads, quantizes and holds only its own rows.

transformers' loader does the reading. While the model is still on meta, our quantizer swaps the weights for packed ones
and shards them; the loader then slices every DTensor parameter by itself and hands our rows to `QuantizeRows`. No rank
ever sees the whole of a quantized weight.
"""

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
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
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from lora_dist.data.tasks import CAUSAL_LM, Task
from lora_dist.embedded import model_path
from lora_dist.errors import UserError, require
from lora_dist.model.bitsandbytes_format import StoredFormat, read_bitsandbytes, stored_format
from lora_dist.model.lazy_weights import LazyTensor, open_weights, weight_files
from lora_dist.model.quantization import FrozenLinear, NF4Linear, as_integers, packed_weights
from lora_dist.model.quantize_model import keep_norms_in_fp32, pack_model
from lora_dist.parallel.fsdp import decoder_layers, shard
from lora_dist.parallel.pipeline import put_back, set_aside
from lora_dist.parallel.strategies import Placement
from lora_dist.parallel.zero import partition_base, split_rows


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
    stored: StoredFormat | None
    is_trained: Callable[[str], bool]
    aside: dict[str, nn.Module] = field(default_factory=dict)  # decoder layers that other ranks hold, by name

    @property
    def where(self) -> torch.device:
        """Where the parameters go; `device` is where they are quantized and computed with."""
        return torch.device("cpu") if self.placement.offload else self.device

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
        if rows.device.type == "cpu":
            # Between the shards, which stay, the C library keeps about as many freed bytes as all the float rows have
            # (1.3 GB where 0.44 were held): back to the system with them.
            ctypes.CDLL(None).malloc_trim(0)
        return converted


class StackExperts(MergeModulelist):
    """MergeModulelist for a rank that owns no expert of a layer: an empty stack of the right shape."""

    def __init__(self, dim: int, device: torch.device):
        super().__init__(dim)
        self.device = device

    def convert(self, input_dict, model=None, full_layer_name=None, **kwargs):
        if any(input_dict.values()):
            return super().convert(input_dict, **kwargs)
        module, name = get_module_from_name(model, full_layer_name)
        packed, param = packed_weights(module).get(name), getattr(module, name)
        (_, out_features, in_features), dtype = (packed.shape, None) if packed else (param.shape, param.dtype)
        rows = out_features // len(input_dict)  # gate and up are concatenated to one afterwards
        stacks = {pattern: [torch.empty(rows, in_features, dtype=dtype, device=self.device)] for pattern in input_dict}
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


@register_quantizer("frozen")
class FrozenQuantizer(HfQuantizer):
    requires_calibration = False
    is_trainable = True

    def is_serializable(self, *args, **kwargs):
        return False

    def param_needs_quantization(self, model, param_name, **kwargs):
        module, weight_name = get_module_from_name(model, param_name)
        packed, load = packed_weights(module).get(weight_name), self.quantization_config.load
        if packed is None or load.stored is None:
            return packed is not None
        # transformers' bitsandbytes left the experts of a checkpoint that it quantized; ours are packed in our cache.
        return len(packed.shape) == 3 and f"{param_name}{packed.kind.suffixes[1]}" not in load.tensors

    def get_quantize_ops(self):
        return QuantizeRows(self.quantization_config.load.device)

    def update_weight_conversions(self, weight_conversions, model):
        """transformers stacks the experts that a rank owns, and fails where it owns none: replace that step."""
        for converter in weight_conversions:
            if isinstance(converter, WeightConverter):
                converter.operations = [
                    StackExperts(op.dim, self.quantization_config.load.where) if type(op) is MergeModulelist else op
                    for op in converter.operations
                ]
        return weight_conversions

    def _process_model_before_weight_loading(self, model, **kwargs):
        """The model is on meta: swap the linears, tie, then shard."""
        load = self.quantization_config.load
        pack_model(model, load.quantization, load.stored)
        _tie(model)
        keep_norms_in_fp32(model)
        _transpose(model, load)
        if load.placement.zero_stage == 3:
            split_rows(model, load.device)
        elif load.placement.stages > 1:
            load.aside = set_aside(model, load.placement.stages)
            ignored = model._keys_to_ignore_on_load_unexpected or set()
            model._keys_to_ignore_on_load_unexpected = {*ignored, *(rf"(^|\.){re.escape(n)}\." for n in load.aside)}
        elif load.placement.shard_ranks > 1:
            trained = {param for name, param in model.named_parameters() if load.is_trained(name)}
            shard(model, load.placement, load.device, trained)

    def _process_model_after_weight_loading(self, model, **kwargs):
        load = self.quantization_config.load
        if load.aside:
            put_back(model, load.aside, load.placement.stages, load.device)
        model.requires_grad_(False)  # the loader made new parameters of those that are not sharded
        _mark_for_peft(model)
        return model


def _mark_for_peft(model: nn.Module) -> None:
    """Again, after the parameters were replaced."""
    for module in model.modules():
        if isinstance(module, NF4Linear):
            module.mark_for_peft()


def _tie(model: PreTrainedModel) -> None:
    """Make one parameter of tied ones: else the root group would gather them twice. `tie_weights` is disabled here."""
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        module, _, name = target.rpartition(".")
        setattr(model.get_submodule(module), name, model.get_parameter(source))


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


def load_base(name: str, *, device: torch.device, placement: Placement, **how) -> PreTrainedModel:
    """`read_base`, ready to compute with. Collective."""
    model = read_base(name, device=device, placement=placement, **how)
    hand_over(model, placement, device)
    return model


def hand_over(model: PreTrainedModel, placement: Placement, device: torch.device) -> None:
    """Give the rows that were read to the engine that will gather them, where that is not FSDP2. Collective."""
    if placement.zero_stage == 3:
        partition_base(model, placement.deepspeed, device)
        _mark_for_peft(model)


def read_base(
    name: str,
    *,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
    placement: Placement,
    is_trained: Callable[[str], bool] = lambda name: False,
    task: Task = CAUSAL_LM,
    classes: list[str] | None = None,
) -> PreTrainedModel:
    """The frozen base, placed as `placement` says. `dtype`: of what is neither quantized nor in a norm.

    A base that is to classify `classes` may lack the head that will: it is made anew, and must be trained.

    `is_trained` says of a parameter's name whether it will be trained: such stay whole on each rank. A checkpoint that
    bitsandbytes quantized is taken as it is. Raises UserError where there is no such model, or it cannot be quantized
    or sharded. Collective.
    """
    config = load_model_config(name, classes)
    if getattr(config, "layerdrop", 0) and placement.shard_ranks > 1:  # ranks would skip different layers
        raise UserError(f"--model_name_or_path {name}: its layerdrop is {config.layerdrop}; a sharded base needs 0")
    stored = stored_format(name, config, quantization)
    tensors = read_bitsandbytes(open_weights(weight_files(name)))
    load = BaseLoad(quantization, placement, device, tensors, stored, is_trained)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing is answered below
    model, loaded = task.models[type(config)].from_pretrained(
        None, config=config, dtype=dtype, device_map={"": load.where},
        state_dict=load.tensors, output_loading_info=True, quantization_config=FrozenConfig(load),
    )  # fmt: skip
    logging.set_verbosity(verbosity)
    absent = sorted(loaded["missing_keys"])
    new = [name for name in absent if task.has_classes and is_trained(name)]
    missing = [name for name in absent if name not in new]
    if missing:  # transformers would go on with random numbers in their place
        raise UserError(f"--model_name_or_path {name}: its checkpoint lacks {' '.join(missing[:4])}")
    if placement.offload:  # what is not sharded computes where it lies
        for tensor in (*model.parameters(), *model.buffers()):
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(device)
    model.config.name_or_path = model.name_or_path = model_path(name)
    del model.config.quantization_config
    vars(model)["new_parameters"] = new
    if model.config.is_encoder_decoder:
        for layer in decoder_layers(model):
            layer.register_forward_pre_hook(_add_gradients_by_layer)
    try:
        model.generation_config = GenerationConfig.from_pretrained(model_path(name))
    except OSError:
        pass  # many have none; transformers made one from the model's config
    return model


def _add_gradients_by_layer(layer: nn.Module, args: tuple) -> tuple:
    """Let the encoder's output collect its gradient layer by layer of the decoder, as FSDP2 has it: the same bits."""
    return tuple(a.view_as(a) if isinstance(a, torch.Tensor) and a.requires_grad else a for a in args)


def meta_model(
    name: str, quantization: str, dtype: torch.dtype, task: Task = CAUSAL_LM, classes: list[str] | None = None
) -> PreTrainedModel:
    """The base as `load_base` will make it, without its weights: to check and count before anything is read."""
    config = load_model_config(name, classes)
    require(type(config) in task.models, "model_name_or_path", name, f"is not a {task.what}")
    stored = stored_format(name, config, quantization)
    with torch.device("meta"):
        model = task.models[type(config)]._from_config(config, dtype=dtype)
    pack_model(model, quantization, stored)
    keep_norms_in_fp32(model)
    return model


def load_model_config(name: str, classes: list[str] | None = None):
    """transformers' config of a model directory or hub name. Raises UserError where there is none."""
    labels = {"id2label": dict(enumerate(classes))} if classes else {}
    labels |= {"label2id": {name: number for number, name in enumerate(classes)}} if classes else {}
    if not Path(model_path(name)).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(
            f"--model_name_or_path {name}: no such directory; "
            "give a model directory or a hub name such as facebook/opt-6.7b"
        )
    try:
        return AutoConfig.from_pretrained(model_path(name), **labels)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--model_name_or_path {name}: {reason} Give a model directory or a hub name such as facebook/opt-6.7b"
        ) from None
