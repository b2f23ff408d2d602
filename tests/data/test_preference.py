"""Pairs of answers: the forms of TRL's preference data, what is refused, and how pairs are batched."""

import dataclasses
import json

import pytest

from lora_dist.data.formats import Encoder, load_tokenizer, mark_trained
from lora_dist.data.micro_batches import MicroBatches, collate
from lora_dist.data.preference.pairs import split_texts
from lora_dist.data.rows import Rows, prepare_rows
from lora_dist.data.tasks import IGNORE_INDEX, PREFERENCE
from lora_dist.errors import UserError
from tests.helpers.ranks import assert_refused, fork_ranks

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}"
TEMPLATE += "<|assistant|>\n{% endif %}"
USER, OTHER = {"role": "user", "content": "A harbour?"}, {"role": "user", "content": "And then?"}
YES, NO = {"role": "assistant", "content": "Yes. The sea."}, {"role": "assistant", "content": "No."}


@pytest.fixture
def pairs(config):
    return dataclasses.replace(config, dataset_text_field=None, loss_type="sigmoid", eval_fraction=0.0)


@pytest.fixture
def prepare(pairs, tmp_path):
    def prepare(*examples, **settings):
        """The prepared data of these examples, written to a file."""
        file = tmp_path / "pairs.jsonl"
        file.write_text("".join(json.dumps(example) + "\n" for example in examples))
        tokenizer = load_tokenizer("embedded")
        tokenizer.chat_template = TEMPLATE
        return prepare_rows(dataclasses.replace(pairs, dataset_name=str(file), **settings), tokenizer)

    return prepare


def shown(data) -> list[str]:
    tokenizer = load_tokenizer("embedded")
    rows = [data.train[i] for i in range(len(data.train))]
    return [mark_trained(tokenizer, row["input_ids"], row["labels"]) for row in rows]


