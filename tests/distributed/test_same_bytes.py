"""The flagship: the adapter's bytes do not depend on the number of ranks or on where the base lies."""

import dataclasses
import json
import math

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from parity import CPU, load_sharded
from ranks import launch_recipe, run_ranks
from safetensors.torch import load_file

from lora_dist.adapters import add_adapters, check_identical, fingerprint
from lora_dist.base_model import base_bytes
from lora_dist.data import MicroBatches, load_texts, load_tokenizer, tokenize
from lora_dist.run_folder import RunFolder
from lora_dist.sharding import sharded_modules
from lora_dist.train import Training, evaluate, train_step

MICRO_BATCHES_PER_STEP = 12


def _train_on_rank(rank, config, mixed_precision, resident_layers, folder, loss_scale=None):
    """3 optimizer steps and an evaluation: (adapter sha256, loss and gradient norm of each step, evaluation).

    `resident_layers`: of 4; "all" is a replicated base.
    """
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    if loss_scale:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale)
    num_ranks = accelerator.num_processes
    assert num_ranks == dist.get_world_size() and accelerator.process_index == rank
    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[mixed_precision]
    placement = {"shard_ranks": 1} if resident_layers == "all" else {"resident_layers": resident_layers}
    model = load_sharded(config.quantization, dtype, config=config, **placement)
    base = base_bytes(model)
    assert len(sharded_modules(model)) == (0 if resident_layers == "all" else 4 - resident_layers + 1)
    if resident_layers == 0:
        assert base.per_rank < 1.1 * base.total / num_ranks
    model = add_adapters(model, config)
    tokenizer = load_tokenizer("embedded")
    rows, eval_rows = (tokenize(texts, tokenizer, 64) for texts in load_texts(config))
    micro_batches = MicroBatches(
        rows, pad_token_id=tokenizer.pad_token_id, seed=config.seed, sequences=2, per_step=MICRO_BATCHES_PER_STEP
    )
    run = Training(model, tokenizer, config, accelerator, micro_batches, eval_rows[:20], RunFolder(folder), base)
    torch.manual_seed(1000 + rank)  # nothing may depend on the ambient random state
    model.train()
    steps = [train_step(run, step) for step in range(3)]
    assert check_identical(model, CPU) == fingerprint(model).hex()
    return fingerprint(model).hex(), [(s.loss, s.grad_norm) for s in steps], evaluate(run)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("quantization", ["int8", "nf4", "none"])
def test_one_adapter_at_any_world_size_and_placement(config, tmp_path, quantization, mixed_precision):
    # A high learning rate from the first step on, and a low clipping threshold: everything has to act.
    config = dataclasses.replace(
        config, quantization=quantization, learning_rate=5e-3, warmup_steps=0, max_grad_norm=0.05, max_steps=3
    )
    placements = [(1, "all"), (2, "all"), (2, 0), (2, 2), (3, 0), (4, "all"), (4, 0), (4, 3)]
    if (quantization, mixed_precision) != ("int8", "bf16"):
        placements = [(1, "all"), (2, 0), (3, 1)]  # 12 / 3 = 4 micro-batches, which start inside a subtree
    outcomes = {
        (num_ranks, resident_layers): result
        for num_ranks, resident_layers in placements
        for result in run_ranks(_train_on_rank, num_ranks, config, mixed_precision, resident_layers, tmp_path)
    }
    sha256, steps, evaluation = outcomes[1, "all"]
    assert all(norm > config.max_grad_norm for _, norm in steps) and steps[0][0] > steps[-1][0] and evaluation > 0
    assert {placement: result for placement, result in outcomes.items() if result != (sha256, steps, evaluation)} == {}


@pytest.mark.parametrize(
    "settings", [{"lora_bias": "all", "loraplus_lr_ratio": 16.0}, {"use_dora": True, "use_rslora": True}], ids=str
)
def test_one_adapter_with_loras_options(config, tmp_path, settings):
    config = dataclasses.replace(config, learning_rate=5e-3, warmup_steps=0, max_grad_norm=0.05, **settings)
    outcomes = [
        run_ranks(_train_on_rank, num_ranks, config, "bf16", resident_layers, tmp_path)
        for num_ranks, resident_layers in ((1, "all"), (2, 0), (3, 2))
    ]
    assert len({result for ranks in outcomes for result in map(str, ranks)}) == 1


