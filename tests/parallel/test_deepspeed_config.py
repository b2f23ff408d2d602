"""DeepSpeed's JSON compared with the flags: what has an effect, what is filled in, and what is refused."""

import dataclasses
import json

import pytest
import torch

from lora_dist.errors import UserError
from lora_dist.model.load import meta_model
from lora_dist.parallel.deepspeed_config import SECTIONS, keys_without_effect, mixed_precision, read_deepspeed_config
from lora_dist.parallel.strategies import read_launch
from lora_dist.parallel.zero import check_zero, engine_config


@pytest.fixture
def two_ranks(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")


def read(config, tmp_path, settings, num_ranks=2):
    file = tmp_path / "ds.json"
    file.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return read_deepspeed_config(dataclasses.replace(config, deepspeed=str(file)), num_ranks)


ZERO3 = {"stage": 3}
REFUSED = {
    "no JSON": ("{", "JSONDecodeError"),
    "a list": ("[]", "must hold a dict"),
    "deep JSON": ("[" * 100_000, "RecursionError"),
    "bf16 true": ({"bf16": True, "zero_optimization": ZERO3}, "bf16 true: must be a JSON object, such as"),
    "fp16 a list": ({"fp16": [], "zero_optimization": ZERO3}, r"fp16 \[\]: must be a JSON object, such as"),
    "enabled a number": ({"bf16": {"enabled": 7}, "zero_optimization": ZERO3}, "bf16.enabled 7: must be true, false"),
    "ZeRO true": ({"zero_optimization": True}, 'zero_optimization true: must be a JSON object, such as {"stage": 3}'),
    "ZeRO null": ({"zero_optimization": None}, "zero_optimization null: must be a JSON object"),
    "stage a text": ({"zero_optimization": {"stage": "3"}}, 'zero_optimization.stage "3": must be 2 or 3'),
    "stage a fraction": ({"zero_optimization": {"stage": 3.0}}, "zero_optimization.stage 3.0: must be 2 or 3"),
    "stage a list": ({"zero_optimization": {"stage": [3]}}, "zero_optimization.stage .*: must be 2 or 3"),
    "offload true": (
        {"zero_optimization": ZERO3 | {"offload_param": True}}, "zero_optimization.offload_param true: must be a JSON"
    ),
    "offload null": (
        {"zero_optimization": ZERO3 | {"offload_optimizer": None}}, "offload_optimizer null: must be a JSON object"
    ),
    "comms_logger true": ({"zero_optimization": ZERO3, "comms_logger": True}, "comms_logger true: must be a JSON"),
    "a long value": ({"zero_optimization": ["x" * 10**6]}, "zero_optimization .*: must be a JSON object"),
    "no stage": ({}, "zero_optimization.stage null: must be 2 or 3"),
    "stage 1": ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage 1: must be 2 or 3"),
    "an optimizer": ({"zero_optimization": ZERO3, "optimizer": {"type": "Adam"}}, ": optimizer: has no effect here"),
    "a scheduler": ({"zero_optimization": ZERO3, "scheduler": {}}, ": scheduler: has no effect here"),
    "accumulation": (
        {"zero_optimization": ZERO3, "gradient_accumulation_steps": 8},
        "gradient_accumulation_steps 8: must be 4, the value of --gradient_accumulation_steps",
    ),
    "micro-batch": (
        {"zero_optimization": ZERO3, "train_micro_batch_size_per_gpu": 1},
        "train_micro_batch_size_per_gpu 1: must be 4, the value of --per_device_train_batch_size",
    ),
    "batch": ({"zero_optimization": ZERO3, "train_batch_size": 16}, "train_batch_size 16: must be 32, .* x ranks"),
    "clipping": ({"zero_optimization": ZERO3, "gradient_clipping": 0.5}, "0.5: must be 1.0, .* --max_grad_norm"),
    "offloaded optimizer": (
        {"zero_optimization": ZERO3 | {"offload_optimizer": {"device": "cpu"}}},
        "offload_optimizer .*: is not supported: the optimizer of the adapters takes only some MiB",
    ),
    "offload without sharding": (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param .*: needs stage 3"
    ),
    "nvme": ({"zero_optimization": ZERO3 | {"offload_param": {"device": "nvme"}}}, "device .*nvme.*: .* use cpu"),
    "fp16 in stage 2": ({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}, "fp16 .*: .* use bf16"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(config, tmp_path, what):
    settings, words = REFUSED[what]
    with pytest.raises(UserError, match=words) as error:
        read(config, tmp_path, settings)
    assert str(error.value).startswith("--deepspeed ") and "\n" not in str(error.value)
    assert len(str(error.value)) < 600


VALUES = (None, True, False, 0, -1, 10**30, 0.5, float("nan"), "", "auto", "x\ny", [], [[1]], {}, {"": {}}, "none")


def test_boundary_any_value_at_any_place_is_taken_or_refused_in_one_line(config, tmp_path):
    valid = {
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}, "bf16": {"enabled": True},
        "train_batch_size": "auto", "comms_logger": {"enabled": True},
    }  # fmt: skip
    places = [(name,) for name in SECTIONS] + [(name, key) for name in valid for key in ("stage", "enabled", "device")]
    places += [("zero_optimization", name, "device") for name in ("offload_param", "offload_optimizer")]
    for *path, key in places:
        for value in VALUES:
            settings = json.loads(json.dumps(valid))
            holder = settings
            for name in path:
                if not isinstance(holder.get(name), dict):
                    holder[name] = {}
                holder = holder[name]
            holder[key] = value
            try:
                assert mixed_precision(read(config, tmp_path, settings)) in ("no", "bf16", "fp16")
            except UserError as error:
                assert "\n" not in str(error), (path, key, value)


@pytest.mark.parametrize("section", ["zero_optimization", "comms_logger"])
def test_boundary_what_deepspeed_itself_refuses_is_one_line(section):
    settings = {"zero_optimization": {"stage": 2}}
    settings[section] = settings.get(section, {}) | {"no_such_key": 1, "enabled": "x\ny"}
    with pytest.raises(
        UserError, match=f"^DeepSpeed config: {section}.*; DeepSpeed's documentation lists the valid keys"
    ) as error:
        check_zero(settings, None)
    assert "\n" not in str(error.value)


def test_boundary_one_rank_under_the_deepspeed_launcher_names_that_launcher(config, tmp_path):
    with pytest.raises(UserError, match="^--deepspeed .*: ZeRO-3 needs 2 ranks or more; start them with deepspeed"):
        read(config, tmp_path, {"zero_optimization": ZERO3}, num_ranks=1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DEEPSPEED_ZERO_STAGE", "x", "accelerate config deepspeed_config: zero_stage 'x': must be a whole number"),
        ("DEEPSPEED_ZERO_STAGE", "", "accelerate config deepspeed_config: zero_stage '': must be a whole number"),
        ("GRADIENT_CLIPPING", "x", "accelerate config deepspeed_config: gradient_clipping x: "),
        ("DEEPSPEED_CONFIG_FILE", "/no/such", "accelerate config deepspeed_config: /no/such: "),
        ("DEEPSPEED_CONFIG_FILE", "/dev/zero", "accelerate config deepspeed_config: /dev/zero: this is not a regular"),
    ],
)
def test_boundary_what_accelerate_passes_on_is_checked(config, two_ranks, monkeypatch, name, value, message):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(UserError) as error:
        read_launch(config)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_one_rank_is_refused(config, tmp_path):
    with pytest.raises(UserError, match="ZeRO-3 needs 2 ranks or more"):
        read(config, tmp_path, {"zero_optimization": ZERO3}, num_ranks=1)


def test_values_that_agree_with_the_flags_are_accepted(config, tmp_path):
    settings = {
        "zero_optimization": ZERO3 | {"overlap_comm": True, "contiguous_gradients": True}, "gradient_clipping": 1.0,
        "train_batch_size": 32, "gradient_accumulation_steps": "auto", "bf16": {"enabled": "auto"},
    }  # fmt: skip
    assert read(config, tmp_path, settings) == settings
    assert keys_without_effect(settings) == ["contiguous_gradients"]  # the banner names it


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, "fp16"),
        ({"bf16": {"enabled": "auto"}}, "fp16"),  # accelerate says fp16
        ({}, "fp16"),
        ({"bf16": {"enabled": False}}, "no"),
    ],
)
def test_the_precision(monkeypatch, settings, expected):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert mixed_precision(settings) == expected


