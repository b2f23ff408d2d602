"""The preflight: facts of each rank, links between all pairs of nodes, and a line for each problem."""

import dataclasses
import itertools
import json
import re
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lora_dist.cluster import preflight
from lora_dist.cluster.findings import RankFacts, find_problems
from lora_dist.cluster.preflight import Report, exchange_rounds, inspect_ranks
from lora_dist.errors import RunFailed
from tests.helpers.ranks import run_ranks

GIB = 2**30
FOLDER = "/shared/runs"


def inspect_as(rank: int, hosts: str, folder: Path) -> Report:
    """Inspect the ranks as if this rank were on the host of this name."""
    socket.gethostname = lambda: hosts.split()[rank]
    preflight.COMPUTE_S, preflight.FAREWELL_S = 0.05, 1.0
    assert dist.get_world_size() == len(hosts.split())
    return inspect_ranks(folder, torch.device("cpu"))


@pytest.mark.parametrize("hosts", ["node1 node2 node3 node4", "node1 node2 node3 node2", "node1 node1"])
def test_facts_of_all_ranks_and_links_of_all_nodes(tmp_path, hosts):
    names = hosts.split()
    report, *others = run_ranks(inspect_as, len(names), hosts, tmp_path / "not" / "there yet")
    assert others == [report] * (len(names) - 1)
    assert [(r.rank, r.host) for r in report.ranks] == list(enumerate(names))
    assert [r.local_rank for r in report.ranks] == list(range(len(names)))
    for r in report.ranks:
        assert (r.device, r.sees_folder, r.folder) == ("cpu", True, str(tmp_path))
        assert 0 < r.free_memory_bytes < r.total_memory_bytes and r.free_disk_bytes > 0 and r.flops_per_s > 1e8
        assert r.versions["torch"] == torch.__version__
    assert list(report.links) == list(itertools.combinations(range(len(set(names))), 2))
    assert all(rate > 1e5 for rate in [*report.links.values(), report.all_reduce_bytes_per_s])
    assert 0.05 < report.seconds < 30
    assert list(tmp_path.iterdir()) == []
    listed = json.loads(json.dumps(report.as_dict()))
    assert [link["hosts"] for link in listed["links"]] == [
        list(p) for p in itertools.combinations(sorted(set(names)), 2)
    ]


def test_one_process_has_no_network(tmp_path):
    (report,) = run_ranks(inspect_as, 1, "node1", tmp_path)
    assert (len(report.ranks), report.links, report.all_reduce_bytes_per_s, report.findings) == (1, {}, None, [])
    assert report.table().endswith("no problems found")


@pytest.mark.parametrize("num_nodes", range(1, 10))
def test_each_pair_of_nodes_exchanges_once(num_nodes):
    rounds = exchange_rounds(num_nodes)
    assert len(rounds) <= num_nodes
    for pairs in rounds:
        nodes = [node for pair in pairs for node in pair]
        assert len(nodes) == len(set(nodes)) and len(pairs) == num_nodes // 2
    assert sorted(pair for pairs in rounds for pair in pairs) == list(itertools.combinations(range(num_nodes), 2))


def _other_disk_on_rank(rank, folder):
    """Node 2 has another disk at that path."""
    read = preflight._read
    if rank == 2:
        preflight._read = lambda path: "" if path.parent == folder else read(path)
    return inspect_as(rank, "node1 node1 node2 node3", folder).findings


def test_a_folder_that_a_node_does_not_see(tmp_path):
    for findings in run_ranks(_other_disk_on_rank, 4, tmp_path):
        rule = "the run folder must be on a disk that all nodes share"
        assert f"node2: does not see {tmp_path}, which node1 wrote to; {rule}" in findings
        assert len([line for line in findings if "does not see" in line]) == 1


def _corrupt_on_rank(rank, folder):
    """Node 2 sends one wrong bit to node 3, and adds a wrong number in the all-reduce."""
    exchange, add_up = preflight._exchange, preflight._sum

    def corrupt(sent, received, peer):
        if peer == 2:
            sent = sent.clone()
            sent[5] ^= 1
        return exchange(sent, received, peer)

    def add_up_wrong(ones):
        works = add_up(ones)
        works[0].wait()
        ones[7] += 1
        return works

    if rank == 1:
        preflight._exchange, preflight._sum = corrupt, add_up_wrong
    report = inspect_as(rank, "node1 node2 node3", folder)
    return report.links, report.all_reduce_bytes_per_s, report.findings


