"""The settings become a placement, or an error that says what would work."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from transformers import OPTConfig

from lora_dist.config import TrainConfig
from lora_dist.errors import UserError
from lora_dist.library import load_base
from lora_dist.model.load import meta_model
from lora_dist.model.memory import base_bytes, expected_memory, layers_that_fit, peak_bytes
from lora_dist.model.placement import agree_on_placement, choose_placement
from lora_dist.parallel.fsdp import decoder_layers
from lora_dist.parallel.strategies import STRATEGIES, Launch, Placement, read_launch
from tests.helpers.families import make_checkpoint
from tests.helpers.ranks import run_ranks

DTYPE = torch.bfloat16


@pytest.fixture(scope="module")
def skeleton():
    return meta_model("embedded", "int8", DTYPE)


def choose(skeleton, config, strategy="fsdp", num_ranks=8, local_ranks=4, monkeypatch=None, **settings):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
    config = dataclasses.replace(config, **settings)
    return choose_placement(Launch(STRATEGIES[strategy], "bf16"), config, skeleton, num_ranks=num_ranks, dtype=DTYPE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "family, quantization", [("embedded", "int8"), ("embedded", "none"), ("gpt2", "nf4"), ("mixtral", "int8")]
)
def test_the_model_on_meta_is_the_model_that_is_loaded(tmp_path, family, quantization, dtype):
    path = family if family == "embedded" else str(make_checkpoint(family, tmp_path, dtype))
    device = torch.device("cpu")
    loaded = load_base(path, quantization=quantization, dtype=dtype, device=device, shard_ranks=1)
    on_meta = meta_model(path, quantization, dtype)
    seen, expected = (
        {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
        for model in (loaded, on_meta)
    )
    assert seen == expected and base_bytes(loaded) == base_bytes(on_meta)


def test_expected_memory(skeleton, config):
    whole = base_bytes(skeleton).total
    layers = [base_bytes(layer).total for layer in decoder_layers(skeleton)]

    def expected(**placement):
        found = expected_memory(skeleton, config, Placement(**placement), DTYPE)
        return found.base_bytes_per_rank, found.peak_bytes_per_rank is not None

    assert expected() == (whole, True)
    assert expected(shard_ranks=2) == (whole // 2, True)
    assert expected(shard_ranks=2, resident_layers=1) == ((whole - layers[-1]) // 2 + layers[-1], True)
    assert expected(shard_ranks=2, gather_once=True) == (whole // 2, False)
    assert expected(shard_ranks=2, context_ranks=2) == (whole // 2, False)
    assert expected(stages=2) == (None, False)


@pytest.mark.parametrize(
    "strategy, settings, expected",
    [
        ("fsdp", {}, Placement(shard_ranks=8)),
        ("hsdp", {}, Placement(shard_ranks=4)),  # one copy per node: the base never crosses nodes
        ("hsdp", {"shard_size": 8}, Placement(shard_ranks=8)),
        ("hsdp", {"shard_size": 2, "resident_layers": "3"}, Placement(shard_ranks=2, resident_layers=3)),
        ("fsdp", {"gather_once": True}, Placement(shard_ranks=8, gather_once=True)),
        ("fsdp", {"resident_layers": "all"}, Placement()),
        ("ddp", {}, Placement()),
        ("fsdp", {"context_parallel_size": 2}, Placement(shard_ranks=8, context_ranks=2)),
    ],
)
def test_placements(skeleton, config, monkeypatch, strategy, settings, expected):
    assert choose(skeleton, config, strategy, monkeypatch=monkeypatch, **settings) == expected


def test_the_accelerate_config_asks_for_offload(skeleton, config, monkeypatch):
    launched = {"RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    for name, value in (launched | {"FSDP_OFFLOAD_PARAMS": "true"}).items():
        monkeypatch.setenv(name, value)
    launch = read_launch(config)
    assert launch.strategy.name == "fsdp_offload"
    placement = choose_placement(launch, config, skeleton, num_ranks=2, dtype=DTYPE)
    assert placement == Placement(shard_ranks=2, offload=True)
    for resident in ("all", "auto"):  # leaves nothing to offload
        with pytest.raises(UserError, match=f"--resident_layers {resident}: .* fsdp_offload_params: true"):
            choose_placement(
                launch, dataclasses.replace(config, resident_layers=resident), skeleton, num_ranks=2, dtype=DTYPE
            )


@pytest.mark.parametrize(
    "strategy, settings, words",
    [
        ("hsdp", {"shard_size": 3}, "--shard_size 3: must divide the 8 ranks"),
        ("hsdp", {"shard_size": 1}, "--shard_size 1: must be 2 or more"),
        ("fsdp", {"shard_size": 4}, "--shard_size 4: has no effect under fsdp: .*hsdp.yaml"),
        ("zero3", {"resident_layers": "2"}, "--resident_layers 2: has no effect under zero3"),
        ("zero3", {"use_dora": True}, "--use_dora True: is not supported under zero3; use fsdp"),
        ("zero3_offload", {"modules_to_save": ["lm_head"]}, "--modules_to_save .* not supported under zero3_offload"),
        ("pipeline", {"lora_bias": "all"}, "--lora_bias all: is not supported under pipeline; use fsdp"),
        ("pipeline", {"context_parallel_size": 2}, "--context_parallel_size 2: is not supported under pipeline"),
        ("pipeline", {"task_type": "SEQ_2_SEQ_LM"}, "--task_type SEQ_2_SEQ_LM: is not supported under pipeline"),
        ("zero3", {"task_type": "SEQ_CLS"}, "--task_type SEQ_CLS: is not supported under zero3; use fsdp"),
        (
            "ddp",
            {"task_type": "SEQ_CLS", "context_parallel_size": 2},
            "--context_parallel_size 2: is not supported with --task_type SEQ_CLS",
        ),
        ("ddp", {"context_parallel_size": 3}, "--context_parallel_size 3: must divide the 8 ranks"),
        ("pipeline", {}, "num_processes: 8: the model has 4 layers"),
        ("fsdp", {"resident_layers": "4"}, "--resident_layers 4: the model has 4 layers"),
        ("fsdp", {"resident_layers": "all", "gather_once": True}, "--gather_once True: has no effect"),
        ("ddp", {"shard_size": 2}, "--shard_size 2: has no effect under ddp"),
        ("single", {"gather_once": True}, "--gather_once True: has no effect under single"),
        ("fsdp", {"resident_layers": "auto", "memory_budget_gib": 1e-3}, "--memory_budget_gib 0.001: .* by estimate"),
    ],
)
def test_settings_that_are_not_supported_are_refused(skeleton, config, monkeypatch, strategy, settings, words):
    with pytest.raises(UserError, match=words):
        choose(skeleton, config, strategy, monkeypatch=monkeypatch, **settings)


def fit(skeleton, config: TrainConfig, budget: int) -> int:
    return layers_that_fit(skeleton, config, 2, DTYPE, budget)


def test_auto_takes_as_many_layers_as_the_budget_allows(config, tmp_path):
    OPTConfig(
        vocab_size=1000,
        hidden_size=1024,
        word_embed_proj_dim=1024,
        ffn_dim=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
    ).save_pretrained(tmp_path)
    deep = meta_model(str(tmp_path), "int8", DTYPE)
    peaks = [peak_bytes(deep, config, 2, DTYPE, resident) for resident in range(25)]
    layer = base_bytes(decoder_layers(deep)[0]).total
    assert {later - earlier for earlier, later in pairwise(peaks[:24])} == {layer / 2}
    assert peaks[12] < peaks[24] < peaks[20]  # without gathers, the whole base costs less than most of it
    budgets = {peaks[0]: 0, peaks[1] - 1: 0, peaks[1]: 1, peaks[12]: 12, peaks[24]: 24, peaks[20]: 24}
    assert {budget: fit(deep, config, budget) for budget in budgets} == budgets
    with pytest.raises(UserError, match="--memory_budget_gib .*: a base that 2 ranks share needs at least"):
        fit(deep, config, peaks[0] - 1)


def test_auto_takes_all_layers_if_the_whole_base_fits(skeleton, config):
    whole = peak_bytes(skeleton, config, 2, DTYPE, 4)
    assert whole < peak_bytes(skeleton, config, 2, DTYPE, 0)  # with tiny layers, the gathers cost more
    assert fit(skeleton, config, whole) == 4


def test_auto_without_a_budget_uses_the_free_memory(skeleton, config, monkeypatch):
    placement = choose(skeleton, config, monkeypatch=monkeypatch, resident_layers="auto")
    assert placement == Placement()  # this machine has room for a tiny base


@pytest.mark.parametrize(
    "env, words",
    [
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config: .*hsdp.yaml"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, "fsdp_reshard_after_forward: false: .* --resident_layers N"),
    ],
)
def test_settings_of_the_accelerate_config_that_are_not_supported_are_refused(monkeypatch, env, words):
    launched = {"RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    for name, value in (launched | env).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        read_launch(TrainConfig())


def _agree_on_rank(rank):
    choices = (Placement(), Placement(4, resident_layers=5), Placement(4, resident_layers=2), Placement(4, 3))
    return agree_on_placement(choices[rank])


def test_all_ranks_take_the_smallest_number_of_resident_layers():
    assert run_ranks(_agree_on_rank, 4) == [Placement(shard_ranks=4, resident_layers=2)] * 4