def test_the_fields_of_an_accelerate_config_without_a_file(config, two_ranks, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    launch = read_launch(config)
    assert (launch.strategy.name, launch.mixed_precision, launch.offload) == ("zero3_offload", "bf16", True)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(UserError, match="accelerate config deepspeed_config: gradient_accumulation_steps 2.0: .* 4"):
        read_launch(config)


def test_a_config_given_twice_is_refused(config, two_ranks, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="--deepspeed x.json: the accelerate config already names a DeepSpeed config"):
        read_launch(dataclasses.replace(config, deepspeed="x.json"))


def test_the_config_that_deepspeed_gets():
    base = meta_model("embedded", "int8", torch.bfloat16)
    settings = {"zero_optimization": ZERO3 | {"stage3_prefetch_bucket_size": 7, "stage3_max_live_parameters": "auto"}}
    given = engine_config(settings, base)
    zero = given["zero_optimization"]
    assert zero["stage3_prefetch_bucket_size"] == 7 and zero["memory_efficient_linear"] is False
    assert (
        10**5 < zero["stage3_max_live_parameters"] < 2 * 10**6 < 10**9
    )  # two layers of this base, not 10**9, which is DeepSpeed's default
    assert zero["stage3_param_persistence_threshold"] < 10**3
    # DeepSpeed sees one micro-batch per step and does not clip.
    assert (given["gradient_accumulation_steps"], given["train_micro_batch_size_per_gpu"]) == (1, 1)
    assert given["gradient_clipping"] == 0 and "bf16" not in given
    assert "stage3_max_live_parameters" not in engine_config({"zero_optimization": {"stage": 2}})["zero_optimization"]
