"""Tiny random checkpoints of the model families: hidden size 64, 2 layers, vocabulary 128."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

LLAMA_LIKE = dict(
    vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MOE = dict(num_experts_per_tok=2, moe_intermediate_size=64)
CONFIGS = {
    "opt": OPTConfig(
        vocab_size=128, hidden_size=64, word_embed_proj_dim=64, ffn_dim=192, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    ),
    "bloom": BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "gpt2": GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "llama": LlamaConfig(**LLAMA_LIKE),
    "llama_tied": LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True),
    "mistral": MistralConfig(**LLAMA_LIKE),
    "qwen2": Qwen2Config(**{k: v for k, v in LLAMA_LIKE.items() if k != "head_dim"}, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**LLAMA_LIKE),
    "gemma": GemmaConfig(**LLAMA_LIKE),
    "phi": PhiConfig(
        vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "falcon": FalconConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
    "gemma_untied": GemmaConfig(**LLAMA_LIKE, tie_word_embeddings=False),
    "gpt2_untied": GPT2Config(
        vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=False
    ),
    "bloom_untied": BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4, tie_word_embeddings=False),
    "qwen3_tied": Qwen3Config(**LLAMA_LIKE, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(**LLAMA_LIKE, **MOE, num_experts=4),
}  # fmt: skip


GPT_OSS = GptOssConfig(**LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2)


def make_checkpoint(family: str, folder: Path, dtype: torch.dtype = torch.float16) -> Path:
    """Write a random checkpoint as safetensors in `dtype`. Dropout is 0.1 if the family has any. Returns its folder."""
    torch.manual_seed(0)
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(GPT_OSS if family == "gpt_oss" else CONFIGS[family])
    for param in model.parameters():  # biases and norms start as constants, so two of them could be exchanged unseen
        param.data += torch.randn_like(param) * 0.05
    model.to(dtype).save_pretrained(folder / family)
    return folder / family
