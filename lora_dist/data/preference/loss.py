"""Losses of pairs of a chosen and a rejected answer, against fixed log-probabilities of a reference.

sigmoid: DPO (arXiv 2305.18290), with `--label_smoothing` its conservative form; hinge: SLiC (arXiv 2305.10425); ipo:
arXiv 2310.12036; robust: arXiv 2403.00409. TRL's DPOTrainer computes the same (tests/training/test_preference.py).

B, T, V, M: rows, tokens, vocabulary, measures. P: pairs; rows 2p and 2p + 1 of a batch are the chosen and the rejected
row of pair p.
"""

import torch
import torch.nn.functional as F

from lora_dist.config import TrainConfig
from lora_dist.data.tasks import IGNORE_INDEX, trained_pairs


def sequence_logps(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """The log-probability of each row's trained tokens, in fp32 (B,)."""
    scores, targets_BT = logits_BTV[:, :-1].flatten(0, 1).float(), labels_BT[:, 1:]
    losses = F.cross_entropy(scores, targets_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return -losses.view_as(targets_BT).sum(1)


def pair_loss(
    logps_B: torch.Tensor, reference_B: torch.Tensor, labels_BT: torch.Tensor, config: TrainConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, PAIR_MEASURES), each summed over the pairs. Scalar, and (M,). A pair that trains nothing counts as 0."""
    gained_P2 = (logps_B - reference_B).view(-1, 2)
    counted_P = trained_pairs(labels_BT)
    losses_P = _losses(gained_P2, (labels_BT != IGNORE_INDEX).sum(1).view(-1, 2), config)
    with torch.no_grad():
        chosen_P, rejected_P = (config.beta * gained_P2).unbind(1)
        right_P = (chosen_P > rejected_P).float()
        measured_MP = torch.stack(
            [chosen_P, rejected_P, chosen_P - rejected_P, right_P, *logps_B.view(-1, 2).unbind(1)]
        )
    return (losses_P * counted_P).sum(), (measured_MP * counted_P).sum(1)


def _losses(gained_P2: torch.Tensor, num_trained_P2: torch.Tensor, config: TrainConfig) -> torch.Tensor:
    """The loss of each pair (P,). `num_trained_P2`: trained tokens of the chosen and of the rejected row."""
    beta, smoothing = config.beta, config.label_smoothing
    if config.loss_type == "ipo":  # per token, as the authors of the paper computed it
        chosen_P, rejected_P = (gained_P2 / num_trained_P2.clamp(min=1)).unbind(1)
        return (chosen_P - rejected_P - 1 / (2 * beta)) ** 2
    margin_P = beta * (gained_P2[:, 0] - gained_P2[:, 1])
    if config.loss_type == "hinge":
        return torch.relu(1 - margin_P)
    right_P, wrong_P = -F.logsigmoid(margin_P), -F.logsigmoid(-margin_P)
    if config.loss_type == "robust":
        return ((1 - smoothing) * right_P - smoothing * wrong_P) / (1 - 2 * smoothing)
    return (1 - smoothing) * right_P + smoothing * wrong_P if smoothing else right_P
