"""Losses of pairs: TRL's loss and gradients on one process; one adapter on any number of ranks; the kept reference."""

import dataclasses
import json
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset

from lora_dist.data.formats import load_tokenizer
from lora_dist.data.micro_batches import MicroBatches
from lora_dist.data.preference.loss import pair_loss
from lora_dist.data.preference.reference import keep_reference, read_reference, reference_folder
from lora_dist.data.rows import Rows, prepare_rows
from lora_dist.data.tasks import IGNORE_INDEX, PAIR_MEASURES, PREFERENCE
from lora_dist.embedded import PREFERENCES_DIR
from lora_dist.model.adapters import add_adapters, fingerprint, save_adapter, trainable_parameters
from lora_dist.model.memory import base_bytes
from lora_dist.parallel.fsdp import sharded_modules
from lora_dist.parallel.strategies import Placement
from lora_dist.training import evaluation
from lora_dist.training.evaluation import evaluate, set_reference
from lora_dist.training.session import turn_off_dropout
from lora_dist.training.step import sum_over_ranks, train_step
from lora_dist.training.timing import Stopwatch
from tests.helpers.parity import CPU, load_placed, load_unsharded, randomize, zero
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import start_run

PAIRS_PER_BATCH, BATCHES = 4, 2
BOUND = 2e-6  # of the loss, and of each gradient relative to the largest


@pytest.fixture
def preferences(config):
    return dataclasses.replace(
        config, dataset_name="embedded/preferences", dataset_text_field=None, loss_type="sigmoid", max_length=128,
        lora_dropout=0.0, warmup_steps=0, max_steps=None, num_train_epochs=1,
        per_device_train_batch_size=PAIRS_PER_BATCH,
    )  # fmt: skip


def make_run(config, placement, *, per_step=BATCHES):
    model = load_placed(placement, config.quantization, torch.float32)
    turn_off_dropout(model)
    model = add_adapters(model, config)
    tokenizer = load_tokenizer("embedded")
    data = prepare_rows(config, tokenizer)
    batches = MicroBatches(
        data.train, pad_token_id=tokenizer.pad_token_id, seed=config.seed, sequences=config.per_device_train_batch_size,
        per_step=per_step, task=PREFERENCE, num_epochs=config.num_train_epochs,
    )  # fmt: skip
    return start_run(model, config, batches, held_out=data.held_out, placement=placement, tokenizer=tokenizer)


# --- TRL


def _ours_on_rank(rank, config):
    run = make_run(config, Placement())
    randomize(run.model)
    before = fingerprint(run.model)
    set_reference(run)
    assert fingerprint(run.model) == before  # also if the reference is another adapter
    run.model.train()
    flat, _ = sum_over_ranks(run.training, 0, Stopwatch(CPU, lambda: 0.0))
    numel = sum(p.numel() for p in run.training.params)
    num_sums = 1 + len(PAIR_MEASURES)  # the loss and these; the number of pairs follows
    flat /= flat[numel + num_sums].item()
    loss, *measured = flat[numel : numel + num_sums].tolist()
    chosen = [ids[0] // 2 for index in range(BATCHES) for ids in run.training.micro_batches.row_ids(0, index)]
    step = train_step(run.training, 0)
    assert step.loss == pytest.approx(loss, rel=1e-6)
    return loss, flat[:numel], step.grad_norm, dict(zip(PAIR_MEASURES, measured, strict=True)), chosen


def _trl_on_rank(rank, config, model, chosen, folder):
    """The same from TRL, whose reference is the base, or with `--reference_adapter` the adapter that `model` has."""
    from trl import DPOConfig, DPOTrainer

    as_reference, lora = bool(config.reference_adapter), model.peft_config["default"]
    lines = (PREFERENCES_DIR / "train.jsonl").read_text().splitlines()
    arguments = DPOConfig(
        output_dir=str(folder), beta=config.beta, loss_type=[config.loss_type], label_smoothing=config.label_smoothing,
        max_length=config.max_length, report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=model if as_reference else model.unload(), args=arguments, processing_class=load_tokenizer("embedded"),
        train_dataset=Dataset.from_list([json.loads(lines[i]) for i in chosen]),
        peft_config=None if as_reference else lora,
    )  # fmt: skip
    params = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all(".default." in name for name in params)
    for param in params.values():  # TRL rounds the adapters on a quantized base to bf16
        param.data = param.data.float()
    randomize(trainer.model)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    gradient = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(params.values()))])
    return loss.item(), gradient, {name: trainer._metrics["train"][name][0] for name in PAIR_MEASURES}


def spread(model):
    """Adapters that are not those of `randomize`, as a reference."""
    for index, param in enumerate(trainable_parameters(model).values()):
        param.data.copy_(torch.randn(param.shape, generator=torch.Generator().manual_seed(100 + index)) * 0.03)


LOSSES = {
    "sigmoid": {}, "hinge": {"loss_type": "hinge"}, "ipo": {"loss_type": "ipo", "beta": 0.2},
    "robust": {"loss_type": "robust", "label_smoothing": 0.2}, "sigmoid, int8": {"quantization": "int8"},
}  # fmt: skip


