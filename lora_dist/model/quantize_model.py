"""Which weights of a model are packed, and what stays in fp32: decided on the model itself, while it is on meta."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from lora_dist.data.tasks import CLASSIFIERS
from lora_dist.errors import UserError
from lora_dist.model.bitsandbytes_format import StoredFormat
from lora_dist.model.quantization import KIND_OF, experts_forward, make_frozen_linear, pack, packed_weights
from lora_dist.parallel.fsdp import decoder_layers
from lora_dist.parallel.zero import whole_shape

# Routers of experts and the like are small and stay as they are; below this share, something large was left out.
LEAST_QUANTIZED_SHARE = 0.9

ALL_EXPERTS_FUNCTIONS.register("frozen", experts_forward)


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
    in_fp32 = model._keep_in_fp32_modules if model.dtype == torch.float16 else None  # T5's, which overflow there
    keep = HfQuantizer.get_modules_to_not_convert(model, stored and stored.skip_modules, in_fp32)
    keep = [*keep, *(name for name, _ in model.named_children() if name in CLASSIFIERS)]
    modules = {n: m for n, m in model.named_modules() if should_convert_module(n, keep)}
    by_size = sorted((m for m in modules.values() if isinstance(m, nn.Linear)), key=lambda m: -m.weight.numel())
    smallest_of_type = {type(module): module for module in by_size}  # the last one of a type stays
    is_linear = {kind: kind is nn.Linear or _computes_linear(module) for kind, module in smallest_of_type.items()}
    for name, module in modules.items():
        if isinstance(module, Conv1D):
            frozen = make_frozen_linear(quantization, *module.weight.shape, module.bias is not None)
            frozen.stored_transposed, frozen.bias = True, module.bias
            model.set_submodule(name, frozen)
        elif is_linear.get(type(module)):
            has_bias = module.bias is not None
            frozen = make_frozen_linear(quantization, module.in_features, module.out_features, has_bias)
            frozen.bias = module.bias  # frozen, and of the model's dtype
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
            shape = whole_shape(param)
            if len(shape) >= 2 and param.is_floating_point() and not param.requires_grad:
                left[name] = left.get(name, 0) + shape.numel()
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
