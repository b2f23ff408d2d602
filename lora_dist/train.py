"""The training loop: it owns the order of micro-batches, their random state and the reduction of their gradients.

N: ranks. G: micro-batches of an optimizer step, over all ranks. B, T, V: sequences, tokens, vocabulary.
"""

import math
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from tqdm import tqdm
from transformers import get_scheduler

from lora_dist import preemption
from lora_dist.adapters import check_identical, save_adapter, trainable_parameters, verify_adapter
from lora_dist.base_model import BaseBytes
from lora_dist.config import TrainConfig
from lora_dist.context_parallel import ContextParallel
from lora_dist.data import IGNORE_INDEX, MicroBatch, MicroBatches, collate, random_key
from lora_dist.manifest import write_manifest
from lora_dist.metrics import MetricsLog
from lora_dist.pipeline import StageDone, pipeline_of, receive_from_before, schedule, send_onward
from lora_dist.reduction import TreeSum, block, flatten_gradients, tree_reduce
from lora_dist.run_folder import RunFolder
from lora_dist.sharding import gathered_bytes, release
from lora_dist.strategies import Placement
from lora_dist.zero import is_partitioned, shard_optimizer, step_with


@dataclass
class Training:
    """What a step needs. `flat` order: the parameters in model order, then the extras."""

    model: PeftModel
    tokenizer: object
    config: TrainConfig
    accelerator: Accelerator
    micro_batches: MicroBatches
    eval_rows: list[list[int]]
    folder: RunFolder
    base: BaseBytes
    placement: Placement = Placement()
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


@dataclass(frozen=True)
class StepResult:
    loss: float  # mean over the trained tokens of the global batch
    grad_norm: float  # before clipping
    num_trained_tokens: int
    num_tokens: int  # without padding
    num_positions: int  # with padding
    data_time_s: float
    stop_asked: bool  # on any rank


def summed_loss(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Cross entropy in fp32, summed over the trained tokens."""
    return F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(),
        labels_BT[:, 1:].flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )


def forward_loss(run: Training, batch: MicroBatch) -> torch.Tensor:
    """The summed loss of a micro-batch, or of this rank's piece of its rows."""
    with run.accelerator.autocast():
        if run.context:
            return run.context.summed_loss(run.model, batch)
        logits = run.model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False).logits
    return summed_loss(logits, batch.labels_BT)


def train_step(run: Training, step: int) -> StepResult:
    """One optimizer step: G micro-batches, one reduction, then the same arithmetic on every rank."""
    run.data_time_s = 0.0
    stop = preemption.stop_asked()  # once a step, whatever the number of micro-batches
    flat = sum_over_stages(run, step, stop) if run.pipeline else sum_over_ranks(run, step, stop)
    numel = sum(p.numel() for p in run.params)
    loss_sum, num_trained, num_tokens, num_positions, num_stops = flat[numel : numel + 5].tolist()
    if not math.isfinite(loss_sum):
        raise FloatingPointError(
            f"step {step + 1}: the loss is {loss_sum}; lower --learning_rate, or use bf16 in place of fp16"
        )
    return StepResult(
        loss=loss_sum / num_trained,
        grad_norm=apply_gradient(run, flat[:numel] / num_trained),
        num_trained_tokens=int(num_trained),
        num_tokens=int(num_tokens),
        num_positions=int(num_positions),
        data_time_s=run.data_time_s,
        stop_asked=num_stops > 0,
    )


def read_micro_batch(run: Training, step: int, index: int) -> tuple[MicroBatch, list[int]]:
    """A micro-batch on the device, with its counts, and the random state set for its forward."""
    started = time.perf_counter()
    batch = run.micro_batches(step, index)
    run.data_time_s += time.perf_counter() - started
    counts = [batch.num_trained_tokens, batch.num_tokens, batch.input_ids_BT.numel()]
    piece = (run.context.piece,) if run.context else ()
    torch.manual_seed(random_key(run.config.seed, step, index, *piece) % 2**32)  # dropout: of the micro-batch alone
    return batch.to(run.accelerator.device), counts


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