@pytest.mark.parametrize("kind", [*LOSSES, "reference adapter"])
def test_trl_gives_our_loss_and_gradients(preferences, tmp_path, kind):
    config = dataclasses.replace(preferences, **({"quantization": "none"} | LOSSES.get(kind, {})))
    base = load_unsharded(config.quantization, torch.float32)  # here, because its threads do not work in a fork
    turn_off_dropout(base)
    model = add_adapters(base, config)
    if kind == "reference adapter":
        spread(model)
        save_adapter(model, load_tokenizer("embedded"), tmp_path / "adapter")
        config = dataclasses.replace(config, reference_adapter=str(tmp_path / "adapter"))
    ((loss, gradient, norm, measures, chosen),) = run_ranks(_ours_on_rank, 1, config)
    ((their_loss, theirs, their_measures),) = run_ranks(_trl_on_rank, 1, config, model, chosen, tmp_path / "trl")
    assert len(set(chosen)) == PAIRS_PER_BATCH * BATCHES and gradient.abs().max() > 1e-3
    assert loss == pytest.approx(their_loss, abs=BOUND)
    assert (gradient - theirs).abs().max() < BOUND * max(1, theirs.abs().max())
    assert norm == pytest.approx(theirs.norm().item(), rel=1e-5)
    assert measures == pytest.approx(their_measures, rel=1e-5, abs=1e-5)
    assert 0 < measures["rewards/accuracies"] < 1 and abs(measures["rewards/margins"]) > 0.01


def test_label_smoothing_of_sigmoid_is_the_mean_over_both_orders(preferences):
    """TRL's sigmoid has none; this is the conservative DPO of the authors of the paper."""
    logps = torch.tensor([-10.0, -12.0, -20.0, -15.0], dtype=torch.float64)
    reference, labels = torch.tensor([-11.0, -11.0, -18.0, -18.0], dtype=torch.float64), torch.tensor([[0, 1]] * 4)
    plain = pair_loss(logps, reference, labels, preferences)[0].item()
    swapped = pair_loss(-logps, -reference, labels, preferences)[0].item()
    smoothed = dataclasses.replace(preferences, label_smoothing=0.1)
    assert pair_loss(logps, reference, labels, smoothed)[0].item() == pytest.approx(0.9 * plain + 0.1 * swapped)
    margins = 0.1 * torch.tensor([(1.0 + 1.0), (-2.0 - 3.0)])
    assert plain == pytest.approx(torch.log1p(torch.exp(-margins)).sum().item(), rel=1e-6)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_a_pair_that_trains_nothing_counts_as_nothing(preferences, loss_type):
    config = dataclasses.replace(preferences, loss_type=loss_type)
    logps, reference = torch.tensor([-3.0, -4.0, 0.0, 0.0], requires_grad=True), torch.tensor([-4.0, -3.0, -9.0, -7.0])
    labels = torch.tensor([[5, 6], [5, 7], [IGNORE_INDEX] * 2, [IGNORE_INDEX] * 2])
    loss, measured = pair_loss(logps, reference, labels, config)
    alone = pair_loss(logps[:2], reference[:2], labels[:2], config)
    assert loss == alone[0] and torch.equal(measured, alone[1]) and PREFERENCE.loss_weight(labels) == 1
    assert torch.autograd.grad(loss, logps)[0][2:].tolist() == [0.0, 0.0]


# --- any number of ranks


def _train_on_rank(rank, config, placement):
    """2 steps, of which the last ends the data, and an evaluation."""
    evaluation.read_reference = lambda *args: None  # each computes it
    run = make_run(config, placement, per_step=12)
    assert len(sharded_modules(run.model)) > 1 or placement.shard_ranks == 1 or placement.zero_stage
    set_reference(run)
    held = base_bytes(run.model)  # after the first forward, when FSDP2 has padded its shards
    assert (held.held < 0.8 * held.total) == (placement.shard_ranks > 1 or placement.stages > 1)
    assert np.count_nonzero(run.training.micro_batches.rows.reference) == 160
    base = evaluate(run)
    assert set(base[1].values()) >= {0.0} and base[1]["rewards/accuracies"] == base[1]["rewards/margins"] == 0.0
    run.model.train()
    assert run.training.num_steps == 2 and run.training.micro_batches(1, 11).loss_weight == 0
    steps = [train_step(run.training, step) for step in range(2)]
    figures = [(s.loss, s.grad_norm, tuple(s.measures.values()), s.num_trained_tokens) for s in steps]
    assert base_bytes(run.model) == held
    references = [rows.reference.tobytes() for rows in (run.training.micro_batches.rows, run.held_out)]
    return fingerprint(run.model).hex(), figures, base, evaluate(run), references


PLACEMENTS = {
    "2 ranks, fsdp": (2, Placement(2)), "2 ranks, pipeline": (2, Placement(stages=2)), "2 ranks, ddp": (2, Placement()),
    "2 ranks, zero3": (2, Placement(2, deepspeed=zero(3))), "3 ranks, fsdp": (3, Placement(3)),
    "4 ranks, hsdp": (4, Placement(2, 1)),
}  # fmt: skip
FAST = ("2 ranks, fsdp", "2 ranks, pipeline")


