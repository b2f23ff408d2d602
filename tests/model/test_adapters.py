"""LoRA's options on a sharded base give the loss and gradients of PEFT and bitsandbytes on one process."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    FalconH1Config,
    Lfm2Config,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
    Zamba2Config,
)

from lora_dist.data.formats import load_tokenizer
from lora_dist.data.micro_batches import MicroBatches
from lora_dist.errors import UserError
from lora_dist.model.adapters import (
    add_adapters,
    check_identical,
    check_targets,
    describe_adapted,
    is_trained_parameter,
    linear_names,
    save_adapter,
    trainable_parameters,
    verify_adapter,
)
from lora_dist.model.load import meta_model
from lora_dist.model.quantize_model import quantize_model
from tests.helpers.families import CONFIGS, make_checkpoint
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


SIZES = dict(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=96)  # fmt: skip
MAMBA = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1)
DELTA = dict(
    head_dim=16, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=16, linear_value_head_dim=16,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, shared_expert_intermediate_size=64)
MLP = {"gate_proj", "up_proj", "down_proj"}
HYBRIDS = {  # config, names that must get an adapter, the line that describes them
    "qwen3_5": (Qwen3_5TextConfig(**SIZES, **DELTA), MLP, "on 15 of 16 linear layers; without one: lm_head"),
    "falcon_h1": (
        FalconH1Config(**SIZES, mamba_d_ssm=64, **MAMBA | {"mamba_n_heads": 4}), MLP,
        "on 16 of 19 linear layers; without one: lm_head, out_proj",  # Mamba's kernel does not call out_proj
    ),
    "bamba": (BambaConfig(**SIZES, **MAMBA, attn_layer_indices=[1]), MLP, "on 12 of 13 linear layers"),
    "lfm2": (Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]), {"w1", "w2", "w3"}, "on 12 of 13 linear"),
    "qwen3_5_moe": (
        Qwen3_5MoeTextConfig(**SIZES, **DELTA, **EXPERTS), MLP,
        "on 17 of 22 linear layers; without one: experts.down_proj, experts.gate_up_proj, lm_head",
    ),
    "qwen3_moe": (Qwen3MoeConfig(**SIZES, **EXPERTS), {"q_proj"}, "8 of 13 linear layers; without one: experts"),
    "zamba2": (  # the linears 0 and 1 have the names of layers
        Zamba2Config(
            vocab_size=128, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
            layers_block_type=["mamba", "hybrid", "mamba"],
        ),
        {"in_proj", "q_proj"}, "without one: 0, 1, lm_head",
    ),
}  # fmt: skip


@pytest.mark.parametrize("quantization", ["int8", "none"])
@pytest.mark.parametrize("family", HYBRIDS)
def test_all_linear_takes_the_mlps_of_hybrids_and_says_what_it_leaves(config, family, quantization):
    """A convolution's weight has three dimensions, as stacked experts have."""
    model_config, names, says = HYBRIDS[family]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
        quantize_model(model, quantization)
        assert names <= set(linear_names(model))
        model = add_adapters(model, dataclasses.replace(config, lora_target_modules=["all-linear"]))
    trained = {name.split(".")[-4] for name in trainable_parameters(model) if "lora_A" in name}
    assert names <= trained
    assert says in describe_adapted(model)


def test_what_is_trained_whole_is_not_adapted(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
        model = add_adapters(model, dataclasses.replace(config, modules_to_save=["lm_head"]))
    assert describe_adapted(model) == (
        "adapters: on 4 of 15 linear layers; without one: down_proj, gate_proj, k_proj, lm_head, o_proj, up_proj"
    )
