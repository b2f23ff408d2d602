"""Families of decoders, from tiny random checkpoints: a sharded base gives the bits of bitsandbytes and PEFT."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from lora_dist.errors import UserError
from lora_dist.model.adapters import add_adapters
from lora_dist.model.load import meta_model
from lora_dist.model.memory import base_bytes
from lora_dist.model.quantize_model import quantized_fraction
from tests.helpers.families import CONFIGS, make_checkpoint
from tests.helpers.parity import load_sharded, load_unsharded, loss_and_gradients, randomize
from tests.helpers.ranks import run_ranks

FAMILIES = list(CONFIGS)
FAMILIES.remove("falcon")


def _adapted(config, model):
    model = add_adapters(model, config)
    randomize(model)
    return model


def _step_on_rank(rank, config, quantization, path, dtype=torch.float32):
    num_ranks = dist.get_world_size()
    model = load_sharded(quantization, dtype, path)
    base = base_bytes(model)
    if num_ranks > 1:
        assert all(isinstance(p, DTensor) for p in model.parameters())
        # 3 does not divide the rows. No expert is split over ranks, so one rank holds 2 of 4 experts.
        whole_experts = any(p.dim() == 3 for p in model.parameters())
        assert base.held < 1.2 * base.total * (-(-4 // num_ranks) / 4 if whole_experts else 1 / num_ranks)
    return loss_and_gradients(_adapted(config, model))


def _assert_equal_to_one_process(config, quantization, num_ranks, path, dtype=torch.float32):
    reference = _adapted(config, load_unsharded(quantization, dtype, path))
    loss, gradients = loss_and_gradients(reference)
    assert torch.isfinite(loss) and all(g.any() for g in gradients.values())
    for rank_loss, rank_gradients in run_ranks(_step_on_rank, num_ranks, config, quantization, path, dtype):
        assert torch.equal(rank_loss, loss)
        assert rank_gradients.keys() == gradients.keys()
        assert [n for n, g in rank_gradients.items() if not torch.equal(g, gradients[n])] == []


@pytest.mark.parametrize(
    "quantization, num_ranks",
    [
        ("int8", 3),
        ("nf4", 3),
        pytest.param("none", 3, marks=pytest.mark.slow),
        pytest.param("nf4_plain", 3, marks=pytest.mark.slow),
        pytest.param("int8", 2, marks=pytest.mark.slow),
        pytest.param("nf4", 2, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_one_process(config, tmp_path, family, quantization, num_ranks):
    """The reference is bitsandbytes + PEFT; for experts, its public functions and transformers' eager experts."""
    config = dataclasses.replace(config, lora_target_modules=["all-linear"])
    path = make_checkpoint(family, tmp_path)
    if quantization != "none":
        fraction, unquantized = quantized_fraction(meta_model(str(path), quantization, torch.float32))
        if family in ("mixtral", "qwen3_moe"):
            assert fraction > 0.97 and len(unquantized) == 1  # the router
        else:
            assert fraction == 1
    _assert_equal_to_one_process(config, quantization, num_ranks, path)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_falcons_own_linear_is_quantized_and_the_same_at_any_world_size(config, tmp_path, quantization):
    """The reference is our base on one rank, because bitsandbytes does not quantize Falcon's subclass of nn.Linear."""
    config = dataclasses.replace(config, lora_target_modules=["all-linear"])
    path = make_checkpoint("falcon", tmp_path)
    assert quantized_fraction(meta_model(str(path), quantization, torch.float32)) == (1.0, set())
    ((loss, gradients),) = run_ranks(_step_on_rank, 1, config, quantization, path)
    for rank_loss, rank_gradients in run_ranks(_step_on_rank, 3, config, quantization, path):
        assert torch.equal(rank_loss, loss)
        assert all(torch.equal(g, gradients[n]) for n, g in rank_gradients.items())


def test_what_cannot_be_quantized_is_refused_and_named(tmp_path):
    """GPT-OSS holds its experts as (I, O)."""
    path = make_checkpoint("gpt_oss", tmp_path)
    with pytest.raises(UserError, match=r"--quantization int8: only \d+% of .* gpt_oss .*experts.down_proj.*use none"):
        meta_model(str(path), "int8", torch.float32)


@pytest.mark.parametrize("quantization", ["int8", "nf4", "none"])
def test_ranks_that_own_no_expert_of_a_layer(config, tmp_path, quantization):
    """4 experts on 5 ranks: no expert is split, so one rank has none."""
    config = dataclasses.replace(config, lora_target_modules=["all-linear"])
    _assert_equal_to_one_process(config, quantization, 5, make_checkpoint("mixtral", tmp_path), torch.bfloat16)


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path):
    path = make_checkpoint("llama", tmp_path)
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="its checkpoint lacks model.layers.1.mlp.up_proj"):
        load_sharded("int8", path=path)
