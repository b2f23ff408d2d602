"""The flagship: the adapter's bytes do not depend on the number of ranks or on where the base lies."""

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator

from lora_dist.data.formats import load_tokenizer
from lora_dist.data.micro_batches import MicroBatches
from lora_dist.data.rows import Rows, prepare_rows
from lora_dist.model.adapters import add_adapters, check_identical, fingerprint
from lora_dist.model.memory import base_bytes
from lora_dist.parallel.fsdp import decoder_layers, sharded_modules
from lora_dist.parallel.strategies import Placement
from lora_dist.parallel.zero import whole_shape
from lora_dist.training.evaluation import evaluate
from lora_dist.training.step import train_step
from tests.helpers.parity import assert_as_checked_in, load_placed, zero
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import start_run

MICRO_BATCHES_PER_STEP = 12


def _train_on_rank(rank, config, mixed_precision, placement, folder, loss_scale=None):
    """3 optimizer steps and an evaluation: (adapter sha256, loss and gradient norm of each step, evaluation)."""
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    if loss_scale:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale)
    num_ranks = accelerator.num_processes
    assert num_ranks == dist.get_world_size() and accelerator.process_index == rank
    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[mixed_precision]
    model = load_placed(placement, config.quantization, dtype, config=config)
    base = base_bytes(model)
    assert_placed(model, placement, base)
    model = add_adapters(model, config)
    tokenizer = load_tokenizer("embedded")
    data = prepare_rows(dataclasses.replace(config, max_length=64), tokenizer)
    eval_rows = Rows(data.held_out.table.select(range(20)))
    micro_batches = MicroBatches(
        data.train, pad_token_id=tokenizer.pad_token_id, seed=config.seed, sequences=2, per_step=MICRO_BATCHES_PER_STEP
    )
    run = start_run(model, config, micro_batches, held_out=eval_rows, placement=placement, accelerator=accelerator)
    torch.manual_seed(1000 + rank)  # nothing may depend on the ambient random state
    model.train()
    steps = [train_step(run.training, step) for step in range(3)]
    assert check_identical(model) == fingerprint(model).hex()
    return fingerprint(model).hex(), [(s.loss, s.grad_norm) for s in steps], evaluate(run)


