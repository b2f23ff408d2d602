"""Do the gathers overlap with the computation? Needs 2 or more GPUs. Not run: no GPU has been available.

    torchrun --nproc_per_node 8 benchmarks/overlap_gpu.py facebook/opt-6.7b int8 > benchmarks/overlap_DATE.md

One micro-batch is traced on rank 0. Counted are the seconds in which all-gather kernels run and no other kernel does.
"""

import sys

import torch
import torch.distributed as dist
from accelerate import Accelerator
from common import header

from lora_dist.config import TrainConfig
from lora_dist.data.micro_batches import collate
from lora_dist.data.tasks import CAUSAL_LM
from lora_dist.library import load_base
from lora_dist.model.adapters import add_adapters


def uncovered(gathers: list[tuple[float, float]], others: list[tuple[float, float]]) -> float:
    """Seconds in which one of `gathers` runs and none of `others`. Both are lists of (start, end)."""
    marks = [(t, kind, change) for kind, spans in enumerate((gathers, others)) for span in spans
             for t, change in zip(span, (1, -1), strict=True)]  # fmt: skip
    running, last, total = [0, 0], 0.0, 0.0
    for t, kind, change in sorted(marks):
        if running[0] and not running[1]:
            total += t - last
        running[kind], last = running[kind] + change, t
    return total


def main(name: str, quantization: str) -> None:
    accelerator = Accelerator(mixed_precision="bf16")
    config = TrainConfig(model_name_or_path=name, max_steps=2)
    model = load_base(name, quantization=quantization, dtype=torch.bfloat16, device=accelerator.device)
    model = add_adapters(model, config).train()
    ids = list(range(5, 517))
    batch = collate([{"input_ids": ids, "labels": ids}] * 4, pad_token_id=1).to(accelerator.device)

    def micro_batch():
        with accelerator.autocast():
            logits = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False).logits
        CAUSAL_LM.summed_loss(logits, batch.labels_BL).backward()

    for _ in range(3):
        micro_batch()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        micro_batch()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = {True: [], False: []}
    for event in kernels:
        spans["AllGather" in event.name].append((event.time_range.start / 1e6, event.time_range.end / 1e6))
    if dist.get_rank() == 0:
        gathering = sum(end - start for start, end in spans[True])
        print(header("Overlap of gathers and computation", f"torchrun benchmarks/overlap_gpu.py {name} {quantization}",
                     f"{dist.get_world_size()} x {torch.cuda.get_device_name()}"))  # fmt: skip
        print(f"All-gather kernels: {gathering:.4f} s per micro-batch, of which {uncovered(*spans.values()):.4f} s "
              "with no other kernel running.")  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:3])
