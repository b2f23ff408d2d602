"""bitsandbytes' files: what it and transformers write for a quantized weight, read and written as our packed parts."""

import dataclasses
import json
from dataclasses import dataclass

import bitsandbytes.functional as bnb_functional
import torch
from bitsandbytes.functional import QuantState
from transformers import BitsAndBytesConfig, PreTrainedModel

from lora_dist.errors import UserError, require
from lora_dist.model.lazy_weights import LazyTensor, OwnRows
from lora_dist.model.quantization import KIND_OF, FrozenLinear, Int8, NF4Double, Packed, packed_weights


@dataclass(frozen=True)
class StoredFormat:
    """How a checkpoint that is quantized already is: its `--quantization`, and the modules it left as they were."""

    quantization: str
    skip_modules: list[str] | None  # None: transformers' own choice, the head


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


def read_bitsandbytes(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """A checkpoint's tensors, with bitsandbytes' entries in it presented as the packed parts above.

    bitsandbytes writes a 4-bit weight as one column (O * I / 2, 1) with its state beside it, an int8 one with `SCB`.
    Raises UserError where a weight is in a 4-bit format other than NF4 with blocks of 64.
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
            _check_format(weight, state, parts.pop(f"{weight}.quant_map")[...])
            *rows, in_features = state["shape"]
            codes = parts[weight]  # some are stored as bfloat16, for FSDP1
            parts[weight] = codes.as_rows(*rows, in_features // 2 // codes.dtype.itemsize).viewed(torch.uint8)
            absmax = parts.pop(f"{weight}.absmax").as_rows(*rows, in_features // 64)
            parts[f"{weight}_absmax"] = absmax if absmax.dtype == torch.uint8 else absmax.viewed(torch.int32)
            if "nested_offset" in state:
                parts[f"{weight}_nested"] = _nested(state["nested_offset"], parts.pop(f"{weight}.nested_absmax"))
                parts.pop(f"{weight}.nested_quant_map")
    return parts


def write_bitsandbytes(
    name: str, packed: Packed, parts: list[OwnRows], nested: torch.Tensor | None, dtype: torch.dtype, writes: bool
) -> dict[str, OwnRows]:
    """The entries bitsandbytes writes for a packed weight: what `read_bitsandbytes` reads, and transformers too.

    `nested`: the whole of it, where the kind has one. `dtype`: what the weight dequantizes to. `writes`: whether this
    rank writes what is not shared.
    """
    if packed.kind is Int8:
        stem = name.removesuffix(".weight")
        weight_format = _own(torch.tensor(0, dtype=torch.uint8), writes)
        scale = dataclasses.replace(parts[1], dtype=torch.float32)
        entries = {name: parts[0], f"{stem}.SCB": scale}
        return entries | ({f"{stem}.weight_format": weight_format} if stem != name else {})
    scales = None
    if nested is not None:
        code = NF4Double.code(nested.device)
        scales = QuantState(absmax=nested[1:], code=code, blocksize=256, dtype=torch.float32)
    state = QuantState(
        absmax=torch.empty(0), shape=torch.Size(packed.shape), code=bnb_functional.get_4bit_type("nf4", device="cpu"),
        blocksize=64, quant_type="nf4", dtype=dtype, offset=None if nested is None else nested[0], state2=scales,
    )  # fmt: skip
    entries = {key: _own(value.cpu(), writes) for key, value in state.as_dict(packed=True).items()}
    entries["absmax"] = dataclasses.replace(
        parts[1], shape=(torch.Size(parts[1].shape).numel(),),
        dtype=torch.uint8 if packed.kind.double_quantized else torch.float32,
    )  # fmt: skip
    column = dataclasses.replace(parts[0], shape=(torch.Size(parts[0].shape).numel(), 1))
    return {name: column} | {f"{name}.{key}": value for key, value in entries.items()}


def _own(tensor: torch.Tensor, writes: bool) -> OwnRows:
    return OwnRows(tuple(tensor.shape), tensor.dtype, tensor if writes else tensor.flatten()[:0])


def _nested(offset: float, absmax: LazyTensor) -> LazyTensor:
    def read(rows, columns):
        return torch.cat([torch.tensor([offset]), absmax[...]])[rows].view(torch.int32)

    return LazyTensor((1 + absmax.shape[0],), torch.int32, read)


def _check_format(name: str, state: dict, quant_map: torch.Tensor) -> None:
    sizes = (state["blocksize"], state.get("nested_blocksize", 256))
    if state["quant_type"] != "nf4" or sizes != (64, 256):
        raise UserError(
            f"--model_name_or_path: {name} is stored as {state['quant_type']} in blocks of {sizes[0]}; "
            "only nf4 in blocks of 64 can be sharded: take the unquantized model"
        )
    if not torch.equal(quant_map, bnb_functional.get_4bit_type("nf4", device="cpu")):
        raise UserError(f"--model_name_or_path: {name} has an NF4 code of its own; take the unquantized model")


def bitsandbytes_config(model: PreTrainedModel, dtype: torch.dtype) -> dict:
    """transformers' quantization_config of the model; what is not packed is named, so that it leaves that too."""
    packed = next(p for module in model.modules() for p in packed_weights(module).values())
    left = [
        name for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not isinstance(module, FrozenLinear)
    ]  # fmt: skip
    if packed.kind is Int8:
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=packed.kind.double_quantized, llm_int8_skip_modules=left,
        )  # fmt: skip
    return config.to_dict()