def test_loss_scaling_as_for_fp16_changes_no_bit(config, tmp_path):
    """accelerate makes a scaler only on a GPU; the loop's use of it is the same here. 2**10 scales without rounding."""
    config = dataclasses.replace(config, learning_rate=5e-3, warmup_steps=0, max_grad_norm=0.05)
    plain = run_ranks(_train_on_rank, 2, config, "no", 0, tmp_path)
    assert run_ranks(_train_on_rank, 2, config, "no", 0, tmp_path, 2.0**10) == plain


def test_a_scaled_gradient_that_overflows_skips_the_step_on_all_ranks(config, tmp_path):
    config = dataclasses.replace(config, learning_rate=5e-3, warmup_steps=0)
    untrained = run_ranks(_train_on_rank, 2, dataclasses.replace(config, learning_rate=1e-30), "no", 0, tmp_path)
    skipped = run_ranks(_train_on_rank, 2, config, "no", 0, tmp_path, 2.0**127)
    assert skipped[0][0] == skipped[1][0] and not any(math.isfinite(norm) for _, norm in skipped[0][1])
    assert skipped[0][2] == pytest.approx(untrained[0][2], abs=1e-12)  # the adapter is where it started


def test_another_seed_gives_other_bytes(config, tmp_path):
    first, second = (
        run_ranks(_train_on_rank, 2, dataclasses.replace(config, seed=seed), "no", 0, tmp_path)[0] for seed in (1, 2)
    )
    assert first[0] != second[0]


# name: (strategy, its launcher's flags, the recipe's flags, accumulation, ranks, ranks that share the base)
LAUNCHES = {
    "single": ("single", (), (), 4, 1, 1),
    "ddp": ("ddp", (), (), 2, 2, 1),
    "fsdp": ("fsdp", (), (), 2, 2, 2),
    "gather once": ("fsdp", (), ("--gather_once", "true"), 2, 2, 2),
    "two copies, offloaded": (
        "fsdp", ("--num_processes", "4", "--fsdp_offload_params", "true"), ("--shard_size", "2"), 1, 4, 2,
    ),
}  # fmt: skip


def test_launches_save_the_same_bytes(tmp_path):
    """Through the real launcher and recipe: one process with twice the accumulation, ddp, fsdp and its dials."""
    adapters, losses, gathered = {}, {}, {}
    for name, (strategy, launcher_flags, flags, accumulation, num_ranks, shard_ranks) in LAUNCHES.items():
        folder = tmp_path / name
        launch_recipe(
            strategy,
            *("--max_steps", "3", "--warmup_steps", "1", "--output_dir", str(folder), "--report_to", "none"),
            *("--gradient_accumulation_steps", str(accumulation), "--max_length", "64", *flags),
            launcher_flags=launcher_flags,
        )
        summary = json.loads((folder / "state.json").read_text())["summary"]
        assert (summary["strategy"], summary["world_size"]) == (strategy, num_ranks)
        assert summary["base_bytes_per_rank"] * shard_ranks == summary["base_bytes_total"]
        adapters[name] = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        losses[name] = [summary["loss_first"], summary["loss_last"], summary["eval_loss"]]
        gathered[name] = summary["gathered_bytes_per_step"]
    assert any(t.any() for n, t in load_file(folder / "adapter/adapter_model.safetensors").items() if "lora_B" in n)
    assert len(set(adapters.values())) == 1
    assert len({str(loss) for loss in losses.values()}) == 1
    assert gathered["single"] == gathered["ddp"] == 0
    assert gathered["gather once"] == summary["base_bytes_total"]
    assert gathered["fsdp"] == 2 * gathered["two copies, offloaded"] > 3 * gathered["gather once"]
