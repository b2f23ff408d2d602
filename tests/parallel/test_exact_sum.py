import random

import pytest
import torch
import torch.distributed as dist

from lora_dist.parallel.exact_sum import TreeSum, block, flatten_gradients, tree_reduce
from tests.helpers.ranks import run_ranks


def reference(leaves: list[torch.Tensor]) -> torch.Tensor:
    """The same tree, written as a recursion over halves that are powers of two."""
    if len(leaves) == 1:
        return leaves[0]
    half = 1 << (len(leaves) - 1).bit_length() - 1
    return reference(leaves[:half]) + reference(leaves[half:])


@pytest.mark.parametrize("total", range(1, 40))
def test_tree_sum_is_one_sum_in_any_order(total):
    generator = torch.Generator().manual_seed(total)
    leaves = [torch.randn(7, generator=generator) * 10 ** (i % 5) for i in range(total)]
    expected = reference(leaves)
    for seed in range(5):
        tree, order = TreeSum(total), list(range(total))
        random.Random(seed).shuffle(order)
        for leaf in order:
            tree.add(0, leaf, leaves[leaf].clone())
        assert len(tree.nodes) == 1
        assert torch.equal(tree.nodes.popitem()[1], expected)


@pytest.mark.parametrize("total, num_ranks", [(8, 2), (7, 3), (40, 8), (4, 3)])
def test_blocks_cover_each_micro_batch_once(total, num_ranks):
    assert [i for rank in range(num_ranks) for i in block(total, num_ranks, rank)] == list(range(total))


def _reduce_on_rank(rank, totals):
    num_ranks = dist.get_world_size()
    sums = []
    for total in totals:
        tree = TreeSum(total)
        for leaf in block(total, num_ranks, rank):
            value = torch.randn(12, generator=torch.Generator().manual_seed(leaf)) * 10 ** (leaf % 5)
            tree.add(0, leaf, value)
        sums.append(tree_reduce(tree))
    return sums


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_tree_reduce_is_one_sum_at_any_world_size(num_ranks):
    totals = list(range(num_ranks, 20))
    leaves = [torch.randn(12, generator=torch.Generator().manual_seed(i)) * 10 ** (i % 5) for i in range(20)]
    for sums in run_ranks(_reduce_on_rank, num_ranks, totals):
        for total, value in zip(totals, sums, strict=True):
            assert torch.equal(value, reference(leaves[:total])), total


def test_flatten_gradients_pads():
    params = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    flat = flatten_gradients(params, [torch.arange(6.0).view(2, 3), None], [5.0, 7], num_ranks=8)
    assert flat.tolist() == [0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 5, 7, 0, 0, 0, 0]  # no gradient counts as zeros
