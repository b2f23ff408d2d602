"""Resident layers, from none (fsdp) to all (ddp): bytes held and gathered, peak memory and time of a step, on 2 ranks.

python benchmarks/residency.py > benchmarks/residency_cpu_DATE.md
"""

import dataclasses
import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from accelerate import Accelerator
from common import header, make_base, mb, run_ranks, table

from lora_dist.config import TrainConfig
from lora_dist.data.micro_batches import MicroBatches
from lora_dist.data.rows import Rows
from lora_dist.model.adapters import add_adapters
from lora_dist.model.load import BaseOptions, load_with, meta_model
from lora_dist.model.memory import base_bytes, peak_bytes
from lora_dist.parallel.fsdp import gathered_bytes
from lora_dist.parallel.strategies import Placement
from lora_dist.training.step import build_training, train_step

NUM_LAYERS, HIDDEN, VOCAB, ACCUMULATION, STEPS, ROUNDS, LENGTH = 12, 512, 8000, 4, 3, 3, 64
CPU, DTYPE = torch.device("cpu"), torch.bfloat16
PLACEMENTS = {
    "0 resident": {"shard_ranks": 2},
    "6 resident": {"shard_ranks": 2, "resident_layers": 6},
    "11 resident": {"shard_ranks": 2, "resident_layers": 11},
    "gather once": {"shard_ranks": 2, "gather_once": True},
    "all resident (ddp)": {},
}
CONFIG = TrainConfig(
    dataset_text_field="text", max_steps=100, warmup_steps=1, per_device_train_batch_size=2, max_length=LENGTH,
    gradient_accumulation_steps=ACCUMULATION,
)  # fmt: skip


def peak_of_live_bytes(training, step) -> int:
    """Peak of the allocated bytes in one step, above those allocated at its start."""
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        train_step(training, step)
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def on_rank(rank, placement, base, folder):
    torch.set_num_threads(1)
    config = dataclasses.replace(CONFIG, model_name_or_path=str(base))
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = load_with(str(base), BaseOptions("int8", DTYPE, CPU, Placement(**placement)))
    base_memory = base_bytes(model)
    model = add_adapters(model, config)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, VOCAB, (LENGTH,), generator=generator).tolist() for _ in range(64)]
    rows = Rows.of([(row, row) for row in ids])
    batches = MicroBatches(rows, pad_token_id=0, seed=1, sequences=2, per_step=ACCUMULATION * dist.get_world_size())
    training = build_training(model, config, accelerator, batches, Placement(**placement))
    model.train()
    results = [train_step(training, 0)]
    before, times = gathered_bytes(model), []
    for step in range(1, 1 + STEPS):
        started = time.perf_counter()
        results.append(train_step(training, step))
        times.append(time.perf_counter() - started)
    gathered = (gathered_bytes(model) - before) // STEPS
    alive = base_memory.held + 3 * 4 * sum(
        p.numel() for p in training.params
    )  # the base, and adapters with AdamW's moments
    peak = alive + peak_of_live_bytes(training, 1 + STEPS)
    return median(times), gathered, base_memory.held, peak, [(r.loss, r.grad_norm) for r in results]


def main():
    folder = Path(tempfile.mkdtemp(prefix="residency"))
    base = make_base(folder / "base", NUM_LAYERS, HIDDEN, VOCAB)
    skeleton, times, facts = meta_model(str(base), "int8", DTYPE), {}, {}
    for _ in range(ROUNDS):
        for name, placement in PLACEMENTS.items():
            ranks = run_ranks(on_rank, 2, placement, base, folder)
            times.setdefault(name, []).append(max(rank[0] for rank in ranks))
            facts[name] = ranks[0]
    assert all(fact[4] == facts["0 resident"][4] for fact in facts.values()), "the trajectories differ"
    slowest, rows = median(times["0 resident"]), []
    for name, (_, gathered, held, peak, _) in facts.items():
        placement = PLACEMENTS[name]
        estimate = (
            ""
            if "shard_ranks" not in placement or "gather_once" in placement
            else mb(peak_bytes(skeleton, CONFIG, 2, DTYPE, placement.get("resident_layers", 0)))
        )
        rows.append([name, mb(held), mb(gathered), mb(peak), estimate, f"{median(times[name]) / slowest:.2f}"])
    shutil.rmtree(folder)
    what = (
        f"A random Llama of {NUM_LAYERS} layers, hidden {HIDDEN}, vocabulary {VOCAB}, int8, bf16, LoRA r=16 on q and "
        f"v, gradient checkpointing; an optimizer step is {ACCUMULATION} micro-batches of 2 x {LENGTH} tokens per rank."
        " Loss and gradient norm of all steps are the same bits in all rows (asserted). Gathered: all-gather output "
        "per rank and optimizer step. Peak: allocated bytes in a step, by torch's profiler. Estimate: the peak that "
        f"--resident_layers auto plans with. Time: median of {ROUNDS} interleaved rounds of {STEPS} steps, as a "
        "ratio to the first row."
    )
    print(header("Resident layers on CPU, 2 ranks over gloo", "python benchmarks/residency.py", what))
    print(table(["placement", "base held MB", "gathered MB", "peak MB", "estimate MB", "time"], rows))
    print("Raw seconds per step: " + "; ".join(f"{n}: {[round(t, 3) for t in v]}" for n, v in times.items()))


if __name__ == "__main__":
    main()
