"""recipes/configs: each file is taken by sft.py, and what its header says of memory is what the estimate says."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from lora_dist.config import TrainConfig
from lora_dist.data.packing import check_packing
from lora_dist.flags import parse_config
from lora_dist.model.adapters import check_targets
from lora_dist.model.memory import peak_bytes
from lora_dist.model.quantize_model import keep_norms_in_fp32, quantize_model
from tests.helpers.ranks import ROOT

FILES = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
LARGE = dict(num_key_value_heads=8, max_position_embeddings=131072, vocab_size=128256)
BASES = {  # the published sizes
    "llama3_8b": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **LARGE
    ),
    "llama3_70b": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **LARGE
    ),
    "mistral_7b": MistralConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, sliding_window=None,
        **(LARGE | {"vocab_size": 32768}),
    ),
    "qwen2_7b": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_header_says_what_the_estimate_says(file):
    config = parse_config(TrainConfig(), ["--config", str(file)])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(BASES[file.stem], dtype=torch.bfloat16)
    quantize_model(model, config.quantization)
    keep_norms_in_fp32(model)
    check_targets(model, config)
    check_packing(model, config)
    layers = BASES[file.stem].num_hidden_layers
    whole = peak_bytes(model, config, 1, torch.bfloat16, layers) / 2**30
    sharded = peak_bytes(model, config, 4, torch.bfloat16, 0) / 2**30
    header = file.read_text()
    assert f"ddp {whole:.1f} GiB, fsdp on 4 GPUs {sharded:.1f} GiB" in header
    assert re.search(rf"recipes/sft.py --config recipes/configs/{file.name}", header)


def test_each_file_has_its_base():
    assert {file.stem for file in FILES} == BASES.keys()
