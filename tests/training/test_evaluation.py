"""Which tokens of a held-out row are given to be completed, and which it is compared with."""

from types import SimpleNamespace

import pytest
import torch

from lora_dist.data.tasks import IGNORE_INDEX, TASKS
from lora_dist.training import evaluation
from lora_dist.training.evaluation import complete_samples, f1_scores


class Words:
    """A tokenizer of numbers; 0 is special, and stands for every other word."""

    bos_token_id = eos_token_id = None

    def __call__(self, text: str, verbose: bool) -> dict:
        return {"input_ids": [int(word) if word.isdecimal() else 0 for word in text.split()]}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(f" {i}" for i in ids if i)


def row(ids: list[int], num_given: int) -> dict:
    return {"input_ids": ids, "labels": [IGNORE_INDEX] * num_given + ids[num_given:]}


@pytest.fixture
def completed(monkeypatch):
    """Samples of rows, and the tokens that were given for each."""

    def of(rows: list[dict], task: str = "CAUSAL_LM", room: int | None = None, **settings):
        given = []
        monkeypatch.setattr(evaluation, "longest_prompt", lambda model, num_new_tokens: room)
        monkeypatch.setattr(evaluation, "complete", lambda run, prompt: given.append(prompt) or [7, 8])
        config = SimpleNamespace(**({"sample_prompt": "", "num_eval_samples": 2} | settings))
        training = SimpleNamespace(micro_batches=SimpleNamespace(task=TASKS[task]))
        run = SimpleNamespace(config=config, tokenizer=Words(), training=training, held_out=rows, model=None)
        return complete_samples(run), given

    return of


def test_a_prompt_is_given_with_its_special_tokens(completed):
    """A chat's turns are marked by them: the text alone would be another prompt."""
    samples, given = completed([row([0, 1, 0, 2, 3, 4], 4)])
    assert given == [[0, 1, 0, 2]]
    assert samples == [{"prompt": " 1 2", "reference": " 3 4", "completion": " 7 8"}]


def test_of_a_text_the_first_half_is_given(completed):
    samples, given = completed([row([0, 1, 2, 3, 4], 1), row([1, 2, 3, 4], 0), row([9], 0)])
    assert given == [[0, 1, 2], [1, 2]] and [sample["reference"] for sample in samples] == [" 3 4", " 3 4"]


def test_of_a_prompt_that_leaves_no_positions_the_end_is_given(completed):
    samples, given = completed([row([1, 2, 3, 4, 5, 6], 5)], room=3)
    assert given == [[3, 4, 5]] and samples[0]["reference"] == " 6"


def test_an_encoder_is_given_all(completed):
    rows = [{"input_ids": [1, 2, 3], "labels": [4, 5]}]
    samples, given = completed(rows, "SEQ_2_SEQ_LM")
    assert given == [[1, 2, 3]] and samples[0]["reference"] == " 4 5"


def test_the_prompt_of_the_settings_comes_first_and_classes_have_none(completed):
    samples, given = completed([row([1, 2], 0)], sample_prompt="5 6 ", num_eval_samples=1)
    assert given == [[5, 6], [1]] and samples[0]["reference"] is None
    assert completed([row([1, 2], 0)], "SEQ_CLS") == ([], [])
    assert completed(None) == ([], [])


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
