"""Trained tokens per second with padded, length-grouped and packed rows, on one machine.

    python benchmarks/packing.py

The padded rows are the tutorial's: 4 quotes a micro-batch, 4 micro-batches a step, int8, r=16 on q_proj, v_proj. Each
step is timed alone, and the three kinds take turns, so that other load on the machine affects all of them.
"""

import dataclasses
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from common import header, make_base, table

from lora_dist.config import TrainConfig
from lora_dist.data.formats import load_tokenizer
from lora_dist.data.micro_batches import MicroBatches
from lora_dist.data.rows import Rows, prepare_rows
from lora_dist.library import load_base
from lora_dist.model.adapters import add_adapters
from lora_dist.parallel.strategies import Placement
from lora_dist.training.step import Training, build_training, train_step

STEPS, MAX_LENGTH = 12, 512
KINDS = {  # sequences of a micro-batch, micro-batches of a step, order
    "padded": (4, 4, {}),
    "grouped": (4, 4, {"group_by_length": True}),
    "packed": (1, 4, {"pack_to": True}),
}


def make_run(kind: str, config: TrainConfig, rows: Rows, tokenizer, device: torch.device) -> Training:
    sequences, per_step, order = KINDS[kind]
    if "pack_to" in order:
        order = {"pack_to": config.max_length}
    dtype = torch.bfloat16
    name = config.model_name_or_path
    base = load_base(name, quantization="int8", dtype=dtype, device=device, shard_ranks=1)
    model = add_adapters(base, config)
    batches = MicroBatches(
        rows, pad_token_id=tokenizer.pad_token_id, seed=0, sequences=sequences, per_step=per_step, **order
    )
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16")
    model.train()
    return build_training(model, config, accelerator, batches, Placement())


def histogram(lengths, width: int = 40) -> str:
    """Number of rows by length, in steps of 20 tokens; the last line has all rows above 200 tokens."""
    edges = [*range(0, 201, 20), int(lengths.max()) + 1]
    counts = [int(((lengths >= low) & (lengths < high)).sum()) for low, high in zip(edges, edges[1:], strict=False)]
    bars = ["#" * round(width * count / max(counts)) for count in counts]
    names = [f"{low:4} to {high - 1:4}" for low, high in zip(edges, edges[1:], strict=False)]
    return "\n".join(f"    {name} {count:6} {bar}" for name, count, bar in zip(names, counts, bars, strict=True))


def measure(config: TrainConfig, rows: Rows, tokenizer, device: torch.device) -> tuple[list[list], dict]:
    """The table's rows, and the raw seconds of each step."""
    runs = {kind: make_run(kind, config, rows, tokenizer, device) for kind in KINDS}
    for run in runs.values():
        train_step(run, 0)
    seen = {kind: [] for kind in KINDS}  # (seconds, trained tokens, tokens, positions) of each step
    for step in range(1, 1 + STEPS):
        for kind, run in runs.items():
            started = time.perf_counter()
            result = train_step(run, step)  # it reads the loss, so the GPU has finished
            seconds = time.perf_counter() - started
            seen[kind].append((seconds, result.num_trained_tokens, result.num_tokens, result.num_positions))
    lines, rates = [], {}
    for kind, steps in seen.items():
        seconds, trained, tokens, positions = (sum(column) for column in zip(*steps, strict=True))
        rates[kind] = trained / seconds
        padding, ratio = f"{1 - tokens / positions:.1%}", f"{rates[kind] / rates['padded']:.2f}"
        lines.append([kind, padding, round(trained / STEPS), f"{seconds / STEPS:.2f}", round(rates[kind]), ratio])
    return lines, {kind: [round(step[0], 3) for step in steps] for kind, steps in seen.items()}


def main() -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        bases = {
            "the embedded OPT (hidden 192, 4 layers)": "embedded",
            "a Llama (hidden 1024, 4 layers, vocabulary 2048)": str(make_base(Path(folder), 4, 1024, 2048)),
        }
        tokenizer = load_tokenizer("embedded")
        config = TrainConfig(
            dataset_name="embedded", dataset_text_field="quote", max_length=MAX_LENGTH, max_steps=10_000
        )
        rows = prepare_rows(dataclasses.replace(config, model_name_or_path="embedded"), tokenizer).train
        what = f"{STEPS} steps of each, in turn, int8, bf16, rows of up to {MAX_LENGTH} tokens, on one {device.type}."
        print(header("Padded, length-grouped and packed rows", "python benchmarks/packing.py", what))
        print(f"{len(rows)} quotes, {rows.lengths.sum()} tokens, by length:\n\n{histogram(rows.lengths)}\n")
        for name, base in bases.items():
            lines, raw = measure(dataclasses.replace(config, model_name_or_path=base), rows, tokenizer, device)
            columns = [
                "rows",
                "padding",
                "trained tokens per step",
                "s per step",
                "trained tokens / s",
                "ratio to padded",
            ]
            print(f"## {name[0].upper() + name[1:]}\n\n{table(columns, lines)}")
            print("Raw seconds per step: " + "; ".join(f"{kind}: {seconds}" for kind, seconds in raw.items()) + "\n")


if __name__ == "__main__":
    main()
