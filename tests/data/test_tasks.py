"""Classifiers and sequence-to-sequence models: one adapter on any number of ranks, and transformers' own loss."""

import dataclasses
from functools import partial

import pytest
import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import (
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from lora_dist.data.formats import load_tokenizer
from lora_dist.data.micro_batches import MicroBatches, collate
from lora_dist.data.rows import Rows
from lora_dist.data.tasks import IGNORE_INDEX, TASKS
from lora_dist.errors import UserError
from lora_dist.model.adapters import add_adapters, fingerprint, is_trained_parameter, save_adapter, trainable_parameters
from lora_dist.model.load import BaseOptions, load_with, meta_model
from lora_dist.model.memory import base_bytes
from lora_dist.model.quantize_model import quantized_fraction
from lora_dist.parallel.strategies import Placement
from lora_dist.training.evaluation import evaluate, held_out_labels, predict
from lora_dist.training.step import train_step
from tests.helpers.families import make_checkpoint
from tests.helpers.parity import CPU, zero
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import start_run

CLASSES = ["one", "two", "three", "four", "five"]
# Labels of row number `row`, which has `length` tokens.
LABELS = {
    "SEQ_CLS": lambda row, length: [row % 5],
    "several of SEQ_CLS": lambda row, length: [int(row % (number + 2) == 0) for number in range(5)],
    "TOKEN_CLS": lambda row, length: [(row + i) % 5 if i % 3 else IGNORE_INDEX for i in range(length)],
    "SEQ_2_SEQ_LM": lambda row, length: [3 + (row * 7 + i) % 120 for i in range(2 + row % 4)],
}


def make_rows(kind) -> Rows:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 30, (22,), generator=generator).tolist()
    ids = [torch.randint(3, 127, (length,), generator=generator).tolist() for length in lengths]
    return Rows.of([(row, LABELS[kind](i, len(row))) for i, row in enumerate(ids)])


def make_base(kind, folder):
    if kind != "SEQ_2_SEQ_LM":
        return make_checkpoint("llama", folder)  # a causal language model: the classifier's head is new
    torch.manual_seed(0)
    t5 = T5Config(
        vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=True,
    )  # fmt: skip
    T5ForConditionalGeneration(t5).save_pretrained(folder / "t5")
    return folder / "t5"


def make_model(config, path, placement, dtype=torch.float32):
    task = TASKS[config.task_type]
    options = BaseOptions(
        config.quantization, dtype, CPU, placement, partial(is_trained_parameter, config), task,
        CLASSES if task.has_classes else None,
    )  # fmt: skip
    return load_with(str(path), options)


def _train_on_rank(rank, config, kind, path, placement, folder):
    model = make_model(config, path, placement)
    base, task = base_bytes(model), TASKS[config.task_type]
    if placement.shard_ranks > 1 and not placement.zero_stage:
        assert all(isinstance(p, DTensor) != is_trained_parameter(config, name) for name, p in model.named_parameters())
        assert base.quantized_held < 1.1 * base.quantized_total / placement.shard_ranks
    model.config.pad_token_id = 0
    model = add_adapters(model, config)
    batches = MicroBatches(make_rows(kind), pad_token_id=0, seed=0, sequences=3, per_step=4, task=task, num_epochs=1)
    run = start_run(model, config, batches, held_out=make_rows(kind), placement=placement)
    model.train()
    steps = [train_step(run.training, step) for step in range(batches.num_steps)]
    if rank == 0 and folder:
        save_adapter(model, load_tokenizer("embedded"), folder)
    figures = [(s.loss, s.grad_norm, s.num_trained_tokens) for s in steps]
    return fingerprint(model).hex(), figures, evaluate(run), predict(run).tolist()


@pytest.mark.parametrize("kind", LABELS)
def test_one_adapter_on_any_number_of_ranks(config, tmp_path, kind):
    config = dataclasses.replace(
        config, task_type=kind.removeprefix("several of "), learning_rate=5e-3, warmup_steps=0,
        lora_target_modules=["q", "v", "wi_0"] if kind == "SEQ_2_SEQ_LM" else ["q_proj", "v_proj"],
    )  # fmt: skip
    path = make_base(kind, tmp_path)
    (one,) = run_ranks(_train_on_rank, 1, config, kind, path, Placement(), tmp_path / "adapter")
    placements = [(2, Placement()), (2, Placement(2)), (3, Placement(3))]
    if kind == "SEQ_2_SEQ_LM":  # not for classifiers: ZeRO-3 does not support a head that is trained whole
        placements.append((2, Placement(2, deepspeed=zero(3))))
    for num_ranks, placement in placements:
        ranks = run_ranks(_train_on_rank, num_ranks, config, kind, path, placement, None)
        assert ranks == [one] * num_ranks
    _, steps, _, predictions = one
    assert len(steps) == 2 and all(norm > 0 for _, norm, _ in steps) and len(predictions) == 22


