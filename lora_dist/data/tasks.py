"""The kinds of task, under PEFT's names: the model's class, what its labels are, and its loss.

B, T, V: sequences, tokens, vocabulary or classes. L: labels of a row: T, or the length of a target, or the classes.
"""

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

CLASSIFIERS = ("classifier", "score")  # the heads of models with classes: trained whole, by PEFT itself
IGNORE_INDEX = -100  # cross_entropy's default


@dataclass(frozen=True)
class Task:
    """Labels are int64 (B, L), IGNORE_INDEX where nothing is trained.

    CAUSAL_LM: token t + 1 at position t + 1, predicted at t. SEQ_2_SEQ_LM: the target's tokens. TOKEN_CLS: a class for
    each token. SEQ_CLS: one class, or for several at once a 0 or 1 for each class.
    """

    name: str
    what: str  # a model of it is called
    models: Mapping  # config class to model class

    @property
    def has_classes(self) -> bool:
        return self.name in ("SEQ_CLS", "TOKEN_CLS")

    @property
    def labels_each_token(self) -> bool:
        return self.name in ("CAUSAL_LM", "TOKEN_CLS")

    @property
    def first(self) -> int:
        """The first label that is predicted."""
        return 1 if self.name == "CAUSAL_LM" else 0

    def num_trained(self, labels_BL: torch.Tensor) -> int:
        """What the loss is a mean over: predicted tokens or classes."""
        return int((labels_BL[:, self.first :] != IGNORE_INDEX).sum())

    def is_trained(self, labels: Sequence[int]) -> bool:
        """Whether a row has anything to learn from."""
        return any(label != IGNORE_INDEX for label in labels[self.first :])

    def exact(self, logits_BTV: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
        """Whether the highest logit is the label wherever a row is trained: bool (B,)."""
        if self.name == "CAUSAL_LM":
            logits_BTV, labels_BL = logits_BTV[:, :-1], labels_BL[:, 1:]
        return ((logits_BTV.argmax(-1) == labels_BL) | (labels_BL == IGNORE_INDEX)).all(1)

    def num_correct(self, logits: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
        """How many of what is trained the highest logit gets right; of several classes at once, how many decisions."""
        if self.name == "SEQ_CLS" and labels_BL.shape[1] > 1:
            return ((logits > 0) == labels_BL.bool())[labels_BL != IGNORE_INDEX].sum()
        if self.name == "CAUSAL_LM":
            logits, labels_BL = logits[:, :-1], labels_BL[:, 1:]
        highest = logits.max(-1).indices  # not argmax, which on bf16 takes a CPU 6 times as long
        return (highest.flatten() == labels_BL.flatten()).sum()

    def summed_loss(self, logits: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
        """Cross entropy in fp32, summed over what is trained. `logits`: (B, T, V), of SEQ_CLS (B, V)."""
        if self.name == "SEQ_CLS" and labels_BL.shape[1] > 1:
            trained_BL = labels_BL != IGNORE_INDEX
            target_BL = labels_BL.clamp(min=0).float()
            losses_BL = F.binary_cross_entropy_with_logits(logits.float(), target_BL, reduction="none")
            return (losses_BL * trained_BL).sum()
        if self.name == "CAUSAL_LM":
            logits, labels_BL = logits[:, :-1], labels_BL[:, 1:]
        scores = logits.flatten(0, -2).float()
        return F.cross_entropy(scores, labels_BL.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


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
