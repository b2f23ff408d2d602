"""One optimizer step: it owns the order of micro-batches, their random state and the reduction of their gradients.

N: ranks. G: micro-batches of an optimizer step, over all ranks. B, T, V: sequences, tokens, vocabulary.
"""

import math
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import get_scheduler

from lora_dist import signals
from lora_dist.config import TrainConfig
from lora_dist.data.micro_batches import MicroBatch, MicroBatches, Prefetch, model_inputs
from lora_dist.data.packing import prepare_packing
from lora_dist.data.rows import Rows
from lora_dist.errors import require
from lora_dist.model.adapters import probe_logits, trainable_parameters
from lora_dist.model.flops import BaseWork
from lora_dist.model.load import BaseBytes
from lora_dist.model.placement import Expected
from lora_dist.parallel.context import ContextParallel
from lora_dist.parallel.exact_sum import TreeSum, block, flatten_gradients, tree_reduce
from lora_dist.parallel.fsdp import gather_wait_s, release
from lora_dist.parallel.pipeline import StageDone, pipeline_of, receive_from_before, schedule, send_onward
from lora_dist.parallel.strategies import Placement
from lora_dist.parallel.zero import shard_optimizer, step_with
from lora_dist.run import watchdog
from lora_dist.run.folder import RunFolder
from lora_dist.seeds import random_key
from lora_dist.training.timing import Stopwatch

# Of a standard deviation of the logits: roundings stay far below, a document that is seen from another far above.
ISOLATION_BOUND = 0.1


@dataclass
class Training:
    """What a step needs. `flat` order: the parameters in model order, then the extras."""

    model: PeftModel
    tokenizer: object
    config: TrainConfig
    accelerator: Accelerator
    micro_batches: MicroBatches
    eval_rows: Rows
    folder: RunFolder
    base: BaseBytes
    placement: Placement = Placement()
    load_s: float | None = None
    base_work: BaseWork | None = None
    expected: Expected | None = None
    memory_before_bytes: int = 0  # this rank's peak before the base was loaded
    num_steps: int = 0
    params: list[torch.nn.Parameter] = field(default_factory=list)

    def __post_init__(self):
        self.num_steps = self.config.max_steps or self.micro_batches.num_steps
        self.params = list(trainable_parameters(self.model).values())
        config = self.config
        if config.loraplus_lr_ratio is None:
            self.optimizer = torch.optim.AdamW(self.params, lr=config.learning_rate, weight_decay=config.weight_decay)
        else:
            self.optimizer = create_loraplus_optimizer(
                self.model, torch.optim.AdamW, lr=config.learning_rate, loraplus_lr_ratio=config.loraplus_lr_ratio,
                loraplus_weight_decay=config.weight_decay,
            )  # fmt: skip
            # PEFT makes groups that may be empty, which DeepSpeed drops and the scheduler would then miss.
            self.optimizer.param_groups = [group for group in self.optimizer.param_groups if group["params"]]
        self.scheduler = get_scheduler(
            self.config.lr_scheduler_type, self.optimizer, self.config.warmup_steps, self.num_steps
        )
        self.pipeline = pipeline_of(self.model)
        context_ranks = self.placement.context_ranks
        self.context = ContextParallel(self.model, context_ranks) if context_ranks > 1 else None
        self.zero2 = None
        if self.placement.zero_stage == 2:
            self.zero2 = shard_optimizer(self.params, self.optimizer, self.placement.deepspeed)
        self.probe = self.micro_batches(0, 0).first().to(self.accelerator.device)
        if self.config.packing:
            prepare_packing(self.model)
            check_isolation(self.model, self.probe.input_ids_BT[0, :64], self.accelerator.autocast)
        self.read = Prefetch(self.micro_batches, turns(self), self.accelerator.device)


@dataclass(frozen=True)
class StepResult:
    loss: float  # mean over the trained tokens of the global batch
    accuracy: float  # share of the trained tokens that the highest logit gets right
    grad_norm: float  # before clipping
    num_trained_tokens: int
    num_tokens: int  # without padding
    num_positions: int  # with padding
    num_pairs: float  # of positions in a row, summed over the rows
    parts_s: dict[str, float]  # on this rank, of metric_names.PARTS
    stop_asked: bool  # on any rank
    bad: bool  # the loss or the gradient is not finite
    skipped: bool  # nothing was updated: bad, or fp16 overflowed, which its loss scale mends


