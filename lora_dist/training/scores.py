"""How right predictions are."""

import torch


def f1_scores(predicted_NC: torch.Tensor, true_NC: torch.Tensor) -> dict[str, float]:
    """Micro and macro F1 of several classes at once. bool (rows, classes) each; a class that nobody names scores 0.

    Micro counts all decisions together; macro is the mean of the classes' own scores.
    """
    hits_C = (predicted_NC & true_NC).sum(0).double()
    named_C = (predicted_NC.sum(0) + true_NC.sum(0)).double()  # F1 = 2 hits / (predicted + true)
    of_class_C = torch.where(named_C > 0, 2 * hits_C / named_C.clamp(min=1), 0.0)
    micro = 2 * hits_C.sum() / named_C.sum().clamp(min=1)
    return {"micro_f1": micro.item(), "macro_f1": of_class_C.mean().item()}
