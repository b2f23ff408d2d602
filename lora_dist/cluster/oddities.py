"""What sets a rank, a device, a disk or a link apart from the others: of what the preflight found, a line for each."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median

Links = dict[tuple[int, int], float | None]  # bytes/s of pairs of nodes; None: what arrived was not what was sent


@dataclass(frozen=True)
class RankFacts:
    """What one rank found."""

    rank: int
    host: str
    local_rank: int
    device: str  # the GPU's name, or cpu
    device_uuid: str | None
    cuda_visible_devices: str | None
    driver: str | None
    versions: dict[str, str]  # of packages
    free_memory_bytes: int  # the device's
    total_memory_bytes: int
    folder: str  # where rank 0 was to write
    sees_folder: bool  # and found what it wrote
    free_disk_bytes: int
    flops_per_s: float


def find_oddities(ranks: list[RankFacts], links: Links) -> list[str]:
    """A line for each thing that sets a rank or node apart from the others, or that a run cannot do with."""
    parts = (_unlike_most(ranks), _shared_gpus(ranks), _little_memory(ranks), _slow(ranks, links), _folder(ranks))
    return [line for part in parts for line in part]


def _unlike_most(ranks: list[RankFacts]) -> Iterator[str]:
    for name in ("device", "driver", *ranks[0].versions):
        values = {r.rank: ({"device": r.device, "driver": r.driver} | r.versions).get(name) for r in ranks}
        ((common, count),) = Counter(values.values()).most_common(1)
        for group in by_host(r for r in ranks if values[r.rank] != common).values():
            yield f"{_who(group)}: {name} {values[group[0].rank]}, and {common} on {count} of {len(ranks)} ranks"
    hosts = by_host(ranks)
    ((common, count),) = Counter(map(len, hosts.values())).most_common(1)
    for host, group in hosts.items():
        if len(group) != common:
            yield f"{host}: {len(group)} rank(s), and {common} on {count} of {len(hosts)} hosts"


def _shared_gpus(ranks: list[RankFacts]) -> Iterator[str]:
    """By the GPUs' own names: where Slurm gives each rank a GPU of its own, each one's CUDA_VISIBLE_DEVICES is 0."""
    users = defaultdict(list)
    for r in ranks:
        users[r.host, r.device_uuid].append(r)
    for (_, uuid), group in users.items():
        if uuid and len(group) > 1:
            visible = " and ".join(dict.fromkeys(str(r.cuda_visible_devices) for r in group))
            yield f"{_who(group)}: share the GPU {uuid}; CUDA_VISIBLE_DEVICES: {visible}"


def _little_memory(ranks: list[RankFacts]) -> Iterator[str]:
    gpus = {_who([r]): r.free_memory_bytes for r in ranks if r.device != "cpu"}
    for who, free, middle in _below(0.8, gpus):
        yield f"{who}: {gib(free)} of device memory free, the median is {gib(middle)}: another process holds it?"
    on_cpu = by_host(r for r in ranks if r.device == "cpu")  # whose ranks share it
    hosts = {host: min(r.free_memory_bytes for r in group) for host, group in on_cpu.items()}
    for who, free, middle in _below(0.5, hosts):
        yield f"{who}: {gib(free)} of memory free, the median is {gib(middle)}"


def _slow(ranks: list[RankFacts], links: Links) -> Iterator[str]:
    if len(ranks) > 2:  # else a median means nothing
        for who, rate, middle in _below(0.5, {_who([r]): r.flops_per_s / 1e9 for r in ranks}):
            yield f"{who}: computes at {rate:.0f} Gflop/s, the median is {middle:.0f}: a slow device"
    # Of the nodes' own medians: of three nodes' links, two are those of the slow one.
    for host, rate, middle in _below(0.5, link_rates(ranks, links)):
        yield f"{host}: {gb_per_s(rate)} to other nodes, the median is {gb_per_s(middle)}: a slow link"
    hosts = list(by_host(ranks))
    for (a, b), rate in links.items():
        if rate is None:
            yield f"{hosts[a]} and {hosts[b]}: other bytes arrived than were sent"


def _folder(ranks: list[RankFacts]) -> Iterator[str]:
    folder, writer = ranks[0].folder, ranks[0].host
    if not ranks[0].sees_folder:
        yield f"{_who(ranks[:1])}: cannot write {folder}"
    else:
        for host in by_host(r for r in ranks if not r.sees_folder):
            rule = "the run folder must be on a disk that all nodes share"
            yield f"{host}: does not see {folder}, which {writer} wrote to; {rule}"
    for host, group in by_host(ranks).items():
        if (free := min(r.free_disk_bytes for r in group)) < 2**30:
            yield f"{host}: {gib(free)} free on the disk of {folder}"


def _below(share: float, figures: dict[str, float]) -> Iterator[tuple[str, float, float]]:
    """(whose, figure, median) of those that are less than this share of the median."""
    middle = median(figures.values()) if figures else 0
    return ((who, figure, middle) for who, figure in figures.items() if figure < share * middle)


def link_rates(ranks: list[RankFacts], links: Links) -> dict[str, float]:
    """Host to the median of its links."""
    rates, hosts = defaultdict(list), list(by_host(ranks))
    for pair, rate in links.items():
        for node in pair if rate else ():
            rates[hosts[node]].append(rate)
    return {host: median(of_host) for host, of_host in rates.items()}


def by_host(ranks: Iterable[RankFacts]) -> dict[str, list[RankFacts]]:
    """In the order of their lowest ranks."""
    hosts = defaultdict(list)
    for r in ranks:
        hosts[r.host].append(r)
    return hosts


def _who(ranks: list[RankFacts]) -> str:
    """Of one host."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(str(r.rank) for r in ranks)} ({ranks[0].host})"


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def gb_per_s(rate: float) -> str:
    return f"{rate / 1e9:.3g} GB/s"
