"""One run: the parts that its steps, evaluations, checkpoints and summary work with."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lora_dist.config import TrainConfig
from lora_dist.data.rows import Rows
from lora_dist.model.memory import BaseBytes, Expected
from lora_dist.parallel.strategies import Placement, Strategy
from lora_dist.run.folder import RunFolder
from lora_dist.tracking.flops import BaseWork
from lora_dist.tracking.metrics import MetricsLog
from lora_dist.training.step import StepResult, Training

NUM_RECENT_LOSSES = 50  # a new loss is compared with these to find spikes
NUM_MEAN_LOSSES = 10  # of the first and of the last steps; their means are printed at the end


@dataclass(frozen=True)
class LoadedBase:
    """The base as it was loaded on this rank."""

    placement: Placement
    num_bytes: BaseBytes
    load_s: float
    expected: Expected
    work: BaseWork | None  # None if the operations of this kind of model are not counted
    memory_before_bytes: int  # this rank's peak before the base was loaded


@dataclass
class Progress:
    """How far a run is: saved with each checkpoint, and the source of its summary."""

    step: int = 0  # optimizer steps completed
    tokens_seen: int = 0  # without padding
    trained_tokens_seen: int = 0
    train_time_s: float = 0.0
    loss_first: float | None = None
    first_losses: list[float] = field(default_factory=list)
    eval_loss_base: float | None = None  # at step 0
    eval_loss: float | None = None  # of eval_step
    eval_step: int | None = None
    eval_reward_accuracy_base: float | None = None  # of pairs: share of the held-out ones, at step 0
    eval_reward_accuracy: float | None = None  # of eval_step
    best_eval_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    recent_losses: list[float] = field(default_factory=list)
    loss_spikes: int = 0
    skipped_steps: int = 0
    bad_steps_in_a_row: int = 0

    def count(self, result: StepResult, step_time_s: float) -> None:
        """Add a step. The loss of a bad step is not recorded."""
        self.step += 1
        self.train_time_s += step_time_s
        self.tokens_seen += result.num_tokens
        self.trained_tokens_seen += result.num_trained_tokens
        self.skipped_steps += result.skipped
        self.bad_steps_in_a_row = self.bad_steps_in_a_row + 1 if result.bad else 0
        if not result.bad:
            self.loss_first = result.loss if self.loss_first is None else self.loss_first
            self.first_losses = [*self.first_losses, result.loss][:NUM_MEAN_LOSSES]
            self.recent_losses = [*self.recent_losses, result.loss][-NUM_RECENT_LOSSES:]

    def mean_losses(self) -> tuple[float, float, int]:
        """(mean loss of the first n steps, of the last n steps, n); n is smaller in a run of a few steps."""
        num_steps = max(1, min(NUM_MEAN_LOSSES, len(self.recent_losses) // 2))
        first, last = self.first_losses[:num_steps], self.recent_losses[-num_steps:]
        return statistics.fmean(first), statistics.fmean(last), num_steps

    def summary(self, num_steps: int) -> dict:
        """What `state.json` says about it. `num_steps`: of the whole run, or where it was stopped early."""
        return {
            "steps": self.step, "loss_first": self.loss_first, "loss_last": (self.recent_losses or [None])[-1],
            "eval_loss_base": self.eval_loss_base, "eval_loss": self.eval_loss if self.step == num_steps else None,
            "best_eval_loss": self.best_eval_loss, "best_step": self.best_step, "tokens_seen": self.tokens_seen,
            "skipped_steps": self.skipped_steps,
            "tokens_per_second": self.tokens_seen / self.train_time_s if self.train_time_s else None,
            **self.reward_scores(),
        }  # fmt: skip

    def reward_scores(self) -> dict[str, float]:
        """Share of the held-out pairs of which the chosen answer gained more than the rejected one, by score name."""
        before, after = self.eval_reward_accuracy_base, self.eval_reward_accuracy
        found = {"reward_accuracy_base": before, "reward_accuracy": after}
        return found if before is not None and after is not None else {}


@dataclass
class Run:
    """A run on this rank, from when the base is loaded until the ranks leave. Made by `open_run`.

    Only `progress`, `last_step` and `scores` change while it trains.
    """

    config: TrainConfig
    strategy: Strategy
    accelerator: Accelerator
    folder: RunFolder
    tokenizer: PreTrainedTokenizerBase
    held_out: Rows
    base: LoadedBase
    training: Training
    metrics: MetricsLog
    # Called at the start and at the end, on all ranks: scores of the held-out rows by name, for the summary and the
    # metric eval/NAME.
    score: Callable[["Run"], dict[str, float]] | None = None
    scores: dict[str, float] = field(default_factory=dict)  # by NAME_base and NAME
    progress: Progress = field(default_factory=Progress)
    last_step: StepResult | None = None  # of the steps taken since this start of the run

    @property
    def model(self) -> PeftModel:
        return self.training.model

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes and prints."""
        return self.accelerator.is_main_process

    @property
    def is_complete(self) -> bool:
        return self.progress.step == self.training.num_steps or self.is_stopped_early

    @property
    def is_stopped_early(self) -> bool:
        """True if the last evaluations brought no lower held-out loss, as many as --early_stopping_patience."""
        patience = self.config.early_stopping_patience
        return 0 < patience <= self.progress.evaluations_since_best
