"""Frozen linear layers in bitsandbytes' formats, as packed integer parameters that torch's FSDP2 can shard by rows.

The only module that knows bitsandbytes. Its kernels do the arithmetic; what is ours is that every packed part is a
plain frozen `nn.Parameter` of an integer dtype, so that it shards, gathers and survives `.to(bfloat16)` unchanged, and
that backward saves nothing but those parts. fp32 scales are stored as their int32 bits: `model.to(bf16)` and mixed
precision policies would round float parameters silently.

Row r of a weight is packed from row r alone (int8), or from whole blocks of 64 values that never cross a row (NF4,
where in_features is a multiple of 64), so any rank can quantize its rows and get the bits of the whole.

Shapes: O = out_features, I = in_features.
"""

from collections.abc import Callable
from typing import ClassVar

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch
from torch import nn

from lora_dist.config import UserError

_ops = torch.ops.bitsandbytes

# Rows of a small tensor from all ranks, in order, and the index of this rank's first row.
GatherRows = Callable[[torch.Tensor], tuple[torch.Tensor, int]]


def as_integers(part: torch.Tensor) -> torch.Tensor:
    return part.view(torch.int32) if part.dtype == torch.float32 else part


def as_floats(part: torch.Tensor) -> torch.Tensor:
    return part.view(torch.float32) if part.dtype == torch.int32 else part


class FrozenMatmul(torch.autograd.Function):
    """x @ W.T + bias for a weight W that never trains.

    Saves the packed parts of W and nothing else: W is frozen, so its input is not needed, and the parts are FSDP's
    own buffers, re-gathered in place before backward. (bitsandbytes' int8 Functions keep x as a ctx attribute, which
    non-reentrant checkpointing cannot drop.)
    """

    @staticmethod
    def forward(ctx, x, bias, kind, *parts):
        ctx.kind = kind
        ctx.save_for_backward(*parts)
        return kind.matmul(x, bias, *map(as_floats, parts))

    @staticmethod
    def backward(ctx, grad_output):
        parts = ctx.saved_tensors  # once: under checkpointing a second read raises
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_output @ ctx.kind.dequantize(grad_output.dtype, *map(as_floats, parts))
        if ctx.needs_input_grad[1]:
            grad_bias = grad_output.flatten(0, -2).sum(0)
        return grad_x, grad_bias, None, *(None for _ in parts)


