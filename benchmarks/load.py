"""Time and memory to load a base of 1.5 GB on 2 and 4 ranks: sharded, from the cache, and with transformers.

    python benchmarks/load.py > benchmarks/load_cpu_DATE.md

The ways to load take turns, for `REPEATS` rounds. The file is in the page cache, so reading costs little here. This
favours the ways that read more.
"""

import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from common import PeakMemory, bytes_read, header, make_base, mb, run_ranks, table
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, logging

from lora_dist.embedded import BASE_DIR
from lora_dist.model.load import BaseOptions
from lora_dist.model.quantized_cache import load_cached_base
from lora_dist.parallel.strategies import Placement

REPEATS = 3
NUM_LAYERS = 14
CPU = torch.device("cpu")


def ours(quantization, base, cache):
    options = BaseOptions(quantization, torch.bfloat16, CPU, Placement(shard_ranks=dist.get_world_size()))
    model = load_cached_base(str(base), options, cache=cache and str(cache))
    return sum(p.to_local().untyped_storage().nbytes() for p in model.parameters())


def theirs(quantization, base, cache):
    config = BitsAndBytesConfig(load_in_8bit=True)
    if quantization == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, device_map={"": CPU}, quantization_config=config, trust_remote_code=False
    )
    return sum(p.untyped_storage().nbytes() for p in model.parameters())


def on_rank(rank, load, quantization, base, cache):
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    dist.barrier()
    started, read = time.perf_counter(), bytes_read()
    with PeakMemory() as peak:
        held = load(quantization, base, cache)
        seconds = time.perf_counter() - started
    return seconds, bytes_read() - read, peak.anonymous, peak.resident, held


def main():
    folder = Path(tempfile.mkdtemp(prefix="load"))
    base = make_base(folder / "base", NUM_LAYERS)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE_DIR / file, base)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    kinds = {"sharded at load": (ours, False), "from the quantized cache": (ours, True)}
    kinds["transformers + bitsandbytes, all of it on every rank"] = (theirs, False)
    raw, rows = [], []
    for quantization in ("int8", "nf4"):
        cache = folder / quantization
        run_ranks(on_rank, 2, ours, quantization, base, cache)  # writes the cache
        for num_ranks in (2, 4):
            results = {kind: [] for kind in kinds}
            for _ in range(REPEATS):
                for kind, (load, cached) in kinds.items():
                    ranks = run_ranks(on_rank, num_ranks, load, quantization, base, cache if cached else None)
                    results[kind].append(max(rank[0] for rank in ranks))
                    worst = [max(values) for values in zip(*ranks, strict=True)]
                    sofar = results.get(kind + " worst", worst)
                    results[kind + " worst"] = [max(pair) for pair in zip(worst, sofar, strict=True)]
            reference = median(results["transformers + bitsandbytes, all of it on every rank"])
            for kind in kinds:
                _, read, anonymous, resident, held = results[kind + " worst"]
                seconds = median(results[kind])
                rows.append([quantization, num_ranks, kind, f"{seconds:.1f}", f"{seconds / reference:.2f}", mb(read),
                             mb(anonymous), mb(resident), mb(held)])  # fmt: skip
                raw.append(f"{quantization}, {num_ranks} ranks, {kind}: {[round(s, 2) for s in results[kind]]} s")
    shutil.rmtree(folder)
    what = (
        f"A random Llama of {NUM_LAYERS} layers, {mb(size)} MB in fp16, loaded as bf16 and quantized. Seconds: of the "
        f"slowest rank, median of {REPEATS} interleaved rounds, also as a ratio to the last way. Bytes: of the rank "
        "with the most. Read: with read and pread, counted by the kernel, which does not count the mapped file of "
        "transformers. Peaks: above the start of the load; resident includes mapped file pages."
    )
    columns = ["format", "ranks", "how", "s", "ratio", "read MB", "peak anonymous MB", "peak resident MB", "held MB"]
    print(header("Loading on CPU", "python benchmarks/load.py", what))
    print(table(columns, rows))
    print("Raw:\n\n" + "\n".join(f"- {line}" for line in raw))


if __name__ == "__main__":
    main()
