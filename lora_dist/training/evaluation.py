"""Forwards without gradients over rows that the ranks divide among them: evaluation, predictions, the reference."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from lora_dist.data.formats import encode_prompt
from lora_dist.data.micro_batches import MicroBatch, collate, model_inputs
from lora_dist.data.preference.loss import sequence_logps
from lora_dist.data.preference.reference import keep_reference, read_reference
from lora_dist.data.rows import Rows
from lora_dist.data.tasks import IGNORE_INDEX, Task
from lora_dist.environment import numerics
from lora_dist.model.adapters import adapter_digest, load_first_adapter, trainable_parameters
from lora_dist.model.positions import longest_prompt
from lora_dist.model.quantized_cache import fingerprint_of
from lora_dist.parallel.exact_sum import block
from lora_dist.parallel.fsdp import release
from lora_dist.parallel.ranks import from_rank_0
from lora_dist.run import watchdog
from lora_dist.training.run import Run
from lora_dist.training.step import forward_loss

MAX_NEW_TOKENS = 48  # of a completion
REFERENCE_VERSION = 1  # Raise it if the same rows would get other log-probabilities.


@torch.no_grad()
def over_batches(
    run: Run, rows: Rows, batches: list[list[int]], measure: Callable[[int, MicroBatch], torch.Tensor], width: int
) -> torch.Tensor:
    """`measure(piece, batch)` of every batch of these rows: float64 (batches, pieces, width), on the CPU.

    Every rank gets all results, exact and the same everywhere. Each batch is measured by one rank; if ranks share rows,
    by one rank for each piece of them. `measure` returns up to `width` numbers. Collective.
    """
    device, share = run.device, run.training.share
    mine = block(len(batches), share.num_groups, share.group)
    found = torch.zeros(len(batches), share.num_pieces, width, dtype=torch.float64, device=device)
    run.model.eval()
    for turn in range(-(-len(batches) // share.num_groups)):
        watchdog.report_activity()
        index = mine[turn] if turn < len(mine) else 0  # the gathers must match: a spare forward, thrown away
        of_batch = [rows[i] for i in batches[index]]
        batch = collate(of_batch, run.training.micro_batches.pad_token_id, run.training.micro_batches.task).to(device)
        measured = measure(share.piece, batch)
        if turn < len(mine):
            found[index, share.piece, : len(measured)] = measured.double()
    run.model.train()
    release(run.model)
    if share.num_groups * share.num_pieces > 1:
        dist.all_reduce(found)  # each entry is zero on all ranks but one: exact in any order
    return found.cpu()


def batches_by_length(rows: Rows, size: int, task: Task) -> list[list[int]]:
    """The numbers of the rows in each batch of `size` rows, or pairs of them, of similar length: it saves padding."""
    per_example = task.rows_per_example
    longest = rows.lengths.reshape(-1, per_example).max(1) if len(rows) else rows.lengths
    order = sorted(range(len(longest)), key=longest.item)
    numbers = [[i * per_example + row for row in range(per_example)] for i in order]
    return [sum(numbers[i : i + size], []) for i in range(0, len(order), size)]


def held_out_batches(run: Run) -> list[list[int]]:
    """The numbers of the held-out rows in each batch."""
    return batches_by_length(run.held_out, run.config.per_device_eval_batch_size, run.training.micro_batches.task)


def evaluate(run: Run) -> tuple[float, dict[str, float]]:
    """(mean loss, `Task.measures` by name) over the trained tokens, or the pairs, of the held-out rows. Collective.

    The bits are the same at any number of ranks.
    """
    names = run.training.micro_batches.task.measures

    def sums(piece: int, batch: MicroBatch) -> torch.Tensor:
        loss, measured_M = forward_loss(run.training, batch)
        weight = 0 if piece else batch.loss_weight
        return torch.tensor([weight, loss.item(), *measured_M.tolist()], dtype=torch.float64)

    found = over_batches(run, run.held_out, held_out_batches(run), sums, 2 + len(names)).sum((0, 1))
    weight, loss, *measured = found.tolist()
    return loss / weight, {name: total / weight for name, total in zip(names, measured, strict=True)}


def set_reference(run: Run) -> None:
    """Give the rows of pairs their log-probability under the reference: the base, or it with `--reference_adapter`.

    They are computed with the adapters that the model has now turned off, once, and kept for the next start. The bits
    are the same at any number of ranks. Collective.
    """
    config, splits = run.config, (run.training.micro_batches.rows, run.held_out)
    identity = {
        "version": REFERENCE_VERSION,
        "base": fingerprint_of(
            config.model_name_or_path, config.quantization, run.model.get_input_embeddings().weight.dtype
        ),
        "adapter": config.reference_adapter and adapter_digest(config.reference_adapter),
        "rows": [rows.digest() for rows in splits],
        "batches": [config.per_device_train_batch_size, config.per_device_eval_batch_size],
        "precision": run.accelerator.mixed_precision,
        "numerics": numerics(str(run.model.config._attn_implementation)),
    }
    kept = from_rank_0(read_reference(identity, tuple(map(len, splits))) if run.is_main else None)
    if kept is None:
        if run.is_main:
            print(f"reference: computing it for {sum(map(len, splits))} rows", flush=True)
        with reference_model(run):
            kept = [_logps(run, *each) for each in zip(splits, identity["batches"], strict=True)]
        if run.is_main:
            keep_reference(identity, kept)
    for rows, logps in zip(splits, kept, strict=True):
        rows.reference = logps


@contextlib.contextmanager
def reference_model(run: Run) -> Iterator[None]:
    """In the block the run's model is the reference. Afterwards its adapters are what they were."""
    if run.config.reference_adapter is None:
        with run.model.disable_adapter():
            yield
        return
    own = {name: param.detach().clone() for name, param in trainable_parameters(run.model).items()}
    load_first_adapter(run.model, run.config, "reference_adapter")
    yield
    for name, param in trainable_parameters(run.model).items():
        param.data.copy_(own[name])


