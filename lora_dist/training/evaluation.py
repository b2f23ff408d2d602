"""The held-out rows, shared among the ranks: loss, predictions; and completions, in lockstep."""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from lora_dist.data.micro_batches import MicroBatch, collate, model_inputs
from lora_dist.data.tasks import IGNORE_INDEX, Task
from lora_dist.parallel.exact_sum import block
from lora_dist.parallel.fsdp import release
from lora_dist.run import watchdog
from lora_dist.training.step import Training, data_share, forward_loss

MAX_NEW_TOKENS = 48  # of a completion


@torch.no_grad()
def over_held_out(run: Training, measure: Callable[[int, MicroBatch], torch.Tensor], width: int) -> torch.Tensor:
    """`measure(place, batch)` of each batch of held-out rows: float64 (batches, places, width), on the CPU. Collective.

    Each is measured by one rank, or where ranks share rows by one in each place of a group; all learn all, exactly.
    """
    device, share = run.accelerator.device, data_share(run)
    batches = held_out_batches(run)
    mine = block(len(batches), share.num_groups, share.group)
    found = torch.zeros(len(batches), share.num_pieces, width, dtype=torch.float64, device=device)
    run.model.eval()
    for turn in range(-(-len(batches) // share.num_groups)):
        watchdog.still_moving()
        index = mine[turn] if turn < len(mine) else 0  # a spare forward, thrown away, keeps the gathers matched
        rows = [run.eval_rows[i] for i in batches[index]]
        batch = collate(rows, run.micro_batches.pad_token_id, run.micro_batches.task).to(device)
        measured = measure(share.piece, batch)
        if turn < len(mine):
            found[index, share.piece, : len(measured)] = measured.double()
    run.model.train()
    release(run.model)
    if share.num_groups * share.num_pieces > 1:
        dist.all_reduce(found)  # each entry is zero on all ranks but one: exact in any order
    return found.cpu()


def held_out_batches(run: Training) -> list[list[int]]:
    """The held-out rows, those of a length together: little padding."""
    size, order = (
        run.config.per_device_eval_batch_size,
        sorted(range(len(run.eval_rows)), key=run.eval_rows.lengths.item),
    )
    return [order[i : i + size] for i in range(0, len(order), size)]


def evaluate(run: Training) -> tuple[float, float]:
    """(mean loss, share predicted right) over the trained tokens of the held-out rows. Collective.

    The same bits at any number of ranks.
    """

    def sums(piece: int, batch: MicroBatch) -> torch.Tensor:
        loss, correct = forward_loss(run, batch)
        return torch.tensor([loss.item(), correct.item(), 0 if piece else batch.num_trained], dtype=torch.float64)

    loss, correct, num_trained = over_held_out(run, sums, 3).sum((0, 1)).tolist()
    return loss / num_trained, correct / num_trained


def predict(run: Training) -> torch.Tensor:
    """What the model makes of each held-out row, in their order: float32 (rows, ...). Collective.

    Of SEQ_CLS the logits of the classes. Of the others 1 where the highest logit is the label at every trained token,
    so where greedy decoding would give exactly the completion; else 0.
    """
    task, classes = run.micro_batches.task, run.model.config.num_labels
    width = classes if task.name == "SEQ_CLS" else 1

    def judge(piece: int, batch: MicroBatch) -> torch.Tensor:
        with run.accelerator.autocast():
            logits = run.model(**model_inputs(run.model, batch), use_cache=False).logits
        of_rows = logits.float() if task.name == "SEQ_CLS" else task.exact(logits, batch.labels_BL).float()[:, None]
        return of_rows.flatten()

    batches = held_out_batches(run)
    found = over_held_out(run, judge, width * run.config.per_device_eval_batch_size)[:, 0]
    predictions = torch.empty(len(run.eval_rows), width)
    for rows, of_batch in zip(batches, found, strict=True):
        predictions[rows] = of_batch.view(-1, width)[: len(rows)].float()
    return predictions


def held_out_labels(run: Training) -> torch.Tensor:
    """The labels of SEQ_CLS's held-out rows, in their order: int64 (rows, labels)."""
    return torch.stack([torch.as_tensor(row["labels"]) for row in run.eval_rows])


def complete_samples(run: Training) -> list[dict[str, str | None]]:
    """Greedy completions of `--sample_prompt` and of the first held-out rows, with what those go on with. Collective.

    {"prompt", "reference", "completion"}. Of a row that is trained from its start, the first half is the prompt.
    """
    samples, decode = [], partial(run.tokenizer.decode, skip_special_tokens=True)
    if run.config.sample_prompt:
        # The space that ends a prompt belongs to the next word's token: leave it to the model.
        samples.append((run.tokenizer(run.config.sample_prompt.rstrip())["input_ids"], None))
    if not run.micro_batches.task.has_classes:
        for i in range(min(run.config.num_eval_samples, len(run.eval_rows or ()))):
            prompt, reference = _cut(run.eval_rows[i], run.micro_batches.task)
            samples.append((prompt, decode(reference[:MAX_NEW_TOKENS])))
    return [
        {"prompt": decode(prompt).rstrip(), "reference": reference, "completion": decode(complete(run, prompt))}
        for prompt, reference in samples
    ]


def _cut(row: dict, task: Task) -> tuple[list[int], list[int]]:
    """The tokens of a row that are given, and those that are to be written."""
    ids, labels = list(map(int, row["input_ids"])), list(map(int, row["labels"]))
    if task.labels_each_token:
        first = next(t for t, label in enumerate(labels) if label != IGNORE_INDEX)
        cut = first if first > 1 else -(-len(ids) // 2)
        ids, labels = ids[:cut], labels[cut:]
    return ids, [label for label in labels if label != IGNORE_INDEX]


@torch.no_grad()
def complete(run: Training, prompt: list[int]) -> list[int]:
    """The tokens that the model goes on with. Collective: every rank generates the same ones in lockstep."""
    watchdog.still_moving()
    prompt_BT = torch.tensor([prompt], device=run.accelerator.device)
    run.model.eval()
    with run.accelerator.autocast():
        out = run.model.generate(
            input_ids=prompt_BT, attention_mask=torch.ones_like(prompt_BT), do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS, use_cache=not run.pipeline,
            pad_token_id=run.tokenizer.pad_token_id, eos_token_id=run.tokenizer.eos_token_id,
        )  # fmt: skip
    run.model.train()
    release(run.model)
    return out[0].tolist() if run.model.config.is_encoder_decoder else out[0, len(prompt) :].tolist()
