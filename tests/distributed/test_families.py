"""Families of decoders, from tiny random checkpoints: sharded over ranks, the bits of bitsandbytes + PEFT."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from families import make_checkpoint
from parity import CPU, load_unsharded, loss_and_gradients, randomize
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from lora_dist.adapters import add_adapters
from lora_dist.base_model import base_bytes, load_base, meta_model, quantized_share
from lora_dist.config import UserError

FAMILIES = "opt bloom gpt_neox llama llama_tied mistral qwen2 qwen3 gemma phi".split()


def _step_on_rank(rank, config, quantization, path):
    num_ranks = dist.get_world_size()
    model = load_base(str(path), quantization=quantization, dtype=torch.float32, device=CPU, shard_ranks=num_ranks)
    base = base_bytes(model)
    if num_ranks > 1:
        assert all(isinstance(p, DTensor) for p in model.parameters())
        assert base.per_rank < 1.2 * base.total / num_ranks  # rows do not divide by 3
    model = add_adapters(model, config)
    randomize(model)
    return loss_and_gradients(model)


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_bitsandbytes(config, tmp_path, family, quantization, num_ranks):
    config = dataclasses.replace(config, lora_target_modules=["all-linear"])
    path = make_checkpoint(family, tmp_path)
    assert quantized_share(meta_model(str(path), quantization)) == (1.0, set())
    reference = add_adapters(load_unsharded(quantization, torch.float32, path), config)
    randomize(reference)
    loss, gradients = loss_and_gradients(reference)
    assert torch.isfinite(loss) and all(g.any() for g in gradients.values())
    for rank_loss, rank_gradients in run_ranks(_step_on_rank, num_ranks, config, quantization, path):
        assert torch.equal(rank_loss, loss)
        assert rank_gradients.keys() == gradients.keys()
        assert [n for n, g in rank_gradients.items() if not torch.equal(g, gradients[n])] == []


def test_falcons_own_linear_is_quantized_and_one_at_any_world_size(config, tmp_path):
    """bitsandbytes leaves Falcon's subclass of nn.Linear as it is: ours on one rank is the reference."""
    config = dataclasses.replace(config, lora_target_modules=["all-linear"])
    path = make_checkpoint("falcon", tmp_path)
    assert quantized_share(meta_model(str(path), "int8")) == (1.0, set())
    ((loss, gradients),) = run_ranks(_step_on_rank, 1, config, "int8", path)
    for rank_loss, rank_gradients in run_ranks(_step_on_rank, 3, config, "int8", path):
        assert torch.equal(rank_loss, loss)
        assert all(torch.equal(g, gradients[n]) for n, g in rank_gradients.items())


@pytest.mark.parametrize(
    "family, left", [("gpt2", "attn.c_attn.weight"), ("mixtral", "experts.gate_up"), ("qwen3_moe", "experts.down")]
)
def test_what_cannot_be_quantized_is_refused_and_named(tmp_path, family, left):
    path = make_checkpoint(family, tmp_path)
    with pytest.raises(UserError, match=rf"--quantization int8: only \d+% of the layers' weights .*{left}.*use none"):
        meta_model(str(path), "int8")
    assert quantized_share(meta_model(str(path), "none"))[0] == 0


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen3_moe"])
def test_unquantized_they_shard_exactly(config, tmp_path, family):
    config = dataclasses.replace(config, lora_target_modules={"gpt2": ["c_attn"]}.get(family, ["q_proj", "o_proj"]))
    path = make_checkpoint(family, tmp_path)
    reference = add_adapters(load_unsharded("none", torch.float32, path), config)
    randomize(reference)
    loss, gradients = loss_and_gradients(reference)
    for rank_loss, rank_gradients in run_ranks(_step_on_rank, 2, config, "none", path):
        assert torch.equal(rank_loss, loss)
        assert all(torch.equal(g, gradients[n]) for n, g in rank_gradients.items())


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path):
    path = make_checkpoint("llama", tmp_path)
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="its checkpoint lacks model.layers.1.mlp.up_proj"):
        load_base(str(path), quantization="int8", dtype=torch.float32, device=CPU, shard_ranks=1)
