"""Load a frozen base so that each rank reads, quantizes and holds only its own rows.

transformers' loader reads the checkpoint. While the model is still on meta, our quantizer replaces its weights by
quantized ones and shards them. The loader then slices the checkpoint by the placement of each DTensor parameter, and
gives this rank's rows to `QuantizeRows`. No rank ever sees the whole of a quantized weight.
"""

import ctypes
import os
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
    PreTrainedConfig,
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
from lora_dist.environment import cpu_has_bf16, has_gpu
from lora_dist.errors import UserError, require
from lora_dist.model.bitsandbytes_format import StoredQuantization, pop_stored_quantization, read_bitsandbytes
from lora_dist.model.lazy_weights import LazyTensor, open_weights, weight_files
from lora_dist.model.quantization import FORMATS, FrozenLinear, NF4Linear, as_integers, quantized_weights
from lora_dist.model.quantize_model import keep_norms_in_fp32, quantize_model
from lora_dist.parallel.fsdp import decoder_layers, shard
from lora_dist.parallel.pipeline import build_stage, remove_other_layers
from lora_dist.parallel.ranks import num_ranks
from lora_dist.parallel.strategies import Placement, world_size
from lora_dist.parallel.zero import partition_base, split_rows

EXAMPLES = "give a model directory or a hub name such as facebook/opt-6.7b"


def _no_parameter(name: str) -> bool:
    return False


def load_base(
    name: str,
    *,
    quantization: str = "int8",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    placement: Placement | None = None,
    will_be_trained: Callable[[str], bool] = _no_parameter,
    task: Task = CAUSAL_LM,
    classes: list[str] | None = None,
) -> PreTrainedModel:
    """Load a frozen base, quantized and spread over the ranks, ready to compute with. Collective.

    name: a model directory, a hub name, or "embedded". A checkpoint that bitsandbytes quantized is used as it is.
    quantization: "int8" (LLM.int8, arXiv 2208.07339), "nf4" (QLoRA with double quantization, arXiv 2305.14314),
        "nf4_plain" (without double quantization) or "none".
    dtype: of the weights that are neither quantized nor in a norm; norms are fp32. Default: bf16, or fp32 on a CPU
        without bf16 instructions.
    device: where the base computes. Default: the GPU number LOCAL_RANK, or the CPU if there is no GPU.
    placement: how the ranks share the base. Default: each rank holds its rows (FSDP2); if there is no process group,
        this process holds all of it.
    will_be_trained: called with the name of each parameter; True for those that the caller will train. They are not
        sharded. Adapters that are added later need no mention.
    task: chooses the class of the model. `classes` are the names of a classifier's classes, in order. A checkpoint may
        lack the classifier's head: it is then made anew and has to be trained.

    Returns a transformers model in which no parameter requires a gradient. Raises UserError if there is no such model,
    if it cannot be quantized or sharded, or if a launcher started several ranks that have not met yet.
    """
    valid = (*FORMATS, "none")
    require(quantization in valid, "quantization", quantization, f"must be one of {', '.join(valid)}")
    if placement is None and world_size() > 1 and not dist.is_initialized():
        raise UserError(f"WORLD_SIZE {world_size()}: no process group; call torch.distributed.init_process_group first")
    device = torch.device(device) if device is not None else _default_device()
    dtype = dtype or (torch.bfloat16 if device.type != "cpu" or cpu_has_bf16() else torch.float32)
    placement = placement or Placement(shard_ranks=num_ranks())
    options = BaseOptions(quantization, dtype, device, placement, will_be_trained, task, classes)
    return load_with(name, options)


def _default_device() -> torch.device:
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if has_gpu() else torch.device("cpu")


@dataclass(frozen=True)
class BaseOptions:
    """How to load a base. The fields are the parameters of `load_base`, which describes them."""

    quantization: str
    dtype: torch.dtype
    device: torch.device
    placement: Placement
    will_be_trained: Callable[[str], bool] = _no_parameter
    task: Task = CAUSAL_LM
    classes: list[str] | None = None

    @property
    def storage_device(self) -> torch.device:
        """Where the shards are stored. They are quantized and computed with on `device`."""
        return torch.device("cpu") if self.placement.offload else self.device


def load_with(name: str, options: BaseOptions) -> PreTrainedModel:
    """`load_base`, with its parameters in one object. Collective."""
    model = read_base(name, options)
    hand_to_deepspeed(model, options)
    return model


