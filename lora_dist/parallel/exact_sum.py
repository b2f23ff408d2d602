"""Sums of gradients whose bits do not depend on which rank computed a gradient, or in what order.

Floating-point addition is not associative, so `all_reduce` gives other bits at another number of ranks N. Here the
gradients of the micro-batches 0..G-1 of a step are added along one fixed binary tree over their indices. The network
only moves data (all-to-all, all-gather); this module does every addition, in the tree's order. If G / N is a power of
two, the traffic is that of a plain all-reduce; otherwise it is at most about 2 log2(G / N) times as much.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist


def block(total: int, num_ranks: int, rank: int) -> range:
    """The micro-batches of one rank. They are contiguous, so that most additions are local; ranks may differ by one."""
    return range(total * rank // num_ranks, total * (rank + 1) // num_ranks)


class TreeSum:
    """Adds leaves 0..total-1 along one fixed binary tree, in whatever order they come.

    Node (level, i) is the sum of the leaves [i << level, i + 1 << level); leaf i is node (0, i). `nodes` holds those
    that wait for their sibling.
    """

    def __init__(self, total: int):
        self.total = total
        self.nodes: dict[tuple[int, int], torch.Tensor] = {}

    def add(self, level: int, index: int, value: torch.Tensor) -> None:
        """Add a node. `value` may be overwritten by a sum."""
        while 1 << level < self.total:
            sibling_exists = (index ^ 1) << level < self.total
            if sibling_exists:
                sibling = self.nodes.pop((level, index ^ 1), None)
                if sibling is None:
                    break  # `value` waits for it
                value = sibling.add_(value)  # a + b and b + a have the same bits
            level, index = level + 1, index >> 1
        self.nodes[level, index] = value


def _held_nodes(total: int, leaves: range) -> list[tuple[int, int]]:
    """The nodes, sorted, that a rank holds after it has added these leaves."""
    tree = TreeSum(total)
    for leaf in leaves:
        tree.add(0, leaf, torch.zeros(()))
    return sorted(tree.nodes)


def tree_reduce(tree: TreeSum, positions: Sequence[int] | None = None) -> torch.Tensor:
    """The sum of all ranks' nodes, the same bytes on every rank. Collective.

    Rank r holds the leaves `block(tree.total, num_ranks, positions[r])`, at least one; without `positions` its position
    is r. A leaf is a 1-D tensor whose length is a multiple of the number of ranks. Each rank gets one slice of every
    node (all-to-all), adds the slices along the tree, and the sums are gathered.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tree.nodes.popitem()[1]
    num_ranks, rank = dist.get_world_size(), dist.get_rank()
    keys = [_held_nodes(tree.total, block(tree.total, num_ranks, p)) for p in positions or range(num_ranks)]
    out, slices = tree.nodes[keys[rank][0]], TreeSum(tree.total)
    slice_numel = out.numel() // num_ranks
    # Each round sends one node of each rank that still has one. If G / N is a power of two, one round is enough.
    for round_index in range(max(map(len, keys))):
        has_node = [int(len(nodes) > round_index) for nodes in keys]
        sent = out.new_empty(0, slice_numel)
        if has_node[rank]:
            sent = tree.nodes[keys[rank][round_index]].view(num_ranks, -1)
        received = out.new_empty(sum(has_node), slice_numel)
        dist.all_to_all_single(received, sent, has_node, [has_node[rank]] * num_ranks)
        received_keys = [nodes[round_index] for nodes in keys if len(nodes) > round_index]
        for key, node_slice in zip(received_keys, received, strict=True):
            slices.add(*key, node_slice)
    dist.all_gather_single(out, slices.nodes.popitem()[1])
    return out


def flatten_gradients(
    params: list[torch.Tensor], grads: Sequence[torch.Tensor | None], extras: list[float], num_ranks: int
) -> torch.Tensor:
    """One fp32 leaf (1-D): all gradients (zeros for None), then `extras`, padded to a multiple of `num_ranks`.

    An extra that counts is exact as long as its sum stays below 2**24.
    """
    parts = [
        (torch.zeros_like(p) if grad is None else grad).reshape(-1).float()
        for p, grad in zip(params, grads, strict=True)
    ]
    numel = sum(map(len, parts)) + len(extras)
    tail = [float(e) for e in extras] + [0.0] * (-numel % num_ranks)
    return torch.cat([*parts, torch.tensor(tail, device=parts[0].device)])
