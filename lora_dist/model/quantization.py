"""Frozen weights in bitsandbytes' formats, as packed integer parameters that torch's FSDP2 can shard by rows.

The only module that calls bitsandbytes' kernels, which do the arithmetic (`serialization` knows its files). Ours is
that every packed part is a plain frozen `nn.Parameter` of an integer dtype, so that it shards, gathers and survives
`.to(bfloat16)` unchanged, and that backward saves nothing but those parts. fp32 scales are stored as their int32 bits:
`model.to(bf16)` and mixed precision policies would round float parameters silently.

Row r of a weight is packed from row r alone (int8), or from whole blocks of 64 values that never cross a row (NF4,
where in_features is a multiple of 64), so any rank can quantize its rows and get the bits of the whole.

Shapes: O = out_features, I = in_features, E = experts, R = rows of this rank (of O, or of E).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lora_dist.errors import UserError

_ops = torch.ops.bitsandbytes

# Rows of a small tensor from all ranks, in order, and the index of this rank's first row.
GatherRows = Callable[[torch.Tensor], tuple[torch.Tensor, int]]


def as_integers(part: torch.Tensor) -> torch.Tensor:
    return part.view(torch.int32) if part.dtype == torch.float32 else part


def as_floats(part: torch.Tensor) -> torch.Tensor:
    return part.view(torch.float32) if part.dtype == torch.int32 else part


class Int8:
    """LLM.int8 (arXiv 2208.07339): int8 rows and one fp32 scale a row; input columns with outliers stay in 16 bits."""

    suffixes = ("", "_scale")
    outlier_threshold: ClassVar[float] = 6.0

    @staticmethod
    def part_shapes(shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each part of a weight (O, I) or (E, O, I). All are sharded along dimension 0."""
        return [(shape, torch.int8), (shape[:-1], torch.int32)]

    @staticmethod
    def quantize(rows: torch.Tensor, gather: GatherRows) -> list[torch.Tensor]:
        """The parts of this rank's rows of a float weight, (R, I) or (R, O, I)."""
        if not len(rows):  # a rank may own no row of a small layer, and the kernel refuses an empty matrix
            return [rows.to(torch.int8), rows.new_empty(rows.shape[:-1], dtype=torch.float32)]
        matrix = rows.to(torch.float16).reshape(-1, rows.shape[-1]).contiguous()
        codes, scale, _ = bnb_functional.int8_vectorwise_quant(matrix)
        return [codes.view(rows.shape), scale.view(rows.shape[:-1])]

    @staticmethod
    def dequantize(shape: tuple[int, int], dtype: torch.dtype, weight: torch.Tensor, scale: torch.Tensor):
        return weight.to(dtype, copy=True).mul_(scale.unsqueeze(1).mul(1.0 / 127.0))

    @classmethod
    def matmul(cls, shape, x, bias, weight, scale) -> torch.Tensor:
        if x.device.type == "cpu":  # as bitsandbytes trains on CPU
            return nn.functional.linear(x, cls.dequantize(shape, x.dtype, weight, scale), bias)
        rows = x.reshape(-1, x.shape[-1])
        codes, row_scale, outliers = bnb_functional.int8_vectorwise_quant(
            rows.to(torch.float16), threshold=cls.outlier_threshold
        )
        out = _ops.int8_mixed_scaled_mm(rows, codes, weight, row_scale, scale, outliers, bias)[0]
        return out.view(*x.shape[:-1], -1)

    @classmethod
    def expert(cls, shape, index: int, weight, scale):
        """(kind, parts) of the weight (O, I) of one expert, from the parts of all of them."""
        return cls, (weight[index], scale[index])


