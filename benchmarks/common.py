"""What the benchmarks share: ranks, memory of a process, a base of a given size, and a table for the log."""

import platform
import re
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from ranks import run_ranks  # noqa: E402, F401

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed")


def make_base(folder: Path, num_layers: int, hidden_size: int = 2048, vocab_size: int = 32000) -> Path:
    """A random Llama in fp16, in safetensors of 500 MB; TinyLlama's shape but for the number of layers."""
    if not (folder / "config.json").exists():
        config = LlamaConfig(
            vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=hidden_size * 11 // 4,
            num_hidden_layers=num_layers, num_attention_heads=hidden_size // 64, num_key_value_heads=4,
        )  # fmt: skip
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
        model.save_pretrained(folder, max_shard_size="500MB")
    return folder


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status, e.g. VmHWM."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def bytes_read() -> int:
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


class PeakMemory:
    """Peak of this process above its start: `anonymous` memory, sampled every 2 ms, and `resident`, file pages too."""

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