def check_isolation(model: PeftModel, document_T: torch.Tensor, autocast) -> None:
    """Raises UserError unless the second of two copies of a document in a row gets the logits of the first. Collective.

    It would not if it saw the first, or if its positions went on from there.
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
    except (TypeError, ValueError) as error:  # a forward that knows no such mask, or no position ids
        isolated, why = False, f"the documents of a row cannot be kept apart: {error}"
    hint = "use --train_sampling_strategy group_by_length"
    require(isolated, "packing", True, f"in a {model.config.model_type} {why}; {hint}")


def forward_loss(run: Training, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(summed loss, number predicted right) of a micro-batch, or of this rank's piece of its rows."""
    with run.accelerator.autocast():
        if run.context:
            return run.context.summed_loss(run.model, batch)
        logits = run.model(**model_inputs(run.model, batch), use_cache=False).logits
    return batch.task.summed_loss(logits, batch.labels_BL), batch.task.num_correct(logits, batch.labels_BL)


def train_step(run: Training, step: int) -> StepResult:
    """One optimizer step: G micro-batches, one reduction, then the same arithmetic on every rank."""
    run.stopwatch, run.loss_sums = Stopwatch(run.accelerator.device, partial(gather_wait_s, run.model)), {}
    flat = sum_over_stages(run, step) if run.pipeline else sum_over_ranks(run, step)
    numel = sum(p.numel() for p in run.params)
    loss_sum, correct, num_trained, num_tokens, num_positions, num_pairs, num_stops = flat[numel : numel + 7].tolist()
    with run.stopwatch.part("update"):
        grad_norm, skipped = apply_gradient(run, flat[:numel] / num_trained, keep=not math.isfinite(loss_sum))
    return StepResult(
        loss=loss_sum / num_trained,
        accuracy=correct / num_trained,
        grad_norm=grad_norm,
        num_trained_tokens=int(num_trained),
        num_tokens=int(num_tokens),
        num_positions=int(num_positions),
        num_pairs=num_pairs,
        parts_s=run.stopwatch.seconds(),
        stop_asked=num_stops > 0,
        bad=not math.isfinite(loss_sum) or (skipped and not run.accelerator.scaler),
        skipped=skipped,
    )


