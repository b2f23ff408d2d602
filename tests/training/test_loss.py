"""The loss, its gradient and the evaluation, means over all ranks' trained tokens: against one big batch in fp64."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_dist.data.micro_batches import MicroBatches, collate
from lora_dist.data.rows import Rows
from lora_dist.data.tasks import CAUSAL_LM, IGNORE_INDEX
from lora_dist.model.adapters import add_adapters, trainable_parameters
from lora_dist.parallel.strategies import Placement
from lora_dist.training.evaluation import evaluate
from lora_dist.training.step import train_step
from tests.helpers.families import make_checkpoint
from tests.helpers.parity import load_placed, randomize
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import start_run

ORDERS = {"random": {}, "packed": {"pack_to": 80}, "grouped": {"group_by_length": True}}


def rows() -> Rows:
    """Of very different lengths, and most of a row only read: a mean of means would be far off."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 60, (15,), generator=generator).tolist()
    ids = [torch.randint(3, 127, (length,), generator=generator).tolist() for length in lengths]
    read = [length * (i % 3) // 4 for i, length in enumerate(lengths)]
    return Rows.of([(row, [IGNORE_INDEX] * n + row[n:]) for row, n in zip(ids, read, strict=True)])


def make_model(config, base):
    model = add_adapters(base, config)
    randomize(model)
    return model


def _on_rank(rank, config, path, settings):
    base = load_placed(Placement(), "none", torch.float32, path)
    batches = MicroBatches(rows(), pad_token_id=1, seed=0, sequences=2, per_step=6, num_epochs=1, **settings)
    run = start_run(make_model(config, base), config, batches, held_out=rows())
    evaluation = evaluate(run)
    assert batches.num_steps in (1, 2)
    steps = [train_step(run.training, step) for step in range(batches.num_steps)]
    ids = [
        [i for index in range(6) for row in batches.row_ids(s, index) for i in row] for s in range(batches.num_steps)
    ]
    for step, result in enumerate(steps):  # all ranks' positions, and pairs of them
        shapes = [batches(step, index).input_ids_BT.shape for index in range(6)]
        assert result.num_positions == sum(rows * length for rows, length in shapes)
        assert result.num_pairs == sum(rows * length**2 for rows, length in shapes)
    return (
        [(s.loss, s.grad_norm, s.num_trained_tokens, s.measures["mean_token_accuracy"]) for s in steps],
        evaluation,
        ids,
    )


def one_big_batch(model, chosen):
    """(loss, gradient norm, trained tokens, share of them predicted right) in fp64."""
    all_rows = rows()
    batch = collate([all_rows[i] for i in chosen], pad_token_id=1)
    logits = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
    scores = logits[:, :-1].log_softmax(-1)
    labels = batch.labels_BL[:, 1:]
    trained = labels != IGNORE_INDEX
    loss = -scores.gather(2, labels.clamp(min=0)[..., None])[..., 0][trained].mean()
    gradients = torch.autograd.grad(loss, list(trainable_parameters(model).values()))
    norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients]))
    return loss.item(), norm.item(), int(trained.sum()), (logits[:, :-1].argmax(-1) == labels)[trained].double().mean()


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize(
    "settings", [{}, {"pack_to": 80}, {"group_by_length": True}], ids=["plain", "packed", "grouped"]
)
def test_against_one_big_batch_in_fp64(config, tmp_path, num_ranks, settings):
    """15 rows in steps of 12 places: the last step is uneven, and some ranks have nothing in it."""
    config = dataclasses.replace(
        config, lora_dropout=0.0, warmup_steps=0, learning_rate=1e-30, packing="pack_to" in settings
    )
    path = make_checkpoint("llama", tmp_path, torch.float32)
    ranks = run_ranks(_on_rank, num_ranks, config, path, settings)
    assert all(rank == ranks[0] for rank in ranks)
    steps, evaluation, ids = ranks[0]
    assert sorted(i for step in ids for i in step) == list(range(15))
    model = make_model(config, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)).double()
    for (loss, norm, num_trained, accuracy), chosen in zip(steps, ids, strict=True):
        big_loss, big_norm, big_trained, big_accuracy = one_big_batch(model, chosen)
        assert num_trained == big_trained and accuracy == pytest.approx(big_accuracy.item())
        assert loss == pytest.approx(big_loss, rel=1e-6) and norm == pytest.approx(big_norm, rel=1e-5)
    big_loss, _, _, big_accuracy = one_big_batch(model, range(15))
    measures = pytest.approx({"mean_token_accuracy": big_accuracy.item()})
    assert evaluation == (pytest.approx(big_loss, rel=1e-6), measures)


def test_a_mean_of_means_would_be_found_out(config, tmp_path):
    """The rows of the test above are such that the usual fault shows."""
    path = make_checkpoint("llama", tmp_path, torch.float32)
    model = make_model(config, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)).double().eval()
    means = []
    for i in range(12):
        batch = collate([rows()[i]], 1)
        loss = CAUSAL_LM.summed_loss(model(input_ids=batch.input_ids_BT).logits, batch.labels_BL).item()
        means.append(loss / batch.num_trained_tokens)
    assert sum(means) / 12 != pytest.approx(one_big_batch(model, range(12))[0], rel=1e-4)