SEA = ["</s>Hope is⟦ the sea.</s>⟧", "</s>Hope is⟦ a rope.</s>⟧"]
ASKED = "<|user|>\nA harbour?</s>\n<|assistant|>\n"
HARBOUR = [f"{ASKED}⟦Yes. The sea.</s>⟧\n", f"{ASKED}⟦No.</s>⟧\n"]
# form: (example, what its two rows show)
FORMS = {
    "prompt": ({"prompt": "Hope is", "chosen": " the sea.", "rejected": " a rope."}, SEA),
    "no prompt": ({"chosen": "Hope is the sea.", "rejected": "Hope is a rope."}, SEA),
    "messages": ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, HARBOUR),
    "messages without a prompt": ({"chosen": [USER, YES], "rejected": [USER, NO]}, HARBOUR),
    "messages, prompt repeated": ({"prompt": "A harbour?", "chosen": [USER, YES], "rejected": [USER, NO]}, HARBOUR),
    "turns that both share": (
        {"chosen": [USER, YES, OTHER, YES], "rejected": [USER, YES, OTHER, NO]},
        [f"{ASKED}Yes. The sea.</s>\n<|user|>\nAnd then?</s>\n<|assistant|>\n⟦{answer}</s>⟧\n"
         for answer in ("Yes. The sea.", "No.")],
    ),
    "a system prompt": (
        {"prompt": [USER], "chosen": [YES], "rejected": [NO], "system": "Be kind."},
        [f"<|system|>\nBe kind.</s>\n{row}" for row in HARBOUR],
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_exactly_the_two_answers_are_compared(prepare, form):
    example, expected = FORMS[form]
    data = prepare(example)
    assert data.format == "preference" and shown(data) == expected and not data.unread and not data.warnings()


@pytest.mark.parametrize(
    "chosen, rejected, expected",
    [
        ("Q: a?\n\nA: blue", "Q: a?\n\nA: black", ("Q: a?\n\nA:", " blue", " black")),  # no word is cut
        ("Q?\n\nYes", "Q?\n\nNo", ("Q?", "\n\nYes", "\n\nNo")),
        ("yes", "no", ("", "yes", "no")),
        ("a b", "a b c", ("a", " b", " b c")),
        ("same same", "same same", ("same", " same", " same")),
    ],
)
def test_the_prompt_that_two_texts_share(chosen, rejected, expected):
    assert split_texts(chosen, rejected) == expected


def test_the_pairs_of_trl_have_the_same_tokens(pairs):
    """The prompt ends where a word does, so TRL's DPOTrainer divides prompt and answers at the same tokens."""
    from trl.data_utils import extract_prompt

    example = {"chosen": "Hope is the sea.", "rejected": "Hope is a rope."}
    theirs = extract_prompt(example)
    assert (theirs["prompt"], theirs["chosen"], theirs["rejected"]) == split_texts(*example.values())


# what: (examples, words of the error)
REFUSED = {
    "a text and messages": ([{"chosen": "a", "rejected": [NO]}], "line 1: one of chosen and rejected is a text"),
    "no shared message": ([{"chosen": [USER, YES], "rejected": [OTHER, NO]}], "line 1: chosen and rejected share no"),
    "a number": ([{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": 3, "rejected": 4}],
                 "line 2: column chosen holds a int; it must hold text or a list of messages"),
    "prompt is a number": ([{"prompt": 3, "chosen": "b", "rejected": "c"}], 'line 1: column prompt holds a int'),
    "an unknown role": (
        [{"prompt": [USER], "chosen": [{"role": "cat", "content": "a"}], "rejected": [NO]}],
        "line 1: message 1 of chosen has the role 'cat'",
    ),
    "one column only": ([{"prompt": "a", "chosen": "b"}], "--loss_type sigmoid: needs columns chosen and rejected"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_bad_pairs_are_refused_by_their_line(prepare, what):
    examples, words = REFUSED[what]
    with pytest.raises(UserError) as refused:
        prepare(*examples)
    assert words in str(refused.value) and "\n" not in str(refused.value), refused.value


# settings: words of the error
SETTINGS = {
    ("packing", True): "--packing True: is not supported with --loss_type sigmoid",
    ("streaming", True): "--streaming True: is not supported with --loss_type sigmoid",
    ("overlong_rows", "split"): "--overlong_rows split: is not supported with --loss_type sigmoid",
    ("context_parallel_size", 2): "--context_parallel_size 2: is not supported with --loss_type sigmoid",
    ("train_on_inputs", True): "--train_on_inputs True: is not supported with --loss_type sigmoid",
    ("task_type", "SEQ_2_SEQ_LM"): "--task_type SEQ_2_SEQ_LM: is not supported with --loss_type sigmoid",
    ("task_type", "SEQ_CLS"): "--task_type SEQ_CLS: is not supported with --loss_type sigmoid",
    ("dataset_format", "text"): "--dataset_format text: has no effect with --loss_type sigmoid",
    ("dataset_text_field", "chosen"): "--dataset_text_field chosen: has no effect with --loss_type sigmoid",
}


@pytest.mark.parametrize("name, value", SETTINGS)
def test_what_pairs_do_not_support_is_refused(prepare, name, value):
    with pytest.raises(UserError) as refused:
        prepare(FORMS["prompt"][0], **{name: value})
    assert SETTINGS[name, value] in str(refused.value) and "\n" not in str(refused.value)


def test_pairs_need_their_loss_and_the_loss_needs_pairs(prepare, config):
    with pytest.raises(UserError, match="these are pairs: give --loss_type sigmoid, or use recipes/dpo.py"):
        prepare({"chosen": "a b", "rejected": "a c"}, loss_type="nll")
    with pytest.raises(UserError, match="--dataset_format preference: needs a loss of pairs"):
        prepare(FORMS["prompt"][0], loss_type="nll", dataset_format="preference")
    both = FORMS["prompt"][0] | {"completion": " the sea."}
    assert prepare(both, loss_type="nll").format == "prompt_completion" and prepare(both).format == "preference"


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"beta": 0.2}, "--beta 0.2: has no effect with --loss_type nll"),
        ({"reference_adapter": "a"}, "--reference_adapter a: has no effect with --loss_type nll"),
        ({"label_smoothing": 0.1}, "--label_smoothing 0.1: has no effect with --loss_type nll"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "has no effect with --loss_type ipo; use sigmoid or robust"),
        ({"loss_type": "robust"}, "--loss_type robust: needs --label_smoothing"),
        ({"loss_type": "sigmoid", "label_smoothing": 0.5}, "--label_smoothing 0.5: must be 0 or more and below 0.5"),
        ({"loss_type": "sigmoid", "beta": 0.0}, "--beta 0.0: must be above 0"),
        ({"loss_type": "dpo"}, "--loss_type dpo: must be one of nll, sigmoid, hinge, ipo, robust"),
    ],
)
def test_settings_of_the_loss(config, settings, words):
    with pytest.raises(UserError) as refused:
        dataclasses.replace(config, **settings)
    assert words in str(refused.value)


def test_a_pair_is_kept_or_left_out_as_a_whole(prepare):
    good = FORMS["prompt"][0]
    data = prepare(
        good, good | {"chosen": ""}, good | {"rejected": None}, good | {"rejected": good["chosen"]},
        {"prompt": "Hope " * 30, "chosen": " the sea.", "rejected": " a rope."}, max_length=20,
    )  # fmt: skip
    assert shown(data) == SEA
    counts = data.counts["train"]
    assert (counts.examples, counts.empty, counts.without_trained_tokens, counts.overlong) == (5, 2, 2, 1)
    overlong = good | {"chosen": " the sea" * 9}
    assert len(prepare(good, overlong, max_length=10, overlong_rows="drop").train) == 2
    assert len(prepare(good, overlong, max_length=10).train) == 4


def test_the_answers_go_through_as_the_completions_that_they_are(pairs):
    """Each row is that of --dataset_format prompt_completion."""
    tokenizer = load_tokenizer("embedded")
    encoder = Encoder(tokenizer, pairs, ["prompt", "chosen", "rejected"])
    rows = encoder([encoder.read(FORMS["prompt"][0], "line 1")])
    plain = Encoder(tokenizer, dataclasses.replace(pairs, loss_type="nll"), ["prompt", "completion"])
    for row, answer in zip(rows, (" the sea.", " a rope."), strict=True):
        assert plain([plain.read({"prompt": "Hope is", "completion": answer}, "line 1")]) == [row]


# --- batches


def made_up(lengths: list[int]) -> Rows:
    rows = Rows.of([([i] * n, [IGNORE_INDEX, *[i] * (n - 1)]) for i, n in enumerate(lengths)])
    return rows


@pytest.mark.parametrize("grouped", [False, True])
def test_a_pair_is_two_adjacent_rows_of_one_micro_batch(grouped):
    rows = made_up([3, 9, 4, 4, 20, 3, 5, 6, 7, 7])
    rows.reference = [-float(i) for i in range(10)]
    batches = MicroBatches(
        rows, pad_token_id=99, seed=1, sequences=2, per_step=2, num_epochs=1, task=PREFERENCE, group_by_length=grouped
    )
    assert (batches.sequences_per_epoch, batches.num_steps) == (5, 2)
    seen = []
    for step in range(2):
        for index in range(2):
            batch = batches(step, index)
            ids = [i for pair in batches.row_ids(step, index) for i in pair]
            assert all(
                rejected == chosen + 1 and chosen % 2 == 0 for chosen, rejected in zip(ids[::2], ids[1::2], strict=True)
            )
            if ids:
                assert batch.input_ids_BT[:, 0].tolist() == ids
                assert batch.reference_B.tolist() == [-float(i) for i in ids]
            assert batch.loss_weight == len(ids) // 2
            seen += ids
    assert sorted(seen) == list(range(10))
    beyond = batches(1, 1)  # one of 5 pairs is left for the second step: nothing to train, but the gathers must match
    assert beyond.loss_weight == beyond.num_trained_tokens == 0 and beyond.input_ids_BT.shape[0] == 2


def test_a_pair_of_which_one_row_trains_nothing_has_no_weight():
    rows = [{"input_ids": [1, 2], "labels": [IGNORE_INDEX, 2]}, {"input_ids": [1, 3], "labels": [IGNORE_INDEX] * 2}]
    assert collate(rows, 0, PREFERENCE).loss_weight == 0


def test_the_recipe_refuses_bad_pairs_on_all_ranks(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text(
        '{"prompt": "a", "chosen": " b", "rejected": " c"}\n{"prompt": "a", "chosen": 3, "rejected": "c"}\n'
    )
    flags = ("--dataset_name", str(file), "--eval_fraction", "0", "--output_dir", str(tmp_path / "run"))
    assert_refused(fork_ranks(*flags, recipe="dpo", strategy="fsdp"), ["d.jsonl: line 2: "])
    missing = ("--reference_adapter", str(tmp_path / "no"), "--output_dir", str(tmp_path / "run"))
    assert_refused(fork_ranks(*missing, recipe="dpo", strategy="fsdp"), ["--reference_adapter", "adapter_config.json"])
    assert not (tmp_path / "run").exists()
