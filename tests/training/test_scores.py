import pytest
import torch

from lora_dist.training.scores import f1_scores


def test_f1_by_hand():
    true = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0]]) > 0
    predicted = torch.tensor([[1, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]]) > 0
    # Class 0: 2 hits, 1 false alarm, 1 miss. Class 1: 1 hit, 1 miss. Class 2: never named.
    scores = f1_scores(predicted, true)
    assert scores["micro_f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert scores["macro_f1"] == pytest.approx((2 * 2 / (2 * 2 + 2) + 2 * 1 / (2 * 1 + 1) + 0) / 3)


def test_f1_of_nothing_and_of_all():
    nothing, everything = torch.zeros(3, 2) > 0, torch.ones(3, 2) > 0
    assert f1_scores(nothing, everything) == {"micro_f1": 0.0, "macro_f1": 0.0}
    assert f1_scores(everything, everything) == {"micro_f1": 1.0, "macro_f1": 1.0}
    assert f1_scores(nothing, nothing) == {"micro_f1": 0.0, "macro_f1": 0.0}