def assert_placed(model, placement, base):
    """The base lies where the placement says: which modules are sharded, and the bytes."""
    num_ranks, layers = dist.get_world_size(), decoder_layers(model)
    sharded = placement.shard_ranks > 1
    assert len(sharded_modules(model)) == (
        len(layers) - placement.resident_layers + 1 if sharded and not placement.zero_stage else 0
    )
    if placement.zero_stage == 3:
        matrices = [p for p in model.parameters() if len(whole_shape(p)) > 1]
        assert all(p.data.numel() == 0 and p.ds_tensor.numel() == -(-p.ds_numel // num_ranks) for p in matrices)
    elif placement.stages > 1:
        outside = base.total - sum(base_bytes(layer).total for layer in layers)
        assert base.held < outside + 1.1 * (base.total - outside) * -(-len(layers) // num_ranks) / len(layers)
    elif sharded and not placement.resident_layers:
        assert base.held < 1.1 * base.total / placement.shard_ranks
    elif not sharded:
        assert base.held == base.total


# Every way to place the base on so many ranks.
PLACEMENTS = {
    "1 rank": (1, Placement()),
    "2 ranks, ddp": (2, Placement()),
    "2 ranks, fsdp": (2, Placement(2)),
    "2 ranks, fsdp, 2 layers resident, gathered once": (2, Placement(2, 2, gather_once=True)),
    "3 ranks, fsdp": (3, Placement(3)),
    "4 ranks, fsdp, offloaded, 3 layers resident": (4, Placement(4, 3, offload=True)),
    "4 ranks, hsdp": (4, Placement(2)),
    "2 ranks, zero2": (2, Placement(deepspeed=zero(2))),
    "4 ranks, zero2": (4, Placement(deepspeed=zero(2))),
    "2 ranks, zero3": (2, Placement(2, deepspeed=zero(3))),
    "3 ranks, zero3, offloaded": (3, Placement(3, offload=True, deepspeed=zero(3, offload=True))),
    "2 ranks, pipeline": (2, Placement(stages=2)),
    "3 ranks, pipeline": (3, Placement(stages=3)),
}
# Of the other formats and precisions, the engines once each; 12 / 3 = 4 micro-batches, which start inside a subtree.
FEW = ("1 rank", "2 ranks, zero3", "2 ranks, pipeline", "3 ranks, fsdp")


@pytest.mark.parametrize(
    "quantization, mixed_precision, names",
    [
        ("int8", "no", PLACEMENTS),
        pytest.param("int8", "bf16", FEW, marks=pytest.mark.slow),  # emulated on some CPUs
        pytest.param("nf4", "no", FEW, marks=pytest.mark.slow),
    ],
)
def test_one_adapter_at_any_world_size_and_placement(config, tmp_path, quantization, mixed_precision, names):
    assert_one_adapter(config, tmp_path, quantization, mixed_precision, names)


@pytest.mark.slow
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("quantization", ["int8", "nf4", "nf4_plain", "none"])
def test_every_format_under_every_placement(config, tmp_path, quantization, mixed_precision):
    assert_one_adapter(config, tmp_path, quantization, mixed_precision, PLACEMENTS)


def assert_one_adapter(config, tmp_path, quantization, mixed_precision, names):
    # A high learning rate from the first step on, and a low clipping threshold: everything has to act.
    config = dataclasses.replace(
        config, quantization=quantization, learning_rate=5e-3, warmup_steps=0, max_grad_norm=0.05, max_steps=3
    )
    outcomes = {
        (name, rank): result
        for name in names
        for rank, result in enumerate(
            run_ranks(_train_on_rank, PLACEMENTS[name][0], config, mixed_precision, PLACEMENTS[name][1], tmp_path)
        )
    }
    sha256, steps, evaluation = outcomes["1 rank", 0]
    assert all(norm > config.max_grad_norm for _, norm in steps) and steps[0][0] > steps[-1][0] and evaluation[0] > 0
    assert {where: result for where, result in outcomes.items() if result != (sha256, steps, evaluation)} == {}
    assert_as_checked_in(f"{quantization} {mixed_precision}", [*map(list, steps), evaluation[0]])


def test_zero2_on_three_ranks_is_within_one_rounding(config, tmp_path):
    """DeepSpeed divides by the number of ranks, which rounds where that is no power of two."""
    config = dataclasses.replace(config, learning_rate=1e-4, warmup_steps=0, max_grad_norm=0.05, lora_dropout=0.0)
    ((_, one, evaluation),) = run_ranks(_train_on_rank, 1, config, "no", Placement(), tmp_path)
    for _, steps, zero2_evaluation in run_ranks(
        _train_on_rank, 3, config, "no", Placement(deepspeed=zero(2)), tmp_path
    ):
        assert steps[0] == one[0]
        assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in one], rel=1e-6)
        assert zero2_evaluation[0] == pytest.approx(evaluation[0], rel=1e-6)
        assert zero2_evaluation[1] == pytest.approx(evaluation[1], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"lora_bias": "all", "loraplus_lr_ratio": 16.0}, {"use_dora": True, "use_rslora": True}], ids=str
)
def test_one_adapter_with_loras_options(config, tmp_path, settings):
    config = dataclasses.replace(config, learning_rate=5e-3, warmup_steps=0, max_grad_norm=0.05, **settings)
    outcomes = [
        run_ranks(_train_on_rank, num_ranks, config, "bf16", placement, tmp_path)
        for num_ranks, placement in ((1, Placement()), (2, Placement(deepspeed=zero(2))), (3, Placement(3, 2)))
    ]
    assert len({result for ranks in outcomes for result in map(str, ranks)}) == 1


@pytest.mark.parametrize("placement", [Placement(2), Placement(stages=2)], ids=["fsdp", "pipeline"])
def test_loss_scaling_as_for_fp16_changes_no_bit(config, tmp_path, placement):
    """accelerate makes a scaler only on a GPU; the loop's use of it is the same here. 2**10 scales without rounding."""
    config = dataclasses.replace(config, learning_rate=5e-3, warmup_steps=0, max_grad_norm=0.05)
    plain = run_ranks(_train_on_rank, 2, config, "no", placement, tmp_path)
    assert run_ranks(_train_on_rank, 2, config, "no", placement, tmp_path, 2.0**10) == plain


def test_a_scaled_gradient_that_overflows_skips_the_step_on_all_ranks(config, tmp_path):
    config = dataclasses.replace(config, learning_rate=5e-3, warmup_steps=0)
    untrained = run_ranks(
        _train_on_rank, 2, dataclasses.replace(config, learning_rate=1e-30), "no", Placement(2), tmp_path
    )
    skipped = run_ranks(_train_on_rank, 2, config, "no", Placement(2), tmp_path, 2.0**127)
    assert skipped[0][0] == skipped[1][0] and not any(math.isfinite(norm) for _, norm in skipped[0][1])
    assert skipped[0][2][0] == pytest.approx(untrained[0][2][0], abs=1e-12)  # the adapter is where it started


def test_another_seed_gives_other_bytes(config, tmp_path):
    first, second = (
        run_ranks(_train_on_rank, 2, dataclasses.replace(config, seed=seed), "no", Placement(2), tmp_path)[0]
        for seed in (1, 2)
    )
    assert first[0] != second[0]