def sum_over_ranks(run: Training, step: int, stop: bool) -> torch.Tensor:
    """Data parallel: each rank, or group that shares rows, takes a block of the micro-batches.

    The sum, flat, of gradients, loss and counts. Its leaves: all micro-batches' first pieces, then all second ones...
    """
    num_ranks, total, share = run.accelerator.num_processes, run.micro_batches.per_step, data_share(run)
    mine, tree = block(total, share.num_groups, share.group), TreeSum(total * share.num_pieces)
    for turn in range(-(-total // share.num_groups)):  # equally many on all ranks: a sharded base's gathers must match
        index = mine[min(turn, len(mine) - 1)]
        batch, counts = read_micro_batch(run, step, index)
        loss = forward_loss(run, batch)
        grads = torch.autograd.grad(scaled(run, loss), run.params, allow_unused=True)
        if share.piece:  # the first piece counts the whole rows
            counts = [0] * len(counts)
        leaf = flatten_gradients(run.params, grads, [loss.item(), *counts, stop], num_ranks)
        if turn < len(mine):  # else a spare turn: thrown away
            tree.add(0, share.piece * total + index, leaf)
    release(run.model)  # under --gather_once all of it is whole until here
    pieces = share.num_pieces
    return tree_reduce(tree, [rank % pieces * share.num_groups + rank // pieces for rank in range(num_ranks)])


def sum_over_stages(run: Training, step: int, stop: bool) -> torch.Tensor:
    """A pipeline: each rank has its layers' part of every micro-batch's gradient. The sum as in `sum_over_ranks`."""
    pipeline, total = run.pipeline, run.micro_batches.per_step
    device, dtype = run.accelerator.device, run.model.get_input_embeddings().weight.dtype
    tree, under_way = TreeSum(total), {}
    scaled(run, torch.zeros((), device=device))  # a loss scaler begins at its first use: else on the last stage alone
    for action, index in schedule(total, pipeline.stage, pipeline.num_stages):
        if action == "forward":
            batch, counts = read_micro_batch(run, step, index)
            shape_BTH = torch.Size([*batch.input_ids_BT.shape, run.model.config.hidden_size])
            receive_from_before(pipeline, shape_BTH, dtype, device)
            try:
                loss = forward_loss(run, batch)
                under_way[index] = pipeline.inbox_BTH, scaled(run, loss), [loss.item(), *counts, stop]
            except StageDone as done:
                (hidden_states_BTH,) = done.args
                assert (hidden_states_BTH.shape, hidden_states_BTH.dtype) == (shape_BTH, dtype)
                send_onward(pipeline, hidden_states_BTH)
                under_way[index] = pipeline.inbox_BTH, hidden_states_BTH, [0, 0, 0, 0, stop]
        else:
            inbox_BTH, output, extras = under_way.pop(index)
            grad = None if pipeline.is_last else pipeline.receive(torch.empty_like(output), pipeline.stage + 1)
            inputs = [*run.params, inbox_BTH] if pipeline.stage else run.params
            grads = torch.autograd.grad(output, inputs, grad, allow_unused=True)
            if pipeline.stage:
                pipeline.send(grads[-1], pipeline.stage - 1)
            tree.add(0, index, flatten_gradients(run.params, grads[: len(run.params)], extras, num_ranks=1))
    pipeline.wait()
    ((_, flat),) = tree.nodes.items()
    numel = sum(p.numel() for p in run.params)
    dist.all_reduce(flat[:numel].view(torch.int32))  # each gradient is one rank's: its bits, and zeros from the others
    dist.all_reduce(flat[numel:])
    return flat


def apply_gradient(run: Training, grad: torch.Tensor) -> float:
    """Clip the flat gradient, update the parameters and the learning rate; returns the norm before clipping."""
    if not run.zero2:
        for param, part in zip(run.params, grad.split([p.numel() for p in run.params]), strict=True):
            param.grad = part.view_as(param)
    scaler = run.accelerator.scaler
    if scaler:
        scaler.unscale_(run.optimizer)  # in place, so in `grad` too
    norm = torch.linalg.vector_norm(grad)
    if run.config.max_grad_norm:
        grad.mul_((run.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
    if scaler:
        scaler.step(run.optimizer)  # left out where fp16 overflowed; the same on all ranks, as the gradient is
        scaler.update()
    elif run.zero2:
        step_with(run.zero2, run.params, grad)
    else:
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.scheduler.step()
    return norm.item()


@torch.no_grad()
def evaluate(run: Training) -> float:
    """Mean loss over the trained tokens of the held-out rows; the same bits at any number of ranks. Collective."""
    size, device, share = run.config.per_device_eval_batch_size, run.accelerator.device, data_share(run)
    rows = sorted(run.eval_rows, key=len)  # rows of a length together: little padding
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    mine = block(len(batches), share.num_groups, share.group)
    sums = torch.zeros(len(batches), share.num_pieces, 2, dtype=torch.float64, device=device)
    run.model.eval()
    for turn in range(-(-len(batches) // share.num_groups)):
        index = mine[turn] if turn < len(mine) else 0  # a spare forward, thrown away, keeps the gathers matched
        batch = collate(batches[index], run.micro_batches.pad_token_id)
        loss, num_trained = forward_loss(run, batch.to(device)).item(), batch.num_trained_tokens
        if turn < len(mine):
            counted = 0 if share.piece else num_trained
            sums[index, share.piece] = torch.tensor([loss, counted], dtype=torch.float64)
    run.model.train()
    release(run.model)
    if share.num_groups * share.num_pieces > 1:
        dist.all_reduce(sums)  # each entry is zero on all ranks but one: exact in any order
    loss, num_trained = sums.cpu().sum((0, 1)).tolist()
    return loss / num_trained


@torch.no_grad()
def complete(run: Training, prompt: str, max_new_tokens: int = 48) -> str:
    """Greedy completion of `prompt`, "" for "". Collective: every rank generates the same tokens in lockstep."""
    if not prompt:
        return ""
    # The space that ends a prompt belongs to the next word's token: leave it to the model.
    inputs = run.tokenizer(prompt.rstrip(), return_tensors="pt").to(run.accelerator.device)
    run.model.eval()
    with run.accelerator.autocast():
        out = run.model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False,
            max_new_tokens=max_new_tokens, use_cache=not run.pipeline,
            pad_token_id=run.tokenizer.pad_token_id, eos_token_id=run.tokenizer.eos_token_id,
        )  # fmt: skip
    run.model.train()
    release(run.model)
    return run.tokenizer.decode(out[0], skip_special_tokens=True)


def save_checkpoint(run: Training, step: int) -> float:
    """Save the adapter of `step` to checkpoints/, keep the newest. Returns seconds. Collective."""
    started = time.perf_counter()
    folder = run.folder.checkpoint(step)
    save_adapter_checked(run, folder / "adapter", trained=step > 1 or not run.config.warmup_steps)
    if run.accelerator.is_main_process:
        write_manifest(folder)
        run.folder.prune_checkpoints(run.config.save_total_limit)
        run.folder.write_state("running", step)
    return time.perf_counter() - started


def save_adapter_checked(run: Training, folder: Path, *, trained: bool) -> None:
    """Save the adapter; raise RuntimeError unless it is one on all ranks and PEFT reads it back as such. Collective."""
    check_identical(run.model, run.accelerator.device)
    if run.accelerator.is_main_process:
        save_adapter(run.model, run.tokenizer, folder)
    run.accelerator.wait_for_everyone()
    probe = collate([run.micro_batches.rows[0]], run.micro_batches.pad_token_id).to(run.accelerator.device)
    verify_adapter(run.model, folder, probe, trained=trained)


def peak_memory_bytes(device: torch.device) -> int:
    """This rank's peak: of allocated GPU memory, or of the process where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train(run: Training, metrics: MetricsLog) -> dict:
    """All steps, with evaluations, checkpoints and metrics. Returns the measured part of the summary. Collective."""
    config = run.config
    losses, tokens_seen, trained_seen, train_time_s = [], 0, 0, 0.0
    eval_loss = eval_loss_base = log_evaluation(run, metrics, 0)  # lora_B is zero: the base
    show_bar = run.accelerator.is_main_process and sys.stderr.isatty()
    bar = tqdm(total=run.num_steps, unit="step", disable=not show_bar)
    run.model.train()
    for done in range(1, run.num_steps + 1):
        started, gathered_before = time.perf_counter(), gathered_bytes(run.model)
        result = train_step(run, done - 1)
        step_time_s, gathered = time.perf_counter() - started, gathered_bytes(run.model) - gathered_before
        train_time_s += step_time_s
        tokens_seen, trained_seen = tokens_seen + result.num_tokens, trained_seen + result.num_trained_tokens
        losses.append(result.loss)
        last = done == run.num_steps
        preempted = result.stop_asked and not last
        values = {}
        if done % config.logging_steps == 0 or last:
            values = step_metrics(run, result, done, step_time_s)
            values |= {"train/tokens_seen": tokens_seen, "train/trainable_tokens_seen": trained_seen}
        if preempted or (config.save_steps and done % config.save_steps == 0 and not last):
            values["checkpoint/save_time_s"] = save_checkpoint(run, done)
        if values:
            metrics.log(values, done)
        if last or (config.eval_steps and done % config.eval_steps == 0):
            eval_loss = log_evaluation(run, metrics, done)
        bar.update()
        bar.set_postfix(loss=f"{result.loss:.3f}", refresh=False)
        if preempted:
            break
    bar.close()
    if done < run.num_steps:  # preempted: not evaluated since
        eval_loss = None
    return {
        "steps": done, "loss_first": losses[0], "loss_last": losses[-1], "eval_loss_base": eval_loss_base,
        "eval_loss": eval_loss, "tokens_seen": tokens_seen, "tokens_per_second": tokens_seen / train_time_s,
        "gathered_bytes_per_step": None if is_partitioned(run.model) else gathered,  # DeepSpeed's are not counted
    }  # fmt: skip


def step_metrics(run: Training, result: StepResult, done: int, step_time_s: float) -> dict[str, float]:
    batches = run.micro_batches
    return {
        "train/loss": result.loss,
        "train/grad_norm": result.grad_norm,
        "train/learning_rate": run.scheduler.get_last_lr()[0],  # of the next step
        "train/epoch": done * batches.per_step * batches.sequences / len(batches.rows),
        "perf/step_time_s": step_time_s,
        "perf/data_time_s": result.data_time_s,
        "perf/tokens_per_second": result.num_tokens / step_time_s,
        "perf/padding_fraction": 1 - result.num_tokens / result.num_positions,
    }


def log_evaluation(run: Training, metrics: MetricsLog, step: int) -> float | None:
    """The held-out loss, logged; None where nothing is held out. Collective."""
    if not run.eval_rows:
        return None
    loss = evaluate(run)
    metrics.log({"eval/loss": loss, "eval/perplexity": math.exp(loss)}, step)
    return loss
