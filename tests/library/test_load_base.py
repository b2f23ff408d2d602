"""What `load_base` returns and refuses."""

import os

import peft
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

import lora_dist
from lora_dist.library import _take_over_sharding
from lora_dist.parallel.fsdp import sharded_modules
from tests.helpers.ranks import STRATEGY_ENV, run_ranks
from tests.helpers.trainers import held_bytes


def adapted() -> peft.PeftModel:
    model = lora_dist.load_base("embedded", quantization="nf4", dtype=torch.float32)
    torch.manual_seed(dist.get_rank())
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "fc1"], task_type="CAUSAL_LM")).eval()


def _answers(rank: int) -> dict:
    model = lora_dist.load_base("embedded", quantization="int8", dtype=torch.bfloat16)
    names = ("is_quantized", "is_loaded_in_8bit", "is_loaded_in_4bit", "quantization_method")
    found = {name: getattr(model, name) for name in names}
    with pytest.raises(ValueError, match="cast"):
        model.to(torch.float32)
    return found | {"class": type(model).__name__, "trains": any(p.requires_grad for p in model.parameters())}


def test_it_answers_as_a_model_of_bitsandbytes():
    for found in run_ranks(_answers, 2):
        assert found == {
            "is_quantized": True, "is_loaded_in_8bit": True, "is_loaded_in_4bit": False,
            "quantization_method": "bitsandbytes", "class": "OPTForCausalLM", "trains": False,
        }  # fmt: skip


def _generated(rank: int) -> tuple[list[int], int]:
    """Tokens of a prompt; rank 1 wants fewer of them than rank 0."""
    model = adapted()
    prompt = torch.arange(5, 12)[None]
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    out = model.generate(input_ids=prompt, max_new_tokens=12 if rank == 0 else 3, **settings)
    return out[0, 7:].tolist(), held_bytes(model)


def test_ranks_may_generate_texts_of_different_lengths():
    (first, _), (second, _) = run_ranks(_generated, 2, timeout_s=120)
    ((alone, _),) = run_ranks(_generated, 1)
    assert len(first) == 12 and first == alone and second[:3] == alone[:3]


