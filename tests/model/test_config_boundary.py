"""A config.json with impossible values is refused in one line, in bounded time, before anything is loaded."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch

from lora_dist.data.tasks import CAUSAL_LM
from lora_dist.embedded import BASE_DIR
from lora_dist.errors import UserError
from lora_dist.library import load_base
from lora_dist.model.files.configs import load_model_config
from lora_dist.model.load import BaseOptions, check_weights, meta_model
from lora_dist.parallel.strategies import Placement
from tests.helpers.families import make_checkpoint

OPTIONS = BaseOptions("int8", torch.float32, torch.device("meta"), Placement(), task=CAUSAL_LM)


def refusal(folder: Path) -> str:
    """What a start says: the config is read, the model is built on meta, the weights are compared."""
    started = time.perf_counter()
    with pytest.raises(UserError, match=f"^--model_name_or_path {folder}: ") as raised:
        load_model_config(str(folder))
        meta_model(str(folder), "int8", torch.float32)
        check_weights(str(folder), OPTIONS)
    assert time.perf_counter() - started < 20 and "\n" not in str(raised.value)
    return str(raised.value)


def rewritten(folder: Path, **entries) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))
    return folder


@pytest.fixture
def llama(tmp_path) -> Path:
    return make_checkpoint("llama", tmp_path)


@pytest.mark.parametrize("value", [0, -1, 10**12, 10**30, float("nan"), float("inf"), 1.5, "64", True])
@pytest.mark.parametrize(
    "size",
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "intermediate_size",
        "num_key_value_heads",
    ],
)
def test_sizes_that_no_model_has(llama, size, value):
    said = refusal(rewritten(llama, **{size: value}))
    assert said.startswith(f"--model_name_or_path {llama}: config.json: {size} is {value}"[:60])


@pytest.mark.parametrize(
    "entries, says",
    [
        ({"num_attention_heads": 5}, "config.json: .*not a multiple of the number of attention heads .5."),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; it must divide num_attention_heads, 4"),
        ({"num_attention_heads": 8, "head_dim": 8, "num_key_value_heads": 8}, "k_proj.weight as "),
        ({"num_labels": 10**9}, "num_labels is 1000000000; it must be a whole number from 1 to 65536"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; it must be a whole number from 1 to 1000"),
        ({"vocab_size": 4}, "config.json|as "),
        ({"model_type": "weird"}, "weird"),
        ({"model_type": ["llama"]}, "give a model of a class in transformers"),
        ({"model_type": None}, "give a model of a class in transformers"),
        ({"rope_theta": float("nan")}, "rope_theta is nan; it must be a number"),
        ({"rope_parameters": {"rope_type": "linear", "factor": float("inf")}}, "factor is inf; it must be a number"),
        ({"rope_parameters": {"rope_type": "none such"}}, "config.json: 'none such'"),
        ({"n_layer": 10**9}, "n_layer is 1000000000; it must be at most 1000"),
        ({"hidden_act": "none such"}, "none such"),
        ({"dtype": "float13"}, "float13"),
        ({"pad_token_id": 10**6}, "config.json"),
    ],
)
def test_values_that_do_not_go_together(llama, entries, says):
    assert re.search(says, refusal(rewritten(llama, **entries)))


def test_heads_that_do_not_divide_the_width(tmp_path):
    folder = Path(shutil.copytree(BASE_DIR, tmp_path / "opt"))
    heads = json.loads((folder / "config.json").read_text())["num_attention_heads"]
    assert "num_heads" in refusal(rewritten(folder, num_attention_heads=heads * 2 - 1))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"null", b"{", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"a": ' * 100_000]
)
def test_a_config_that_is_no_object(llama, content):
    (llama / "config.json").write_bytes(content)
    assert "config.json" in refusal(llama) or "give a model directory" in refusal(llama)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"])
def test_a_pipe_instead_of_a_file(llama, name):
    (llama / name).unlink(missing_ok=True)
    os.mkfifo(llama / name)
    assert f"{name} is not a regular file; remove it" in refusal(llama)


def test_no_config(llama):
    (llama / "config.json").unlink()
    assert "the directory holds no config.json; give a model directory or a hub name" in refusal(llama)


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "model").touch()
    refusal(tmp_path / "model")


def test_a_dense_model_of_a_family_with_experts_may_have_none(llama):
    load_model_config(str(rewritten(llama, num_local_experts=0)))
    load_base(str(llama), quantization="none")
