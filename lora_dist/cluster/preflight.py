"""Checks the ranks of a job before it trains: devices, packages, disk and network, and what differs among them.

One node that differs from the others stops a job, or slows all of it. So each rank measures what it has and how fast it
computes, each pair of nodes measures its link, and what stands out is named. Many pairs exchange at the same time, each
node with one other: this takes about as many rounds as there are nodes, while one pair after the other would take the
square of it. The only large package imported here is torch: at the start of a job, all ranks import from one disk.
"""

import contextlib
import dataclasses
import datetime
import os
import re
import secrets
import shutil
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from lora_dist.cluster.findings import Links, RankFacts, by_host, find_problems, link_rates
from lora_dist.environment import versions
from lora_dist.errors import RunFailed
from lora_dist.parallel.ranks import gather, keep_to_one_machine, num_ranks, this_rank
from lora_dist.parallel.strategies import check_rank_variables, world_size
from lora_dist.units import MIB, gb_per_s, gib

ARRIVAL_S = 300.0  # longest time between the first rank and the last: many nodes import from one disk
PATIENCE_S = 20.0  # longest wait for one rank that does not answer
# Time between a failure and the end of a rank. Once a rank has ended, its launcher may end rank 0, which prints why.
FAREWELL_S = 5.0
COMPUTE_S = 0.3  # shortest time to measure the speed of a device
REPEATS = 4  # exchanges timed together: starting one takes as long as a fast link needs for it
MESSAGE_BYTES = {"cuda": 16 * MIB, "cpu": MIB}
MAX_HOSTS_SHOWN = 16
COLUMNS = ["host", "ranks", "device", "driver", "memory free", "disk free", "computes", "links"]


@dataclass(frozen=True)
class Report:
    """The same on every rank. Nodes are numbered in the order of their lowest ranks."""

    ranks: list[RankFacts]
    links: Links
    all_reduce_bytes_per_s: float | None  # sent, and received, by each rank; None: one rank, or a wrong sum
    findings: list[str]
    seconds: float

    def as_dict(self) -> dict:
        hosts = list(by_host(self.ranks))
        links = [{"hosts": [hosts[a], hosts[b]], "bytes_per_s": rate} for (a, b), rate in self.links.items()]
        return dataclasses.asdict(self) | {"links": links}

    def table(self) -> str:
        """One line per host; if there are many, only the first, the last and those with findings."""
        rows = [COLUMNS, *self._rows()]
        widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(COLUMNS))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines.append("packages: " + ", ".join(f"{name} {version}" for name, version in self.ranks[0].versions.items()))
        if self.all_reduce_bytes_per_s:
            lines.append(f"all-reduce over {len(self.ranks)} ranks: {gb_per_s(self.all_reduce_bytes_per_s)}")
        lines.append(f"took {self.seconds:.1f} s")
        return "\n".join(lines + ([f"warning: {line}" for line in self.findings] or ["no problems found"]))

    def _rows(self) -> Iterator[list[str]]:
        hosts, rates = by_host(self.ranks), link_rates(self.ranks, self.links)
        named = {word for line in self.findings for word in re.split("[ ()]+", line.split(": ")[0])}
        skipping = False
        for number, (host, ranks) in enumerate(hosts.items(), 1):
            if len(hosts) <= MAX_HOSTS_SHOWN or number <= 4 or number == len(hosts) or host in named:
                yield _row(host, ranks, rates.get(host))
                skipping = False
            elif not skipping:
                yield ["..."]
                skipping = True


def _row(host: str, ranks: list[RankFacts], link_rate: float | None) -> list[str]:
    gflops = [r.flops_per_s / 1e9 for r in ranks]
    return [
        host,
        str(len(ranks)),
        ", ".join(dict.fromkeys(r.device for r in ranks)),
        ", ".join(dict.fromkeys(r.driver or "-" for r in ranks)),
        gib(min(r.free_memory_bytes for r in ranks)),
        gib(min(r.free_disk_bytes for r in ranks)),
        f"{min(gflops):.0f}-{max(gflops):.0f} Gflop/s",
        gb_per_s(link_rate) if link_rate else "-",
    ]


