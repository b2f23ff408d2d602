import gc
import weakref

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import OPTConfig, OPTForCausalLM

from lora_dist.config import TrainConfig
from lora_dist.errors import UserError
from lora_dist.model.adapters import add_adapters, linear_names, parameter_counts
from lora_dist.model.quantization import FORMATS, FrozenLinear, as_integers, make_frozen_linear, quantized_weights
from lora_dist.model.quantize_model import quantize_model

OPT_6_7B = OPTConfig(
    hidden_size=4096, word_embed_proj_dim=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32
)


def quantize(quantization: str, linear: nn.Linear) -> FrozenLinear:
    frozen = make_frozen_linear(quantization, linear.in_features, linear.out_features, bias=True)
    parts = FORMATS[quantization].quantize(linear.weight.data, lambda rows: (rows, 0))
    for name, part in zip(quantized_weights(frozen)["weight"].part_names, parts, strict=True):
        setattr(frozen, name, nn.Parameter(as_integers(part), requires_grad=False))
    frozen.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    return frozen


def parts_of(frozen: FrozenLinear) -> dict[str, nn.Parameter]:
    return {name: getattr(frozen, name) for name in quantized_weights(frozen)["weight"].part_names}


@pytest.mark.parametrize("quantization", [*FORMATS, "none"])
def test_opt_6_7b_has_the_tutorials_parameter_counts(quantization):
    with torch.device("meta"):
        model = OPTForCausalLM(OPT_6_7B)
    quantize_model(model, quantization)
    model = add_adapters(model, TrainConfig(max_steps=2))
    trainable, total = parameter_counts(model)
    assert (trainable, total, f"{100 * trainable / total:.4f}") == (8_388_608, 6_666_862_592, "0.1258")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    quantized = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    assert len(quantized) == (0 if quantization == "none" else 32 * 6)


@pytest.mark.parametrize("quantization", FORMATS)
def test_every_part_is_an_integer_and_survives_a_cast(quantization):
    """`.to(bfloat16)` would silently round scales that are stored as floats."""
    torch.manual_seed(0)
    linear = quantize(quantization, nn.Linear(128, 96))
    x = torch.randn(4, 128)
    before = linear(x)
    linear.to(torch.bfloat16)
    linear.bias.data = linear.bias.data.float()
    assert all(not part.is_floating_point() for part in parts_of(linear).values())
    assert torch.allclose(linear(x), before, atol=1e-2)  # the bias was rounded, the scales were not
    linear.bias = None
    parts = {name: part.clone() for name, part in parts_of(linear).items()}
    linear.to(torch.float16)
    assert all(torch.equal(part, parts[name]) for name, part in parts_of(linear).items())


def test_nf4_refuses_rows_that_end_inside_a_block():
    with pytest.raises(UserError, match="in_features=96, .*not a multiple of 64"):
        make_frozen_linear("nf4", 96, 64, bias=False)


def input_outlives_checkpointed_forward(linear) -> bool:
    """True if the linear's input, computed inside a checkpointed block, is alive after the block's forward."""
    seen = []

    def block(x):
        hidden = x * 2
        seen.append(weakref.ref(hidden))
        return linear(hidden).sin()

    out = checkpoint(block, torch.randn(4, 128, requires_grad=True), use_reentrant=False)
    gc.collect()
    alive = seen[0]() is not None
    out.sum().backward()
    return alive


@pytest.mark.parametrize("quantization", FORMATS)
def test_no_input_outlives_a_checkpointed_layer(quantization):
    assert not input_outlives_checkpointed_forward(quantize(quantization, nn.Linear(128, 96)))


@pytest.mark.parametrize("quantization", FORMATS)
def test_no_dequantized_weight_outlives_its_use(quantization, monkeypatch):
    frozen, made = quantize(quantization, nn.Linear(128, 96)), []
    format = FORMATS[quantization]
    dequantize = format.dequantize

    def watched(*args):
        weight = dequantize(*args)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(format, "dequantize", watched)
    x = torch.randn(4, 128, requires_grad=True)
    out = checkpoint(lambda x: frozen(x).sin(), x, use_reentrant=False)
    assert not any(weight() is not None for weight in made)
    out.sum().backward()
    assert made and not any(weight() is not None for weight in made)


def test_bitsandbytes_own_int8_linear_keeps_its_input():
    """This is why the autograd Function is ours. If upstream changes and this test fails, it is no longer needed."""
    linear = bnb.nn.Linear8bitLt(128, 96, has_fp16_weights=False)
    linear.load_state_dict({"weight": torch.randn(96, 128), "bias": torch.zeros(96)})
    assert input_outlives_checkpointed_forward(linear.to("cpu").train())


def test_linear_names_are_those_that_can_be_targeted():
    with torch.device("meta"):
        model = OPTForCausalLM(OPT_6_7B)
    quantize_model(model, "int8")
    assert linear_names(model) == ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"]
