"""Every strategy on the same base: bytes held per rank, bytes sent per step, and the time of an optimizer step.

python benchmarks/strategies.py > benchmarks/strategies_cpu_DATE.md
"""

import dataclasses
import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DS_ACCELERATOR"] = "cpu"  # otherwise DeepSpeed prints that it chose this

import torch
import torch.distributed as dist
from accelerate import Accelerator
from common import header, make_base, mb, run_ranks, table
from residency import CONFIG, CPU, DTYPE, HIDDEN, LENGTH, NUM_LAYERS, VOCAB

from lora_dist.data.micro_batches import MicroBatches
from lora_dist.data.rows import Rows
from lora_dist.model.adapters import add_adapters, fingerprint
from lora_dist.model.load import BaseOptions, load_with
from lora_dist.model.memory import base_bytes
from lora_dist.parallel.strategies import Placement
from lora_dist.training.step import build_training, train_step

PER_STEP, STEPS, ROUNDS, COUNTER = 8, 3, 3, Path("/sys/class/net/lo/statistics/tx_bytes")


def zero(stage: int, **offload) -> dict:
    return {"zero_optimization": {"stage": stage, **offload}}


# strategy: (ranks, placement)
PLACEMENTS = {
    "single": (1, Placement()),
    "ddp": (2, Placement()),
    "zero2": (2, Placement(deepspeed=zero(2))),
    "fsdp": (2, Placement(2)),
    "fsdp_offload": (2, Placement(2, offload=True)),
    "zero3": (2, Placement(2, deepspeed=zero(3))),
    "zero3_offload": (2, Placement(2, offload=True, deepspeed=zero(3, offload_param={"device": "cpu"}))),
    "pipeline": (2, Placement(stages=2)),
}


def on_rank(rank, placement, base, folder):
    torch.set_num_threads(1)
    config = dataclasses.replace(CONFIG, model_name_or_path=str(base))
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = load_with(str(base), BaseOptions("int8", DTYPE, CPU, placement))
    base_memory = base_bytes(model)
    model = add_adapters(model, config)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, VOCAB, (LENGTH,), generator=generator).tolist() for _ in range(64)]
    rows = Rows.of([(row, row) for row in ids])
    batches = MicroBatches(rows, pad_token_id=0, seed=1, sequences=2, per_step=PER_STEP)
    training = build_training(model, config, accelerator, batches, placement)
    model.train()
    for step in range(2):  # DeepSpeed learns the order of modules in its first passes
        train_step(training, step)
    if dist.is_initialized():
        dist.barrier()
    before, times = int(COUNTER.read_text()), []
    for step in range(2, 2 + STEPS):
        started = time.perf_counter()
        train_step(training, step)
        times.append(time.perf_counter() - started)
    if dist.is_initialized():
        dist.barrier()
    sent = (int(COUNTER.read_text()) - before) // STEPS
    return median(times), sent, base_memory.held, base_memory.total, fingerprint(model).hex()


def main():
    folder = Path(tempfile.mkdtemp(prefix="strategies"))
    base = make_base(folder / "base", NUM_LAYERS, HIDDEN, VOCAB)
    times, facts = {}, {}
    for _ in range(ROUNDS):
        for name, (num_ranks, placement) in PLACEMENTS.items():
            ranks = run_ranks(on_rank, num_ranks, placement, base, folder)
            times.setdefault(name, []).append(max(rank[0] for rank in ranks))
            facts[name] = ranks[0]
    shutil.rmtree(folder)
    assert len({fact[4] for fact in facts.values()}) == 1, "the adapters differ"
    fastest, rows = median(times["ddp"]), []
    for name, (_, sent, held, total, _) in facts.items():
        sent = mb(sent) if PLACEMENTS[name][0] > 1 else "0"
        rows.append([name, f"{mb(held)} of {mb(total)}", sent, f"{median(times[name]) / fastest:.2f}"])
    what = (
        f"A random Llama of {NUM_LAYERS} layers, hidden {HIDDEN}, vocabulary {VOCAB}, int8, bf16, LoRA r=16 on q and "
        f"v, gradient checkpointing; an optimizer step is {PER_STEP} micro-batches of 2 x {LENGTH} tokens. The "
        "adapters after all steps are the same bytes in all rows (asserted). Sent: by both ranks together per step, "
        "with headers, counted by the kernel on the loopback device. Time: of an optimizer step, median of "
        f"{ROUNDS} interleaved rounds of {STEPS} steps, as a ratio to ddp's; single has one of the two cores."
    )
    print(header("The strategies on CPU, 2 ranks over gloo", "python benchmarks/strategies.py", what))
    print(table(["strategy", "base held per rank MB", "sent per step MB", "time"], rows))
    print("Raw seconds per step: " + "; ".join(f"{n}: {[round(t, 3) for t in v]}" for n, v in times.items()))


if __name__ == "__main__":
    main()
