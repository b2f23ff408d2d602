"""Packing: several documents in one row, which do not see each other.

This module decides which documents share a row, and makes the model inputs that keep them apart. Position ids alone
are enough for Llama, but not for OPT and Falcon. Therefore the attention mask is block-diagonal: causal within a
document, and zero between documents.

B: rows. T: tokens of the longest row. H: attention heads. `documents_BT` holds the number of each token's document,
from 1; 0 on padding.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from lora_dist.config import TrainConfig
from lora_dist.data.tasks import IGNORE_INDEX
from lora_dist.errors import require


def best_fit_decreasing(lengths: Sequence[int], order: Sequence[int], max_length: int) -> list[list[int]]:
    """Divide documents among rows of up to `max_length` tokens. Returns the rows, as lists of document numbers.

    Each document, longest first, goes into the row where it leaves the least room. `order` is a permutation of all
    document numbers. It decides which of two equally long documents comes first, so the number of rows does not depend
    on it. `lengths`: tokens of each document, at most `max_length`.
    """
    rows, with_room = [], [[] for _ in range(max_length + 1)]  # with_room[n]: rows with n tokens left
    nonempty = 0  # bit n is set if with_room[n] holds a row
    for document in sorted(order, key=lambda i: -lengths[i]):
        length = int(lengths[document])
        roomy_enough = nonempty >> length
        if roomy_enough:
            room = length + (roomy_enough & -roomy_enough).bit_length() - 1  # its lowest set bit: the tightest fit
            row = with_room[room].pop()
            if not with_room[room]:
                nonempty ^= 1 << room
        else:
            room, row = max_length, []
            rows.append(row)
        row.append(document)
        with_room[room - length].append(row)
        nonempty |= 1 << (room - length)
    return rows


def join(documents: list[dict]) -> dict[str, np.ndarray]:
    """Pack documents into one row. `attention_mask` holds the number of each token's document, from 1.

    The first token of a document is not trained, because the last token of the document before would predict it.
    """
    labels = [np.array(document["labels"]) for document in documents]
    for label in labels:
        label[0] = IGNORE_INDEX
    lengths = [len(document["input_ids"]) for document in documents]
    return {
        "input_ids": np.concatenate([document["input_ids"] for document in documents]),
        "labels": np.concatenate(labels),
        "attention_mask": np.repeat(np.arange(1, len(documents) + 1), lengths),
    }


def positions_in_documents(documents_BT: torch.Tensor) -> torch.Tensor:
    """Position ids that start from 0 in each document. int64 (B, T)."""
    index_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    is_first_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    is_first_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return index_T - torch.where(is_first_BT, index_T, 0).cummax(1).values


def block_diagonal(documents_BT: torch.Tensor) -> torch.Tensor:
    """Attention mask, bool (B, 1, T, T): token i may see token j if j <= i and both are in the same document.

    Padding counts as a document, because softmax is undefined for a token that sees nothing.
    """
    return (documents_BT[:, :, None] == documents_BT[:, None, :]).tril()[:, None]


def packed_inputs(model: nn.Module, documents_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """Arguments of the model's forward that keep the documents of a row apart."""
    mask_B1TT = block_diagonal(documents_BT)
    if model.config.model_type == "bloom":  # it has no position ids, and adds the mask to the attention scores
        dtype = model.get_input_embeddings().weight.dtype
        lowest = torch.finfo(dtype).min
        return {"attention_mask": torch.zeros_like(mask_B1TT, dtype=dtype).masked_fill(~mask_B1TT, lowest)}
    return {"attention_mask": mask_B1TT, "position_ids": positions_in_documents(documents_BT)}


def check_packing(model: PreTrainedModel, config: TrainConfig) -> None:
    """Raises UserError if the model has a sliding window that is shorter than `--max_length`.

    The mask of packed rows replaces the model's own mask and has no window, so tokens would see further than usual.
    """
    window = getattr(model.config, "sliding_window", None)
    too_short = window and getattr(model.config, "use_sliding_window", True) and window < config.max_length
    why = f"this model's layers see only {window} tokens back, but packed rows have up to {config.max_length} tokens"
    hint = f"use --max_length {window}, or --packing false --train_sampling_strategy group_by_length"
    require(not too_short, "packing", True, f"{why}; {hint}")


def prepare_packing(model: nn.Module) -> None:
    """Let BLOOM compute its attention biases from the mask of packed rows. Other models need nothing.

    BLOOM counts the tokens of a (B, T) mask; in a packed row the count must start again with each document.
    """
    if model.config.model_type == "bloom":
        transformer = next(m for m in model.modules() if hasattr(type(m), "build_alibi_tensor"))
        transformer.build_alibi_tensor = partial(_packed_alibi, transformer.build_alibi_tensor)


def _packed_alibi(alibi_of_mask_BT, mask: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """ALiBi biases (B x H, 1, T), also for the (B, 1, T, T) mask of `packed_inputs`.

    A token's position in its document is the number of tokens that it may see, minus 1.
    """
    if mask.dim() == 2:
        return alibi_of_mask_BT(mask, num_heads, dtype)
    positions_BT = (mask[:, 0] == 0).sum(-1) - 1
    ones_BT = torch.ones_like(positions_BT)
    biases_HT = alibi_of_mask_BT(ones_BT[:1], num_heads, torch.float32)[:, 0]  # slope x position, for 0, 1, ...
    slope_H1 = biases_HT[:, 1:2] if biases_HT.shape[1] > 1 else torch.zeros_like(biases_HT)
    return (slope_H1 * positions_BT[:, None]).flatten(0, 1)[:, None].to(dtype)