def _logps(run: Run, rows: Rows, size: int) -> np.ndarray:
    """The log-probability of the trained tokens of each row, in batches of `size` pairs: float32. Collective."""

    def measure(piece: int, batch: MicroBatch) -> torch.Tensor:
        with run.accelerator.autocast():
            logits = run.model(**model_inputs(run.model, batch), use_cache=False).logits
        return sequence_logps(logits, batch.labels_BL)

    batches = batches_by_length(rows, size, run.training.micro_batches.task)
    logps = np.zeros(len(rows), np.float32)
    for numbers, found in zip(batches, over_batches(run, rows, batches, measure, 2 * size), strict=True):
        logps[numbers] = found[0, : len(numbers)].numpy()
    return logps


def predict(run: Run) -> torch.Tensor:
    """The model's answer for each held-out row, in their order: float32 (rows, width). Collective.

    SEQ_CLS: the class logits. Other tasks: 1.0 if greedy decoding would reproduce the target exactly, otherwise 0.0.
    """
    task, classes = run.training.micro_batches.task, run.model.config.num_labels
    width = classes if task.name == "SEQ_CLS" else 1

    def judge(piece: int, batch: MicroBatch) -> torch.Tensor:
        with run.accelerator.autocast():
            logits = run.model(**model_inputs(run.model, batch), use_cache=False).logits
        answers = logits if task.name == "SEQ_CLS" else task.exact_match(logits, batch.labels_BL)[:, None]
        return answers.float().flatten()

    batches = held_out_batches(run)
    found = over_batches(run, run.held_out, batches, judge, width * max(map(len, batches), default=0))[:, 0]
    predictions = torch.empty(len(run.held_out), width)
    for rows, of_batch in zip(batches, found, strict=True):
        predictions[rows] = of_batch.view(-1, width)[: len(rows)].float()
    return predictions


