"""How many tokens a model can read in one sequence."""

from torch import nn
from transformers import PreTrainedModel


def positions_of(model: PreTrainedModel) -> tuple[int | None, bool]:
    """(number of tokens that a model has positions for, True if it cannot compute more). None: it has no limit.

    A table of positions, learned or not, ends a run with an error; rotary positions beyond those in training only give
    worse results. `model` may be on meta.
    """
    tables = [
        module.num_embeddings
        - (module.padding_idx + 1 if module.padding_idx is not None else vars(module).get("offset", 0))
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and ("position" in name.rpartition(".")[2] or name.endswith("wpe"))
    ]
    tables += [len(buffer) for name, buffer in model.named_buffers() if name.endswith("embed_positions")]  # GPT-J
    if tables:
        return min(tables), True
    text = model.config.get_text_config()
    limit, rope = getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None)
    if not limit or not rope:  # ALiBi, relative positions, Mamba
        return None, False
    if rope.get("rope_type") in ("linear", "dynamic", "yarn"):  # the others' limit counts their scaling already
        limit = max(limit, int(rope.get("original_max_position_embeddings", limit) * rope["factor"]))
    return limit, False


def longest_prompt(model: PreTrainedModel, num_new_tokens: int) -> int | None:
    """Number of tokens that a prompt may have if so many are generated after it; None: any number can be computed."""
    limit, is_table = positions_of(model)
    if not is_table:
        return None
    return limit if model.config.is_encoder_decoder else limit - num_new_tokens
