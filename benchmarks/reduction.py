"""The sum of gradients along a fixed tree, compared with a plain all-reduce: bytes sent, and time.

python benchmarks/reduction.py > benchmarks/reduction_cpu_DATE.md
"""

import os
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from common import header, mb, run_ranks, table

from lora_dist.parallel.exact_sum import TreeSum, block, tree_reduce

NUMEL, REPEATS, COUNTER = 8_388_608, 7, Path("/sys/class/net/lo/statistics/tx_bytes")  # OPT-6.7B, r=16 on q and v
CASES = [(2, 4), (2, 6), (4, 8), (4, 12)]  # ranks, micro-batches per step


def on_rank(rank, num_micro_batches):
    torch.set_num_threads(1)
    num_ranks, figures = dist.get_world_size(), []
    leaves = [torch.randn(NUMEL) for _ in block(num_micro_batches, num_ranks, rank)]

    def plain():
        total = leaves[0].clone()
        for leaf in leaves[1:]:
            total += leaf
        dist.all_reduce(total)

    def tree():
        nodes = TreeSum(num_micro_batches)
        for index, leaf in zip(block(num_micro_batches, num_ranks, rank), leaves, strict=True):
            nodes.add(0, index, leaf.clone())
        tree_reduce(nodes)

    times, sent = {plain: [], tree: []}, {plain: [], tree: []}
    for _ in range(REPEATS):
        for reduce in (plain, tree):
            dist.barrier()
            before, started = int(COUNTER.read_text()), time.perf_counter()
            reduce()
            dist.barrier()
            times[reduce].append(time.perf_counter() - started)
            sent[reduce].append(int(COUNTER.read_text()) - before)
    for reduce in (plain, tree):
        figures += [median(times[reduce]), median(sent[reduce])]
    return figures


def main():
    rows = []
    for num_ranks, num_micro_batches in CASES:
        plain_s, plain_sent, tree_s, tree_sent = run_ranks(on_rank, num_ranks, num_micro_batches)[0]
        rows.append([
            num_ranks, num_micro_batches, mb(plain_sent), mb(tree_sent), f"{tree_sent / plain_sent:.2f}",
            f"{plain_s * 1000:.0f}", f"{tree_s * 1000:.0f}", f"{tree_s / plain_s:.2f}",
        ])  # fmt: skip
    what = (
        f"{NUMEL} fp32 numbers per micro-batch. Plain: gradients added in place, one all-reduce. Tree: as in "
        "training. Sent: by all ranks together, counted by the kernel on the loopback device. Medians of "
        f"{REPEATS} interleaved repeats, which include local additions and copies."
    )
    print(header("The cost of the tree, on CPU over gloo", "python benchmarks/reduction.py", what))
    columns = ["ranks", "micro-batches", "plain sent MB", "tree sent MB", "ratio", "plain ms", "tree ms", "ratio"]
    print(table(columns, rows))


if __name__ == "__main__":
    main()
