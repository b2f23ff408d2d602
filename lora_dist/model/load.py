"""Load a frozen base so that each rank reads, quantizes and holds only its own rows.

transformers' loader reads the checkpoint. While the model is still on meta, our quantizer replaces its weights by
quantized ones and shards them. The loader then slices the checkpoint by the placement of each DTensor parameter, and
gives this rank's rows to `QuantizeRows`. No rank ever sees the whole of a quantized weight.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from lora_dist.boundary import boundary, read_json
from lora_dist.data.tasks import CAUSAL_LM, Task
from lora_dist.embedded import model_path
from lora_dist.errors import UserError, require
from lora_dist.model.bitsandbytes_format import pop_stored_quantization, read_bitsandbytes
from lora_dist.model.files.configs import load_generation_config, load_model_config
from lora_dist.model.files.lazy_weights import open_checkpoint
from lora_dist.model.loader_hooks import BaseLoad, BaseOptions, FrozenConfig, mark_for_peft
from lora_dist.model.quantize_model import keep_norms_in_fp32, quantize_model
from lora_dist.parallel.fsdp import decoder_layers
from lora_dist.parallel.ranks import gather
from lora_dist.parallel.strategies import Placement
from lora_dist.parallel.zero import partition_base

FINGERPRINT = "fingerprint.json"  # of a folder that we quantized
FINGERPRINT_KEYS = {"format", "bitsandbytes", "quantization", "dtype", "files"}
# Constants that old checkpoints hold beside the weights: masks, tables of rotary positions, versions.
NO_WEIGHT = re.compile(
    r"(^|\.)(inv_freq|cos_cached|sin_cached|position_ids|masked_bias|version|(attn|attention)(\.attention)?\.bias)$"
)


def load_with(name: str, options: BaseOptions) -> PreTrainedModel:
    """Load a frozen base, ready to compute with, of which this rank holds its rows. Collective.

    Returns a transformers model in which no parameter requires a gradient. Raises UserError if there is no such model,
    or if it cannot be quantized or sharded.
    """
    model = read_base(name, options)
    hand_to_deepspeed(model, options)
    return model


def original_name(name: str) -> str:
    """The directory or hub name that an adapter records as its base.

    A folder that `lora-dist quantize` wrote says what it was made from: servers need the original, and it outlives a
    folder on a scratch disk.
    """
    base = read_fingerprint(Path(model_path(name))).get("base")
    return base if isinstance(base, str) else model_path(name)


def read_fingerprint(folder: Path) -> dict:
    """What a folder that we quantized was made from; {} if we did not write the folder, or if this file is damaged."""
    try:
        found = read_json(folder / FINGERPRINT, FINGERPRINT)
    except UserError:
        return {}
    return found if found.keys() >= FINGERPRINT_KEYS else {}


def read_base(name: str, options: BaseOptions) -> PreTrainedModel:
    """Read and quantize this rank's rows. With ZeRO-3 the model cannot compute before `hand_to_deepspeed`. Collective.

    Raises UserError as `load_with` does.
    """
    check_weights(name, options)
    config = load_model_config(name, options.classes)
    _refuse_layerdrop(name, config, options.placement)
    stored = pop_stored_quantization(name, config, options.quantization)
    tensors, not_finite = open_checkpoint(name), set()
    largest = torch.finfo(options.dtype).max
    watched = {key: tensor.watched(partial(not_finite.add, key), largest) for key, tensor in tensors.items()}
    model, report = _load_quietly(config, BaseLoad(options, read_bitsandbytes(watched), stored))
    _refuse_not_finite({f"{key} in {tensors[key].file.name}" for key in not_finite}, name, options.dtype)
    vars(model)["new_parameters"] = sorted(report["missing_keys"])  # a classifier's new head, says `check_weights`
    if options.placement.offload:
        _put_unsharded_on_device(model, options.device)
    model.config.name_or_path = model.name_or_path = original_name(name)
    del model.config.quantization_config
    if model.config.is_encoder_decoder:
        for layer in decoder_layers(model):
            layer.register_forward_pre_hook(_add_gradients_by_layer)
    model.generation_config = load_generation_config(name) or model.generation_config
    return model


def _refuse_layerdrop(name: str, config: PreTrainedConfig, placement: Placement) -> None:
    layerdrop = getattr(config, "layerdrop", 0)
    if layerdrop and placement.shard_ranks > 1:  # ranks would skip different layers
        raise UserError(f"--model_name_or_path {name}: its layerdrop is {layerdrop}; a sharded base needs layerdrop 0")


def _load_quietly(config: PreTrainedConfig, load: BaseLoad) -> tuple[PreTrainedModel, dict[str, set]]:
    """The loaded model, and transformers' report: missing, unexpected and mismatched weights. Hides its warnings."""
    options, verbosity = load.options, logging.get_verbosity()
    logging.set_verbosity_error()  # `_check_report` says what is wrong
    try:
        return options.task.models[type(config)].from_pretrained(
            None, config=config, dtype=options.dtype, device_map={"": options.storage_device}, trust_remote_code=False,
            state_dict=load.tensors, output_loading_info=True, quantization_config=FrozenConfig(load),
            ignore_mismatched_sizes=True,  # they are in the report
        )  # fmt: skip
    finally:
        logging.set_verbosity(verbosity)