class NF4:
    """NF4 (QLoRA, arXiv 2305.14314): two codes a byte, and one fp32 absmax per block of 64."""

    suffixes = ("", "_absmax")
    double_quantized: ClassVar[bool] = False

    @staticmethod
    def part_shapes(shape):
        rows, in_features = shape[:-1], shape[-1]
        return [((*rows, in_features // 2), torch.uint8), ((*rows, in_features // 64), torch.int32)]

    @staticmethod
    def quantize(rows, gather):
        weight, absmax = (shape for shape, _ in NF4.part_shapes(rows.shape))
        if not len(rows):
            return [rows.new_empty(weight, dtype=torch.uint8), rows.new_empty(absmax, dtype=torch.float32)]
        codes, scales = _ops.quantize_4bit(rows.contiguous(), 64, "nf4", torch.uint8)
        return [codes.view(weight), scales.view(absmax)]

    @staticmethod
    def dequantize(shape, dtype, weight, absmax):
        return _ops.dequantize_4bit(weight.reshape(-1, 1), absmax.reshape(-1), 64, "nf4", shape, dtype)

    @staticmethod
    def matmul(shape, x, bias, weight, absmax):
        return _ops.gemm_4bit(x, weight.reshape(-1, 1), shape, absmax.reshape(-1), 64, "nf4", bias=bias)

    @classmethod
    def expert(cls, shape, index, weight, absmax):
        return cls, (weight[index], absmax[index])


class NF4Double(NF4):
    """NF4 whose absmax are quantized in turn: one uint8 code per block of 64.

    `nested` holds what the codes are decoded with: [offset, one fp32 scale per 256 codes].
    """

    suffixes = ("", "_absmax", "_nested")
    double_quantized: ClassVar[bool] = True
    _code_per_device: ClassVar[dict[torch.device, torch.Tensor]] = {}

    @staticmethod
    def part_shapes(shape):
        num_blocks = torch.Size(shape).numel() // 64
        weight, absmax = NF4.part_shapes(shape)
        return [weight, (absmax[0], torch.uint8), ((1 + -(-num_blocks // 256),), torch.int32)]

    @staticmethod
    def quantize(rows, gather):
        codes, absmax = NF4.quantize(rows, gather)
        whole, start = gather(absmax)  # the offset is the mean over the whole weight
        offset = whole.mean()
        absmax_codes, state = bnb_functional.quantize_blockwise(whole.view(-1) - offset, blocksize=256)
        mine = absmax_codes.view(whole.shape)[start : start + len(rows)].clone()
        return [codes, mine, torch.cat([offset.view(1), state.absmax])]

    @classmethod
    def code(cls, device: torch.device) -> torch.Tensor:
        if device not in cls._code_per_device:
            cls._code_per_device[device] = bnb_functional.create_dynamic_map().to(device)
        return cls._code_per_device[device]

    @classmethod
    def dequantize(cls, shape, dtype, weight, absmax, nested):
        scales = _ops.dequantize_blockwise(
            absmax.view(-1), nested[1:].contiguous(), cls.code(weight.device), 256, torch.float32
        )
        return NF4.dequantize(shape, dtype, weight, scales + nested[0])

    @classmethod
    def matmul(cls, shape, x, bias, weight, absmax, nested):
        return _ops.gemm_4bit(
            x, weight.view(-1, 1), shape, nested[1:].contiguous(), 64, "nf4", bias=bias,
            absmax_8bit=absmax.view(-1), absmax_code=cls.code(x.device), absmax_offset=nested[0],
        )  # fmt: skip

    @classmethod
    def expert(cls, shape, index, weight, absmax, nested):
        """Decoded for this expert alone; its blocks may begin inside a group of 256, which the kernel cannot."""
        num_blocks = absmax[index].numel()
        blocks = torch.arange(index * num_blocks, (index + 1) * num_blocks, device=absmax.device)
        group = (blocks // 256).view(absmax[index].shape)
        scales = cls.code(absmax.device)[absmax[index].long()] * nested[1:][group]
        return NF4, (weight[index], scales + nested[0])


KIND_OF = {"int8": Int8, "nf4": NF4Double, "nf4_plain": NF4}


@dataclass(frozen=True)
class Packed:
    """A weight that a module holds in packed parts: how, its shape unpacked, and the names of the parts."""

    kind: type
    shape: tuple[int, ...]
    names: tuple[str, ...]

    def parts(self, module: nn.Module) -> list[nn.Parameter]:
        return [getattr(module, name) for name in self.names]

    def select(self, expert: int | None, parts: list[torch.Tensor]):
        """(kind, parts) of the one matrix that is multiplied with: an expert's, or the only one."""
        parts = list(map(as_floats, parts))
        return (self.kind, parts) if expert is None else self.kind.expert(self.shape, expert, *parts)


def packed_weights(module: nn.Module) -> dict[str, Packed]:
    """Name to packing of the weights that this module itself holds packed."""
    return vars(module).get("packed_weights", {})


def pack(module: nn.Module, name: str, kind: type, shape: tuple[int, ...]) -> None:
    """Put the parts of a weight, empty and on meta, in place of the module's parameter `name`."""
    if kind is not Int8 and shape[-1] % 64:
        raise UserError(
            f"--quantization nf4: a layer with in_features={shape[-1]} cannot be split by rows "
            "(not a multiple of 64); use int8"
        )
    names = tuple(name + suffix for suffix in kind.suffixes)
    for part_name, (part_shape, dtype) in zip(names, kind.part_shapes(shape), strict=True):
        empty = torch.empty(part_shape, dtype=dtype, device="meta")
        setattr(module, part_name, nn.Parameter(empty, requires_grad=False))
    module.packed_weights = {**packed_weights(module), name: Packed(kind, shape, names)}


class FrozenMatmul(torch.autograd.Function):
    """x @ W.T + bias for a weight W that never trains, or for one expert's slice of it.

    Saves the packed parts of W and nothing else: W is frozen, so its input is not needed, and the parts are FSDP's
    own buffers, re-gathered in place before backward. (bitsandbytes' int8 Functions keep x as a ctx attribute, which
    non-reentrant checkpointing cannot drop.)
    """

    @staticmethod
    def forward(ctx, x, bias, packed: Packed, expert: int | None, *parts):
        ctx.packed, ctx.expert = packed, expert
        ctx.save_for_backward(*parts)
        kind, selected = packed.select(expert, parts)
        return kind.matmul(packed.shape[-2:], x, bias, *selected)

    @staticmethod
    def backward(ctx, grad_output):
        parts = ctx.saved_tensors  # once: under checkpointing a second read raises
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            kind, selected = ctx.packed.select(ctx.expert, parts)
            grad_x = grad_output @ kind.dequantize(ctx.packed.shape[-2:], grad_output.dtype, *selected)
        if ctx.needs_input_grad[1]:
            grad_bias = grad_output.sum(0).sum_to_size(grad_output.shape[-1:])  # in bitsandbytes' order
        return grad_x, grad_bias, None, None, *(None for _ in parts)


def frozen_linear(module: nn.Module, name: str, x: torch.Tensor, bias=None, expert: int | None = None) -> torch.Tensor:
    """x @ W.T + bias with the packed weight `name` of the module, in autocast's dtype as torch's own linear does."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    packed = packed_weights(module)[name]
    bias = None if bias is None else bias.to(x.dtype)
    return FrozenMatmul.apply(x, bias, packed, expert, *packed.parts(module))


class FrozenLinear:
    """What the two below share. They subclass bitsandbytes' modules so that PEFT takes its bitsandbytes path."""

    _is_hf_initialized = True  # transformers must not draw random numbers for a weight that a checkpoint lacks
    stored_transposed = False  # whether the checkpoint has the weight as (I, O), as Conv1D does

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return frozen_linear(self, "weight", x, self.bias)

    @property
    def W_q(self) -> torch.Tensor:
        """PEFT's DoRA asks a layer that has this name, as HQQ's do, for `dequantize()`."""
        return self.weight

    def dequantize(self) -> torch.Tensor:
        """The weight (O, I) in fp32. Collective where the layer is sharded and not gathered."""
        packed = packed_weights(self)["weight"]
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in packed.parts(self)]
        return packed.kind.dequantize(packed.shape, torch.float32, *map(as_floats, whole))


class Int8Linear(FrozenLinear, bnb.nn.Linear8bitLt):
    def __init__(self, in_features: int, out_features: int, bias: bool, kind: type = Int8):
        super().__init__(
            in_features, out_features, bias, has_fp16_weights=False, threshold=kind.outlier_threshold, device="meta"
        )
        pack(self, "weight", kind, (out_features, in_features))


class NF4Linear(FrozenLinear, bnb.nn.Linear4bit):
    def __init__(self, in_features: int, out_features: int, bias: bool, kind: type = NF4Double):
        super().__init__(
            in_features, out_features, bias, quant_type="nf4", compress_statistics=kind.double_quantized, device="meta"
        )
        pack(self, "weight", kind, (out_features, in_features))
        self.mark_for_peft()

    def mark_for_peft(self) -> None:
        """Put on the weight the attributes that PEFT reads of a bitsandbytes parameter."""
        kind = packed_weights(self)["weight"].kind
        self.weight.compress_statistics, self.weight.quant_type = kind.double_quantized, "nf4"


def make_frozen_linear(quantization: str, in_features: int, out_features: int, bias: bool) -> FrozenLinear:
    """A packed linear on meta. `quantization`: a key of KIND_OF. Raises UserError where its rows cannot be packed."""
    kind = KIND_OF[quantization]
    return (Int8Linear if kind is Int8 else NF4Linear)(in_features, out_features, bias, kind)


def experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Experts with packed weights, for transformers' experts interface: one expert is dequantized at a time.

    The arithmetic and its order are those of transformers' eager experts. hidden_states (tokens, I); top_k_index and
    top_k_weights (tokens, k).
    """
    up = "gate_up_proj" if self.has_gate else "up_proj"
    out = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        slot, token = torch.where(top_k_index.t() == expert)
        bias_of = {n: getattr(self, f"{n}_bias")[expert] if self.has_bias else None for n in (up, "down_proj")}
        hidden = frozen_linear(self, up, hidden_states[token], bias_of[up], expert)
        hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
        hidden = frozen_linear(self, "down_proj", hidden, bias_of["down_proj"], expert)
        hidden = hidden * top_k_weights[token, slot, None]
        out.index_add_(0, token, hidden.to(out.dtype))
    return out
