"""Run a function on N gloo ranks inside a test, or a recipe through its launcher."""

import contextlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import lora_dist.entry

# How long a test waits for what takes seconds: so that a hang ends, on any kind of CPU and on a busy machine.
PATIENCE_S = 600
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def run_ranks(fn, num_ranks: int, *args, timeout_s: int = PATIENCE_S) -> list:
    """[fn(rank, *args) of each rank]. Forks, so that the imports of the test process are shared."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_one_rank, args=(fn, rank, num_ranks, folder, args)) for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout_s
        while any(p.exitcode is None for p in processes) and not any(p.exitcode for p in processes):
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        for process in processes:  # one failed or none came back in time: the others wait for it in a collective
            process.join(0 if process.exitcode is None else None)
            process.kill()
        failures = [path.read_text() for path in Path(folder).glob("*.failure")]
        assert not failures, "\n".join(failures)
        assert [p.exitcode for p in processes] == [0] * num_ranks, f"exit codes {[p.exitcode for p in processes]}"
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(num_ranks)]


def _one_rank(fn, rank, num_ranks, folder, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_WORLD_SIZE=str(num_ranks))
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks)
        assert dist.get_world_size() == num_ranks  # the trap: N processes that are each a world of one
        torch.save(fn(rank, *args), f"{folder}/{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(f"{folder}/{rank}.failure").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)  # not through the parent's exit handlers


def launch(*args: str, timeout_s: int = PATIENCE_S, env: dict | None = None) -> subprocess.CompletedProcess:
    """Run a command of the virtual environment, e.g. launch("torchrun", ...), from the repository's root."""
    command = [str(BIN / args[0]), *args[1:]]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | (env or {}), capture_output=True, text=True, timeout=timeout_s
    )


def start_rank(rank: int, *flags: str, num_ranks: int = 2, env: dict | None = None) -> subprocess.Popen:
    """The recipe's own process as a launcher starts it, so that its exit code, output and signals are its own."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29400 + os.getpid() % 500}
    return subprocess.Popen(
        [str(BIN / "python"), "recipes/opt_quotes.py", *flags],
        cwd=ROOT,
        env=os.environ | {k: str(v) for k, v in (place | address).items()} | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# What `accelerate launch` puts into the environment for accelerate_configs/NAME.yaml; other strategies: --deepspeed.
STRATEGY_ENV = {
    "ddp": {},
    "fsdp": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "hsdp": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"},
    "pipeline": {"ACCELERATE_USE_MEGATRON_LM": "true"},
}


def fork_ranks(*flags: str, timeout_s: int = PATIENCE_S, **kwargs) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of the recipe on each rank, as `forked_ranks` starts it."""
    with forked_ranks(*flags, **kwargs) as ranks:
        return ranks.wait(timeout_s)


def assert_refused(ended: list[tuple[int, str, str]], expected: Sequence[str]) -> None:
    """Bad input on 2 ranks: exit code 2 of both, one line from rank 0 with these words, and nothing else."""
    assert [code for code, _, _ in ended] == [2, 2], ended
    (_, out, err), (_, *other) = ended
    assert (out, other) == ("", ["", ""])
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for words in expected:
        assert words in err


@contextlib.contextmanager
def forked_ranks(
    *flags: str,
    num_ranks: int = 2,
    env: dict | None = None,
    recipe: str = "opt_quotes",
    strategy: str = "ddp",
    patch=None,
) -> Iterator["ForkedRanks"]:
    """The recipe's ranks as a launcher starts them, but with the imports of the test process: most of the time.

    `patch(rank)` is called in each before the recipe. None is left behind.
    """
    import lora_dist.model.quantized_cache  # noqa: F401
    import lora_dist.training.session  # noqa: F401

    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder, socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        reserved.close()
        env = STRATEGY_ENV[strategy] | (env or {}) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if strategy == "pipeline":
            env["MEGATRON_LM_PP_DEGREE"] = str(num_ranks)
        ranks = [
            context.Process(target=_forked_recipe, args=(recipe, rank, num_ranks, flags, env, folder, patch))
            for rank in range(num_ranks)
        ]
        for process in ranks:
            process.start()
        try:
            yield ForkedRanks(ranks, Path(folder))
        finally:
            for process in ranks:
                process.kill()
                process.join()


def wait_for_step(folder, step: int) -> None:
    """Until a run has logged a step in its RunFolder."""
    deadline = time.monotonic() + PATIENCE_S
    while max((line["train/global_step"] for line in folder.read_metrics()), default=0) < step:
        assert time.monotonic() < deadline, "it does not train"
        time.sleep(0.02)


@dataclass
class ForkedRanks:
    processes: list
    folder: Path

    def wait(self, timeout_s: float = PATIENCE_S) -> list[tuple[int, str, str]]:
        """(exit code, stdout, stderr) of each rank; None for one that is still there."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        return [(process.exitcode, *self.texts(rank)) for rank, process in enumerate(self.processes)]

    def texts(self, rank: int) -> list[str]:
        files = [self.folder / f"{rank}.{kind}" for kind in ("out", "err")]
        return [file.read_text() if file.exists() else "" for file in files]


def _forked_recipe(recipe, rank, num_ranks, flags, env, folder, patch):
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{rank}.{kind}", os.O_CREAT | os.O_WRONLY), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=num_ranks, LOCAL_WORLD_SIZE=num_ranks)
    os.environ.update({name: str(value) for name, value in place.items()} | env)
    sys.path.insert(0, str(ROOT / "recipes"))
    sys.argv = [f"{recipe}.py", *flags]
    try:
        lora_dist.entry.REFUSAL_S = 0.0  # no launcher is here that would end the others
        if patch:
            patch(rank)
        runpy.run_path(str(ROOT / f"recipes/{recipe}.py"), run_name="__main__")  # ends the process
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def launch_recipe(
    strategy: str, *flags: str, launcher_flags: tuple = (), recipe: str = "opt_quotes", **kwargs
) -> subprocess.CompletedProcess:
    """`accelerate launch --config_file accelerate_configs/STRATEGY.yaml recipes/RECIPE.py FLAGS`; must exit 0."""
    yaml = f"accelerate_configs/{strategy}.yaml"
    done = launch(
        "accelerate", "launch", "--config_file", yaml, *launcher_flags, f"recipes/{recipe}.py", *flags, **kwargs
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done