def read_base(name: str, options: BaseOptions) -> PreTrainedModel:
    """Read and quantize this rank's rows. With ZeRO-3 the model cannot compute before `hand_to_deepspeed`. Collective.

    Raises UserError as `load_base` does.
    """
    config = load_model_config(name, options.classes)
    _refuse_layerdrop(name, config, options.placement)
    stored = pop_stored_quantization(name, config, options.quantization)
    load = BaseLoad(options, read_bitsandbytes(open_weights(weight_files(name))), stored)
    model, missing = _load_quietly(config, load)
    vars(model)["new_parameters"] = _check_missing(name, missing, options)
    if options.placement.offload:
        _put_unsharded_on_device(model, options.device)
    model.config.name_or_path = model.name_or_path = model_path(name)
    del model.config.quantization_config
    if model.config.is_encoder_decoder:
        for layer in decoder_layers(model):
            layer.register_forward_pre_hook(_add_gradients_by_layer)
    try:
        model.generation_config = GenerationConfig.from_pretrained(model_path(name))
    except OSError:
        pass  # many checkpoints have none; transformers has made one from the model's config
    return model


def _refuse_layerdrop(name: str, config: PreTrainedConfig, placement: Placement) -> None:
    layerdrop = getattr(config, "layerdrop", 0)
    if layerdrop and placement.shard_ranks > 1:  # ranks would skip different layers
        raise UserError(f"--model_name_or_path {name}: its layerdrop is {layerdrop}; a sharded base needs layerdrop 0")


def _load_quietly(config: PreTrainedConfig, load: "BaseLoad") -> tuple[PreTrainedModel, list[str]]:
    """The loaded model, and the sorted names of the weights that its checkpoint lacks. Hides transformers' warnings."""
    options, verbosity = load.options, logging.get_verbosity()
    logging.set_verbosity_error()  # `_check_missing` reports the weights that are missing
    try:
        model, report = options.task.models[type(config)].from_pretrained(
            None, config=config, dtype=options.dtype, device_map={"": options.storage_device},
            state_dict=load.tensors, output_loading_info=True, quantization_config=FrozenConfig(load),
        )  # fmt: skip
    finally:
        logging.set_verbosity(verbosity)
    return model, sorted(report["missing_keys"])


def _check_missing(name: str, missing: list[str], options: BaseOptions) -> list[str]:
    """Names of the weights that may be missing, because they are a classifier's new head, which will be trained.

    Raises UserError if the checkpoint lacks others: transformers would put random numbers in their place.
    """
    new = [weight for weight in missing if options.task.has_classes and options.will_be_trained(weight)]
    lacking = [weight for weight in missing if weight not in new]
    if lacking:
        raise UserError(f"--model_name_or_path {name}: its checkpoint lacks {' '.join(lacking[:4])}")
    return new


def _put_unsharded_on_device(model: PreTrainedModel, device: torch.device) -> None:
    """With offloading, only shards stay in host memory; everything else is moved to where it computes."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)


def _add_gradients_by_layer(layer: nn.Module, args: tuple) -> tuple:
    """Make the encoder's output collect its gradient one decoder layer at a time, as under FSDP2, for equal bits."""
    return tuple(a.view_as(a) if isinstance(a, torch.Tensor) and a.requires_grad else a for a in args)


def hand_to_deepspeed(model: PreTrainedModel, options: BaseOptions) -> None:
    """Under ZeRO-3, hand the rows that were read to DeepSpeed, which will gather them. Collective."""
    if options.placement.zero_stage == 3:
        partition_base(model, options.placement.deepspeed, options.device)
        _mark_for_peft(model)


def meta_model(
    name: str, quantization: str, dtype: torch.dtype, task: Task = CAUSAL_LM, classes: list[str] | None = None
) -> PreTrainedModel:
    """The base as `load_base` will make it, but on meta, without weights. For checks and counts before reading.

    Raises UserError if there is no such model, or if it cannot be quantized.
    """
    config = load_model_config(name, classes)
    require(type(config) in task.models, "model_name_or_path", name, f"is not a {task.model_kind}")
    stored = pop_stored_quantization(name, config, quantization)
    with torch.device("meta"):
        model = task.models[type(config)]._from_config(config, dtype=dtype)
    quantize_model(model, quantization, stored)
    keep_norms_in_fp32(model)
    return model


def load_model_config(name: str, classes: list[str] | None = None) -> PreTrainedConfig:
    """transformers' config of a model directory or hub name. Raises UserError if there is none."""
    labels = {}
    if classes:
        labels["id2label"] = dict(enumerate(classes))
        labels["label2id"] = {label: number for number, label in enumerate(classes)}
    if not Path(model_path(name)).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"--model_name_or_path {name}: no such directory; {EXAMPLES}")
    try:
        return AutoConfig.from_pretrained(model_path(name), **labels)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--model_name_or_path {name}: {reason.rstrip('.')}; {EXAMPLES}") from None


# What follows is called by transformers' loader.


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
        _mark_for_peft(model)
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


def _mark_for_peft(model: nn.Module) -> None:
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