def held_out_labels(run: Run) -> torch.Tensor:
    """SEQ_CLS: the labels of the held-out rows, in their order. int64 (rows, labels)."""
    return torch.stack([torch.as_tensor(row["labels"]) for row in run.held_out])


def f1_scores(predicted_NC: torch.Tensor, true_NC: torch.Tensor) -> dict[str, float]:
    """Micro and macro F1 of rows that may have several classes. Two bool tensors (rows, classes).

    "micro_f1" counts all decisions together; "macro_f1" is the mean of the classes' own scores, where a class that is
    neither predicted nor true scores 0.
    """
    hits_C = (predicted_NC & true_NC).sum(0).double()
    named_C = (predicted_NC.sum(0) + true_NC.sum(0)).double()  # F1 = 2 hits / (predicted + true)
    of_class_C = torch.where(named_C > 0, 2 * hits_C / named_C.clamp(min=1), 0.0)
    micro = 2 * hits_C.sum() / named_C.sum().clamp(min=1)
    return {"micro_f1": micro.item(), "macro_f1": of_class_C.mean().item()}


def complete_samples(run: Run) -> list[dict[str, str | None]]:
    """Greedy completions of `--sample_prompt` and of the first `--num_eval_samples` held-out rows. Collective.

    Returns dicts with "prompt", "reference" (the row's own completion; None for `--sample_prompt`) and "completion". If
    a row is trained from its first token on, its first half is taken as the prompt. Only the end is taken of a prompt
    that leaves the model no positions for the completion. The row of a pair is the chosen one.
    """
    room = longest_prompt(run.model, MAX_NEW_TOKENS)
    samples, decode = [], partial(run.tokenizer.decode, skip_special_tokens=True)
    if run.config.sample_prompt:
        samples.append((encode_prompt(run.tokenizer, run.config.sample_prompt), None))
    if not run.training.micro_batches.task.has_classes:
        task = run.training.micro_batches.task
        for i in range(min(run.config.num_eval_samples, len(run.held_out or ()) // task.rows_per_example)):
            prompt, reference = _cut(run.held_out[i * task.rows_per_example], task)
            prompt = prompt if room is None else prompt[-room:]
            samples.append((prompt, decode(reference[:MAX_NEW_TOKENS])))
    return [
        {"prompt": decode(prompt).rstrip(), "reference": reference, "completion": decode(complete(run, prompt))}
        for prompt, reference in samples
    ]


def _cut(row: dict, task: Task) -> tuple[list[int], list[int]]:
    """(tokens of a row that are given to the model, tokens that it has to write)."""
    ids, labels = list(map(int, row["input_ids"])), list(map(int, row["labels"]))
    if task.labels_each_token:
        first = next(t for t, label in enumerate(labels) if label != IGNORE_INDEX)
        cut = first if first > 1 else -(-len(ids) // 2)
        ids, labels = ids[:cut], labels[cut:]
    return ids, [label for label in labels if label != IGNORE_INDEX]


@torch.no_grad()
def complete(run: Run, prompt: list[int]) -> list[int]:
    """The token ids that the model continues the prompt with. Collective: all ranks generate the same ones together."""
    watchdog.report_activity()
    prompt_BT = torch.tensor([prompt], device=run.device)
    run.model.eval()
    with run.accelerator.autocast():
        out = run.model.generate(
            input_ids=prompt_BT, attention_mask=torch.ones_like(prompt_BT), do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS, use_cache=not run.training.pipeline,
            pad_token_id=run.tokenizer.pad_token_id, eos_token_id=run.tokenizer.eos_token_id,
        )  # fmt: skip
    run.model.train()
    release(run.model)
    return out[0].tolist() if run.model.config.is_encoder_decoder else out[0, len(prompt) :].tolist()
