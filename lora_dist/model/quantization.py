"""Frozen weights in bitsandbytes' formats, as integer parameters that torch's FSDP2 can shard by rows.

Only this module calls bitsandbytes' kernels, which do the arithmetic; `bitsandbytes_format` reads and writes its files.
A quantized weight is made of parts (codes, scales). Each part is a plain frozen `nn.Parameter` of an integer dtype, so
it can be sharded and gathered, and `.to(bfloat16)` does not change it; backward saves nothing but the parts. fp32
scales are stored as their int32 bits, because `model.to(bf16)` and mixed precision policies would silently round float
parameters.

Any rank can quantize its own rows and gets the same bits as from the whole weight. int8 quantizes each row by itself.
NF4 quantizes blocks of 64 values; in_features must be a multiple of 64, so that no block crosses a row.

Shapes: O = out_features, I = in_features, E = experts, R = rows of this rank (out of O, or out of E).
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

# Maps this rank's rows of a small tensor to the rows of all ranks, in order, and the index of this rank's first row.
GatherRows = Callable[[torch.Tensor], tuple[torch.Tensor, int]]


def as_integers(part: torch.Tensor) -> torch.Tensor:
    """fp32 as int32 with the same bits. A tensor of another dtype is returned as it is."""
    return part.view(torch.int32) if part.dtype == torch.float32 else part


def as_floats(part: torch.Tensor) -> torch.Tensor:
    """int32 as fp32 with the same bits. A tensor of another dtype is returned as it is."""
    return part.view(torch.float32) if part.dtype == torch.int32 else part


class Int8:
    """LLM.int8 (arXiv 2208.07339): int8 codes and one fp32 scale per row.

    Columns of the input that hold an outlier are multiplied in 16 bits.
    """

    suffixes = ("", "_scale")  # of the names of the parts
    outlier_threshold: ClassVar[float] = 6.0

    @staticmethod
    def part_shapes(shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each part of a weight (O, I) or (E, O, I). Every part is sharded along dimension 0."""
        return [(shape, torch.int8), (shape[:-1], torch.int32)]

    @staticmethod
    def quantize(rows: torch.Tensor, gather: GatherRows) -> list[torch.Tensor]:
        """Quantize this rank's rows of a float weight, (R, I) or (R, O, I), into parts. Scales are returned as fp32.

        Collective over the ranks that share the weight if `gather` is: NF4Double calls it.
        """
        if not len(rows):  # a rank may own no row of a small layer; the kernel does not accept an empty matrix
            return [rows.to(torch.int8), rows.new_empty(rows.shape[:-1], dtype=torch.float32)]
        matrix = rows.to(torch.float16).reshape(-1, rows.shape[-1]).contiguous()
        codes, scale, _ = bnb_functional.int8_vectorwise_quant(matrix)
        return [codes.view(rows.shape), scale.view(rows.shape[:-1])]

    @staticmethod
    def dequantize(shape: tuple[int, int], dtype: torch.dtype, weight: torch.Tensor, scale: torch.Tensor):
        """The weight (O, I) as `dtype`."""
        return weight.to(dtype, copy=True).mul_(scale.unsqueeze(1).mul(1.0 / 127.0))

    @classmethod
    def matmul(cls, shape, x, bias, weight, scale) -> torch.Tensor:
        """x @ W.T + bias, for a weight of shape (O, I)."""
        if x.device.type == "cpu":  # what bitsandbytes does in training on a CPU
            return nn.functional.linear(x, cls.dequantize(shape, x.dtype, weight, scale), bias)
        rows = x.reshape(-1, x.shape[-1])
        codes, row_scale, outliers = bnb_functional.int8_vectorwise_quant(
            rows.to(torch.float16), threshold=cls.outlier_threshold
        )
        out = _ops.int8_mixed_scaled_mm(rows, codes, weight, row_scale, scale, outliers, bias)[0]
        return out.view(*x.shape[:-1], -1)

    @classmethod
    def expert(cls, shape, index: int, weight, scale):
        """(format, parts) of one expert's weight (O, I), from the parts of all experts."""
        return cls, (weight[index], scale[index])


