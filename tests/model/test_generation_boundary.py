"""Damaged tokenizer files and generation_config.json of a model folder are refused in one line, before data is read."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from lora_dist.config import TrainConfig
from lora_dist.data.formats import load_tokenizer
from lora_dist.embedded import BASE_DIR
from lora_dist.errors import UserError
from lora_dist.library import load_base
from lora_dist.model.files.configs import load_generation_config
from lora_dist.training.plan import check_names


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(BASE_DIR, tmp_path / "model"))


BAD = ["[]", "{", "\x00", "[" * 100_000] + [
    json.dumps(entries)
    for entries in (
        {"eos_token_id": "x"}, {"num_beams": 0}, {"num_beams": 10**9}, {"num_beams": "a"}, {"repetition_penalty": 0},
        {"bad_words_ids": 3}, {"top_k": "a", "do_sample": True}, {"max_time": "a"}, {"min_length": "b"},
        {"cache_implementation": "none such"}, {"watermarking_config": {"a": 1}}, {"sequence_bias": [[1]]},
    )
]  # fmt: skip


@pytest.mark.parametrize("content", BAD)
def test_a_damaged_generation_config_is_refused(folder, content):
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=f"^--model_name_or_path {folder}: generation_config.json: ") as raised:
        load_generation_config(str(folder))
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="generation_config.json"):
        check_names(TrainConfig(model_name_or_path=str(folder), dataset_name="embedded"))


@pytest.mark.parametrize(
    "entries",
    [{"num_beams": 4, "early_stopping": True, "no_repeat_ngram_size": 3}, {"suppress_tokens": [5, 50_000]},
     {"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "high"}, {"stop_strings": ["a"]}, {"assistant_early_exit": 1},
     {"temperature": 0.7, "do_sample": True, "top_p": 0.9}, {"eos_token_id": [1, 2]}],
)  # fmt: skip
def test_what_models_have_in_it_can_be_generated_with(folder, entries):
    (folder / "generation_config.json").write_text(json.dumps(entries))
    before = torch.get_rng_state()
    config = load_generation_config(str(folder))
    assert torch.equal(torch.get_rng_state(), before)
    assert config.temperature == entries.get("temperature")
    model = load_base(str(folder), quantization="none")
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False).shape[0] == 1


def test_a_model_without_it(folder):
    (folder / "generation_config.json").unlink()
    assert load_generation_config(str(folder)) is None


def no_such_token(tokenizer: dict) -> dict:
    """The tokenizers library panics when it looks for it."""
    processor = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "none", "type_id": 0}}], "pair": [],
                 "special_tokens": {}}  # fmt: skip
    return tokenizer | {"post_processor": processor}


@pytest.mark.parametrize(
    "name, change",
    [
        ("tokenizer.json", no_such_token),
        ("tokenizer.json", lambda content: content | {"model": None}),
        ("tokenizer.json", lambda content: content | {"added_tokens": 3}),
        ("tokenizer.json", lambda content: []),
        ("tokenizer_config.json", lambda content: content | {"model_max_length": "long"}),
        ("tokenizer_config.json", lambda content: content | {"model_max_length": {}}),
        ("tokenizer_config.json", lambda content: [content]),
        ("tokenizer_config.json", lambda content: content | {"eos_token": None}),
    ],
)
def test_damaged_tokenizer_files_are_refused(folder, capfd, name, change):
    load_tokenizer(str(folder))
    (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))
    capfd.readouterr()
    with pytest.raises(UserError, match=f"^--model_name_or_path {folder}: its tokenizer ") as raised:
        load_tokenizer(str(folder))
    assert "\n" not in str(raised.value) and "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"{"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer_files_that_are_no_json_are_refused(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"^--model_name_or_path {folder}: its tokenizer cannot be loaded: "):
        load_tokenizer(str(folder))


def test_no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="its tokenizer knows no word; its files may be missing"):
        load_tokenizer(str(folder))


def test_headers_are_read_before_the_data_and_leave_no_file_open(folder):
    config = TrainConfig(model_name_or_path=str(folder), dataset_name="none such")
    open_files = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        check_names(config)
    assert len(os.listdir("/proc/self/fd")) == open_files
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="model.safetensors"):
        check_names(config)
