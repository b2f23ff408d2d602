"""Several documents in a row, kept apart: which go together, and what a model is told so that none sees another.

With position ids alone Llama keeps documents apart, OPT and Falcon do not. So the mask says it: block-diagonal, and
causal within a document.

B: rows. T: tokens of the longest.
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
    """Rows, as lists of documents: each document, longest first, goes where it leaves the least room.

    Documents of a length come in `order`, so the number of rows does not depend on it.
    """
    rows, with_room = [], [[] for _ in range(max_length + 1)]  # with_room[n]: rows with n tokens left
    nonempty = 0  # bit n: with_room[n] holds a row
    for document in sorted(order, key=lambda i: -lengths[i]):
        length = int(lengths[document])
        enough = nonempty >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
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
    """One row of several documents; `attention_mask` numbers them from 1, and no last token predicts a first one."""
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
    """Position ids, int64 (B, T), that begin again with each document."""
    index_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return index_T - torch.where(begins_BT, index_T, 0).cummax(1).values


def block_diagonal(documents_BT: torch.Tensor) -> torch.Tensor:
    """Attention mask, bool (B, 1, T, T), True where row's token may see column's: earlier, and of its document.

    Padding is a document too: a token that saw nothing would have no softmax.
    """
    return (documents_BT[:, :, None] == documents_BT[:, None, :]).tril()[:, None]


def packed_inputs(model: nn.Module, documents_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """The forward's arguments that keep documents apart."""
    mask_B1TT = block_diagonal(documents_BT)
    if model.config.model_type == "bloom":  # no position ids, and a mask that is added to the scores
        dtype = model.get_input_embeddings().weight.dtype
        unseen = torch.finfo(dtype).min
        return {"attention_mask": torch.zeros_like(mask_B1TT, dtype=dtype).masked_fill(~mask_B1TT, unseen)}
    return {"attention_mask": mask_B1TT, "position_ids": positions_in_documents(documents_BT)}


def check_packing(model: PreTrainedModel, config: TrainConfig) -> None:
    """Raises UserError where rows as long as `--max_length` would see more packed than they do unpacked."""
    window = getattr(model.config, "sliding_window", None)
    limited = window and getattr(model.config, "use_sliding_window", True) and window < config.max_length
    why = f"this model's layers see {window} tokens back, and packed rows of {config.max_length} would see all; "
    require(not limited, "packing", True, why + f"use --max_length {window}, or --train_sampling_strategy")


def prepare_packing(model: nn.Module) -> None:
    """Bloom's attention biases count the tokens of a (B, T) mask: let them count a packed row's by document."""
    if model.config.model_type == "bloom":
        transformer = next(m for m in model.modules() if hasattr(type(m), "build_alibi_tensor"))
        transformer.build_alibi_tensor = partial(_alibi, transformer.build_alibi_tensor)


def _alibi(of_mask_BT, mask: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
    if mask.dim() == 2:
        return of_mask_BT(mask, num_heads, dtype)
    positions_BT = (mask[:, 0] == 0).sum(-1) - 1
    ones_BT = torch.ones_like(positions_BT)
    slopes_HT = of_mask_BT(ones_BT[:1], num_heads, torch.float32)[:, 0]  # slope x position, of positions 0, 1, ...
    slope_H1 = slopes_HT[:, 1:2] if slopes_HT.shape[1] > 1 else torch.zeros_like(slopes_HT)
    return (slope_H1 * positions_BT[:, None]).flatten(0, 1)[:, None].to(dtype)
