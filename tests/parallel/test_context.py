"""Ranks that share rows train as one rank on whole rows, each with its part of the activations."""

import dataclasses

import pytest
import torch

from lora_dist.errors import UserError
from lora_dist.model.adapters import fingerprint, trainable_parameters
from lora_dist.model.load import meta_model
from lora_dist.parallel.context import FAMILIES, check_context_parallel
from lora_dist.parallel.fsdp import decoder_layers
from lora_dist.parallel.strategies import Placement
from lora_dist.training.evaluation import evaluate
from lora_dist.training.step import train_step
from tests.helpers.families import CONFIGS, make_checkpoint
from tests.helpers.parity import load_placed, zero
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import make_run


def _train_on_rank(rank, config, path, placement):
    """(2 steps, evaluation, adapter, its sha256, longest row that a layer saw)."""
    run = make_run(config, load_placed(placement, config.quantization, torch.float32, path), placement)
    lengths = []
    decoder_layers(run.model)[0].register_forward_hook(lambda layer, args, output: lengths.append(output.shape[1]))
    run.model.train()
    steps = [train_step(run.training, step) for step in range(2)]
    figures = [(s.loss, s.grad_norm, s.num_trained_tokens, s.num_tokens, s.num_positions) for s in steps]
    adapter = {name: param.detach().clone() for name, param in trainable_parameters(run.model).items()}
    return figures, evaluate(run), adapter, fingerprint(run.model).hex(), max(lengths)


def assert_close(ranks, whole, learning_rate, num_pieces):
    figures, evaluation, adapter, _, longest = whole
    for their_figures, their_evaluation, their_adapter, sha256, piece in ranks:
        for mine, theirs in zip(figures, their_figures, strict=True):
            assert theirs[:2] == pytest.approx(mine[:2], rel=2e-6) and theirs[2:] == mine[2:]
        assert their_evaluation[0] == pytest.approx(evaluation[0], rel=2e-6)
        assert their_evaluation[1] == pytest.approx(evaluation[1], rel=2e-6)
        # Compared by norm: if a gradient is near zero, which is rare, AdamW turns a rounding of it into a visible step.
        apart = torch.cat([(their_adapter[name] - param).flatten() for name, param in adapter.items()])
        assert apart.norm() < 1e-3 * learning_rate * apart.numel() ** 0.5
        assert sha256 == ranks[0][3] and piece == -(-longest // num_pieces)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_two_ranks_on_each_row_train_as_one(config, tmp_path, monkeypatch, family):
    quantization = "nf4" if family in ("llama", "qwen3") else "int8"
    config = dataclasses.replace(
        config, quantization=quantization, lora_target_modules=["all-linear"], learning_rate=1e-4, warmup_steps=0,
        lora_dropout=0.0,
    )  # fmt: skip
    for name in ("attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout"):  # drawn for each piece, so it would differ
        if hasattr(CONFIGS[family], name):
            monkeypatch.setattr(CONFIGS[family], name, 0.0)  # for this test only
    path = make_checkpoint(family, tmp_path)
    (whole,) = run_ranks(_train_on_rank, 1, config, path, Placement())
    assert all(p.any() for p in whole[2].values())
    assert_close(run_ranks(_train_on_rank, 2, config, path, Placement(2, context_ranks=2)), whole, 1e-4, 2)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_packed_rows_are_shared_too(config, tmp_path, monkeypatch, family):
    """Documents cross from one rank's piece into the other's, and positions start again inside a piece."""
    config = dataclasses.replace(
        config, packing=True, max_length=50, learning_rate=1e-4, warmup_steps=0, lora_dropout=0.0
    )
    if family == "opt":
        monkeypatch.setattr(CONFIGS["opt"], "dropout", 0.0)
    path = make_checkpoint(family, tmp_path)
    (whole,) = run_ranks(_train_on_rank, 1, config, path, Placement())
    assert_close(run_ranks(_train_on_rank, 2, config, path, Placement(2, context_ranks=2)), whole, 1e-4, 2)


# One or two groups of two ranks, under several placements and with dropout: the same bytes.
GROUPS = {
    "2 ranks, fsdp": (2, Placement(2, context_ranks=2)),
    "2 ranks, ddp": (2, Placement(context_ranks=2)),
    "2 ranks, zero3": (2, Placement(2, deepspeed=zero(3), context_ranks=2)),
    "4 ranks, hsdp": (4, Placement(2, context_ranks=2)),
    "4 ranks, fsdp": (4, Placement(4, 1, context_ranks=2)),
}


def test_groups_of_two_give_the_same_bytes_at_any_number_of_ranks(config):
    config = dataclasses.replace(config, learning_rate=5e-3, warmup_steps=0, max_grad_norm=0.05)
    ranks = {
        (name, rank): (figures, evaluation, sha256)
        for name, (num_ranks, placement) in GROUPS.items()
        for rank, (figures, evaluation, _, sha256, _) in enumerate(
            run_ranks(_train_on_rank, num_ranks, config, "embedded", placement)
        )
    }
    assert len(set(map(str, ranks.values()))) == 1, ranks


def test_three_ranks_on_each_row_and_a_checkpointed_layer(config, tmp_path):
    config = dataclasses.replace(config, learning_rate=1e-4, warmup_steps=0, lora_dropout=0.0)
    path = make_checkpoint("llama", tmp_path)
    (whole,) = run_ranks(_train_on_rank, 1, config, path, Placement())
    plain = dataclasses.replace(config, gradient_checkpointing=False)
    for with_checkpointing in (config, plain):
        ranks = run_ranks(_train_on_rank, 3, with_checkpointing, path, Placement(3, context_ranks=3))
        assert_close(ranks, whole, 1e-4, 3)


@pytest.mark.parametrize(
    "family, size, words",
    [
        ("llama", 3, "--context_parallel_size 3: must divide the 4 ranks"),
        ("bloom", 2, "--context_parallel_size 2: is not supported for a bloom; it is for gemma, gpt2"),
        ("mistral", 2, "is not supported for a mistral"),
    ],
)
def test_what_is_refused(config, tmp_path, family, size, words):
    model = meta_model(str(make_checkpoint(family, tmp_path)), "int8", torch.float32)
    with pytest.raises(UserError, match=words):
        check_context_parallel(model, dataclasses.replace(config, context_parallel_size=size), 4)
    model.config.model_type, model.config.sliding_window = "llama", 64
    with pytest.raises(UserError, match="sliding window"):
        check_context_parallel(model, dataclasses.replace(config, context_parallel_size=2), 4)
