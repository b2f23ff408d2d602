"""Documents packed into a row: every model family gives them the logits and gradients that they have alone."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from transformers import FalconConfig

from lora_dist.data.micro_batches import MicroBatches, collate, model_inputs
from lora_dist.data.packing import check_packing, join, prepare_packing
from lora_dist.data.tasks import CAUSAL_LM
from lora_dist.errors import UserError
from lora_dist.model.adapters import add_adapters, probe_logits, trainable_parameters
from lora_dist.model.load import meta_model
from lora_dist.parallel.strategies import Placement
from lora_dist.training.step import check_isolation
from tests.helpers.families import CONFIGS, make_checkpoint
from tests.helpers.parity import batch_of, load_placed, randomize, rows_of
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import start_run

DOCUMENTS = [list(range(5, 17)), list(range(30, 37)), [99, 98], list(range(5, 25)), list(range(50, 59))]
FAMILIES = [family for family in CONFIGS if not family.endswith("tied")]


def _logits_and_gradients(model, batches):
    """(logits of all tokens in order, summed loss, its gradients)."""
    logits, loss = [], 0
    for batch in batches:
        logits.append(probe_logits(model, batch, torch.no_grad)[batch.attention_mask_BT > 0])
        of_batch = model(**model_inputs(model, batch), use_cache=False).logits
        loss = loss + CAUSAL_LM.summed_loss(of_batch, batch.labels_BL)
    return torch.cat(logits), loss, torch.autograd.grad(loss, list(trainable_parameters(model).values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_unpacked(config, tmp_path, family):
    config = dataclasses.replace(
        config, lora_target_modules=["all-linear"], lora_dropout=0.0, gradient_checkpointing=False
    )
    model = add_adapters(load_placed(Placement(), "int8", torch.float32, make_checkpoint(family, tmp_path)), config)
    randomize(model)
    model.eval()
    prepare_packing(model)
    documents = [{"input_ids": ids, "labels": ids} for ids in DOCUMENTS]
    packed = collate([join(documents[:4]), join(documents[4:])], pad_token_id=1)  # with padding
    assert packed.packed and packed.input_ids_BT.shape == (2, sum(map(len, DOCUMENTS[:4])))
    logits, loss, gradients = _logits_and_gradients(model, [batch_of([ids]) for ids in DOCUMENTS])
    packed_logits, packed_loss, packed_gradients = _logits_and_gradients(model, [packed])
    assert (packed_logits - logits).abs().max() < 1e-5 * logits.abs().max()
    assert packed_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    for mine, theirs in zip(packed_gradients, gradients, strict=True):
        assert (mine - theirs).norm() < 1e-4 * theirs.norm()
    joined = batch_of([sum(DOCUMENTS[:4], [])])  # without the mask the documents see each other
    naive = probe_logits(model, joined, torch.no_grad)[0]
    assert (naive - logits[: len(naive)]).abs().max() > 0.1 * logits.std()
    check_isolation(model, torch.tensor(DOCUMENTS[0]), torch.no_grad)


def test_a_model_that_does_not_accept_the_mask_is_refused(config, tmp_path, monkeypatch):
    """Falcon with ALiBi."""
    falcon = FalconConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True)
    monkeypatch.setitem(CONFIGS, "falcon_alibi", falcon)
    path = make_checkpoint("falcon_alibi", tmp_path)
    config = dataclasses.replace(config, packing=True, lora_target_modules=["all-linear"])
    (message,) = run_ranks(_refused_on_rank, 1, config, path)
    assert message.startswith("--packing True: in a falcon the documents of a row cannot be kept apart: ")


def _refused_on_rank(rank, config, path):
    base = load_placed(Placement(), "int8", torch.float32, path)
    model = add_adapters(base, config)
    batches = MicroBatches(rows_of(DOCUMENTS), pad_token_id=1, seed=0, sequences=1, per_step=1, pack_to=64)
    try:
        start_run(model, config, batches)
    except UserError as error:
        return str(error)


def test_documents_that_see_each_other_are_found(config, tmp_path, monkeypatch):
    model = add_adapters(load_placed(Placement(), "int8", torch.float32), config)
    check_isolation(model, torch.tensor(DOCUMENTS[0]), torch.no_grad)
    monkeypatch.setattr(
        "lora_dist.data.packing.block_diagonal", lambda documents: documents.new_ones(1, 1, 24, 24).tril() > 0
    )
    with pytest.raises(UserError, match="--packing True: in a opt the documents of a row see each other"):
        check_isolation(model, torch.tensor(DOCUMENTS[0]), torch.no_grad)
    monkeypatch.undo()
    whole = torch.arange(24)[None]
    monkeypatch.setattr("lora_dist.data.packing.positions_in_documents", lambda documents: whole)
    with pytest.raises(UserError, match="see each other"):  # position ids that do not start again
        check_isolation(model, torch.tensor(DOCUMENTS[0]), torch.no_grad)


def test_a_sliding_window_shorter_than_the_rows_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr(CONFIGS["mistral"], "sliding_window", 32)
    model = meta_model(str(make_checkpoint("mistral", tmp_path)), "int8", torch.float32)
    check_packing(model, dataclasses.replace(config, max_length=32))
    with pytest.raises(
        UserError, match="--packing True: this model's layers see only 32 tokens back, .*--max_length 32"
    ):
        check_packing(model, dataclasses.replace(config, max_length=64))


def test_packed_rows_hold_every_document_once():
    """Documents follow each other without gaps, and `attention_mask` numbers them in order."""
    batches = MicroBatches(
        rows_of(DOCUMENTS), pad_token_id=1, seed=0, sequences=2, per_step=1, pack_to=30, num_epochs=1
    )
    found = []
    for step in range(batches.num_steps):
        batch = batches(step, 0)
        for ids, numbers in zip(batch.input_ids_BT, batch.attention_mask_BT, strict=True):
            assert all(later - earlier in (0, 1) for earlier, later in pairwise(numbers[numbers > 0].tolist()))
            found += [ids[numbers == number].tolist() for number in range(1, int(numbers.max()) + 1)]
    assert sorted(found) == sorted(DOCUMENTS)