def check_weights(name: str, options: BaseOptions) -> None:
    """Raises UserError unless a checkpoint holds the weights that its config.json asks for, and no others.

    It loads the model on meta, so it reads the headers of the checkpoint's files and not one weight. Downloads them if
    needed. Only a classifier's head that will be trained may be missing, because it is then made anew.
    """
    config, task = load_model_config(name, options.classes), options.task
    require(type(config) in task.models, "model_name_or_path", name, f"is not a {task.model_kind}")
    stored = pop_stored_quantization(name, config, options.quantization)
    on_meta = replace(  # the shapes of weights that are quantized now would hide those of the checkpoint
        options, quantization=options.quantization if stored else "none", device=torch.device("meta"),
        placement=Placement(),
    )  # fmt: skip
    with boundary(f"--model_name_or_path {name}: config.json"), _no_progress_bar():
        tensors = read_bitsandbytes(open_checkpoint(name))
        tensors = {key: torch.empty(t.shape, dtype=t.dtype, device="meta") for key, t in tensors.items()}
        model, report = _load_quietly(config, BaseLoad(on_meta, tensors, stored))
    what = f"--model_name_or_path {name}: its checkpoint"
    integers = {key for key, t in tensors.items() if key.endswith(".weight") and not t.dtype.is_floating_point}
    if integers and not stored:
        raise UserError(f"{what} holds {_first_names(integers)} as integers; give the one that it was quantized from")
    hint = "config.json and the weights must be of one model"
    new = {key for key in report["missing_keys"] if task.has_classes and options.will_be_trained(key)}
    if lacking := report["missing_keys"] - new:
        raise UserError(f"{what} lacks {_first_names(lacking)}; {hint}")
    if unused := {key for key in report["unexpected_keys"] if _is_unused_weight(model, key, task)}:
        raise UserError(f"{what} holds {_first_names(unused)}, which the model of config.json has not; {hint}")
    for key, found, needed in sorted(report["mismatched_keys"]):
        raise UserError(f"{what} holds {key} as {tuple(found)}, and the model needs {tuple(needed)}; {hint}")


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """A bar would stand on the terminal before the line that says what is wrong."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _refuse_not_finite(found: set[str], name: str, dtype: torch.dtype) -> None:
    """Raises UserError, the same on all ranks, if one of them read a number that `dtype` cannot hold. Collective."""
    if found := set().union(*gather(found)):
        what = f"--model_name_or_path {name}: {_first_names(found)}"
        too_large = " or numbers beyond float16; try bf16," if dtype == torch.float16 else ";"
        raise UserError(f"{what}: holds NaN or infinite numbers{too_large} download it again, or give another base")


def _first_names(names: set[str], most: int = 4) -> str:
    others = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + others


def _is_unused_weight(model: PreTrainedModel, key: str, task: Task) -> bool:
    """True if a tensor that the model does not use is a weight, and not a constant or the head of another task."""
    if NO_WEIGHT.search(key) or key in dict(model.named_buffers()):
        return False
    prefix = f"{model.base_model_prefix}."
    first = key.removeprefix(prefix).split(".")[0]
    in_base = first in dict(model.base_model.named_children()) or key.startswith(prefix) and first != "pooler"
    return in_base or not task.has_classes


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
        mark_for_peft(model)


def meta_model(
    name: str, quantization: str, dtype: torch.dtype, task: Task = CAUSAL_LM, classes: list[str] | None = None
) -> PreTrainedModel:
    """The base as `load_with` will make it, but on meta, without weights. For checks and counts before reading.

    Raises UserError if there is no such model, or if it cannot be quantized.
    """
    config = load_model_config(name, classes)
    require(type(config) in task.models, "model_name_or_path", name, f"is not a {task.model_kind}")
    stored = pop_stored_quantization(name, config, quantization)
    with boundary(f"--model_name_or_path {name}: config.json"), torch.device("meta"):
        model = task.models[type(config)]._from_config(config, dtype=dtype)
    quantize_model(model, quantization, stored)
    keep_norms_in_fp32(model)
    return model
