"""Whatever stands in the small files of a model or adapter folder is read, or refused in one line."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

from lora_dist.data.formats import load_tokenizer
from lora_dist.embedded import BASE_DIR
from lora_dist.library import load_base
from lora_dist.model.adapters import add_adapters, check_adapter, check_first_adapter, save_adapter
from lora_dist.model.files.configs import load_generation_config, load_model_config
from lora_dist.model.load import BaseOptions, check_weights, meta_model
from lora_dist.parallel.strategies import Placement
from tests.helpers.families import make_checkpoint
from tests.helpers.properties import answered, counts, holds, json_values, mutations

META = BaseOptions("int8", torch.float32, torch.device("meta"), Placement())
NUMBERS = st.sampled_from([0, 1, 2, 3, 7, -1, 10**6, 10**9, 2**63, 2**70, 0.5, 1e300, float("inf"), float("nan")])


@st.composite
def changed_json(draw, valid: dict) -> bytes:
    """The valid object with one entry changed, at any depth, or as bytes with pieces changed."""
    if draw(st.integers(0, 3)) == 0:
        return draw(mutations(json.dumps(valid).encode()))
    content = json.loads(json.dumps(valid))
    place = content
    while True:
        key = draw(st.sampled_from(sorted(place)))
        if not (isinstance(place[key], dict) and place[key] and draw(st.booleans())):
            break
        place = place[key]
    place[key] = draw(NUMBERS | json_values)
    return json.dumps(content).encode("utf-8", "surrogatepass")


@pytest.fixture(params=["llama", "qwen3_moe"])
def model(request, tmp_path) -> Path:
    return make_checkpoint(request.param, tmp_path)


@counts
def test_any_model_config(count, model):
    file = model / "config.json"

    def check(content):
        file.write_bytes(content)
        with answered(model):
            load_model_config(str(model))
            meta_model(str(model), "int8", torch.float32)
            check_weights(str(model), META)

    holds(count, changed_json(json.loads(file.read_text())), check)


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(BASE_DIR, tmp_path / "model"))


GENERATION = {
    "bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 1, "do_sample": True, "temperature": 0.7, "top_p": 0.9,
    "top_k": 20, "num_beams": 1, "max_length": 20, "min_length": 0, "repetition_penalty": 1.1, "suppress_tokens": [5],
    "begin_suppress_tokens": [5], "forced_eos_token_id": 2, "no_repeat_ngram_size": 3, "bad_words_ids": [[5]],
    "length_penalty": 1.0, "max_time": 5.0, "stop_strings": ["a"], "cache_implementation": "dynamic",
}  # fmt: skip


@counts
def test_any_generation_config(count, folder):
    file = folder / "generation_config.json"
    base = load_base(str(folder), quantization="none")
    prompt = torch.tensor([[5, 6]])

    def check(content):
        file.write_bytes(content)
        with answered(folder):
            base.generation_config = load_generation_config(str(folder))
            base.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False)

    holds(count, changed_json(GENERATION), check)


@counts
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_any_tokenizer_file(count, name, folder):
    file = folder / name

    def check(content):
        file.write_bytes(content)
        with answered(folder):
            tokenizer = load_tokenizer(str(folder))
            tokenizer(["A text", "another one."])

    holds(count, changed_json(json.loads(file.read_text())), check)


@counts
def test_any_adapter(count, tmp_path, config):
    adapter = tmp_path / "adapter"
    save_adapter(add_adapters(load_base("embedded"), config), load_tokenizer("embedded"), adapter)
    file = adapter / "adapter_config.json"
    config = dataclasses.replace(config, adapter_name_or_path=str(adapter))

    def check(content):
        file.write_bytes(content)
        with answered(adapter):
            check_adapter(adapter)
        with answered(adapter):
            check_first_adapter(config)

    holds(count, changed_json(json.loads(file.read_text())), check)
