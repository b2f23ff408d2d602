"""The ranks of a run: how they meet, and what they tell each other.

A function marked "Collective" must be called by every rank. In a process without a process group each of them behaves
as on the only rank of a group of one.
"""

import datetime
import errno
import ipaddress
import os
import socket
import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lora_dist.errors import UserError
from lora_dist.parallel.strategies import world_size

if TYPE_CHECKING:
    from accelerate import Accelerator

# Another node may have to tokenize what this one has in its cache. Once the ranks have met, silence is a fault.
MEETING_TIMEOUT, COLLECTIVE_TIMEOUT = datetime.timedelta(days=1), datetime.timedelta(minutes=30)


def this_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: Any) -> list:
    """Every rank's value, in the order of the ranks. Any picklable object. Collective."""
    values = [value] * num_ranks()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def from_rank_0(value: Any) -> Any:
    """Rank 0's value; the other ranks' values are ignored. Any picklable object. Collective."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def copy_from_rank_0(tensor: torch.Tensor) -> None:
    """Overwrite the tensor with rank 0's, which has the same shape and dtype. Collective."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)


def gather_numbers(numbers: list[float], device: torch.device) -> list[list[float]]:
    """Every rank's numbers, in the order of the ranks; each rank must give equally many. One all-gather. Collective."""
    mine = torch.tensor(numbers, dtype=torch.float64, device=device)
    if not dist.is_initialized():
        return [mine.tolist()]
    of_all = mine.new_empty(num_ranks() * len(numbers))
    dist.all_gather_single(of_all, mine)
    return of_all.view(-1, len(numbers)).tolist()


def any_rank(flag: bool, device: torch.device) -> bool:
    """True if the flag is set on at least one rank. Collective."""
    flags = torch.tensor([float(flag)], device=device)
    if dist.is_initialized():
        dist.all_reduce(flags)
    return flags.item() > 0


def barrier() -> None:
    """Wait until every rank is here. Collective."""
    if dist.is_initialized():
        dist.barrier()


def check_same_on_all_ranks(values: dict[str, Any]) -> None:
    """Raises UserError if a rank has another value than rank 0 for one of these names. Collective."""
    ranks = gather((socket.gethostname(), values))
    host, first = ranks[0]
    for number, (other_host, other) in enumerate(ranks):
        differing = [name for name in first if other[name] != first[name]]
        if differing:
            name, *more = differing
            also = f" (also {', '.join(more)})" if more else ""
            raise UserError(
                f"{name}: {first[name]} on rank 0 ({host}), {other[name]} on rank {number} ({other_host}){also}; "
                "all ranks need the same"
            )


def _is_one_machine() -> bool:
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")


def keep_to_one_machine() -> None:
    """If all ranks are on one machine, let gloo listen on the loopback device only, so that nobody else can connect."""
    if _is_one_machine():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def start_ranks(mixed_precision: str | None = None) -> "Accelerator":
    """Join the process group that the launcher described; it uses gloo if there is no GPU. Collective.

    Raises UserError if accelerate does not start as many ranks as the launcher announced.
    """
    import transformers
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    on_gpu = torch.cuda.is_available()
    if not on_gpu:  # bits depend on the thread count, so it must not depend on the launcher
        torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    for engine in ("DEEPSPEED", "MEGATRON_LM"):  # lora-dist starts these itself, not accelerate
        os.environ.pop(f"ACCELERATE_USE_{engine}", None)
    keep_to_one_machine()
    meet(on_gpu)
    patience = InitProcessGroupKwargs(timeout=MEETING_TIMEOUT)
    # Without cpu=True accelerate trains N separate copies if there is no GPU.
    accelerator = Accelerator(cpu=not on_gpu, mixed_precision=mixed_precision, kwargs_handlers=[patience])
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT)
    asked = world_size()
    if accelerator.num_processes != asked:
        raise UserError(
            f"WORLD_SIZE {asked}: accelerate started {accelerator.num_processes} rank(s); "
            "launch with accelerate launch, torchrun or python"
        )
    return accelerator


def meet(on_gpu: bool) -> None:
    """Start the process group where torch's own way would listen too widely, or find a dead rank.

    - torch 2.13 lets rank 0's store listen on all interfaces. Here it listens on the loopback device, or, if there are
      several machines, on the interface of MASTER_ADDR. The store of torchrun's own process is not ours to open.
    - That store outlives ranks that torchrun restarts, and torch uses the same names in it for every attempt, so a rank
      may find the address of a dead one ("Gloo connectFullMesh failed"). Here each attempt has its own names.
    """
    if "RANK" not in os.environ or dist.is_initialized() or world_size() == 1:
        return
    attempt, host = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ["MASTER_ADDR"]
    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        if attempt == "0":
            return
        store = dist.TCPStore(host, port, is_master=False)
    else:
        is_alone = _is_one_machine()
        host = "127.0.0.1" if is_alone else host
        listener = _listener(host, port, others_connect=not is_alone) if rank == 0 else None
        listen = {"master_listen_fd": listener.detach()} if listener else {}
        store = dist.TCPStore(
            host, port, is_master=rank == 0, wait_for_workers=False, timeout=MEETING_TIMEOUT, **listen
        )  # fmt: skip
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=dist.PrefixStore(f"attempt {attempt}", store), timeout=MEETING_TIMEOUT,
        rank=rank, world_size=world_size(),
    )  # fmt: skip


def _listener(host: str, port: int, *, others_connect: bool) -> socket.socket | None:
    """A socket that listens on this address only; None if that would keep other machines out.

    So it is if this machine has no such address (NAT), or if its own name stands for the loopback device here, as in
    Debian's /etc/hosts. Raises UserError if the port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if others_connect and ipaddress.ip_address(address[0].partition("%")[0]).is_loopback:
            return None
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"MASTER_PORT {port}: another process listens on it; give another port") from None
        return None


def leave_ranks() -> None:
    """Leave the process group. Without that, gloo's threads may end a Python that shuts down with SIGABRT."""
    if dist.is_initialized():
        dist.destroy_process_group()
