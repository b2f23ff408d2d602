"""A checkpoint whose weights are not those that its config.json asks for is refused, by the weights' names."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig

from lora_dist.config import TrainConfig
from lora_dist.data.formats import load_tokenizer
from lora_dist.data.rows import PreparedData, Rows
from lora_dist.data.tasks import TASKS
from lora_dist.errors import UserError
from lora_dist.library import load_base
from lora_dist.model.files.lazy_weights import open_checkpoint
from lora_dist.model.load import BaseOptions, check_weights
from lora_dist.model.quantized_cache import load_cached_base
from lora_dist.parallel.strategies import STRATEGIES, Launch, Placement
from lora_dist.training.plan import plan_base
from tests.helpers.families import CONFIGS, make_checkpoint
from tests.helpers.parity import load_sharded
from tests.helpers.ranks import run_ranks


def options(task: str = "CAUSAL_LM", quantization: str = "int8") -> BaseOptions:
    classes = ["a", "b", "c"] if TASKS[task].has_classes else None
    return BaseOptions(
        quantization, torch.float32, torch.device("cpu"), Placement(),
        will_be_trained=lambda name: name.startswith(("score.", "classifier.")), task=TASKS[task], classes=classes,
    )  # fmt: skip


def set_config(folder: Path, **entries) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


LAYER = "model.layers.1.mlp.up_proj.weight"
FAULTS = {
    "fewer layers in config.json": (
        lambda folder: set_config(folder, num_hidden_layers=1),
        "holds model.layers.1.input_layernorm.weight, .* and 5 more",
    ),
    "more layers in config.json": (
        lambda folder: set_config(folder, num_hidden_layers=3),
        "lacks model.layers.2.input_layernorm.weight, .* and 5 more",
    ),
    "a weight less": (lambda folder: change_weights(folder, lambda w: w.pop(LAYER)), f"lacks {LAYER}; "),
    "a weight more": (
        lambda folder: change_weights(folder, lambda w: w.update({"model.layers.1.extra.weight": torch.ones(2, 2)})),
        "holds model.layers.1.extra.weight, which the model",
    ),
    "no head": (lambda folder: change_weights(folder, lambda w: w.pop("lm_head.weight")), "lacks lm_head.weight"),
    "another width": (
        lambda folder: set_config(folder, intermediate_size=100),
        r"holds model.layers.0.mlp.down_proj.weight as \(64, 192\), and the model needs \(64, 100\)",
    ),
    "another vocabulary": (
        lambda folder: set_config(folder, vocab_size=100), r"holds lm_head.weight as \(128, 64\), and .* \(100, 64\)"
    ),
    "a vector for a matrix": (
        lambda folder: change_weights(folder, lambda w: w.update({LAYER: w[LAYER].flatten()})),
        rf"holds {LAYER} as \(12288,\)",
    ),
    "integers": (
        lambda folder: change_weights(folder, lambda w: w.update({LAYER: w[LAYER].to(torch.int8)})),
        f"holds {LAYER} as integers; give the one that it was quantized from",
    ),
    "another kind of model": (lambda folder: set_config(folder, model_type="opt"), "lacks "),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_do_not_fit_config_json_are_named(tmp_path, fault):
    folder = make_checkpoint("llama", tmp_path)
    check_weights(str(folder), options())
    make, says = FAULTS[fault]
    make(folder)
    with pytest.raises(UserError, match=f"^--model_name_or_path {folder}: its checkpoint {says}"):
        check_weights(str(folder), options())
    with pytest.raises(UserError, match=says):  # the same for who calls the library
        load_base(str(folder), quantization="int8")


@pytest.mark.parametrize("family", [*CONFIGS, "gpt_oss"])
def test_every_family_passes_also_with_a_new_head(tmp_path, family):
    """With the constants that old checkpoints hold beside the weights."""
    folder = make_checkpoint(family, tmp_path)
    constants = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "h.0.attn.masked_bias": torch.ones(())}
    constants |= {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "gpt_neox.layers.1.attention.bias": torch.ones(1, 1, 8, 8)}
    change_weights(folder, lambda weights: weights.update(constants))
    check_weights(str(folder), options())
    if type(AutoConfig.from_pretrained(folder)) in TASKS["SEQ_CLS"].models:  # lm_head is then not used
        check_weights(str(folder), options("SEQ_CLS"))


def test_a_classifier_needs_all_but_its_head(tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    set_config(folder, num_hidden_layers=1)
    with pytest.raises(UserError, match="holds model.layers.1.input_layernorm.weight"):
        check_weights(str(folder), options("SEQ_CLS"))
    set_config(folder, num_hidden_layers=3)
    with pytest.raises(UserError, match="lacks model.layers.2.input_layernorm.weight"):
        check_weights(str(folder), options("SEQ_CLS"))


def test_a_classifier_of_another_number_of_classes(tmp_path):
    config = BertConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"holds classifier.bias as \(2,\), and the model needs \(3,\)"):
        check_weights(str(tmp_path), options("SEQ_CLS"))
    check_weights(str(tmp_path), replace(options("SEQ_CLS"), classes=["a", "b"]))
    check_weights(str(tmp_path), replace(options("TOKEN_CLS"), classes=["a", "b"]))  # which does not use the pooler


def test_the_plan_of_a_run_checks_the_weights(tmp_path):
    """It is made before the run folder is begun."""
    folder = make_checkpoint("llama", tmp_path)
    set_config(folder, num_hidden_layers=1)
    config = TrainConfig(model_name_or_path=str(folder), mixed_precision="no", lora_target_modules=["q_proj"])
    data = PreparedData(Rows.of([([1], [1])]), Rows.of([]), {}, "text", None)
    with pytest.raises(UserError, match="its checkpoint holds model.layers.1"):
        plan_base(config, Launch(STRATEGIES["ddp"], "no"), load_tokenizer("embedded"), data)


def test_no_weight_is_read(monkeypatch):
    monkeypatch.setattr("os.preadv", None)
    assert open_checkpoint("embedded")
    check_weights("embedded", options())


VALUES = {"NaN": float("nan"), "infinite": float("inf"), "minus infinite": -float("inf")}


def spoil(folder: Path, name: str, value: float) -> None:
    """Put the value into the last element of a weight."""

    def change(weights):
        weights[name].flatten()[-1] = value

    change_weights(folder, change)


@pytest.mark.parametrize("quantization", ["int8", "nf4", "none"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", VALUES)
def test_weights_that_are_not_finite_are_named(tmp_path, value, name, quantization):
    folder = make_checkpoint("llama", tmp_path)
    spoil(folder, name, VALUES[value])
    with pytest.raises(
        UserError, match=f"{folder}: {name} in model.safetensors: holds NaN or infinite numbers; downlo"
    ):
        load_base(str(folder), quantization=quantization)


def test_the_largest_finite_weights_pass(tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    spoil(folder, "lm_head.weight", torch.finfo(torch.float16).max)
    assert load_base(str(folder), quantization="int8").lm_head.weight.max() == torch.finfo(torch.float16).max


def test_numbers_that_fp16_cannot_hold_are_named(tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    change_weights(folder, lambda w: w.update({LAYER: w[LAYER].float()}))
    spoil(folder, LAYER, 1e6)
    load_base(str(folder), quantization="int8", dtype=torch.float32)
    with pytest.raises(UserError, match=f"{LAYER} in .*: holds NaN or infinite numbers or numbers beyond float16; try"):
        load_base(str(folder), quantization="int8", dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_weights_that_are_not_finite_are_named(tmp_path, dtype):
    folder = make_checkpoint("llama", tmp_path)
    change_weights(folder, lambda w: w.update({LAYER: w[LAYER].to(dtype)}))
    load_base(str(folder), quantization="none", dtype=torch.float32)
    change_weights(folder, lambda w: w[LAYER].view(torch.uint8).flatten()[-1:].fill_(0x7F))
    with pytest.raises(UserError, match=f"{LAYER} in model.safetensors: holds NaN"):
        load_base(str(folder), quantization="none", dtype=torch.float32)


def test_scales_of_a_quantized_base_that_are_not_finite_are_named(tmp_path):
    config, cache = replace(options(), quantization="nf4"), tmp_path / "cache"
    load_cached_base("embedded", config, cache=str(cache))
    load_base(str(cache), quantization="nf4")
    (name, *_) = [name for name in load_file(cache / "model.safetensors") if name.endswith("nested_absmax")]
    spoil(cache, name, float("nan"))
    with pytest.raises(UserError, match=f"{name} in model.safetensors: holds NaN"):
        load_base(str(cache), quantization="nf4")


def _refusal_on_rank(rank, folder):
    with pytest.raises(UserError) as raised:
        load_sharded("nf4", path=folder)
    return str(raised.value)


def test_every_rank_says_the_same_of_what_one_of_them_has_read(tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    spoil(folder, LAYER, float("nan"))  # a row that rank 1 reads
    said = run_ranks(_refusal_on_rank, 2, folder)
    assert said[0] == said[1] and f"{LAYER} in model.safetensors: holds NaN" in said[0]
