"""Which weights of a model are quantized and which stay in fp32, decided on the model while it is on meta."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from lora_dist.data.tasks import CLASSIFIER_HEADS
from lora_dist.errors import UserError
from lora_dist.model.bitsandbytes_format import StoredQuantization
from lora_dist.model.quantization import (
    FORMATS,
    experts_forward,
    make_frozen_linear,
    quantized_weights,
    replace_by_quantized,
)
from lora_dist.parallel.fsdp import decoder_layers
from lora_dist.parallel.zero import whole_shape

# Small matrices, such as routers of experts, are not quantized. Below this fraction a large one was left out too.
MIN_QUANTIZED_FRACTION = 0.9

ALL_EXPERTS_FUNCTIONS.register("frozen", experts_forward)


def quantize_model(model: PreTrainedModel, quantization: str, stored: StoredQuantization | None = None) -> None:
    """Freeze a model on meta and replace its linears and experts, but not its head, by quantized ones.

    With "none" the model is only frozen. If the checkpoint is quantized already, `stored` says which modules are not.
    Raises UserError if more than a tenth of the layers' weights would stay unquantized.
    """
    model.requires_grad_(False)
    # PEFT chooses its bitsandbytes path by these two attributes.
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = quantization == "int8", quantization in ("nf4", "nf4_plain")
    if quantization == "none":
        return
    modules = _modules_to_quantize(model, stored)
    is_linear = _linear_classes(modules.values())
    for name, module in modules.items():
        if isinstance(module, Conv1D):
            frozen = make_frozen_linear(quantization, *module.weight.shape, module.bias is not None)
            frozen.stored_transposed, frozen.bias = True, module.bias
            model.set_submodule(name, frozen)
        elif is_linear.get(type(module)):
            has_bias = module.bias is not None
            frozen = make_frozen_linear(quantization, module.in_features, module.out_features, has_bias)
            frozen.bias = module.bias  # frozen, in the model's dtype
            model.set_submodule(name, frozen)
        elif _has_plain_experts(module):
            for weight_name, param in list(module.named_parameters(recurse=False)):
                if param.dim() == 3:
                    replace_by_quantized(module, weight_name, FORMATS[quantization], tuple(param.shape))
            model.set_experts_implementation("frozen")
    fraction, unquantized = quantized_fraction(model)
    if fraction < MIN_QUANTIZED_FRACTION and stored is None:
        raise UserError(
            f"--quantization {quantization}: only {fraction:.0%} of the layers' weights of a {model.config.model_type} "
            f"can be quantized, but not {' '.join(sorted(unquantized))}; use none"
        )


def _modules_to_quantize(model: PreTrainedModel, stored: StoredQuantization | None) -> dict[str, nn.Module]:
    """All modules but those that transformers' bitsandbytes integration does not quantize, by name."""
    in_fp32 = model._keep_in_fp32_modules if model.dtype == torch.float16 else None  # T5's overflow in fp16
    skipped = HfQuantizer.get_modules_to_not_convert(model, stored and stored.skip_modules, in_fp32)
    skipped = [*skipped, *(name for name, _ in model.named_children() if name in CLASSIFIER_HEADS)]
    return {name: module for name, module in model.named_modules() if should_convert_module(name, skipped)}


def _linear_classes(modules) -> dict[type, bool]:
    """For each class of linear in the model: True if it computes x @ W.T + b. Tried on the smallest of each class."""
    by_size = sorted((m for m in modules if isinstance(m, nn.Linear)), key=lambda m: -m.weight.numel())
    smallest = {type(module): module for module in by_size}  # later ones replace earlier, larger ones
    return {cls: cls is nn.Linear or _computes_linear(module) for cls, module in smallest.items()}


def _computes_linear(module: nn.Linear) -> bool:
    """True if a subclass of nn.Linear, such as Falcon's, computes x @ W.T + b. It is tried on random numbers."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):  # the caller builds the model on meta
        params = {name: torch.randn(param.shape, generator=generator) for name, param in module.named_parameters()}
        x = torch.randn(3, module.in_features, generator=generator)
        expected = nn.functional.linear(x, params["weight"], params.get("bias"))
        found = torch.func.functional_call(module, params, (x,))
        if not isinstance(found, torch.Tensor) or found.shape != expected.shape:  # a router that gives several tensors
            return False
        return torch.allclose(found, expected, rtol=1e-4, atol=1e-3)


def _has_plain_experts(module: nn.Module) -> bool:
    """True if a module follows transformers' experts interface and holds each expert's weight as (O, I)."""
    attributes = vars(module)
    return attributes.get("is_transposed") is False and not attributes["has_post_expert_norm"]


def quantized_fraction(model: nn.Module) -> tuple[float, set[str]]:
    """Fraction of the decoder layers' frozen matrix weights that is quantized, and the names of the other matrices."""
    num_quantized, unquantized = 0, {}
    for layer in decoder_layers(model):
        weights = [weight for module in layer.modules() for weight in quantized_weights(module).values()]
        num_quantized += sum(torch.Size(weight.shape).numel() for weight in weights)
        for name, param in layer.named_parameters():
            shape = whole_shape(param)
            if len(shape) >= 2 and param.is_floating_point() and not param.requires_grad:
                unquantized[name] = unquantized.get(name, 0) + shape.numel()
    return num_quantized / (num_quantized + sum(unquantized.values())), set(unquantized)


def keep_norms_in_fp32(model: nn.Module) -> None:
    """Hold the parameters of norms in fp32, as PEFT's `prepare_model_for_kbit_training` does.

    A norm still returns the dtype of its input, so activations stay in 16 bits. Embeddings, heads and the biases of
    linears stay in 16 bits too: an fp32 copy would hold the same numbers and be rounded to 16 bits before each use.
    """
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 1 and weight.is_floating_point() and weight.dtype != torch.float32:
            module.float()
            module.register_forward_hook(_return_input_dtype, with_kwargs=True)


def _return_input_dtype(module, args, kwargs, output):
    return output.to((*args, *kwargs.values())[0].dtype)
