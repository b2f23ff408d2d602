"""One optimizer step: it owns the order of micro-batches, their random state and the reduction of their gradients.

A flat gradient holds the trained parameters in model order, then the extras: the summed loss, the sums of the task's
`measures`, and the counts.

N: ranks. G: micro-batches of an optimizer step, over all ranks. B, T, V: sequences, tokens, vocabulary. M: measures.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from lora_dist import signals
from lora_dist.config import TrainConfig
from lora_dist.data.micro_batches import MicroBatch, MicroBatches, Prefetch, model_inputs
from lora_dist.data.packing import prepare_packing
from lora_dist.data.preference.loss import pair_loss, sequence_logps
from lora_dist.errors import require
from lora_dist.model.adapters import probe_logits, trainable_parameters
from lora_dist.parallel.context import ContextParallel, start_context_parallel
from lora_dist.parallel.exact_sum import TreeSum, block, flatten_gradients, tree_reduce
from lora_dist.parallel.fsdp import gather_wait_s, gathered_bytes, release
from lora_dist.parallel.pipeline import (
    Pipeline,
    StageDone,
    pipeline_of,
    receive_from_previous_stage,
    schedule,
    send_to_next_stage,
)
from lora_dist.parallel.strategies import Placement
from lora_dist.parallel.zero import shard_optimizer, zero2_step
from lora_dist.run import watchdog
from lora_dist.seeds import random_key
from lora_dist.training.timing import Stopwatch

# In standard deviations of the logits: rounding stays far below it, a document that another one sees is far above.
ISOLATION_BOUND = 0.1
NUM_COUNTS = 5  # that `read_micro_batch` returns


@dataclass(frozen=True)
class DataShare:
    """Which block of the micro-batches a rank computes, and which piece of their rows."""

    num_groups: int
    group: int
    num_pieces: int = 1
    piece: int = 0

    def indices(self, total: int) -> list[int]:
        """The micro-batches of a step, out of `total`, that this rank computes, in order.

        Equally many on all ranks, because the gathers of a sharded base must match: the last one may be a repetition,
        whose result is thrown away.
        """
        mine = block(total, self.num_groups, self.group)
        return [mine[min(turn, len(mine) - 1)] for turn in range(-(-total // self.num_groups))]


@dataclass(frozen=True)
class Training:
    """What an optimizer step needs. Made by `build_training`."""

    config: TrainConfig
    accelerator: Accelerator
    model: PeftModel
    params: list[torch.nn.Parameter]  # that are trained, in model order
    optimizer: Optimizer
    scheduler: LambdaLR
    zero2: object | None  # DeepSpeed's engine, which then steps the optimizer
    num_steps: int  # of the whole run
    micro_batches: MicroBatches
    read: Prefetch  # this rank's micro-batches
    share: DataShare
    context: ContextParallel | None
    pipeline: Pipeline | None
    probe: MicroBatch  # one row on the device, to compare logits on


def build_training(
    model: PeftModel, config: TrainConfig, accelerator: Accelerator, micro_batches: MicroBatches, placement: Placement
) -> Training:
    """Make the optimizer and the reader of the data, and check that packed documents do not see each other.

    `model` is the base, placed as `placement` says, with its adapters. Raises UserError. Collective.
    """
    params = list(trainable_parameters(model).values())
    num_steps = config.max_steps or micro_batches.num_steps
    optimizer = build_optimizer(model, params, config)
    scheduler = get_scheduler(config.lr_scheduler_type, optimizer, config.warmup_steps, num_steps)
    ranks = placement.context_ranks
    context = start_context_parallel(model, ranks) if ranks > 1 else None
    pipeline = pipeline_of(model)
    zero2 = shard_optimizer(params, optimizer, placement.deepspeed) if placement.zero_stage == 2 else None
    share = data_share(accelerator, context, pipeline)
    probe = micro_batches(0, 0).first_row().to(accelerator.device)
    if config.packing:
        prepare_packing(model)
        check_isolation(model, probe.input_ids_BT[0, :64], accelerator.autocast)
    read = Prefetch(micro_batches, share.indices(micro_batches.per_step), accelerator.device)
    return Training(
        config, accelerator, model, params, optimizer, scheduler, zero2, num_steps, micro_batches, read, share, context,
        pipeline, probe,
    )  # fmt: skip


def build_optimizer(model: PeftModel, params: list[torch.nn.Parameter], config: TrainConfig) -> Optimizer:
    if config.loraplus_lr_ratio is None:
        return torch.optim.AdamW(params, lr=config.learning_rate, weight_decay=config.weight_decay)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=config.learning_rate, loraplus_lr_ratio=config.loraplus_lr_ratio,
        loraplus_weight_decay=config.weight_decay,
    )  # fmt: skip
    # PEFT makes groups that may be empty. DeepSpeed drops them, and the scheduler would then miss them.
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    return optimizer


def data_share(accelerator: Accelerator, context: ContextParallel | None, pipeline: Pipeline | None) -> DataShare:
    if context:
        return DataShare(context.num_groups, context.group_index, context.size, context.piece)
    if pipeline:  # every rank takes part in every micro-batch
        return DataShare(1, 0)
    return DataShare(accelerator.num_processes, accelerator.process_index)


def check_isolation(model: PeftModel, document_T: torch.Tensor, autocast) -> None:
    """Raises UserError unless both of two copies of a document, packed into one row, get the same logits. Collective.

    They would differ if the second copy saw the first one, or if its positions continued those of the first one.
    """
    ids_BT = document_T.repeat(2)[None]
    documents_BT = torch.tensor([[1, 2]], device=ids_BT.device).repeat_interleave(len(document_T), 1)
    why = "the documents of a row see each other"
    try:
        two = MicroBatch(ids_BT, documents_BT, ids_BT, packed=True)
        first_TV, second_TV = probe_logits(model, two, autocast)[0].float().chunk(2)
        apart = (second_TV - first_TV).abs().max() / first_TV.std()
        why += f": logits change by {apart:.2g} of their spread"
        isolated = apart < ISOLATION_BOUND
    except (TypeError, ValueError) as error:  # the forward takes no mask of this kind, or no position ids
        isolated, why = False, f"the documents of a row cannot be kept apart: {error}"
    hint = "use --train_sampling_strategy group_by_length"
    require(isolated, "packing", True, f"in a {model.config.model_type} {why}; {hint}")


@dataclass(frozen=True)
class StepResult:
    loss: float  # mean over the trained tokens, or the pairs, of the global batch
    measures: dict[str, float]  # means over the same, by the names of `Task.measures`
    grad_norm: float  # before clipping
    num_trained_tokens: int
    num_tokens: int  # without padding
    num_positions: int  # with padding
    num_pairs: float  # pairs of positions in the same row, over all rows
    loss_sums: dict[int, float]  # summed loss of each micro-batch that this rank computed, or of its piece of it
    parts_s: dict[str, float]  # seconds on this rank, by the names of metric_names.PARTS
    gathered_bytes: int  # of the base, on this rank
    stop_asked: bool  # on any rank
    bad: bool  # the loss or the gradient is not finite
    skipped: bool  # nothing was updated: the step is bad, or fp16 overflowed and its loss scaler will adapt


def train_step(training: Training, step: int) -> StepResult:
    """One optimizer step: G micro-batches, one reduction, then the same arithmetic on every rank. Collective."""
    stopwatch = Stopwatch(training.accelerator.device, partial(gather_wait_s, training.model))
    gathered_before = gathered_bytes(training.model)
    add_gradients = sum_over_stages if training.pipeline else sum_over_ranks
    flat, loss_sums = add_gradients(training, step, stopwatch)
    numel = sum(p.numel() for p in training.params)
    names = training.micro_batches.task.measures
    loss_sum, *extras = flat[numel:].tolist()
    measured, counts = extras[: len(names)], extras[len(names) :]
    weight, num_trained, num_tokens, num_positions, num_pairs, num_stops, *_ = counts  # the rest is padding
    with stopwatch.part("update"):
        grad_norm, skipped = apply_gradient(training, flat[:numel] / weight, keep=not math.isfinite(loss_sum))
    return StepResult(
        loss=loss_sum / weight,
        measures={name: total / weight for name, total in zip(names, measured, strict=True)},
        grad_norm=grad_norm,
        num_trained_tokens=int(num_trained),
        num_tokens=int(num_tokens),
        num_positions=int(num_positions),
        num_pairs=num_pairs,
        loss_sums=loss_sums,
        parts_s=stopwatch.seconds(),
        gathered_bytes=gathered_bytes(training.model) - gathered_before,
        stop_asked=num_stops > 0,
        bad=not math.isfinite(loss_sum) or (skipped and not training.accelerator.scaler),
        skipped=skipped,
    )


def read_micro_batch(training: Training, step: int, turn: int) -> tuple[MicroBatch, list[int]]:
    """The `turn`-th micro-batch of this rank in a step, on the device, with its counts.

    Also sets the random state for its forward: dropout depends on the micro-batch alone.
    """
    batch = training.read(step, turn)
    num_rows, length = batch.input_ids_BT.shape
    counts = [batch.loss_weight, batch.num_trained_tokens, batch.num_tokens, num_rows * length, num_rows * length**2]
    piece = (training.context.piece,) if training.context else ()
    key = random_key(training.config.seed, step, training.read.indices[turn], *piece)
    torch.manual_seed(key % 2**32)
    return batch, counts


def forward_loss(training: Training, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, `Task.measures`), both summed over a micro-batch, or over this rank's piece of its rows.

    A scalar, and (M,).
    """
    model, labels_BL = training.model, batch.labels_BL
    with training.accelerator.autocast():
        if training.context:
            loss, correct = training.context.summed_loss(model, batch)
            return loss, correct[None]
        logits = model(**model_inputs(model, batch), use_cache=False).logits
    if batch.task.has_pairs:
        return pair_loss(sequence_logps(logits, labels_BL), batch.reference_B, labels_BL, training.config)
    return batch.task.summed_loss(logits, labels_BL), batch.task.num_correct(logits, labels_BL)[None]


