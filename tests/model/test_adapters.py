"""LoRA's options on a sharded base give the loss and gradients of PEFT and bitsandbytes on one process."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lora_dist.data.formats import load_tokenizer
from lora_dist.data.micro_batches import MicroBatches
from lora_dist.errors import UserError
from lora_dist.model.adapters import (
    add_adapters,
    check_identical,
    check_targets,
    is_trained_parameter,
    save_adapter,
    trainable_parameters,
    verify_adapter,
)
from lora_dist.model.load import meta_model
from tests.helpers.families import make_checkpoint
from tests.helpers.parity import batch_of, load_sharded, load_unsharded, loss_and_gradients, randomize, rows_of
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import start_run

# name: (family, settings, number of trained parameters beside lora_A and lora_B)
OPTIONS = {
    "bias all": ("opt", {"lora_bias": "all"}, 2 * (6 + 2) + 1),
    "bias lora_only": ("opt", {"lora_bias": "lora_only"}, 2 * 2),
    "rslora": ("llama", {"use_rslora": True}, 0),
    "dora": ("llama", {"use_dora": True}, 2 * 2),
    "dora without dropout": ("opt", {"use_dora": True, "lora_dropout": 0.0}, 2 * 2),
    "head trained whole": ("llama", {"modules_to_save": ["lm_head"]}, 1),
    "embeddings trained whole": ("llama", {"modules_to_save": ["embed_tokens", "norm"]}, 1 + 2 * 2 + 1),
}


def _adapted(config, model, perturb=True):
    model = add_adapters(model, config)
    if perturb:
        randomize(model)
    return model


def _on_rank(rank, config, quantization, path, folder):
    model = load_sharded(quantization, path=path, config=config)
    assert dist.get_world_size() == 2
    model = _adapted(config, model, perturb=False)
    check_identical(model)
    fresh = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
    for name, param in model.named_parameters():
        assert isinstance(param, DTensor) != (param.requires_grad or is_trained_parameter(config, name)), name
    randomize(model)
    outcome = loss_and_gradients(model)
    if rank == 0:
        save_adapter(model, load_tokenizer("embedded"), folder / "adapter")
    dist.barrier()
    verify_adapter(model, folder / "adapter", batch_of([[2, 5, 6, 7]]))
    return fresh, outcome


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("option", OPTIONS)
def test_loss_gradients_and_start_equal_peft_on_one_process(config, tmp_path, option, quantization):
    family, settings, num_extra = OPTIONS[option]
    config = dataclasses.replace(config, **settings)
    path = make_checkpoint(family, tmp_path)
    check_targets(meta_model(str(path), quantization, torch.float32), config)
    base = load_unsharded(quantization, torch.float32, path)
    if config.use_dora and quantization == "int8":  # not with bitsandbytes' linear, whose weight PEFT's DoRA moves
        base = load_sharded(quantization, path=path)  # so the reference is our own base on one process
    reference = _adapted(config, base, perturb=False)
    expected = {name: p.detach().clone() for name, p in trainable_parameters(reference).items()}
    assert len([name for name in expected if "lora_A" not in name and "lora_B" not in name]) == num_extra
    randomize(reference)
    loss, gradients = loss_and_gradients(reference)
    for fresh, (rank_loss, rank_gradients) in run_ranks(_on_rank, 2, config, quantization, path, tmp_path):
        assert fresh.keys() == expected.keys()
        # PEFT rounds a new lora_A on a 4-bit base to bnb_4bit_compute_dtype, which is fp32 here too.
        assert [name for name, value in fresh.items() if not torch.equal(value, expected[name])] == []
        assert torch.equal(rank_loss, loss)
        assert [name for name, g in rank_gradients.items() if not torch.equal(g, gradients[name])] == []


@pytest.mark.parametrize(
    "family, modules, why",
    [
        ("llama", ["score"], "no such module; e.g. embed_tokens lm_head"),
        ("llama", ["q_proj"], "is quantized"),
        ("opt", ["lm_head"], "is tied to another"),
    ],
)
def test_modules_that_cannot_be_trained_whole_are_refused(config, tmp_path, family, modules, why):
    skeleton = meta_model(str(make_checkpoint(family, tmp_path)), "int8", torch.float32)
    with pytest.raises(UserError, match=f"--modules_to_save {modules[0]}: {why}"):
        check_targets(skeleton, dataclasses.replace(config, modules_to_save=modules))


def _learning_rates_on_rank(rank, config, folder):
    model = load_sharded("int8")
    model = add_adapters(model, config)
    batches = MicroBatches(rows_of([[1, 2]]), pad_token_id=0, seed=0, sequences=1, per_step=1)
    training = start_run(model, config, batches).training
    lr_of = {id(param): group["initial_lr"] for group in training.optimizer.param_groups for param in group["params"]}
    return {name: lr_of[id(param)] for name, param in trainable_parameters(model).items()}


def test_loraplus_gives_lora_b_a_learning_rate_of_its_own(config, tmp_path):
    config = dataclasses.replace(config, loraplus_lr_ratio=16.0, weight_decay=0.01)
    (rates,) = run_ranks(_learning_rates_on_rank, 1, config, tmp_path)
    assert len(rates) == 16
    assert all(rate == config.learning_rate * (16 if "lora_B" in name else 1) for name, rate in rates.items())