def test_wrong_bytes_are_noticed(tmp_path):
    for links, all_reduce_rate, findings in run_ranks(_corrupt_on_rank, 3, tmp_path):
        assert [pair for pair, rate in links.items() if rate is None] == [(1, 2)] and all_reduce_rate is None
        assert "node2 and node3: the bytes received differ from the bytes sent" in findings
        assert "all-reduce: the sum of a 1 from each of 3 ranks was not 3" in findings


def _silent_on_rank(rank, where, folder):
    """Rank 2 does not answer: in its exchanges, or before them."""
    preflight.PATIENCE_S = 0.3

    def stay_away(*args):
        time.sleep(2.5)
        raise RunFailed("was away")

    if rank == 2:
        setattr(preflight, where, stay_away)
    try:
        inspect_as(rank, "node1 node2 node3 node4", folder)
    except RunFailed as error:
        dist.barrier = dist.destroy_process_group = lambda: None  # the group is broken
        return str(error)


@pytest.mark.parametrize(
    "where, expected",
    [
        ("_measure_rank", "rank 2 (node3): no answer within 1 s"),
        (
            "_measure_links",
            "exchange between rank 1 (node2) and rank 2 (node3) failed: Timed out",
        ),  # the first exchange of rank 2
    ],
)
def test_all_ranks_name_a_silent_one(tmp_path, where, expected):
    *lines, away, last = run_ranks(_silent_on_rank, 4, where, tmp_path)
    assert (lines, away) == ([last] * 2, "was away") and last.startswith(expected), last
    assert list(tmp_path.iterdir()) == []


def facts(rank: int, *, per_host: int = 2, gpu: bool = True, **changes) -> RankFacts:
    same = RankFacts(
        rank=rank, host=f"node{rank // per_host + 1}", local_rank=rank % per_host,
        device="NVIDIA H100 80GB HBM3" if gpu else "cpu", device_uuid=f"GPU-{rank}" if gpu else None,
        cuda_visible_devices="0" if gpu else None, driver="570.86.15" if gpu else None,
        versions={"torch": "2.13.0", "peft": "0.21.2"}, free_memory_bytes=78 * GIB, total_memory_bytes=80 * GIB,
        folder=FOLDER, sees_folder=True, free_disk_bytes=500 * GIB, flops_per_s=133e9,
    )  # fmt: skip
    return dataclasses.replace(same, **changes)


def all_links(num_nodes: int, *, slow: int | None = None) -> dict:
    pairs = itertools.combinations(range(num_nodes), 2)
    return {pair: 1.2e9 if slow in pair else 11.8e9 for pair in pairs}