@pytest.mark.parametrize(
    "loss_type, names",
    [("sigmoid", FAST), pytest.param("sigmoid", PLACEMENTS, marks=pytest.mark.slow, id="sigmoid-all"),
     pytest.param("ipo", ["3 ranks, fsdp"], marks=pytest.mark.slow)],
)  # fmt: skip
def test_one_adapter_and_one_reference_on_any_number_of_ranks(preferences, loss_type, names):
    config = dataclasses.replace(preferences, loss_type=loss_type, lora_dropout=0.05, learning_rate=5e-3)
    (one,) = run_ranks(_train_on_rank, 1, config, Placement())
    for name in names:
        num_ranks, placement = PLACEMENTS[name]
        assert run_ranks(_train_on_rank, num_ranks, config, placement) == [one] * num_ranks, name
    _, steps, (base_loss, _), (loss, measures), _ = one
    assert steps[0][0] == pytest.approx(base_loss, abs=0.01 if loss_type == "sigmoid" else 1) and loss < base_loss
    assert measures["rewards/accuracies"] > 0.8 and measures["rewards/margins"] > 0


# --- the kept reference

IDENTITY = {"base": "b", "rows": ["r"]}


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    logps = [np.arange(6, dtype=np.float32), np.arange(4, dtype=np.float32)]
    keep_reference(IDENTITY, logps)
    return logps


def test_a_kept_reference_is_read_back(kept):
    found = read_reference(IDENTITY, (6, 4))
    assert all(np.array_equal(a, b) for a, b in zip(found, kept, strict=True))
    assert read_reference(IDENTITY | {"base": "c"}, (6, 4)) is None
    assert read_reference(IDENTITY, (8, 4)) is None


@pytest.mark.parametrize("name", ["train.npy", "held-out.npy", "identity.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["a byte", "cut off", "gone"])
def test_a_damaged_reference_is_not_read_and_is_replaced(kept, name, damage):
    file = reference_folder(IDENTITY) / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-9] + (bytes([content[-9] ^ 1]) + content[-8:] if damage == "a byte" else b""))
    assert read_reference(IDENTITY, (6, 4)) is None
    keep_reference(IDENTITY, kept)
    assert read_reference(IDENTITY, (6, 4)) is not None


def test_a_reference_of_something_else_under_this_name_is_not_read(kept):
    other = IDENTITY | {"base": "c"}
    reference_folder(IDENTITY).rename(reference_folder(other))
    assert read_reference(other, (6, 4)) is None


def test_a_reference_that_cannot_be_kept_is_a_warning(kept, monkeypatch, capsys):
    monkeypatch.setattr(np, "save", partial(_fail, OSError(28, "No space left on device")))
    keep_reference(IDENTITY | {"base": "c"}, kept)
    assert "No space left on device; the next start computes it again" in capsys.readouterr().err
    assert not reference_folder(IDENTITY | {"base": "c"}).exists()


def _fail(error, *args):
    raise error


def _twice_on_rank(rank, config):
    """The references of two starts, of which the second has no model that could compute one."""
    found = []
    for _ in range(2):
        run = make_run(config, Placement(2))
        if found:
            run.model.forward = partial(_fail, AssertionError("a forward"))
        set_reference(run)
        found.append([rows.reference.tobytes() for rows in (run.training.micro_batches.rows, run.held_out)])
    return found


def test_a_second_start_reads_the_reference(preferences, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    (first, second), other = run_ranks(_twice_on_rank, 2, preferences)
    assert first == second and other == [first, first] and any(first[0])


def _identity_on_rank(rank, config, rows):
    run = make_run(config, Placement())
    if rows:
        run.held_out = Rows(run.held_out.table.select(range(rows)))
    seen = []
    evaluation.read_reference = lambda identity, num_rows: seen.append(identity) or [np.zeros(n) for n in num_rows]
    set_reference(run)
    return json.dumps(seen[0], sort_keys=True)


def test_the_reference_depends_on_base_rows_and_batches(preferences):
    changes = [
        {}, {"quantization": "nf4"}, {"max_length": 30}, {"per_device_train_batch_size": 2},
        {"per_device_eval_batch_size": 2}, {"eval_fraction": 0.1, "dataset_test_split": "none"},
        {"rename_columns": ["chosen=rejected", "rejected=chosen"]},
    ]  # fmt: skip
    configs = [dataclasses.replace(preferences, **change) for change in changes]
    found = [run_ranks(_identity_on_rank, 1, config, 0)[0] for config in configs]
    found += run_ranks(_identity_on_rank, 1, preferences, 10)
    assert len(set(found)) == len(found)
    unchanged = dataclasses.replace(preferences, beta=0.5, loss_type="ipo", learning_rate=1e-5, lora_r=4)
    assert run_ranks(_identity_on_rank, 1, unchanged, 0)[0] == found[0]