@pytest.mark.parametrize("kind", LABELS)
def test_transformers_and_peft_compute_the_same_loss(config, tmp_path, kind):
    """Load the saved adapter into transformers' own model and compute the loss with its own forward."""
    config = dataclasses.replace(
        config, task_type=kind.removeprefix("several of "), quantization="none", learning_rate=5e-3, warmup_steps=0,
        lora_target_modules=["q", "v"] if kind == "SEQ_2_SEQ_LM" else ["q_proj", "v_proj"],
    )  # fmt: skip
    path = make_base(kind, tmp_path)
    ((_, _, (evaluation, measures), predictions),) = run_ranks(
        _train_on_rank, 1, config, kind, path, Placement(), tmp_path / "adapter"
    )
    rows, task, settings = make_rows(kind), TASKS[config.task_type], {"dtype": torch.float32}
    if kind == "SEQ_2_SEQ_LM":
        base = T5ForConditionalGeneration.from_pretrained(path, **settings)
    else:
        classifier = LlamaForTokenClassification if kind == "TOKEN_CLS" else LlamaForSequenceClassification
        base = classifier.from_pretrained(path, num_labels=5, pad_token_id=0, **settings)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    total = num_trained = correct = 0
    for i in range(len(rows)):
        batch = collate([rows[i]], 0, task)
        labels = batch.labels_BL
        if kind.startswith("several"):
            model.config.problem_type, labels = "multi_label_classification", labels.float()
        elif kind == "SEQ_CLS":
            model.config.problem_type, labels = "single_label_classification", labels[:, 0]
        with torch.no_grad():
            out = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, labels=labels)
        total, num_trained = total + out.loss.item() * batch.num_trained_tokens, num_trained + batch.num_trained_tokens
        correct += int(((out.logits > 0) if kind.startswith("several") else out.logits.argmax(-1)).eq(labels).sum())
        if kind.endswith("SEQ_CLS"):
            assert torch.allclose(out.logits[0], torch.tensor(predictions[i]), atol=1e-5)
        elif kind == "SEQ_2_SEQ_LM":  # 1.0 if greedy decoding writes exactly the target
            written = model.generate(input_ids=batch.input_ids_BT, max_new_tokens=labels.shape[1], do_sample=False)
            assert predictions[i] == [float(written[0, 1:].tolist() == labels[0].tolist())]
    assert total / num_trained == pytest.approx(evaluation, rel=1e-6)
    accuracy = measures["mean_token_accuracy"]
    assert 0 < accuracy < 1 and accuracy == correct / num_trained
    if task.has_classes:
        assert (tmp_path / "adapter" / "labels.json").read_text() == '["one", "two", "three", "four", "five"]\n'


def test_t5_is_quantized_except_for_its_position_biases(tmp_path):
    path = str(make_base("SEQ_2_SEQ_LM", tmp_path))
    share, left = quantized_fraction(meta_model(path, "int8", torch.float32, TASKS["SEQ_2_SEQ_LM"]))
    assert share > 0.97 and {name.rpartition(".")[0].rpartition(".")[2] for name in left} == {"relative_attention_bias"}
    with pytest.raises(UserError, match="is not a causal language model"):
        meta_model(path, "int8", torch.float32)


def _untrained_heads_on_rank(rank, config, path, seed):
    model = add_adapters(make_model(config, path, Placement(2)), dataclasses.replace(config, seed=seed))
    return {name: param.detach().clone() for name, param in trainable_parameters(model).items() if "score" in name}


def test_the_seed_decides_the_weights_of_a_new_head(config, tmp_path):
    config, path = dataclasses.replace(config, task_type="SEQ_CLS"), make_base("SEQ_CLS", tmp_path)
    first, second = run_ranks(_untrained_heads_on_rank, 2, config, path, 1)
    other, _ = run_ranks(_untrained_heads_on_rank, 2, config, path, 2)
    (name,) = first
    assert torch.equal(first[name], second[name]) and not torch.equal(first[name], other[name])
    assert first[name].dtype == torch.float32 and 0.01 < first[name].std() < 0.03


def test_held_out_labels_come_in_the_order_of_the_rows(config):
    class Run:
        held_out = make_rows("several of SEQ_CLS")

    assert held_out_labels(Run).tolist() == [LABELS["several of SEQ_CLS"](i, 0) for i in range(22)]
