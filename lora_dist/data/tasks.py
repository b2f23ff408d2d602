"""The kinds of task, under PEFT's names: each has its class of model, its labels and its loss.

B, T: sequences, tokens. V: the size of the vocabulary, or the number of classes. L: labels of a row. L is T for
CAUSAL_LM and TOKEN_CLS, and the length of the target for SEQ_2_SEQ_LM. For SEQ_CLS it is 1, or V if a row may have
several classes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
)

from lora_dist.config import TrainConfig

CLASSIFIER_HEADS = ("classifier", "score")  # names of a classifier's head in transformers; PEFT trains it whole
IGNORE_INDEX = -100  # the label of what is not trained; cross_entropy's default
# TRL's names. A reward is beta times the log-probability that an answer gained over the reference.
PAIR_MEASURES = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A kind of task. Its labels are int64 (B, L), and IGNORE_INDEX for what is not trained.

    CAUSAL_LM: label t is token t, and position t - 1 predicts it. SEQ_2_SEQ_LM: the tokens of the target. TOKEN_CLS:
    the class number of each token. SEQ_CLS: one class number, or a 0 or 1 for each class if a row may have several.
    """

    name: str
    model_kind: str  # what messages call a model for this task
    models: Mapping  # config class to model class
    rows_per_example: int = 1  # 2: a chosen and a rejected row, which the loss compares

    @property
    def has_classes(self) -> bool:
        return self.name in ("SEQ_CLS", "TOKEN_CLS")

    @property
    def has_pairs(self) -> bool:
        return self.rows_per_example == 2

    @property
    def has_perplexity(self) -> bool:
        """True if exp(loss) is a perplexity: the loss is a mean over tokens of text."""
        return not (self.has_classes or self.has_pairs)

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of what a step and an evaluation measure beside the loss, as means over the same terms."""
        return PAIR_MEASURES if self.has_pairs else ("mean_token_accuracy",)

    @property
    def labels_each_token(self) -> bool:
        return self.name in ("CAUSAL_LM", "TOKEN_CLS")

    @property
    def first_predicted(self) -> int:
        """Index of the first label that the model predicts. CAUSAL_LM: no position predicts the first token."""
        return 1 if self.name == "CAUSAL_LM" else 0

    def num_trained_tokens(self, labels_BL: torch.Tensor) -> int:
        """Number of labels that the loss is a mean over. SEQ_CLS: rows, or rows x classes if a row may have several."""
        return int((labels_BL[:, self.first_predicted :] != IGNORE_INDEX).sum())

    def loss_weight(self, labels_BL: torch.Tensor) -> int:
        """Number of terms that the loss is a mean over: trained tokens, or pairs of which both rows train something."""
        return int(trained_pairs(labels_BL).sum()) if self.has_pairs else self.num_trained_tokens(labels_BL)

    def has_trained_tokens(self, labels: Sequence[int]) -> bool:
        """True if a row with these L labels trains anything."""
        return any(label != IGNORE_INDEX for label in labels[self.first_predicted :])

    def exact_match(self, logits_BTV: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
        """True for each row in which the highest logit is the label at every trained position. Bool (B,)."""
        if self.name == "CAUSAL_LM":
            logits_BTV, labels_BL = logits_BTV[:, :-1], labels_BL[:, 1:]
        return ((logits_BTV.argmax(-1) == labels_BL) | (labels_BL == IGNORE_INDEX)).all(1)

    def num_correct(self, logits: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
        """Number of trained labels that the highest logit gets right. Scalar int64.

        SEQ_CLS if a row may have several classes: number of right decisions, where a positive logit means 1.
        `logits`: (B, T, V), for SEQ_CLS (B, V).
        """
        if self.name == "SEQ_CLS" and labels_BL.shape[1] > 1:
            return ((logits > 0) == labels_BL.bool())[labels_BL != IGNORE_INDEX].sum()
        if self.name == "CAUSAL_LM":
            logits, labels_BL = logits[:, :-1], labels_BL[:, 1:]
        highest = logits.max(-1).indices  # argmax takes 6 times as long for bf16 on a CPU
        return (highest.flatten() == labels_BL.flatten()).sum()

    def summed_loss(self, logits: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
        """Cross entropy in fp32, summed over the trained labels. Scalar. `logits`: (B, T, V), for SEQ_CLS (B, V)."""
        if self.name == "SEQ_CLS" and labels_BL.shape[1] > 1:
            trained_BL = labels_BL != IGNORE_INDEX
            target_BL = labels_BL.clamp(min=0).float()
            losses_BL = F.binary_cross_entropy_with_logits(logits.float(), target_BL, reduction="none")
            return (losses_BL * trained_BL).sum()
        if self.name == "CAUSAL_LM":
            logits, labels_BL = logits[:, :-1], labels_BL[:, 1:]
        scores = logits.flatten(0, -2).float()
        return F.cross_entropy(scores, labels_BL.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def trained_pairs(labels_BL: torch.Tensor) -> torch.Tensor:
    """Bool (B / 2,): whether both rows of a pair train something. The rows of a pair are adjacent, chosen first."""
    return (labels_BL[:, 1:] != IGNORE_INDEX).any(1).view(-1, 2).all(1)


TASKS = {
    task.name: task
    for task in (
        Task("CAUSAL_LM", "causal language model", MODEL_FOR_CAUSAL_LM_MAPPING),
        Task("SEQ_2_SEQ_LM", "sequence-to-sequence model", MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
        Task("SEQ_CLS", "model with a sequence classifier", MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
        Task("TOKEN_CLS", "model with a token classifier", MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING),
    )
}
CAUSAL_LM = TASKS["CAUSAL_LM"]
PREFERENCE = dataclasses.replace(CAUSAL_LM, rows_per_example=2)


def task_of(config: TrainConfig) -> Task:
    """The task of a run: `--task_type`, or a causal language model that is trained on pairs."""
    return PREFERENCE if config.has_pairs else TASKS[config.task_type]