def test_equal_ranks_have_no_problems():
    for num_ranks, gpu in itertools.product((1, 2, 4, 16), (True, False)):
        ranks = [facts(rank, gpu=gpu) for rank in range(num_ranks)]
        assert find_problems(ranks, all_links(-(-num_ranks // 2))) == []


MEMORY = "rank 5 (node3): 12.3 GiB of device memory free, the median is 78.0 GiB: another process may use it"
PROBLEMS = {  # line: how rank 5 of 8 differs; it is on node3, with rank 4
    MEMORY: {"free_memory_bytes": int(12.3 * GIB)},
    "rank 5 (node3): torch 2.12.0, but 2.13.0 on 7 of 8 ranks": {"versions": {"torch": "2.12.0", "peft": "0.21.2"}},
    "rank 5 (node3): peft None, but 0.21.2 on 7 of 8 ranks": {"versions": {"torch": "2.13.0"}},
    "rank 5 (node3): driver 535.1, but 570.86.15 on 7 of 8 ranks": {"driver": "535.1"},
    "rank 5 (node3): device NVIDIA A100, but NVIDIA H100 80GB HBM3 on 7 of 8 ranks": {"device": "NVIDIA A100"},
    "ranks 4, 5 (node3): share the GPU GPU-4; CUDA_VISIBLE_DEVICES: 0": {"device_uuid": "GPU-4"},
    "rank 5 (node3): computes at 41 Gflop/s, the median is 133: the device is slow": {"flops_per_s": 41e9},
    "node3: 0.9 GiB free on the disk of /shared/runs": {"free_disk_bytes": int(0.9 * GIB)},
    "node3: does not see /shared/runs, which node1 wrote to; the run folder must be on a disk that all nodes share": {
        "sees_folder": False
    },
}


@pytest.mark.parametrize("line", PROBLEMS)
def test_a_rank_that_differs_is_named(line):
    ranks = [facts(rank, **(PROBLEMS[line] if rank == 5 else {})) for rank in range(8)]
    assert find_problems(ranks, all_links(4)) == [line]


@pytest.mark.parametrize(
    "change",
    [
        {"free_memory_bytes": 63 * GIB},
        {"flops_per_s": 67e9},
        {"device_uuid": "GPU-3"},  # the GPU of a rank on another host
        {"free_disk_bytes": 2 * GIB},
        {"cuda_visible_devices": "1", "local_rank": 7},
    ],
)
def test_what_may_differ(change):
    assert find_problems([facts(rank, **(change if rank == 5 else {})) for rank in range(8)], all_links(4)) == []


def test_two_ranks_have_no_slow_one():
    assert find_problems([facts(0), facts(1, flops_per_s=1e9)], {}) == []


def test_a_node_that_differs_is_named():
    ranks = [facts(rank) for rank in range(8)]
    assert find_problems(ranks[:-1], all_links(4)) == ["node4: 1 rank(s), but 2 on 3 of 4 hosts"]
    cannot = [dataclasses.replace(r, sees_folder=False) for r in ranks]
    assert find_problems(cannot, all_links(4)) == ["rank 0 (node1): cannot write /shared/runs"]
    on_cpu = [facts(rank, gpu=False, free_memory_bytes=(30 if rank > 5 else 78) * GIB) for rank in range(8)]
    assert find_problems(on_cpu, all_links(4)) == ["node4: 30.0 GiB of memory free, the median is 78.0 GiB"]
    wrong = all_links(4) | {(1, 3): None}
    assert find_problems(ranks, wrong) == ["node2 and node4: the bytes received differ from the bytes sent"]


@pytest.mark.parametrize("num_nodes", [3, 4, 9])
def test_a_slow_link_is_of_one_node(num_nodes):
    ranks = [facts(rank) for rank in range(2 * num_nodes)]
    (line,) = find_problems(ranks, all_links(num_nodes, slow=2))
    assert re.fullmatch(r"node3: 1.2 GB/s to other nodes, the median is [\d.]+ GB/s: the link is slow", line)
    assert find_problems(ranks[:4], {(0, 1): 1e6}) == []
    if num_nodes > 3:  # one slow link does not change the median of a node
        assert find_problems(ranks, all_links(num_nodes, slow=2) | {(2, 3): 11.8e9}) == [line]
        assert find_problems(ranks, all_links(num_nodes) | {(2, 3): 1.2e9}) == []


def test_the_table_of_many_hosts_is_short():
    ranks = [facts(rank, per_host=8, **({"flops_per_s": 41e9} if rank == 300 else {})) for rank in range(512)]
    links = all_links(64, slow=50)
    report = Report(ranks, links, 9.87e9, find_problems(ranks, links), 12.34)
    lines = report.table().splitlines()
    assert [line.split()[0] for line in lines[:11]] == (
        "host node1 node2 node3 node4 ... node38 ... node51 ... node64".split()
    )
    row = ["node38", "8", "NVIDIA H100 80GB HBM3", "570.86.15", "78.0 GiB", "500.0 GiB", "41-133 Gflop/s", "11.8 GB/s"]
    assert re.split("  +", lines[6]) == row
    assert lines[11:] == [
        "packages: torch 2.13.0, peft 0.21.2",
        "all-reduce over 512 ranks: 9.87 GB/s",
        "took 12.3 s",
        "warning: rank 300 (node38): computes at 41 Gflop/s, the median is 133: the device is slow",
        "warning: node51: 1.2 GB/s to other nodes, the median is 11.8 GB/s: the link is slow",
    ]
    few = Report(ranks[:128], {}, None, [], 1.0).table().splitlines()
    assert [line.split()[0] for line in few[1:17]] == [f"node{number}" for number in range(1, 17)]
    assert few[17:] == ["packages: torch 2.13.0, peft 0.21.2", "took 1.0 s", "no problems found"]
