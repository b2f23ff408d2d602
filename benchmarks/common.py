"""Shared by the benchmarks: ranks, memory of a process, a base of a given size, and tables in Markdown."""

import contextlib
import multiprocessing
import os
import platform
import re
import runpy
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.multiprocessing import start_processes
from tqdm.std import TqdmDefaultWriteLock
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).parents[1]
TqdmDefaultWriteLock.mp_lock = None  # shared by all forks; one that is killed may hold it for good
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed")
# What `accelerate launch` puts into the environment for accelerate_configs/NAME.yaml.
LAUNCHER_ENV = {
    "ddp": {},
    "fsdp": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "hsdp": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"},
    "pipeline": {"ACCELERATE_USE_MEGATRON_LM": "true"},
}


def run_ranks(fn, num_ranks: int, *args) -> list:
    """Run fn(rank, *args) on gloo ranks forked from this process; returns their results. An error in one ends all."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_run_rank, (fn, num_ranks, folder, args), nprocs=num_ranks, start_method="fork")
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(num_ranks)]


def _run_rank(rank: int, fn, num_ranks: int, folder: str, args: tuple) -> None:
    os.environ.update(_rank_env(rank, num_ranks))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks)
    torch.save(fn(rank, *args), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _rank_env(rank: int, num_ranks: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    return {name: str(value) for name, value in numbers.items()}


@dataclass
class RecipeRanks:
    """Processes that run a recipe; `folder` holds their stdout and stderr."""

    processes: list
    folder: Path

    def wait(self, timeout_s: float) -> list[tuple[int | None, str, str]]:
        """(exit code, stdout, stderr) of each rank; the code of a rank that is still running is None."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        outputs = [[(self.folder / f"{rank}.{kind}").read_text() for kind in ("out", "err")]
                   for rank in range(len(self.processes))]  # fmt: skip
        return [(process.exitcode, *texts) for process, texts in zip(self.processes, outputs, strict=True)]


@contextlib.contextmanager
def recipe_ranks(
    *flags: str, num_ranks: int, strategy: str, env: dict | None = None, patch: Callable | None = None
) -> Iterator[RecipeRanks]:
    """Start the ranks of recipes/opt_quotes.py as forks of this process, so that none has to import the packages again.

    `patch(rank)` is called in each rank before the recipe. At the end of the block all ranks are killed.
    """
    import lora_dist.model.quantized_cache  # noqa: F401
    import lora_dist.training.session  # noqa: F401

    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
    env = address | LAUNCHER_ENV[strategy] | (env or {})
    if strategy == "pipeline":
        env["MEGATRON_LM_PP_DEGREE"] = str(num_ranks)
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        args = (num_ranks, flags, env, folder, patch)
        for rank in range(num_ranks):
            for kind in ("out", "err"):
                Path(f"{folder}/{rank}.{kind}").touch()
        processes = [context.Process(target=_run_recipe, args=(rank, *args)) for rank in range(num_ranks)]
        for process in processes:
            process.start()
        try:
            yield RecipeRanks(processes, Path(folder))
        finally:
            for process in processes:
                process.kill()
                process.join()


def run_recipe(*flags: str, num_ranks: int = 2, timeout_s: float = 300, **kwargs) -> None:
    """Run recipes/opt_quotes.py to its end, as `recipe_ranks` starts it. All ranks must exit with 0."""
    with recipe_ranks(*flags, num_ranks=num_ranks, **kwargs) as ranks:
        ended = ranks.wait(timeout_s)
    assert [code for code, _, _ in ended] == [0] * num_ranks, ended


def _run_recipe(rank: int, num_ranks: int, flags: tuple, env: dict, folder: str, patch: Callable | None) -> None:
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{rank}.{kind}", os.O_WRONLY), number)
    os.environ.update(_rank_env(rank, num_ranks) | env)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = ["opt_quotes.py", *flags]
    try:
        if patch:
            patch(rank)
        runpy.run_path(str(ROOT / "recipes/opt_quotes.py"), run_name="__main__")  # ends the process
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def wait_until(condition: Callable, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"this did not happen within {timeout_s} s"
        time.sleep(0.1)


def make_base(folder: Path, num_layers: int, hidden_size: int = 2048, vocab_size: int = 32000) -> Path:
    """A random Llama in fp16, in safetensors files of 500 MB. By default it has TinyLlama's shape."""
    if not (folder / "config.json").exists():
        config = LlamaConfig(
            vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=hidden_size * 11 // 4,
            num_hidden_layers=num_layers, num_attention_heads=hidden_size // 64, num_key_value_heads=4,
        )  # fmt: skip
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16, trust_remote_code=False)
        model.save_pretrained(folder, max_shard_size="500MB")
    return folder


def status(field: str) -> int:
    """Value of a field of /proc/self/status in bytes, e.g. VmHWM."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def bytes_read() -> int:
    """Bytes that this process has read with read and pread."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


class PeakMemory:
    """Peak memory of this process above that at the start of the block, in bytes.

    `anonymous`: without file pages, sampled every 2 ms. `resident`: with file pages.
    """

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self.start, self.resident_start, self.anonymous, self.done = status("RssAnon"), status("VmRSS"), 0, False
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def _sample(self):
        while not self.done:
            self.anonymous = max(self.anonymous, status("RssAnon") - self.start)
            time.sleep(0.002)

    def __exit__(self, *_):
        self.done = True
        self.thread.join()
        self.resident = status("VmHWM") - self.resident_start


def mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.1f}"


def header(title: str, command: str, what: str) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    cores = len(re.findall("^processor", Path("/proc/cpuinfo").read_text(), re.M))
    return (
        f"# {title}\n\n    {command}\n\n{what}\n\n{time.strftime('%Y-%m-%d')}, {processor}, {cores} cores (shared), "
        f"Python {platform.python_version()}, {versions}.\n"
    )


def table(columns: list[str], rows: list[list]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"
