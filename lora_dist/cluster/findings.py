"""Finds ranks, devices, disks and links that differ from the others, among what the preflight measured."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median

from lora_dist.units import GIB, gb_per_s, gib

Links = dict[tuple[int, int], float | None]  # bytes/s between two nodes; None: the bytes received were wrong


@dataclass(frozen=True)
class RankFacts:
    """What one rank measured."""

    rank: int
    host: str
    local_rank: int
    device: str  # the GPU's name, or cpu
    device_uuid: str | None
    cuda_visible_devices: str | None
    driver: str | None
    versions: dict[str, str]  # package to version
    free_memory_bytes: int  # of the device
    total_memory_bytes: int
    folder: str  # where rank 0 wrote a file
    sees_folder: bool  # this rank found that file
    free_disk_bytes: int
    flops_per_s: float


def find_problems(ranks: list[RankFacts], links: Links) -> list[str]:
    """One line for each rank or node that differs from the others, or that would make a run fail."""
    parts = (_unlike_most(ranks), _shared_gpus(ranks), _little_memory(ranks), _slow(ranks, links), _folder(ranks))
    return [line for part in parts for line in part]


def _unlike_most(ranks: list[RankFacts]) -> Iterator[str]:
    for name in ("device", "driver", *ranks[0].versions):
        values = {r.rank: ({"device": r.device, "driver": r.driver} | r.versions).get(name) for r in ranks}
        ((common, num_common),) = Counter(values.values()).most_common(1)
        for group in by_host(r for r in ranks if values[r.rank] != common).values():
            yield f"{_names(group)}: {name} {values[group[0].rank]}, but {common} on {num_common} of {len(ranks)} ranks"
    hosts = by_host(ranks)
    ((common, num_common),) = Counter(map(len, hosts.values())).most_common(1)
    for host, group in hosts.items():
        if len(group) != common:
            yield f"{host}: {len(group)} rank(s), but {common} on {num_common} of {len(hosts)} hosts"


def _shared_gpus(ranks: list[RankFacts]) -> Iterator[str]:
    """Ranks that use the same GPU, by its UUID: if Slurm gives each rank its own GPU, each sees it as device 0."""
    users = defaultdict(list)
    for r in ranks:
        users[r.host, r.device_uuid].append(r)
    for (_, uuid), group in users.items():
        if uuid and len(group) > 1:
            visible = " and ".join(dict.fromkeys(str(r.cuda_visible_devices) for r in group))
            yield f"{_names(group)}: share the GPU {uuid}; CUDA_VISIBLE_DEVICES: {visible}"


def _little_memory(ranks: list[RankFacts]) -> Iterator[str]:
    gpus = {_names([r]): r.free_memory_bytes for r in ranks if r.device != "cpu"}
    for who, free, middle in _below(0.8, gpus):
        yield f"{who}: {gib(free)} of device memory free, the median is {gib(middle)}: another process may use it"
    on_cpu = by_host(r for r in ranks if r.device == "cpu")  # the ranks of a host share its memory
    hosts = {host: min(r.free_memory_bytes for r in group) for host, group in on_cpu.items()}
    for who, free, middle in _below(0.5, hosts):
        yield f"{who}: {gib(free)} of memory free, the median is {gib(middle)}"


def _slow(ranks: list[RankFacts], links: Links) -> Iterator[str]:
    if len(ranks) > 2:  # of two ranks, a median means nothing
        for who, rate, middle in _below(0.5, {_names([r]): r.flops_per_s / 1e9 for r in ranks}):
            yield f"{who}: computes at {rate:.0f} Gflop/s, the median is {middle:.0f}: the device is slow"
    # Compared are the nodes' own medians: among three nodes, two of the three links are those of the slow node.
    for host, rate, middle in _below(0.5, link_rates(ranks, links)):
        yield f"{host}: {gb_per_s(rate)} to other nodes, the median is {gb_per_s(middle)}: the link is slow"
    hosts = list(by_host(ranks))
    for (a, b), rate in links.items():
        if rate is None:
            yield f"{hosts[a]} and {hosts[b]}: the bytes received differ from the bytes sent"


def _folder(ranks: list[RankFacts]) -> Iterator[str]:
    folder, writer = ranks[0].folder, ranks[0].host
    if not ranks[0].sees_folder:
        yield f"{_names(ranks[:1])}: cannot write {folder}"
    else:
        for host in by_host(r for r in ranks if not r.sees_folder):
            rule = "the run folder must be on a disk that all nodes share"
            yield f"{host}: does not see {folder}, which {writer} wrote to; {rule}"
    for host, group in by_host(ranks).items():
        if (free := min(r.free_disk_bytes for r in group)) < GIB:
            yield f"{host}: {gib(free)} free on the disk of {folder}"


def _below(fraction: float, figures: dict[str, float]) -> Iterator[tuple[str, float, float]]:
    """(name, figure, median) of the figures that are less than this fraction of the median."""
    middle = median(figures.values()) if figures else 0
    return ((name, figure, middle) for name, figure in figures.items() if figure < fraction * middle)


def link_rates(ranks: list[RankFacts], links: Links) -> dict[str, float]:
    """Host to the median rate of its links, in bytes/s."""
    rates, hosts = defaultdict(list), list(by_host(ranks))
    for pair, rate in links.items():
        for node in pair if rate else ():
            rates[hosts[node]].append(rate)
    return {host: median(of_host) for host, of_host in rates.items()}


def by_host(ranks: Iterable[RankFacts]) -> dict[str, list[RankFacts]]:
    """Ranks grouped by host; hosts in the order of their lowest ranks."""
    hosts = defaultdict(list)
    for r in ranks:
        hosts[r.host].append(r)
    return hosts


def _names(ranks: list[RankFacts]) -> str:
    """Ranks of one host by name: "rank 5 (node3)" or "ranks 4, 5 (node3)"."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(str(r.rank) for r in ranks)} ({ranks[0].host})"
