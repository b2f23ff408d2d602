"""Sums of gradients that do not depend on who computed them, or in what order.

Floating-point addition is not associative, so `all_reduce` gives other bits at another world size. Here the gradients
of the micro-batches 0..G-1 of a step are added along one fixed binary tree over their indices. The network only moves
data (all-to-all, all-gather); every addition is done by us, in the tree's order. Cost on the wire: that of a plain
all-reduce where G / N is a power of two, at most about 2 log2 of it elsewhere.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist


def block(total: int, num_ranks: int, rank: int) -> range:
    """The micro-batches of one rank: contiguous, so that most of its additions are local; uneven allowed."""
    return range(total * rank // num_ranks, total * (rank + 1) // num_ranks)


class TreeSum:
    """Adds leaves 0..total-1 along one fixed binary tree, whoever holds them and in whatever order they come."""

    def __init__(self, total: int):
        self.total = total
        self.nodes: dict[
            tuple[int, int], torch.Tensor
        ] = {}  # (level, i): sum of the leaves [i << level, i + 1 << level)

    def add(self, level: int, index: int, value: torch.Tensor) -> None:
        """Adds node (level, index); leaf i is (0, i). `value` is used as the buffer of the sum."""
        while 1 << level < self.total:
            if (
                index ^ 1
            ) << level < self.total:  # the other half exists: wait for it, or add it (a + b is b + a, bit for bit)
                other = self.nodes.pop((level, index ^ 1), None)
                if other is None:
                    break
                value = other.add_(value)
            level, index = level + 1, index >> 1
        self.nodes[level, index] = value


def _held_nodes(total: int, leaves: range) -> list[tuple[int, int]]:
    """The nodes that remain with a rank after it added these leaves."""
    tree = TreeSum(total)
    for leaf in leaves:
        tree.add(0, leaf, torch.zeros(()))
    return sorted(tree.nodes)


def tree_reduce(tree: TreeSum, positions: Sequence[int] | None = None) -> torch.Tensor:
    """The sum of all ranks' nodes, the same bytes on every rank.

    Rank r holds the leaves `block(tree.total, num_ranks, positions[r])` (r itself where `positions` is None), at least
    one, each a 1-D tensor whose length is a multiple of the world size. Slices go all-to-all, are added along the tree,
    and are gathered.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tree.nodes.popitem()[1]
    num_ranks, rank = dist.get_world_size(), dist.get_rank()
    keys = [_held_nodes(tree.total, block(tree.total, num_ranks, p)) for p in positions or range(num_ranks)]
    out, slices = tree.nodes[keys[rank][0]], TreeSum(tree.total)
    for turn in range(max(map(len, keys))):  # one turn where each rank holds one node: G / N is a power of two
        have = [int(len(nodes) > turn) for nodes in keys]
        mine = (
            tree.nodes[keys[rank][turn]].view(num_ranks, -1)
            if have[rank]
            else out.new_empty(0, out.numel() // num_ranks)
        )
        received = out.new_empty(sum(have), out.numel() // num_ranks)
        dist.all_to_all_single(received, mine, have, [have[rank]] * num_ranks)
        for row, key in zip(received, (nodes[turn] for nodes in keys if len(nodes) > turn), strict=True):
            slices.add(*key, row)
    dist.all_gather_single(out, slices.nodes.popitem()[1])
    return out


def flatten_gradients(
    params: list[torch.Tensor], grads: Sequence[torch.Tensor | None], extras: list[float], num_ranks: int
) -> torch.Tensor:
    """One fp32 leaf: each gradient (zeros for None), then `extras`, padded to a multiple of `num_ranks`.

    An integer extra is exact while its sum stays below 2**24.
    """
    parts = [
        (torch.zeros_like(p) if grad is None else grad).reshape(-1).float()
        for p, grad in zip(params, grads, strict=True)
    ]
    numel = sum(map(len, parts)) + len(extras)
    tail = [float(e) for e in extras] + [0.0] * (-numel % num_ranks)
    return torch.cat([*parts, torch.tensor(tail, device=parts[0].device)])
