"""What a run depends on beside its settings: package versions, the commit of this code, the device and its kernels."""

import functools
import os
import platform
import re
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

from lora_dist.errors import UserError

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "lora-dist")
CODE = Path(__file__).parents[1]
PACKAGE = Path(__file__).parent
COMMIT_FILE = "git_commit"  # beside a copy of the code, which has no repository
BF16_TEST_SIZE = 256  # rows and columns of the matrices that `bf16_slowdown` multiplies


def shipped(folder: str) -> Path:
    """The folder `recipes` or `accelerate_configs`: inside the installed package, or beside it in a checkout."""
    inside = PACKAGE / folder
    return inside if inside.is_dir() else PACKAGE.parent / folder


@functools.cache  # reads one file per package, and saving a checkpoint must not wait for that
def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def git_commit() -> str | None:
    """The commit of the checkout that this package is run from, with "+changes" if files differ from it.

    None if the package is not run from a checkout.
    """
    copied = CODE / COMMIT_FILE
    if copied.exists():
        return copied.read_text(encoding="utf-8").strip() or None
    if _git("rev-parse", "--show-toplevel") != str(CODE):  # installed, maybe inside somebody's repository
        return None
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return commit and commit + ("+changes" if changes else "")


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(CODE), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def env_count(name: str, default: int, *, least: int = 0, setting: str = "") -> int:
    """The whole number in this environment variable; the default if it is not set. Raises UserError.

    `setting`: what the user gave instead, if a launcher made the variable of it.
    """
    text = os.environ.get(name)
    if text is None:
        return default
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        remedy = "" if setting else "; start the ranks with lora-dist train, accelerate launch or torchrun, or unset it"
        raise UserError(f"{setting or name} {ascii(text)[:60]}: must be a whole number, {least} or more{remedy}")
    return int(text)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if has_gpu() else "cpu"


def cpu_has_bf16() -> bool:
    """True if oneDNN, which multiplies torch's matrices on a CPU, has bf16 kernels that are not emulated here.

    It has them with AVX-512 or AMX, and with bf16 instructions on arm64. It obeys ONEDNN_MAX_CPU_ISA.
    """
    import torch

    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def bf16_slowdown() -> float:
    """How many times as long a matrix product takes in bf16 as in fp32, measured on this CPU in about 0.1 s."""
    import torch

    seconds = []
    for dtype in (torch.bfloat16, torch.float32):
        matrix, times = torch.ones(BF16_TEST_SIZE, BF16_TEST_SIZE, dtype=dtype), []
        for _ in range(4):  # the first one chooses the kernel
            started = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - started)
        seconds.append(min(times))
    return seconds[0] / seconds[1]


def numerics(attention: str) -> dict[str, str]:
    """What the bits of a step depend on, beside the settings. `attention`: the model's attention implementation."""
    import torch

    on_gpu = has_gpu()
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "torch": torch.__version__,
        "bitsandbytes": versions()["bitsandbytes"],
        "device": torch.cuda.get_device_name() if on_gpu else cpu,
        "threads": "any" if on_gpu else str(torch.get_num_threads()),
        "attention": attention,
    }