@contextlib.contextmanager
def joined_ranks() -> Iterator[torch.device]:
    """Join the process group that the launcher describes; yields this rank's device. Collective."""
    check_rank_variables()
    on_gpu, local_rank = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    keep_to_one_machine()
    if world_size() > 1:
        patience = datetime.timedelta(seconds=ARRIVAL_S)
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=patience)
    try:
        yield device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def inspect_ranks(folder: Path, device: torch.device) -> Report:
    """Check the ranks of a run that will write to `folder`. Collective.

    Raises RunFailed, with the name of the rank, if a rank does not answer.
    """
    total = num_ranks()
    _wait_for_all([f"rank {rank}" for rank in range(total)], "arrived", ARRIVAL_S)
    started, folder = time.perf_counter(), _nearest_existing(folder)
    # A new name: network file systems remember for a while that a file was not there.
    probe = folder / f".preflight-{secrets.token_hex(8)}"
    if this_rank() == 0:
        with contextlib.suppress(OSError):  # no rank finds the probe then, and the report says so
            probe.write_text(probe.name)
    try:
        ranks = gather((socket.gethostname(), probe))
        hosts, probe_of_rank_0 = [host for host, _ in ranks], ranks[0][1]
        names = [f"rank {rank} ({host})" for rank, host in enumerate(hosts)]
        mine = _measure_rank(device, folder, probe_of_rank_0)
        _wait_for_all(names, "measured ranks", 3 * PATIENCE_S)
    finally:
        with contextlib.suppress(OSError):  # only rank 0 has written one
            probe.unlink()
    rate, links = _measure_all_reduce(total, device), _measure_links(hosts, names, device)
    _wait_for_all(names, "measured links", 3 * PATIENCE_S)  # a rank that waits for one other rank gives up earlier
    found = gather((mine, rate, links, time.perf_counter() - started))
    facts, rates, links_of_ranks, seconds = map(list, zip(*found, strict=True))
    links, rate = _merge_links(links_of_ranks), _slowest(rates)
    findings = find_problems(facts, links)
    if total > 1 and rate is None:
        findings.append(f"all-reduce: the sum of a 1 from each of {total} ranks was not {total}")
    return Report(facts, links, rate, findings, max(seconds))


def _nearest_existing(folder: Path) -> Path:
    """The folder itself, or its nearest parent that exists."""
    folder = Path(os.path.abspath(folder))
    return next(path for path in (folder, *folder.parents) if os.path.exists(path))