def _after_a_backward(rank: int, row: int | None = None) -> dict[str, torch.Tensor]:
    model = adapted()
    model.add_adapter("reference", model.peft_config["default"])
    torch.nn.init.ones_(model.get_parameter(next(n for n, _ in model.named_parameters() if "lora_B.default" in n)))
    ids = torch.arange(5, 25)[None] + (rank if row is None else row)
    model(input_ids=ids, labels=ids).loss.backward()
    found = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
    return found | {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_adapters_of_all_ranks_become_those_of_rank_0_and_their_gradients_the_mean():
    """Ranks that drew other numbers begin alike, also with a frozen reference; rows and gradients differ."""
    first, second = run_ranks(_after_a_backward, 2)
    (alone,), (other,) = (run_ranks(_after_a_backward, 1, row) for row in (0, 1))
    assert first.keys() == second.keys() and any(".reference." in name for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    gradients = [name for name in first if name.startswith("gradient")]
    assert gradients and all(torch.equal(first[name], alone[name]) for name in first.keys() - {*gradients})
    assert any(not torch.equal(alone[name], other[name]) for name in gradients)
    for name in gradients:
        torch.testing.assert_close(first[name], (alone[name] + other[name]) / 2, atol=1e-6, rtol=1e-4)


def _losses(rank: int, prepared: bool) -> tuple[list[float], int]:
    model = lora_dist.load_base("embedded", quantization="nf4", dtype=torch.bfloat16)
    before = held_bytes(model)
    if prepared:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    ids = torch.arange(5, 25)[None]
    losses = []
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
    return losses, before - held_bytes(model)


def test_preparing_a_sharded_base_as_peft_does_changes_nothing():
    plain, prepared = (run_ranks(_losses, 2, flag) for flag in (False, True))
    assert plain == prepared and plain[0][1] == 0


PLACEMENTS = {  # (what a launcher says, arguments, bytes that a rank holds as a fraction of the base, modules sharded)
    "torchrun": ({}, {}, 0.5, True),
    "whole": ({}, {"shard_ranks": 1}, 1.0, False),
    "fsdp": (STRATEGY_ENV["fsdp"], {}, 0.5, True),
    "copies in nodes": (STRATEGY_ENV["hsdp"] | {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}, {}, 1.0, False),
    "offload": (STRATEGY_ENV["fsdp"] | {"FSDP_OFFLOAD_PARAMS": "true"}, {}, 0.5, True),
    "resident layers": ({}, {"resident_layers": 1}, 0.6, True),
}


def _placed(rank: int, env: dict, arguments: dict) -> tuple[int, int, int, str | None]:
    os.environ.update(env)
    model = lora_dist.load_base("embedded", quantization="int8", dtype=torch.float32, **arguments)
    again = lora_dist.load_base("embedded", quantization="int8", dtype=torch.float32, **arguments)
    assert held_bytes(again) == held_bytes(model)
    whole = sum(param.nbytes for param in model.parameters())
    return held_bytes(model), whole, len(sharded_modules(model)), os.environ.get("ACCELERATE_USE_FSDP")


@pytest.mark.parametrize("name", PLACEMENTS)
def test_the_base_is_where_launcher_and_arguments_say(name):
    env, arguments, share, is_sharded = PLACEMENTS[name]
    for held, whole, num_sharded, engine in run_ranks(_placed, 2, env, arguments):
        assert held / whole == pytest.approx(share, abs=0.06) and bool(num_sharded) == is_sharded
        assert engine is None  # an Accelerator would shard the base again


REFUSED = {  # (environment, arguments, words of the error)
    "quantization": ({}, {"quantization": "int9"}, "quantization 'int9': must be one of int8, nf4, nf4_plain, none"),
    "ranks": ({}, {"shard_ranks": 3}, "shard_ranks 3: must divide the 1 ranks"),
    "layers without shards": ({}, {"resident_layers": 1}, "resident_layers 1: has no effect, because each rank holds"),
    "offload without shards": ({}, {"offload": True}, "offload True: has no effect, because each rank holds the whole"),
    "negative": ({}, {"resident_layers": -1}, "resident_layers -1: must be 0 or more"),
    "labels": ({}, {"num_labels": 0}, "num_labels 0: must be 1 or more"),
    "task": (
        {},
        {"peft_config": peft.LoraConfig(task_type="FEATURE_EXTRACTION")},
        "must be one of CAUSAL_LM",
    ),
    "no such model": ({}, {"name_or_path": "/nothing"}, "/nothing"),
    "DeepSpeed": ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DEEPSPEED: load_base shards the base itself; use accel"),
    "Megatron": ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "megatron_lm: is not supported by load_base; use fsdp"),
    "FSDP 1": (
        {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2", "RANK": "0"},
        {},
        "fsdp_version: none",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_boundary_what_cannot_work_is_one_line(name, monkeypatch):
    env, arguments, words = REFUSED[name]
    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
    _take_over_sharding.cache_clear()
    try:
        with pytest.raises(lora_dist.UserError) as raised:
            lora_dist.load_base(**{"name_or_path": "embedded"} | arguments)
    finally:
        _take_over_sharding.cache_clear()
    assert words in str(raised.value) and "\n" not in str(raised.value)


WHOLE = {"bias": "all", "modules_to_save": ["final_layer_norm"]}


def _trained_whole(rank: int, is_said: bool) -> tuple[set[str], str]:
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **WHOLE)
    said = {"peft_config": lora} if is_said else {}
    model = peft.get_peft_model(lora_dist.load_base("embedded", quantization="int8", dtype=torch.float32, **said), lora)
    ids = torch.arange(5, 25)[None]
    try:
        model(input_ids=ids, labels=ids).loss.backward()
    except lora_dist.UserError as error:
        return set(), str(error)
    return {name for name, p in model.named_parameters() if p.grad is not None and not isinstance(p, DTensor)}, ""


def test_what_is_trained_whole_is_not_sharded_if_load_base_knows_of_it():
    trained, error = run_ranks(_trained_whole, 2, True)[0]
    assert not error and any("final_layer_norm.modules_to_save" in name for name in trained)
    assert any(name.endswith("q_proj.base_layer.bias") for name in trained)
    for trained, error in run_ranks(_trained_whole, 2, False):
        assert not trained and error.endswith("but it is sharded; give load_base the peft_config that asks for it")


def _compiled(rank: int) -> str:
    model = adapted().train()
    ids = torch.arange(5, 25)[None]
    with pytest.raises(Exception) as raised:
        torch.compile(model)(input_ids=ids, labels=ids)
    return str(raised.value)


def test_boundary_torch_compile_is_refused_and_does_not_hang():
    for error in run_ranks(_compiled, 2):
        assert "torch_compile: is not supported for a base of load_base; leave it out" in error


def _after_arguments(rank: int, folder: str) -> str:
    os.environ.pop("ACCELERATE_USE_CPU", None)
    TrainingArguments(folder)
    with pytest.raises(lora_dist.UserError) as raised:
        lora_dist.load_base("embedded")
    return str(raised.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_boundary_arguments_that_would_let_each_rank_train_alone(tmp_path):
    for line in run_ranks(_after_arguments, 2, str(tmp_path)):
        assert line.startswith("TrainingArguments use_cpu False: without a GPU, each rank would train alone; give use_")


def _too_many_layers(rank: int) -> str:
    with pytest.raises(lora_dist.UserError) as raised:
        lora_dist.load_base("embedded", resident_layers=4)
    return str(raised.value)


def test_boundary_more_resident_layers_than_the_model_has():
    assert set(run_ranks(_too_many_layers, 2)) == {"resident_layers 4: the model has 4 layers; give fewer"}
