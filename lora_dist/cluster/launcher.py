"""`lora-dist train`: starts the ranks of a recipe on this machine and ends with their exit code."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_dist.cluster.recipe import find_config_file, find_recipe, launcher_env, load_recipe, read_config_file
from lora_dist.config import Bounds
from lora_dist.entry import LAUNCHER_PID
from lora_dist.environment import shipped
from lora_dist.errors import UserError, require
from lora_dist.flags import parse_config
from lora_dist.signals import SIGNALS

NUM_CPU_RANKS = 2  # if there is no GPU
RANKS_HERE = Bounds(1, 1024, "ranks")  # on one machine
# Time for the other ranks to leave by themselves after one has failed: the watchdog needs up to 10 s of it.
GRACE_S = 15.0
POLL_S = 0.05


@dataclass(frozen=True)
class TrainCommand:
    """The words of `lora-dist train`: RECIPE, the launcher's two options, and the recipe's flags."""

    recipe: Path
    flags: list[str]
    config_file: str | None
    num_processes: int | None


def read_command(words: list[str]) -> TrainCommand:
    """Raises UserError for everything that is wrong with the words and can be said without torch, data or model.

    The launcher's options may stand before or after the recipe. With --help among the recipe's flags it prints the
    recipe's settings and exits.
    """
    options, rest = {"--config_file": None, "--num_processes": None}, []
    words = iter(words)
    for word in words:
        name, equals, value = word.partition("=")
        if name in options:
            value = value if equals else next(words, None)
            if not value:
                raise UserError(f"{name}: needs a value")
            options[name] = value
        else:
            rest.append(word)
    if not rest:
        raise UserError("recipe: none is given; the command is lora-dist train RECIPE, e.g. lora-dist train sft")
    recipe, *flags = rest
    if recipe.startswith("-"):
        raise UserError(f"{recipe}: comes before the recipe; the command is lora-dist train RECIPE [--SETTING VALUE]")
    num_processes = options["--num_processes"]
    if num_processes is not None:
        valid = re.fullmatch("[0-9]{1,9}", num_processes) and RANKS_HERE.hold(int(num_processes))
        require(valid, "num_processes", num_processes, f"must be a whole number, {RANKS_HERE}")
        num_processes = int(num_processes)
    if options["--config_file"]:
        read_config_file(find_config_file(options["--config_file"]))
    path = find_recipe(recipe)
    module = load_recipe(path)
    parse_config(module.CONFIG, flags, description=module.__doc__ or "", prog=f"lora-dist train {recipe}")
    return TrainCommand(path, flags, options["--config_file"], num_processes)


def train(words: list[str]) -> int:
    """Start the ranks that `words` ask for, wait for all of them, and return the exit code. Raises UserError."""
    command = read_command(words)
    num_ranks, config_file = plan_ranks(command)
    env = os.environ | launcher_env(config_file, num_ranks) | {LAUNCHER_PID: str(os.getpid())}
    line = [sys.executable, str(command.recipe), *command.flags]
    with tempfile.TemporaryDirectory(prefix="lora-dist-") as folder, _rank_store(num_ranks) as store_env:
        error_files = [Path(folder) / f"rank-{rank}.json" for rank in range(num_ranks)]
        ranks: list[subprocess.Popen] = []
        with _signals_passed_on(ranks) as received, _stopped_together(ranks):
            for rank, error_file in enumerate(error_files):
                if received:
                    break
                place = _place(rank, num_ranks) | {"TORCHELASTIC_ERROR_FILE": str(error_file)}
                # In its own process group, a rank gets Ctrl-C once: from here, and not from the terminal as well.
                ranks.append(
                    subprocess.Popen(line, env=env | store_env | place, stdin=subprocess.DEVNULL, process_group=0)
                )
            codes = wait_for_all(ranks)
        return _exit_code(codes, error_files, received)


def plan_ranks(command: TrainCommand) -> tuple[int, Path]:
    """(number of ranks, accelerate's config file). Imports torch to count the GPUs. Raises UserError."""
    import torch

    num_gpus, num_ranks = torch.cuda.device_count(), command.num_processes
    if command.config_file is None:
        num_ranks = num_ranks or num_gpus or NUM_CPU_RANKS
        config_file = find_config_file("single" if num_ranks == 1 else "fsdp")
    else:
        config_file = find_config_file(command.config_file)
        settings = read_config_file(config_file)
        num_machines = settings.get("num_machines") or 1
        why = "lora-dist train starts one machine's ranks; for several, see lora-dist submit or accelerate launch"
        require(num_machines == 1, "config_file", f"{config_file}: num_machines: {num_machines}", why)
        if num_ranks is None:
            num_ranks = _num_ranks_of(settings, config_file, num_gpus)
            valid = type(num_ranks) is int and RANKS_HERE.hold(num_ranks)
            why = f"must be a whole number, {RANKS_HERE}"
            require(valid, "config_file", f"{config_file}: num_processes: {num_ranks}", why)
    why = f"this machine has {num_gpus} GPU(s); give {num_gpus} or less, or CUDA_VISIBLE_DEVICES= to use the CPU"
    require(not num_gpus or num_ranks <= num_gpus, "num_processes", num_ranks, why)
    return num_ranks, config_file


def _num_ranks_of(settings: dict, config_file: Path, num_gpus: int) -> int:
    """Number of ranks if no flag gives one. The files that ship serve any number; a file of one's own says it."""
    if str(settings.get("distributed_type")) in ("NO", "False"):  # YAML reads an unquoted NO as false
        return 1
    is_own = config_file.resolve().parent != shipped("accelerate_configs").resolve()
    return (is_own and settings.get("num_processes")) or num_gpus or NUM_CPU_RANKS


def _place(rank: int, num_ranks: int) -> dict[str, str]:
    """The variables that tell a rank its place; none for a single process, as with `accelerate launch`."""
    if num_ranks == 1:
        return {}
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


@contextlib.contextmanager
def _rank_store(num_ranks: int) -> Iterator[dict[str, str]]:
    """The store in which the ranks meet, on a free port of the loopback device; yields the variables that name it.

    It lives in this process, as it lives in torchrun's, so it does not die with rank 0.
    """
    if num_ranks == 1:
        yield {}
        return
    import torch.distributed as dist

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )  # fmt: skip
    yield {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0", "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }  # fmt: skip
    del store


