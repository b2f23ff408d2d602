"""Rows too long for one GPU: a group of ranks shares each row, and each rank computes one piece of its positions.

Every part of a decoder except attention works on each position alone. In attention, each rank has the queries of its
piece and gathers keys and values from the group, as Llama 3 was trained (arXiv 2407.21783, section 3.3.2). Sums over
positions are added in another order than on one rank, so the bits depend on the size of the group. They do not depend
on the number of groups.

B, H, T, D, V: sequences, heads, tokens, head size, vocabulary; P: positions of this rank's piece, T / size.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lora_dist.config import TrainConfig
from lora_dist.data.micro_batches import MicroBatch
from lora_dist.data.packing import positions_in_documents
from lora_dist.data.tasks import IGNORE_INDEX
from lora_dist.errors import require

NAME = "context_parallel"
# Families with plain causal attention through transformers' attention interface, whose forward takes positions. A test
# covers each of them.
FAMILIES = {"gemma", "gpt2", "gpt_neox", "llama", "mixtral", "opt", "phi", "qwen2", "qwen3"}


class GatherSequence(torch.autograd.Function):
    """Gathers (B, H, P, D) of each rank of the group to (B, H, T, D). Collective in the group, backward too.

    Backward adds the gradients of all ranks, in the order of the ranks.
    """

    @staticmethod
    def forward(ctx, piece_BHPD, group):
        ctx.group = group
        pieces = [torch.empty_like(piece_BHPD, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(pieces, piece_BHPD.contiguous(), group=group)
        return torch.cat(pieces, dim=2)

    @staticmethod
    def backward(ctx, grad_BHTD):
        own_grads = torch.stack(grad_BHTD.chunk(ctx.group.size(), dim=2))  # one for each rank's piece
        all_grads = torch.empty_like(own_grads)  # one from each rank, all for this rank's piece
        dist.all_to_all_single(all_grads, own_grads, group=ctx.group)
        return all_grads.sum(0), None


def _attention(group, module, query_BHPD, key_BHPD, value_BHPD, attention_mask, **kwargs):
    """transformers' sdpa attention, on gathered keys and values if the mask is longer than this rank's piece."""
    if attention_mask is not None and attention_mask.shape[-1] > key_BHPD.shape[2]:
        key_BHPD, value_BHPD = GatherSequence.apply(key_BHPD, group), GatherSequence.apply(value_BHPD, group)
        kwargs["is_causal"] = False  # the mask is causal already
    return sdpa_attention_forward(module, query_BHPD, key_BHPD, value_BHPD, attention_mask, **kwargs)


@dataclass(frozen=True)
class ContextParallel:
    """This rank's group, made of consecutive ranks so that it is inside a node; and its piece of each row."""

    size: int  # ranks of a group
    piece: int
    num_groups: int
    group_index: int

    def summed_loss(self, model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(cross entropy in fp32, number of right predictions), summed over the trained tokens of this rank's piece.

        Collective in the group.
        """
        input_ids_BP, mask_B1PT, positions_BP, targets_BP = self.split(batch)
        logits_BPV = model(
            input_ids=input_ids_BP, attention_mask=mask_B1PT, position_ids=positions_BP, use_cache=False
        ).logits
        loss = F.cross_entropy(
            logits_BPV.flatten(0, 1).float(), targets_BP.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        return loss, (logits_BPV.max(-1).indices == targets_BP).sum()

    def split(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """This rank's piece of the padded rows.

        Returns token ids (B, P), mask (B or 1, 1, P, T; True: attend), positions (B, P) and next tokens (B, P).
        """
        pad = -batch.input_ids_BT.shape[1] % self.size
        ids_BT, documents_BT = (F.pad(t, (0, pad)) for t in (batch.input_ids_BT, batch.attention_mask_BT))
        targets_BT = F.pad(batch.labels_BL[:, 1:], (0, pad + 1), value=IGNORE_INDEX)
        length = ids_BT.shape[1] // self.size
        piece = slice(self.piece * length, (self.piece + 1) * length)
        index_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        seen_BPT = (index_T[piece, None] >= index_T[None])[None]  # this also hides the padding, which is on the right
        positions_BT = index_T.expand(len(ids_BT), -1)
        if batch.packed:
            seen_BPT = seen_BPT & (documents_BT[:, piece, None] == documents_BT[:, None])
            positions_BT = positions_in_documents(documents_BT)
        return ids_BT[:, piece], seen_BPT[:, None], positions_BT[:, piece], targets_BT[:, piece]


def start_context_parallel(model: nn.Module, size: int) -> ContextParallel:
    """Form groups of `size` ranks that share rows, and change the model's attention accordingly. Collective."""
    num_ranks, rank = dist.get_world_size(), dist.get_rank()
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, num_ranks, size)]
    context = ContextParallel(size, rank % size, num_ranks // size, rank // size)
    AttentionInterface.register(NAME, partial(_attention, groups[context.group_index]))
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return context


def check_context_parallel(model: nn.Module, config: TrainConfig, num_ranks: int) -> None:
    """Raises UserError if `--context_parallel_size` ranks cannot share this model's rows."""
    name, size, model_type = "context_parallel_size", config.context_parallel_size, model.config.model_type
    require(config.task_type == "CAUSAL_LM", name, size, f"is not supported with --task_type {config.task_type}")
    require(num_ranks % size == 0, name, size, f"must divide the {num_ranks} ranks")
    families = ", ".join(sorted(FAMILIES))
    require(model_type in FAMILIES, name, size, f"is not supported for a {model_type}; it is for {families}")
    sliding = getattr(model.config, "sliding_window", None) and getattr(model.config, "use_sliding_window", True)
    require(not sliding, name, size, "is not supported for a model with a sliding window, such as this one")
