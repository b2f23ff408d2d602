"""Rows longer than a model's positions: refused before a run begins, or said, if the model can compute them."""

import contextlib
import dataclasses

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    GPTJConfig,
    LlamaConfig,
    MptConfig,
    RobertaConfig,
    T5Config,
)

from lora_dist.config import TrainConfig
from lora_dist.data.formats import load_tokenizer
from lora_dist.data.rows import PreparedData, Rows, RowStream
from lora_dist.errors import UserError
from lora_dist.model.positions import longest_prompt, positions_of
from lora_dist.training.plan import check_positions
from tests.helpers.families import CONFIGS, LLAMA_LIKE

SMALL_BART = dict(vocab_size=128, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                  decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64)  # fmt: skip
TABLE = {
    "opt": CONFIGS["opt"], "gpt2": CONFIGS["gpt2"],
    "gptj": GPTJConfig(vocab_size=128, n_embd=64, n_layer=1, n_head=4, n_positions=64, rotary_dim=8),
}  # fmt: skip
ROTARY = {name: CONFIGS[name] for name in ("llama", "gpt_neox", "mixtral", "phi")}
UNLIMITED = {"bloom": CONFIGS["bloom"], "mpt": MptConfig(vocab_size=128, d_model=64, n_layers=1, n_heads=4)}


def on_meta(config, model_class=AutoModelForCausalLM):
    with torch.device("meta"):
        return model_class.from_config(config)


def data_of(*lengths: int, labels: int | None = None, held_out: int = 3) -> PreparedData:
    rows = Rows.of([([1] * length, [1] * (labels or length)) for length in lengths])
    return PreparedData(rows, Rows.of([([1] * held_out, [1] * held_out)] if held_out else []), {}, "text", None)


CONFIG = TrainConfig(model_name_or_path="base", max_length=256)


@pytest.mark.parametrize("family", TABLE)
def test_rows_beyond_a_table_are_refused(family):
    model = on_meta(TABLE[family])
    assert positions_of(model) == (64, True)
    check_positions(model, CONFIG, data_of(64, 10), None)  # a large --max_length alone does not matter
    for data in (data_of(65), data_of(3, held_out=65)):
        says = "^--max_length 256: the longest row has 65 tokens, and base has only 64 positions; give --max_length 64"
        with pytest.raises(UserError, match=says):
            check_positions(model, CONFIG, data, None)


@pytest.mark.parametrize("family", TABLE)
def test_the_limit_is_what_the_model_can_compute(family):
    model = AutoModelForCausalLM.from_config(TABLE[family])
    model(torch.ones(1, 64, dtype=torch.int64))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.ones(1, 65, dtype=torch.int64))


def test_the_first_positions_of_a_table_may_be_for_padding():
    """RoBERTa counts from padding_idx + 1."""
    config = RobertaConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=66, pad_token_id=1,
    )  # fmt: skip
    assert positions_of(on_meta(config, AutoModelForSequenceClassification)) == (64, True)
    model = AutoModelForSequenceClassification.from_config(config)
    model(torch.full((1, 64), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 65), 5))


def test_targets_count_too():
    model = on_meta(BartConfig(**SMALL_BART, max_position_embeddings=64), AutoModelForSeq2SeqLM)
    check_positions(model, CONFIG, data_of(64, labels=64), None)
    with pytest.raises(UserError, match="the longest row has 65 tokens"):
        check_positions(model, CONFIG, data_of(5, labels=65), None)


def test_padding_of_context_parallelism_counts_too():
    model, config = on_meta(CONFIGS["opt"]), dataclasses.replace(CONFIG, context_parallel_size=3)
    check_positions(model, config, data_of(63), None)
    with pytest.raises(UserError, match="the longest row has 64 tokens and 2 of padding for --context_parallel_size"):
        check_positions(model, config, data_of(64), None)


def test_a_prompt_leaves_positions_for_its_completion(tmp_path):
    model, tokenizer = on_meta(CONFIGS["opt"]), load_tokenizer("embedded")
    assert longest_prompt(model, 48) == 16 and longest_prompt(on_meta(CONFIGS["llama"]), 48) is None
    for text, fits in (("Hi there", True), ("a b c d e f g h " * 3, False)):
        config = dataclasses.replace(CONFIG, sample_prompt=text)
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="^--sample_prompt .* has .* tokens;"):
            check_positions(model, config, data_of(3), tokenizer)


def test_what_is_not_known_before_counts_as_long_as_max_length():
    model = on_meta(CONFIGS["opt"])
    stream = dataclasses.replace(data_of(3), train=RowStream(None, None, CONFIG))
    for config, data in ((CONFIG, stream), (dataclasses.replace(CONFIG, packing=True), data_of(3))):
        with pytest.raises(UserError, match="rows have up to 256 tokens, and base has only 64 positions"):
            check_positions(model, config, data, None)
        check_positions(model, dataclasses.replace(config, max_length=64), data, None)


@pytest.mark.parametrize("family", ROTARY)
def test_rows_beyond_rotary_positions_are_warned_of_once(family, capsys, monkeypatch):
    model = on_meta(ROTARY[family])
    check_positions(model, CONFIG, data_of(64), None)
    assert not capsys.readouterr().err
    check_positions(model, CONFIG, data_of(65), None)
    says = "warning: the longest row has 65 tokens, and base was made for 64 positions: --max_length 64 stays"
    err = capsys.readouterr().err
    assert err.startswith(says) and err.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    check_positions(model, CONFIG, data_of(65), None)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "rope, limit",
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0}, 64),
    ],
)  # fmt: skip
def test_the_scaling_of_rotary_positions_counts(rope, limit):
    config = LlamaConfig(**LLAMA_LIKE, rope_parameters={"rope_theta": 10000.0} | rope)
    assert positions_of(on_meta(config)) == (limit, False)


@pytest.mark.parametrize("family", [*UNLIMITED, "t5"])
def test_a_model_without_a_limit_takes_rows_of_any_length(family, capsys):
    if family == "t5":
        config = T5Config(vocab_size=128, d_model=64, d_ff=64, num_layers=1, num_heads=2, d_kv=32)
        model = on_meta(config, AutoModelForSeq2SeqLM)
    else:
        model = on_meta(UNLIMITED[family])
    assert positions_of(model) == (None, False)
    check_positions(model, CONFIG, data_of(250), None)
    assert not capsys.readouterr().err