class NF4:
    """NF4 (QLoRA, arXiv 2305.14314): two codes per byte, and one fp32 absmax per block of 64."""

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
    """NF4 with double quantization: the absmax of each block of 64 is itself quantized, to one uint8 code.

    `nested` decodes these codes. It holds [offset, one fp32 scale per 256 codes].
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
        all_absmax, start = gather(absmax)  # the offset is the mean over the whole weight
        offset = all_absmax.mean()
        all_codes, state = bnb_functional.quantize_blockwise(all_absmax.view(-1) - offset, blocksize=256)
        absmax_codes = all_codes.view(all_absmax.shape)[start : start + len(rows)].clone()
        return [codes, absmax_codes, torch.cat([offset.view(1), state.absmax])]

    @classmethod
    def code(cls, device: torch.device) -> torch.Tensor:
        """bitsandbytes' table of the 256 values that an absmax code stands for, fp32, made once per device."""
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
        """Decode the absmax of this expert alone, with torch.

        Its blocks may begin inside a group of 256, which bitsandbytes' kernel does not support.
        """
        num_blocks = absmax[index].numel()
        blocks = torch.arange(index * num_blocks, (index + 1) * num_blocks, device=absmax.device)
        group = (blocks // 256).view(absmax[index].shape)
        scales = cls.code(absmax.device)[absmax[index].long()] * nested[1:][group]
        return NF4, (weight[index], scales + nested[0])


FORMATS = {"int8": Int8, "nf4": NF4Double, "nf4_plain": NF4}


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that a module holds as quantized parts."""

    format: type  # Int8, NF4 or NF4Double
    shape: tuple[int, ...]  # of the float weight: (O, I) or (E, O, I)
    part_names: tuple[str, ...]  # names of the module's parameters that are the parts

    def parts(self, module: nn.Module) -> list[nn.Parameter]:
        return [getattr(module, name) for name in self.part_names]

    def matrix(self, expert: int | None, parts: list[torch.Tensor]):
        """(format, parts) of the matrix to multiply with: that of one expert, or the only one if `expert` is None."""
        parts = list(map(as_floats, parts))
        return (self.format, parts) if expert is None else self.format.expert(self.shape, expert, *parts)


def quantized_weights(module: nn.Module) -> dict[str, QuantizedWeight]:
    """The quantized weights that belong to this module itself, not to a submodule, by name."""
    return vars(module).get("quantized_weights", {})


def replace_by_quantized(module: nn.Module, name: str, format: type, shape: tuple[int, ...]) -> None:
    """Replace the module's parameter `name` by the parts of a quantized weight, which are empty and on meta.

    Raises UserError if rows of this length cannot be quantized one by one.
    """
    if format is not Int8 and shape[-1] % 64:
        raise UserError(
            f"--quantization nf4: a layer has in_features={shape[-1]}, which is not a multiple of 64, "
            "so its rows cannot be quantized one by one; use int8"
        )
    part_names = tuple(name + suffix for suffix in format.suffixes)
    for part_name, (part_shape, dtype) in zip(part_names, format.part_shapes(shape), strict=True):
        empty = torch.empty(part_shape, dtype=dtype, device="meta")
        setattr(module, part_name, nn.Parameter(empty, requires_grad=False))
    module.quantized_weights = {**quantized_weights(module), name: QuantizedWeight(format, shape, part_names)}


class FrozenMatmul(torch.autograd.Function):
    """x @ W.T + bias for a weight W that is never trained, or for one expert's slice of it.

    Saves the parts of W and nothing else. W is frozen, so backward does not need the input; and the parts are FSDP's
    own buffers, which are gathered again in place before backward. (bitsandbytes' int8 Functions keep x as an attribute
    of ctx, which non-reentrant checkpointing cannot free.)
    """

    @staticmethod
    def forward(ctx, x, bias, weight: QuantizedWeight, expert: int | None, *parts):
        ctx.weight, ctx.expert = weight, expert
        ctx.save_for_backward(*parts)
        format, matrix_parts = weight.matrix(expert, parts)
        return format.matmul(weight.shape[-2:], x, bias, *matrix_parts)

    @staticmethod
    def backward(ctx, grad_output):
        parts = ctx.saved_tensors  # read once: under checkpointing a second read raises
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            format, matrix_parts = ctx.weight.matrix(ctx.expert, parts)
            grad_x = grad_output @ format.dequantize(ctx.weight.shape[-2:], grad_output.dtype, *matrix_parts)
        if ctx.needs_input_grad[1]:
            grad_bias = grad_output.sum(0).sum_to_size(grad_output.shape[-1:])  # in bitsandbytes' order
        return grad_x, grad_bias, None, None, *(None for _ in parts)


def frozen_linear(module: nn.Module, name: str, x: torch.Tensor, bias=None, expert: int | None = None) -> torch.Tensor:
    """x @ W.T + bias with the module's quantized weight `name`. Under autocast, x is cast as torch's linear does it."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    weight = quantized_weights(module)[name]
    bias = None if bias is None else bias.to(x.dtype)
    return FrozenMatmul.apply(x, bias, weight, expert, *weight.parts(module))


class FrozenLinear:
    """Base class of the two quantized linears. These also subclass bitsandbytes' modules, by which PEFT knows them."""

    _is_hf_initialized = True  # transformers must not draw random numbers for a weight that a checkpoint lacks
    stored_transposed = False  # True if the checkpoint holds the weight as (I, O), as for Conv1D

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return frozen_linear(self, "weight", x, self.bias)

    @property
    def W_q(self) -> torch.Tensor:
        """HQQ's layers have this name. PEFT's DoRA calls `dequantize()` on a layer that has it."""
        return self.weight

    def dequantize(self) -> torch.Tensor:
        """The weight (O, I) in fp32. Collective if the layer is sharded and not gathered."""
        weight = quantized_weights(self)["weight"]
        whole_parts = [p.full_tensor() if isinstance(p, DTensor) else p for p in weight.parts(self)]
        return weight.format.dequantize(weight.shape, torch.float32, *map(as_floats, whole_parts))


class Int8Linear(FrozenLinear, bnb.nn.Linear8bitLt):
    def __init__(self, in_features: int, out_features: int, bias: bool, format: type = Int8):
        super().__init__(
            in_features, out_features, bias, has_fp16_weights=False, threshold=format.outlier_threshold, device="meta"
        )
        replace_by_quantized(self, "weight", format, (out_features, in_features))


class NF4Linear(FrozenLinear, bnb.nn.Linear4bit):
    def __init__(self, in_features: int, out_features: int, bias: bool, format: type = NF4Double):
        double = format.double_quantized
        super().__init__(in_features, out_features, bias, quant_type="nf4", compress_statistics=double, device="meta")
        replace_by_quantized(self, "weight", format, (out_features, in_features))
        self.mark_for_peft()

    def mark_for_peft(self) -> None:
        """Give the weight the attributes that PEFT reads from a bitsandbytes parameter."""
        format = quantized_weights(self)["weight"].format
        self.weight.compress_statistics, self.weight.quant_type = format.double_quantized, "nf4"


def make_frozen_linear(quantization: str, in_features: int, out_features: int, bias: bool) -> FrozenLinear:
    """A quantized linear on meta. `quantization`: a key of FORMATS. Raises UserError as `replace_by_quantized` does."""
    format = FORMATS[quantization]
    return (Int8Linear if format is Int8 else NF4Linear)(in_features, out_features, bias, format)


def experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Experts with quantized weights, for transformers' experts interface. Dequantizes one expert at a time.

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
