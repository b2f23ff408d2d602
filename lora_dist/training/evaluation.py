"""Evaluation on the held-out rows, which the ranks divide among them: loss, predictions, scores; and completions."""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from lora_dist.data.formats import encode_prompt
from lora_dist.data.micro_batches import MicroBatch, collate, model_inputs
from lora_dist.data.tasks import IGNORE_INDEX, Task
from lora_dist.model.positions import longest_prompt
from lora_dist.parallel.exact_sum import block
from lora_dist.parallel.fsdp import release
from lora_dist.run import watchdog
from lora_dist.training.run import Run
from lora_dist.training.step import forward_loss

MAX_NEW_TOKENS = 48  # of a completion


@torch.no_grad()
def over_held_out(run: Run, measure: Callable[[int, MicroBatch], torch.Tensor], width: int) -> torch.Tensor:
    """`measure(piece, batch)` of every batch of held-out rows: float64 (batches, pieces, width), on the CPU.

    Every rank gets all results, exact and the same everywhere. Each batch is measured by one rank; if ranks share rows,
    by one rank for each piece of them. `measure` returns up to `width` numbers. Collective.
    """
    device, share = run.device, run.training.share
    batches = held_out_batches(run)
    mine = block(len(batches), share.num_groups, share.group)
    found = torch.zeros(len(batches), share.num_pieces, width, dtype=torch.float64, device=device)
    run.model.eval()
    for turn in range(-(-len(batches) // share.num_groups)):
        watchdog.report_activity()
        index = mine[turn] if turn < len(mine) else 0  # the gathers must match: a spare forward, thrown away
        rows = [run.held_out[i] for i in batches[index]]
        batch = collate(rows, run.training.micro_batches.pad_token_id, run.training.micro_batches.task).to(device)
        measured = measure(share.piece, batch)
        if turn < len(mine):
            found[index, share.piece, : len(measured)] = measured.double()
    run.model.train()
    release(run.model)
    if share.num_groups * share.num_pieces > 1:
        dist.all_reduce(found)  # each entry is zero on all ranks but one: exact in any order
    return found.cpu()


def held_out_batches(run: Run) -> list[list[int]]:
    """The numbers of the held-out rows in each batch; rows of similar length are together, which saves padding."""
    size = run.config.per_device_eval_batch_size
    order = sorted(range(len(run.held_out)), key=run.held_out.lengths.item)
    return [order[i : i + size] for i in range(0, len(order), size)]


def evaluate(run: Run) -> tuple[float, float]:
    """(mean loss, share of right predictions) over the trained tokens of the held-out rows. Collective.

    The bits are the same at any number of ranks.
    """

    def sums(piece: int, batch: MicroBatch) -> torch.Tensor:
        loss, correct = forward_loss(run.training, batch)
        num_trained = 0 if piece else batch.num_trained_tokens
        return torch.tensor([loss.item(), correct.item(), num_trained], dtype=torch.float64)

    loss, correct, num_trained = over_held_out(run, sums, 3).sum((0, 1)).tolist()
    return loss / num_trained, correct / num_trained


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
    found = over_held_out(run, judge, width * run.config.per_device_eval_batch_size)[:, 0]
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
    that leaves the model no positions for the completion.
    """
    room = longest_prompt(run.model, MAX_NEW_TOKENS)
    samples, decode = [], partial(run.tokenizer.decode, skip_special_tokens=True)
    if run.config.sample_prompt:
        samples.append((encode_prompt(run.tokenizer, run.config.sample_prompt), None))
    if not run.training.micro_batches.task.has_classes:
        for i in range(min(run.config.num_eval_samples, len(run.held_out or ()))):
            prompt, reference = _cut(run.held_out[i], run.training.micro_batches.task)
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