class FrozenLinear:
    """What the two kinds below share. They subclass bitsandbytes' modules so that PEFT takes its bitsandbytes path."""

    _is_hf_initialized = True  # transformers must not draw random numbers for a weight that a checkpoint lacks

    @staticmethod
    def part_shapes(out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name of each packed part: its shape and dtype. All are sharded along dimension 0."""
        raise NotImplementedError

    def _make_parts(self) -> None:
        for name, (shape, dtype) in self.part_shapes(self.out_features, self.in_features).items():
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False))
        self.part_names = list(self.part_shapes(self.out_features, self.in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):  # as torch's own linear does under autocast
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return FrozenMatmul.apply(x, bias, type(self), *(getattr(self, name) for name in self.part_names))


class Int8Linear(FrozenLinear, bnb.nn.Linear8bitLt):
    """LLM.int8 (arXiv 2208.07339): int8 rows and one fp32 scale a row; input columns with outliers stay in 16 bits."""

    outlier_threshold: ClassVar[float] = 6.0

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__(
            in_features,
            out_features,
            bias,
            has_fp16_weights=False,
            threshold=self.outlier_threshold,
            device="meta",
        )
        self._make_parts()

    @staticmethod
    def part_shapes(out_features, in_features):
        return {"weight": ((out_features, in_features), torch.int8), "scale": ((out_features,), torch.int32)}

    @staticmethod
    def quantize(rows: torch.Tensor, gather: GatherRows) -> tuple[torch.Tensor, ...]:
        if not len(rows):  # a rank may own no row of a small layer, and the kernel refuses an empty matrix
            return rows.to(torch.int8), rows.new_empty(0, dtype=torch.float32)
        return bnb_functional.int8_vectorwise_quant(rows.to(torch.float16).contiguous())[:2]

    @staticmethod
    def dequantize(dtype: torch.dtype, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return weight.to(dtype, copy=True).mul_(scale.unsqueeze(1).mul(1.0 / 127.0))

    @classmethod
    def matmul(cls, x, bias, weight, scale):
        if x.device.type == "cpu":  # as bitsandbytes trains on CPU
            return nn.functional.linear(x, cls.dequantize(x.dtype, weight, scale), bias)
        rows = x.reshape(-1, x.shape[-1])
        codes, row_scale, outliers = bnb_functional.int8_vectorwise_quant(
            rows.to(torch.float16), threshold=cls.outlier_threshold
        )
        out = _ops.int8_mixed_scaled_mm(rows, codes, weight, row_scale, scale, outliers, bias)[0]
        return out.view(*x.shape[:-1], -1)


class NF4Linear(FrozenLinear, bnb.nn.Linear4bit):
    """NF4 with double quantization (QLoRA, arXiv 2305.14314): two codes a byte, one uint8 absmax per block of 64.

    `nested` holds what the absmax codes are decoded with: [offset, one fp32 scale per 256 codes].
    """

    _code_per_device: ClassVar[dict[torch.device, torch.Tensor]] = {}

    def __init__(self, in_features: int, out_features: int, bias: bool):
        if in_features % 64:
            raise UserError(
                f"--quantization nf4: a layer with in_features={in_features} cannot be split by rows "
                "(not a multiple of 64); use int8"
            )
        super().__init__(in_features, out_features, bias, quant_type="nf4", compress_statistics=True, device="meta")
        self._make_parts()
        self.mark_for_peft()

    def mark_for_peft(self) -> None:
        """Put on the weight the attributes that PEFT reads of a bitsandbytes parameter."""
        self.weight.compress_statistics, self.weight.quant_type = True, "nf4"

    @staticmethod
    def part_shapes(out_features, in_features):
        num_blocks = out_features * in_features // 64
        return {
            "weight": ((out_features, in_features // 2), torch.uint8),
            "absmax": ((out_features, in_features // 64), torch.uint8),
            "nested": ((1 + -(-num_blocks // 256),), torch.int32),
        }

    @staticmethod
    def quantize(rows: torch.Tensor, gather: GatherRows) -> tuple[torch.Tensor, ...]:
        num_rows, in_features = rows.shape
        if num_rows:
            codes, absmax = _ops.quantize_4bit(rows.contiguous(), 64, "nf4", torch.uint8)
        else:
            codes, absmax = rows.new_empty(0, dtype=torch.uint8), rows.new_empty(0, dtype=torch.float32)
        whole, start = gather(absmax.view(num_rows, in_features // 64))  # the offset is the mean over the whole weight
        offset = whole.mean()
        absmax_codes, state = bnb_functional.quantize_blockwise(whole.view(-1) - offset, blocksize=256)
        mine = absmax_codes.view(whole.shape)[start : start + num_rows].clone()
        return codes.view(num_rows, in_features // 2), mine, torch.cat([offset.view(1), state.absmax])

    @classmethod
    def _code(cls, device: torch.device) -> torch.Tensor:
        if device not in cls._code_per_device:
            cls._code_per_device[device] = bnb_functional.create_dynamic_map().to(device)
        return cls._code_per_device[device]

    @classmethod
    def dequantize(cls, dtype, weight, absmax, nested):
        shape = (weight.shape[0], weight.shape[1] * 2)
        scales = _ops.dequantize_blockwise(
            absmax.view(-1), nested[1:].contiguous(), cls._code(weight.device), 256, torch.float32
        )
        return _ops.dequantize_4bit(weight.view(-1, 1), scales + nested[0], 64, "nf4", shape, dtype)

    @classmethod
    def matmul(cls, x, bias, weight, absmax, nested):
        shape = (weight.shape[0], weight.shape[1] * 2)
        return _ops.gemm_4bit(
            x, weight.view(-1, 1), shape, nested[1:].contiguous(), 64, "nf4", bias=bias,
            absmax_8bit=absmax.view(-1), absmax_code=cls._code(x.device), absmax_offset=nested[0],
        )  # fmt: skip


LINEAR_OF = {"int8": Int8Linear, "nf4": NF4Linear}