def _measure_rank(device: torch.device, folder: Path, probe: Path) -> RankFacts:
    """`probe` is the file that rank 0 wrote."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    free, total = torch.cuda.mem_get_info(device) if gpu else _host_memory()
    return RankFacts(
        rank=this_rank(),
        host=socket.gethostname(),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        device=gpu.name if gpu else "cpu",
        device_uuid=str(gpu.uuid) if gpu else None,
        cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        driver=_driver(),
        versions=versions(),
        free_memory_bytes=free,
        total_memory_bytes=total,
        folder=str(probe.parent),
        sees_folder=_read(probe) == probe.name,
        free_disk_bytes=shutil.disk_usage(folder).free,
        flops_per_s=_flops_per_s(device),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _host_memory() -> tuple[int, int]:
    """(available, total) bytes."""
    sizes = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return tuple(1024 * int(sizes[name].split()[0]) for name in ("MemAvailable", "MemTotal"))


def _driver() -> str | None:
    """Version of the NVIDIA driver."""
    found = re.search(r"\s(\d+\.[\d.]+)\s", _read(Path("/proc/driver/nvidia/version")))
    return found and found[1]


def _flops_per_s(device: torch.device) -> float:
    """The best of many matrix products: ranks that share a core have it only sometimes, and GPUs need a warm-up."""
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    synchronize, seconds, until = torch.get_device_module(device).synchronize, [], time.perf_counter() + COMPUTE_S
    while len(seconds) < 10 or time.perf_counter() < until:
        started = time.perf_counter()
        matrix @ matrix
        synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def _wait_for_all(names: list[str], point: str, patience_s: float) -> None:
    """Wait until all ranks have reached a point. `names[r]` is rank r's name in an error.

    This is no collective, because the error of a collective does not name the rank. Raises RunFailed.
    """
    if len(names) == 1:
        return
    store, deadline = _store(), time.monotonic() + patience_s
    store.set(f"preflight/{point}/{this_rank()}", "")
    store.add(f"preflight/{point}", 1)
    while store.add(f"preflight/{point}", 0) < len(names):
        if store.check(["preflight/gave up"]) or time.monotonic() > deadline:
            absent = [name for r, name in enumerate(names) if not store.check([f"preflight/{point}/{r}"])]
            raise _give_up(f"{', '.join(absent[:8])}: no answer within {patience_s:.0f} s")
        time.sleep(0.25)


def _give_up(line: str) -> RunFailed:
    """The error that all ranks raise: that of the rank that gave up first, because it knows the cause."""
    with contextlib.suppress(RuntimeError):  # the store has ended with rank 0
        line = _store().compare_set("preflight/gave up", "", line).decode()
    time.sleep(FAREWELL_S if this_rank() else FAREWELL_S / 5)  # the store may end with rank 0: let the others read it
    return RunFailed(line)


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def _measure_all_reduce(num_ranks: int, device: torch.device) -> float | None:
    """Bytes/s that each rank sends, and receives; None for one rank, or if the sum is wrong."""
    if num_ranks == 1:
        return None
    ones = torch.empty(MESSAGE_BYTES[device.type] // 4, device=device)
    seconds = _seconds(partial(_sum, ones), f"all-reduce over {num_ranks} ranks", device, PATIENCE_S)
    return 2 * (1 - 1 / num_ranks) * ones.nbytes / seconds if (ones == num_ranks).all() else None


def _measure_links(hosts: list[str], names: list[str], device: torch.device) -> Links:
    """The links of this node, measured by its lowest rank; {} on other ranks."""
    leaders, links = [hosts.index(host) for host in dict.fromkeys(hosts)], {}
    if len(leaders) == 1 or this_rank() not in leaders:
        return links
    me, generator = leaders.index(this_rank()), torch.Generator().manual_seed(0)
    message = torch.randint(256, (MESSAGE_BYTES[device.type],), dtype=torch.uint8, generator=generator).to(device)
    for number, pairs in enumerate(exchange_rounds(len(leaders))):
        for pair in (pair for pair in pairs if me in pair):
            peer, received = sum(pair) - me, torch.zeros_like(message)
            start = partial(_exchange, message.roll(me), received, leaders[peer])
            what = "exchange between " + " and ".join(names[leaders[node]] for node in pair)
            # Later rounds wait longer, so that in a chain of nodes that wait for each other the first one is named.
            seconds = _seconds(start, what, device, PATIENCE_S + number / 10)
            links[pair] = message.nbytes / seconds if torch.equal(received, message.roll(peer)) else None
    return links


def exchange_rounds(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint pairs of nodes in which each pair comes once (the circle method of tournaments).

    One node keeps its position, and the others move on by one position per round.
    """
    # An odd number of nodes is filled up by one that does not exist; its partner rests.
    circle, rounds = list(range(num_nodes + num_nodes % 2)), []
    for _ in circle[1:]:
        half = len(circle) // 2
        pairs = [tuple(sorted(pair)) for pair in zip(circle[:half], reversed(circle[half:]), strict=True)]
        rounds.append([pair for pair in pairs if num_nodes not in pair])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def _sum(ones: torch.Tensor) -> list[dist.Work]:
    return [dist.all_reduce(ones.fill_(1), async_op=True)]


def _exchange(sent: torch.Tensor, received: torch.Tensor, peer: int) -> list[dist.Work]:
    return dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)])


def _seconds(start: Callable[[], list[dist.Work]], what: str, device: torch.device, patience_s: float) -> float:
    """Mean seconds of several operations in a row, after a first one that connects.

    `start` starts one operation. Raises RunFailed if the first one does not end within `patience_s`.
    """
    synchronize = torch.get_device_module(device).synchronize
    try:
        for work in start():
            work.wait(datetime.timedelta(seconds=patience_s))
        synchronize()
        started = time.perf_counter()
        for _ in range(REPEATS):
            for work in start():
                work.wait()
        synchronize()
    except RuntimeError as error:
        if "timed out" not in str(error).lower():  # the other end gave up on a third rank: let it report that first
            time.sleep(1.0)
        why = str(error).partition("\n")[0].rpartition("] ")[2].split(". ")[0]  # without gloo's source line and advice
        raise _give_up(f"{what} failed: {why}") from None
    return (time.perf_counter() - started) / REPEATS


def _slowest(rates: Iterable[float | None]) -> float | None:
    rates = list(rates)
    return None if None in rates else min(rates)


def _merge_links(links_of_ranks: list[Links]) -> Links:
    """Both ends of a link have measured it: the slower rate counts, and None if one end received wrong bytes."""
    rates = defaultdict(list)
    for pair, rate in (item for links in links_of_ranks for item in links.items()):
        rates[pair].append(rate)
    return {pair: _slowest(rates[pair]) for pair in sorted(rates)}