@contextlib.contextmanager
def _signals_passed_on(ranks: list[subprocess.Popen]) -> Iterator[list[int]]:
    """Pass the signals that ask a run to stop on to the ranks; yields the list of those received."""
    received: list[int] = []

    def pass_on(number: int, frame) -> None:
        if number == signal.SIGINT and sys.stderr.isatty():
            again = (
                "leaving at once" if received else "saving and leaving after this step; Ctrl-C again to leave at once"
            )
            print(f"\n{again}", file=sys.stderr, flush=True)
        received.append(number)
        for rank in ranks:
            if rank.poll() is None:
                # A terminal that is closed asks in its own way; the recipes know SIGTERM.
                rank.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    numbers = [n for n in (*SIGNALS, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]  # nohup ignores one
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _stopped_together(ranks: list[subprocess.Popen]) -> Iterator[None]:
    """Let Ctrl-Z stop the ranks too, and `fg` or `bg` continue them. They are in process groups of their own."""

    def stop(number: int, frame) -> None:
        for name in (signal.SIGSTOP, signal.SIGCONT):
            for rank in ranks:
                if rank.poll() is None:
                    rank.send_signal(name)
            if name == signal.SIGSTOP:
                os.kill(os.getpid(), signal.SIGSTOP)  # returns when this process is continued

    before = signal.signal(signal.SIGTSTP, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, before)


def wait_for_all(ranks: list[subprocess.Popen]) -> list[tuple[int, int]]:
    """(rank, exit code) in the order in which the ranks ended; the code is minus the signal that ended it.

    If one fails, the others are asked to stop: those that do not train yet end at once. After GRACE_S they are killed.
    """
    ended, codes, deadline = [], {}, None
    while len(ended) < len(ranks):
        for number, rank in enumerate(ranks):
            if number not in codes and rank.poll() is not None:
                codes[number] = rank.returncode
                ended.append((number, rank.returncode))
                if rank.returncode and deadline is None:
                    deadline = time.monotonic() + GRACE_S
                    for other in ranks:
                        if other.poll() is None:
                            other.terminate()
        if deadline and time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
        time.sleep(POLL_S)
    return ended


def _exit_code(codes: list[tuple[int, int]], error_files: list[Path], received: list[int]) -> int:
    """The exit code of the ranks; says why they failed if rank 0 could not say it."""
    failed = [(rank, code) for rank, code in codes if code]
    if not failed:
        return 128 + received[0] if not codes else 0  # asked to stop before any rank was started
    first, code = failed[0]
    said = any(file.exists() for rank, file in enumerate(error_files) if rank != first)  # a rank named it already
    if code < 0 and -code not in received and not said:
        name = signal.Signals(-code).name
        hint = " (the machine may have run out of memory)" if -code == signal.SIGKILL else ""
        print(f"error: rank {first} was ended by {name}{hint}", file=sys.stderr, flush=True)
    elif dict(codes).get(0) in (-signal.SIGKILL, -signal.SIGTERM) and error_files[first].exists():
        print(json.loads(error_files[first].read_text())["message"]["message"], file=sys.stderr, flush=True)
    return next((code for _, code in failed if code > 0), 128 - code)