def turns(run: Training) -> list[int]:
    """The micro-batches of a step that this rank computes, in their order.

    Equally many on all ranks, as a sharded base's gathers must match: a last one may be a repetition, thrown away.
    """
    share, total = data_share(run), run.micro_batches.per_step
    mine = block(total, share.num_groups, share.group)
    return [mine[min(turn, len(mine) - 1)] for turn in range(-(-total // share.num_groups))]


def read_micro_batch(run: Training, step: int, turn: int) -> tuple[MicroBatch, list[int]]:
    """A micro-batch on the device, with its counts, and the random state set for its forward."""
    with run.stopwatch.part("data"):
        batch = run.read(step, turn)
    num_rows, length = batch.input_ids_BT.shape
    counts = [batch.num_trained, batch.num_tokens, num_rows * length, num_rows * length**2]
    piece = (run.context.piece,) if run.context else ()
    key = random_key(run.config.seed, step, run.read.turns[turn], *piece)
    torch.manual_seed(key % 2**32)  # dropout: of the micro-batch alone
    return batch, counts


def scaled(run: Training, loss: torch.Tensor) -> torch.Tensor:
    return run.accelerator.scaler.scale(loss) if run.accelerator.scaler else loss


@dataclass(frozen=True)
class DataShare:
    """Which block of the micro-batches a rank computes, and which piece of their rows."""

    num_groups: int
    group: int
    num_pieces: int = 1
    piece: int = 0


def data_share(run: Training) -> DataShare:
    if run.context:
        return DataShare(run.context.num_groups, run.context.group_index, run.context.size, run.context.piece)
    if run.pipeline:  # every rank takes part in every micro-batch
        return DataShare(1, 0)
    return DataShare(run.accelerator.num_processes, run.accelerator.process_index)


def sum_over_ranks(run: Training, step: int) -> torch.Tensor:
    """Data parallel: each rank, or group that shares rows, takes a block of the micro-batches.

    The sum, flat, of gradients, loss and counts. Its leaves: all micro-batches' first pieces, then all second ones...
    """
    num_ranks, total, share = run.accelerator.num_processes, run.micro_batches.per_step, data_share(run)
    num_own, tree = len(block(total, share.num_groups, share.group)), TreeSum(total * share.num_pieces)
    for turn, index in enumerate(run.read.turns):
        watchdog.moved(step, f"micro-batch {index + 1} of {total}")
        batch, counts = read_micro_batch(run, step, turn)
        with run.stopwatch.part("forward"):
            loss, correct = forward_loss(run, batch)
        with run.stopwatch.part("backward"):
            grads = torch.autograd.grad(scaled(run, loss), run.params, allow_unused=True)
        if share.piece:  # the first piece counts the whole rows
            counts = [0] * len(counts)
        run.loss_sums[index] = loss.item()
        stop = signals.stop_asked()  # as late as it can be: rides on the step's one reduction
        extras = [run.loss_sums[index], correct.item(), *counts, stop]
        leaf = flatten_gradients(run.params, grads, extras, num_ranks)
        if turn < num_own:
            tree.add(0, share.piece * total + index, leaf)
    release(run.model)  # under --gather_once all of it is whole until here
    watchdog.moved(step, "reduction of the gradients")
    pieces = share.num_pieces
    with run.stopwatch.part("reduce"):
        return tree_reduce(tree, [rank % pieces * share.num_groups + rank // pieces for rank in range(num_ranks)])


def sum_over_stages(run: Training, step: int) -> torch.Tensor:
    """A pipeline: each rank has its layers' part of every micro-batch's gradient. The sum as in `sum_over_ranks`."""
    pipeline, total = run.pipeline, run.micro_batches.per_step
    device, dtype = run.accelerator.device, run.model.get_input_embeddings().weight.dtype
    tree, under_way = TreeSum(total), {}
    scaled(run, torch.zeros((), device=device))  # a loss scaler begins at its first use: else on the last stage alone
    for action, index in schedule(total, pipeline.stage, pipeline.num_stages):
        watchdog.moved(step, f"{action} of micro-batch {index + 1} of {total}")
        if action == "forward":
            batch, counts = read_micro_batch(run, step, index)
            shape_BTH = torch.Size([*batch.input_ids_BT.shape, run.model.config.hidden_size])
            with run.stopwatch.part("wait"):
                receive_from_before(pipeline, shape_BTH, dtype, device)
            try:
                with run.stopwatch.part("forward"):
                    loss, correct = forward_loss(run, batch)
                run.loss_sums[index] = loss.item()
                extras = [run.loss_sums[index], correct.item(), *counts]
                under_way[index] = pipeline.inbox_BTH, scaled(run, loss), extras
            except StageDone as done:
                (hidden_states_BTH,) = done.args
                assert (hidden_states_BTH.shape, hidden_states_BTH.dtype) == (shape_BTH, dtype)
                send_onward(pipeline, hidden_states_BTH)
                under_way[index] = pipeline.inbox_BTH, hidden_states_BTH, [0] * 6
        else:
            inbox_BTH, output, extras = under_way.pop(index)
            with run.stopwatch.part("wait"):
                grad = None if pipeline.is_last else pipeline.receive(torch.empty_like(output), pipeline.stage + 1)
            inputs = [*run.params, inbox_BTH] if pipeline.stage else run.params
            with run.stopwatch.part("backward"):
                grads = torch.autograd.grad(output, inputs, grad, allow_unused=True)
            if pipeline.stage:
                pipeline.send(grads[-1], pipeline.stage - 1)
            extras = [*extras, signals.stop_asked()]
            tree.add(0, index, flatten_gradients(run.params, grads[: len(run.params)], extras, num_ranks=1))
    pipeline.wait()
    ((_, flat),) = tree.nodes.items()
    numel = sum(p.numel() for p in run.params)
    with run.stopwatch.part("reduce"):
        dist.all_reduce(flat[:numel].view(torch.int32))  # each gradient is one rank's: its bits, zeros from the others
        dist.all_reduce(flat[numel:])
    return flat


def apply_gradient(run: Training, grad: torch.Tensor, *, keep: bool = False) -> tuple[float, bool]:
    """Clip the flat gradient, update the parameters and the learning rate. (Norm before clipping, whether skipped).

    The parameters and the optimizer stay as they are where the gradient is not finite, or with `keep`; the learning
    rate is the step's all the same. All ranks do the same, as they hold the same gradient.
    """
    if not run.zero2:
        for param, part in zip(run.params, grad.split([p.numel() for p in run.params]), strict=True):
            param.grad = part.view_as(param)
    scaler = run.accelerator.scaler
    if scaler:
        scaler.unscale_(run.optimizer)  # in place, so in `grad` too
    norm = torch.linalg.vector_norm(grad)
    norm_before = norm.item()
    skipped = keep or not math.isfinite(norm_before)
    if run.config.max_grad_norm:
        grad.mul_((run.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
    if scaler:
        scaler.step(run.optimizer)  # left out where fp16 overflowed
        scaler.update()
    elif not skipped:
        if run.zero2:
            step_with(run.zero2, run.params, grad)
        else:
            run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.scheduler.step()
    return norm_before, skipped
