"""The config.json and generation_config.json of a model folder, checked before a class of transformers reads them."""

import copy
import math
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig, OPTConfig, OPTForCausalLM, PreTrainedConfig
from transformers.utils import logging

from lora_dist.boundary import boundary, read_json
from lora_dist.embedded import model_path
from lora_dist.errors import UserError

EXAMPLES = "give a model directory or a hub name such as facebook/opt-6.7b"
MOST_LAYERS = 1000  # more would take hours to build
LARGEST = {  # where the weights' shapes do not decide, or are compared too late
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"), MOST_LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_local_experts", "num_experts"), 2**16),
    "hidden_size": 2**20, "head_dim": 2**20, "intermediate_size": 2**24, "vocab_size": 2**28,
    "max_position_embeddings": 2**31, "num_labels": 2**16,
}  # fmt: skip
OTHER_WAYS = (  # to generate
    "penalty_alpha", "dola_layers", "assistant_early_exit", "prompt_lookup_num_tokens", "guidance_scale",
    "stop_strings", "cache_implementation", "return_dict_in_generate",
)  # fmt: skip


def load_model_config(name: str, classes: list[str] | None = None) -> PreTrainedConfig:
    """transformers' config of a model directory or hub name. Raises UserError if there is none that could be right."""
    labels, what = {}, f"--model_name_or_path {name}"
    if classes:
        labels["id2label"] = dict(enumerate(classes))
        labels["label2id"] = {label: number for number, label in enumerate(classes)}
    folder = Path(model_path(name))
    if folder.is_dir():
        for path in sorted(folder.iterdir()):  # transformers would wait for ever for what a FIFO gives
            if path.exists() and not path.is_file() and not path.is_dir():
                raise UserError(f"{what}: {path.name} is not a regular file; remove it")
        if not (folder / "config.json").exists():
            raise UserError(f"{what}: the directory holds no config.json; {EXAMPLES}")
        read_json(folder / "config.json", f"{what}: config.json")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{what}: no such directory; {EXAMPLES}")
    with boundary(what, hint=EXAMPLES):
        values, _ = PreTrainedConfig.get_config_dict(model_path(name))
    what += ": config.json"
    _check_values(what, values)
    with boundary(what, hint="give a model of a class in transformers; the code of a model folder is never run"):
        config = AutoConfig.from_pretrained(model_path(name), trust_remote_code=False, **labels)
    _check_sizes(what, config)
    return config


def _check_values(what: str, value: object, key: str = "") -> None:
    """Raises UserError for what config.json must not hold before a config class reads it.

    These are numbers that are NaN or infinite, counts of which a class would make long lists, and the name of a kernel
    from the hub, which would be code.
    """
    if isinstance(value, dict | list):
        for name, entry in value.items() if isinstance(value, dict) else [(key, entry) for entry in value]:
            _check_values(what, entry, name)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{what}: {key} is {value}; it must be a number")
    elif key in LARGEST:
        _check_size(what, key, value)
    elif isinstance(value, int) and key.endswith(("layer", "layers")) and value > MOST_LAYERS:
        raise UserError(f"{what}: {key} is {value}; it must be at most {MOST_LAYERS}")
    elif key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
        raise UserError(f"{what}: {key} {value} is code from the hub, which is never run; remove the entry")


def _check_size(what: str, key: str, value: object) -> None:
    least = 0 if "experts" in key else 1  # a family may have dense models
    if isinstance(value, int | float | str) and (type(value) is not int or not least <= value <= LARGEST[key]):
        raise UserError(f"{what}: {key} is {value!r}; it must be a whole number from {least} to {LARGEST[key]}")


def _check_sizes(what: str, config: PreTrainedConfig) -> None:
    """Raises UserError unless the sizes of the model are numbers that a model may have, also under a family's names."""
    for part in (config, config.get_text_config()):
        for key in LARGEST:
            _check_size(what, key, getattr(part, key, None))
        heads, groups = (getattr(part, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
        if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
            raise UserError(f"{what}: num_key_value_heads is {groups}; it must divide num_attention_heads, {heads}")


def load_generation_config(name: str) -> GenerationConfig | None:
    """None if the model has none, as many; transformers then makes one of its config.

    Left out are ways to generate that need code from the hub, another model or the tokenizer: samples are greedy.
    Raises UserError if nothing can be generated with it.
    """
    what = f"--model_name_or_path {name}: generation_config.json"
    with boundary(what, hint="remove or repair the file"):
        try:
            config = GenerationConfig.from_pretrained(model_path(name))
        except OSError:
            if (Path(model_path(name)) / "generation_config.json").exists():
                raise
            return None
        for way in OTHER_WAYS:
            setattr(config, way, None)
        if config.num_beams is not None and config.num_beams not in range(1, 101):
            raise UserError(f"{what}: num_beams is {config.num_beams!r}; it must be a whole number from 1 to 100")
        _try_to_generate(config, load_model_config(name).get_text_config(decoder=True).vocab_size)
    return config


def _try_to_generate(config: GenerationConfig, vocab_size: int) -> None:
    """Generate one token with the smallest model, because transformers checks most of the values only there."""
    size = dict(hidden_size=2, word_embed_proj_dim=2, ffn_dim=2, num_hidden_layers=1, num_attention_heads=1)
    prompt, verbosity = torch.tensor([[0, 1]]), logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with torch.random.fork_rng(devices=[]):
            model = OPTForCausalLM(OPTConfig(vocab_size=vocab_size, max_position_embeddings=8, **size))
            model.generation_config = copy.deepcopy(config)
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False, num_beams=1,
                num_return_sequences=1,
            )  # fmt: skip
    finally:
        logging.set_verbosity(verbosity)
