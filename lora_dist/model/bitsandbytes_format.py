"""Checkpoints in bitsandbytes' format, as it and transformers write them: read as our parts, and written from them."""

import dataclasses
import json
from dataclasses import dataclass

import bitsandbytes.functional as bnb_functional
import torch
from bitsandbytes.functional import QuantState
from transformers import BitsAndBytesConfig, PreTrainedModel

from lora_dist.errors import UserError, require
from lora_dist.model.files.lazy_weights import LazyTensor, OwnRows
from lora_dist.model.quantization import FORMATS, FrozenLinear, Int8, NF4Double, QuantizedWeight, quantized_weights


@dataclass(frozen=True)
class StoredQuantization:
    """How a checkpoint is quantized already."""

    quantization: str  # a key of FORMATS
    skip_modules: list[str] | None  # modules that were not quantized; None: transformers' default, the head


def pop_stored_quantization(name: str, config, quantization: str) -> StoredQuantization | None:
    """How bitsandbytes quantized the checkpoint `name`; None if it is not quantized.

    Removes the entry from the model's `config`, because with it transformers would load bitsandbytes' own quantizer.
    Raises UserError if the checkpoint is quantized in another way than `quantization` says.
    """
    entry = vars(config).pop("quantization_config", None)
    if entry is None:
        return None
    entry = entry if isinstance(entry, dict) else entry.to_dict()
    found = f"by {entry.get('quant_method')}"
    if entry.get("load_in_8bit"):
        found = "int8"
    elif entry.get("load_in_4bit"):
        found = "nf4" if entry.get("bnb_4bit_use_double_quant") else "nf4_plain"
    hint = f"as {found}: give that" if found in FORMATS else f"{found}: give the unquantized model"
    require(found == quantization, "quantization", quantization, f"{name} is quantized already, {hint}")
    return StoredQuantization(found, entry.get("llm_int8_skip_modules"))


def read_bitsandbytes(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """A checkpoint's tensors, in which bitsandbytes' entries are replaced by parts as `quantization` defines them.

    bitsandbytes writes a 4-bit weight as one column (O * I / 2, 1) with its state in other entries, and an int8 weight
    with its scales as `SCB`. Raises UserError if a weight is in a 4-bit format other than NF4 with blocks of 64.
    """
    parts = dict(tensors)
    for name in tensors:
        if name.endswith(".SCB"):
            stem = name.removesuffix(".SCB")
            weight = stem if stem in tensors else f"{stem}.weight"
            parts[f"{weight}_scale"] = parts.pop(name).viewed(torch.int32)
            parts.pop(f"{stem}.weight_format", None)
        elif ".quant_state.bitsandbytes__" in name:
            weight = name[: name.index(".quant_state.")]
            state = json.loads(bytes(parts.pop(name)[...].tolist()))
            _check_nf4(weight, state, parts.pop(f"{weight}.quant_map")[...])
            *rows, in_features = state["shape"]
            codes = parts[weight]  # some checkpoints store them as bfloat16, for FSDP1
            parts[weight] = codes.as_rows(*rows, in_features // 2 // codes.dtype.itemsize).viewed(torch.uint8)
            absmax = parts.pop(f"{weight}.absmax").as_rows(*rows, in_features // 64)
            parts[f"{weight}_absmax"] = absmax if absmax.dtype == torch.uint8 else absmax.viewed(torch.int32)
            if "nested_offset" in state:
                parts[f"{weight}_nested"] = _nested(state["nested_offset"], parts.pop(f"{weight}.nested_absmax"))
                parts.pop(f"{weight}.nested_quant_map")
    return parts


def write_bitsandbytes(
    name: str,
    weight: QuantizedWeight,
    parts: list[OwnRows],
    nested: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    writes: bool,
) -> dict[str, OwnRows]:
    """The entries that bitsandbytes writes for a quantized weight; `read_bitsandbytes` and transformers read them.

    `parts`: this rank's rows of the codes and of their scales. `nested`: all of that part, if the format has it.
    `dtype`: of the dequantized weight. `writes`: True on the one rank that writes the entries that are not sharded.
    """
    if weight.format is Int8:
        stem = name.removesuffix(".weight")
        weight_format = _unsharded(torch.tensor(0, dtype=torch.uint8), writes)
        scale = dataclasses.replace(parts[1], dtype=torch.float32)
        entries = {name: parts[0], f"{stem}.SCB": scale}
        return entries | ({f"{stem}.weight_format": weight_format} if stem != name else {})
    scales = None
    if nested is not None:
        code = NF4Double.code(nested.device)
        scales = QuantState(absmax=nested[1:], code=code, blocksize=256, dtype=torch.float32)
    state = QuantState(
        absmax=torch.empty(0), shape=torch.Size(weight.shape), code=bnb_functional.get_4bit_type("nf4", device="cpu"),
        blocksize=64, quant_type="nf4", dtype=dtype, offset=None if nested is None else nested[0], state2=scales,
    )  # fmt: skip
    entries = {key: _unsharded(value.cpu(), writes) for key, value in state.as_dict(packed=True).items()}
    entries["absmax"] = dataclasses.replace(
        parts[1], shape=(torch.Size(parts[1].shape).numel(),),
        dtype=torch.uint8 if weight.format.double_quantized else torch.float32,
    )  # fmt: skip
    column = dataclasses.replace(parts[0], shape=(torch.Size(parts[0].shape).numel(), 1))
    return {name: column} | {f"{name}.{key}": value for key, value in entries.items()}


def _unsharded(tensor: torch.Tensor, writes: bool) -> OwnRows:
    """A tensor that every rank holds, and that this rank writes if `writes`."""
    return OwnRows(tuple(tensor.shape), tensor.dtype, tensor if writes else tensor.flatten()[:0])


def _nested(offset: float, absmax: LazyTensor) -> LazyTensor:
    """The part `nested` of NF4Double: [offset, scales]."""

    def read(rows, columns):
        return torch.cat([torch.tensor([offset]), absmax[...]])[rows].view(torch.int32)

    return LazyTensor((1 + absmax.shape[0],), torch.int32, read)


def _check_nf4(name: str, state: dict, quant_map: torch.Tensor) -> None:
    """Raises UserError unless a 4-bit weight is NF4 in blocks of 64, with bitsandbytes' own code."""
    block_sizes = (state["blocksize"], state.get("nested_blocksize", 256))
    if state["quant_type"] != "nf4" or block_sizes != (64, 256):
        raise UserError(
            f"--model_name_or_path: {name} is stored as {state['quant_type']} in blocks of {block_sizes[0]}; "
            "only nf4 in blocks of 64 is supported: give the unquantized model"
        )
    if not torch.equal(quant_map, bnb_functional.get_4bit_type("nf4", device="cpu")):
        raise UserError(
            f"--model_name_or_path: {name} is stored with an NF4 code other than bitsandbytes' own, "
            "which is not supported: give the unquantized model"
        )


def bitsandbytes_config(model: PreTrainedModel, dtype: torch.dtype) -> dict:
    """transformers' quantization_config of a quantized model. It names the linears that are not quantized."""
    weight = next(weight for module in model.modules() for weight in quantized_weights(module).values())
    unquantized = [
        name for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not isinstance(module, FrozenLinear)
    ]  # fmt: skip
    if weight.format is Int8:
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=unquantized)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=weight.format.double_quantized, llm_int8_skip_modules=unquantized,
        )  # fmt: skip
    return config.to_dict()