def scaled(training: Training, loss: torch.Tensor) -> torch.Tensor:
    scaler = training.accelerator.scaler
    return scaler.scale(loss) if scaler else loss


def sum_over_ranks(training: Training, step: int, stopwatch: Stopwatch) -> tuple[torch.Tensor, dict[int, float]]:
    """Data parallel: each rank, or group of ranks that share rows, computes a block of the micro-batches.

    Returns the flat gradient, summed over all micro-batches, the same bytes on every rank; and this rank's `loss_sums`.
    Leaf order of the sum tree: piece 0 of every micro-batch, then piece 1 of every micro-batch, and so on.
    """
    num_ranks, total, share = training.accelerator.num_processes, training.micro_batches.per_step, training.share
    num_own, tree, loss_sums = len(block(total, share.num_groups, share.group)), TreeSum(total * share.num_pieces), {}
    for turn, index in enumerate(training.read.indices):
        watchdog.report_progress(step, f"micro-batch {index + 1} of {total}")
        with stopwatch.part("data"):
            batch, counts = read_micro_batch(training, step, turn)
        with stopwatch.part("forward"):
            loss, measured_M = forward_loss(training, batch)
        with stopwatch.part("backward"):
            grads = torch.autograd.grad(scaled(training, loss), training.params, allow_unused=True)
        if share.piece:  # the rank with the first piece counts the whole rows
            counts = [0] * len(counts)
        loss_sums[index] = loss.item()
        stop = signals.stop_asked()  # read as late as possible; it travels with the step's only reduction
        extras = [loss_sums[index], *measured_M.tolist(), *counts, stop]
        leaf = flatten_gradients(training.params, grads, extras, num_ranks)
        if turn < num_own:
            tree.add(0, share.piece * total + index, leaf)
    release(training.model)  # with --gather_once the whole base is held until here
    watchdog.report_progress(step, "reduction of the gradients")
    pieces = share.num_pieces
    with stopwatch.part("reduce"):
        flat = tree_reduce(tree, [rank % pieces * share.num_groups + rank // pieces for rank in range(num_ranks)])
    return flat, loss_sums


@dataclass(frozen=True)
class StageForward:
    """A micro-batch whose backward is still to come, on one stage of a pipeline."""

    inbox_BTH: torch.Tensor | None  # what the stage before sent; None on the first stage
    output: torch.Tensor  # the scaled loss on the last stage, else the hidden states (B, T, H) that were sent onward
    extras: list[float]


def sum_over_stages(training: Training, step: int, stopwatch: Stopwatch) -> tuple[torch.Tensor, dict[int, float]]:
    """Pipeline: each rank computes its layers' part of every micro-batch's gradient.

    Returns what `sum_over_ranks` returns. Only the last stage knows the losses, so only its `loss_sums` is filled.
    """
    pipeline, total = training.pipeline, training.micro_batches.per_step
    tree, under_way, loss_sums = TreeSum(total), {}, {}
    # A loss scaler is set up when it is first used, which would otherwise happen on the last stage alone.
    scaled(training, torch.zeros((), device=training.accelerator.device))
    for action, index in schedule(total, pipeline.stage, pipeline.num_stages):
        watchdog.report_progress(step, f"{action} of micro-batch {index + 1} of {total}")
        if action == "forward":
            under_way[index] = stage_forward(training, step, index, stopwatch)
            if pipeline.is_last:
                loss_sums[index] = under_way[index].extras[0]
        else:
            tree.add(0, index, stage_backward(training, under_way.pop(index), stopwatch))
    pipeline.wait()
    ((_, flat),) = tree.nodes.items()
    numel = sum(p.numel() for p in training.params)
    with stopwatch.part("reduce"):
        dist.all_reduce(flat[:numel].view(torch.int32))  # each gradient is one rank's: its bits, zeros from the others
        dist.all_reduce(flat[numel:])
    return flat, loss_sums


def stage_forward(training: Training, step: int, index: int, stopwatch: Stopwatch) -> StageForward:
    """Receive hidden states from the stage before, compute this stage's layers, and send the result onward."""
    pipeline, model = training.pipeline, training.model
    with stopwatch.part("data"):
        batch, counts = read_micro_batch(training, step, index)
    shape_BTH = torch.Size([*batch.input_ids_BT.shape, model.config.hidden_size])
    dtype = model.get_input_embeddings().weight.dtype
    with stopwatch.part("wait"):
        receive_from_previous_stage(pipeline, shape_BTH, dtype, training.accelerator.device)
    try:
        with stopwatch.part("forward"):
            loss, measured_M = forward_loss(training, batch)
        return StageForward(pipeline.inbox_BTH, scaled(training, loss), [loss.item(), *measured_M.tolist(), *counts])
    except StageDone as done:
        (hidden_states_BTH,) = done.args
        assert (hidden_states_BTH.shape, hidden_states_BTH.dtype) == (shape_BTH, dtype)
        send_to_next_stage(pipeline, hidden_states_BTH)
        num_extras = 1 + len(batch.task.measures) + NUM_COUNTS
        return StageForward(pipeline.inbox_BTH, hidden_states_BTH, [0.0] * num_extras)


def stage_backward(training: Training, forward: StageForward, stopwatch: Stopwatch) -> torch.Tensor:
    """Receive the gradient of this stage's output, send that of its input; returns this stage's flat gradient."""
    pipeline, params = training.pipeline, training.params
    grad = None
    if not pipeline.is_last:
        with stopwatch.part("wait"):
            grad = pipeline.receive(torch.empty_like(forward.output), pipeline.stage + 1)
    inputs = [*params, forward.inbox_BTH] if pipeline.stage else params
    with stopwatch.part("backward"):
        grads = torch.autograd.grad(forward.output, inputs, grad, allow_unused=True)
    if pipeline.stage:
        pipeline.send(grads[-1], pipeline.stage - 1)
    return flatten_gradients(params, grads[: len(params)], [*forward.extras, signals.stop_asked()], num_ranks=1)


def apply_gradient(training: Training, grad: torch.Tensor, *, keep: bool = False) -> tuple[float, bool]:
    """Clip the flat gradient and update parameters and learning rate. Returns (norm before clipping, skipped).

    Parameters and optimizer stay as they are if the gradient is not finite, or with `keep`; the learning rate moves on
    in any case. All ranks do the same, because they hold the same gradient.
    """
    optimizer, scaler, max_norm = training.optimizer, training.accelerator.scaler, training.config.max_grad_norm
    if not training.zero2:
        for param, part in zip(training.params, grad.split([p.numel() for p in training.params]), strict=True):
            param.grad = part.view_as(param)
    if scaler:
        scaler.unscale_(optimizer)  # in place, so it also changes `grad`
    norm = torch.linalg.vector_norm(grad)
    norm_before = norm.item()
    skipped = keep or not math.isfinite(norm_before)
    if max_norm:
        grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    if scaler:
        scaler.step(optimizer)  # does nothing if fp16 overflowed
        scaler.update()
    elif not skipped:
        if training.zero2:
            zero2_step(training.zero2, training.params, grad)
        else:
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    training.scheduler.step()
    return norm_before, skipped
