"""Each format to token ids and labels: exactly the completion is trained, and what cannot be told is refused."""

import dataclasses

import pytest

from lora_dist.data.formats import Encoder, choose_format, load_tokenizer, marked
from lora_dist.data.tasks import IGNORE_INDEX
from lora_dist.errors import UserError

TURNS = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
TEMPLATES = {
    "plain": TURNS + ASK,
    "marked": "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{{ '\n' }}{% endfor %}" + ASK,
    # Earlier answers lose their thoughts, as in templates of reasoning models.
    "rewriting": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content if loop.last or m.role == 'user' else "
    "m.content.split('.')[-1] }}</s>\n{% endfor %}" + ASK,
    "open": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "all marked": "{% generation %}" + TURNS + "{% endgeneration %}",
    "alternating": "{% if messages[0].role != 'user' %}{{ raise_exception('a chat begins with the user') }}{% endif %}"
    + TURNS + ASK,
}  # fmt: skip
CHAT = [("user", "Hello there."), ("assistant", "Hi."), ("user", "A harbour?"), ("assistant", "Yes. The sea.")]


def messages(turns, keys=("role", "content")):
    return [dict(zip(keys, turn, strict=True)) for turn in turns]


@pytest.fixture
def encode(config, tmp_path):
    def encode(example, template=None, **settings):
        """(decoded with marks, ids, labels) of one example."""
        chosen = dataclasses.replace(config, dataset_text_field=None, **settings)
        tokenizer = load_tokenizer("embedded")
        tokenizer.chat_template = TEMPLATES.get(template)
        encoder = Encoder(tokenizer, chosen, list(example))
        ((ids, labels),) = encoder([encoder.read(example, 7)])
        assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
        return marked(tokenizer, ids, labels), ids, labels

    return encode


def test_text_is_trained_whole_and_closed_by_eos(encode):
    shown, ids, _ = encode({"text": "“Hope.”"})
    assert shown == "⟦</s>“Hope.”</s>⟧" and ids[0] == ids[-1] == 2


@pytest.mark.parametrize("prompt, completion", [("Name it:", " a lamp"), ("Name it: ", "a lamp"), ("a har", "bour")])
def test_a_prompt_is_tokenized_as_it_will_be_at_inference(encode, prompt, completion):
    shown, ids, labels = encode({"prompt": prompt, "completion": completion})
    alone = load_tokenizer("embedded")(prompt)["input_ids"]
    assert ids[: len(alone)] == alone and labels[: len(alone)] == [IGNORE_INDEX] * len(alone)
    assert shown == f"</s>{prompt}⟦{completion}</s>⟧"
    assert (
        encode({"prompt": prompt, "completion": completion}, train_on_inputs=True)[0]
        == f"⟦</s>{prompt}{completion}</s>⟧"
    )


def test_a_token_that_would_reach_across_is_split():
    """The case above is one: the whole has a token that neither part has."""
    tokenizer = load_tokenizer("embedded")
    alone = tokenizer("a har")["input_ids"]
    assert tokenizer("a harbour")["input_ids"][: len(alone)] != alone


def test_instructions_under_headings_without_a_template(encode):
    shown, *_ = encode({"instruction": "Name it.", "input": "A lamp", "output": "light"})
    assert shown == "</s>### Instruction:\nName it.\n\n### Input:\nA lamp\n\n### Response:\n⟦light</s>⟧"
    assert encode({"instruction": "Name it.", "input": None, "output": "light"})[0] == (
        "</s>### Instruction:\nName it.\n\n### Response:\n⟦light</s>⟧"
    )


def test_instructions_through_a_template(encode):
    shown, *_ = encode({"instruction": "Name it.", "input": "A lamp", "output": "light"}, "plain")
    assert shown == "<|user|>\nName it.\n\nA lamp</s>\n<|assistant|>\n⟦light</s>⟧\n"


EXPECTED = """<|user|>
Hello there.</s>
<|assistant|>
⟦Hi.</s>⟧
<|user|>
A harbour?</s>
<|assistant|>
⟦Yes. The sea.</s>⟧
"""


@pytest.mark.parametrize("template", ["plain", "marked"])
def test_only_the_assistants_turns_are_trained(encode, template):
    """With marks in the template and without: the same tokens."""
    assert encode({"messages": messages(CHAT)}, template)[0] == EXPECTED
    sharegpt = [({"user": "human", "assistant": "gpt"}[role], text) for role, text in CHAT]
    assert encode({"conversations": messages(sharegpt, ("from", "value"))}, template)[0] == EXPECTED
    shown, ids, labels = encode({"messages": messages(CHAT)}, template, train_on_inputs=True)
    assert ids == labels and shown.count("⟦") == 1


def test_an_opening_turn_of_the_assistant_answers_nothing(encode):
    shown, *_ = encode({"messages": messages([("assistant", "Hi."), *CHAT[2:]])}, "plain")
    assert shown == "<|assistant|>\nHi.</s>\n<|user|>\nA harbour?</s>\n<|assistant|>\n⟦Yes. The sea.</s>⟧\n"


def test_a_template_without_an_end_of_turn_is_closed_by_eos(encode):
    shown, *_ = encode({"messages": messages(CHAT[:2])}, "open")
    assert shown == "user: Hello there.\nassistant: ⟦Hi.\n</s>⟧"


def test_a_prompt_of_messages_trains_the_completion_alone(encode):
    example = {"prompt": messages(CHAT[:3]), "completion": messages(CHAT[3:])}
    for template in ("plain", "marked"):  # marks would train the answer in the prompt too
        shown, *_ = encode(example, template)
        assert shown == EXPECTED.replace("⟦Hi.</s>⟧", "Hi.</s>")


@pytest.mark.parametrize(
    "template, turns, words",
    [
        ("rewriting", [CHAT[0], ("assistant", "Well. Hi."), *CHAT[2:]], "row 7: .* turn 2 otherwise .*generation"),
        ("all marked", CHAT, "row 7: the chat template marks every token"),
        ("alternating", CHAT[1:], "row 7: the chat template refuses it: a chat begins with the user"),
        ("plain", [("user", ["a list"])], "row 7: message 1 of messages needs a role and content"),
        ("plain", [(None, "text")], "row 7: message 1"),
        (None, CHAT, "--dataset_format messages: embedded has no chat template; give --chat_template"),
    ],
)
def test_a_chat_whose_trained_tokens_cannot_be_told_is_refused(encode, template, turns, words):
    with pytest.raises(UserError, match=words):
        encode({"messages": messages(turns)}, template)


def test_a_rewriting_template_is_fine_for_one_answer(encode):
    assert encode({"messages": messages(CHAT[:2])}, "rewriting")[0].endswith("⟦Hi.</s>⟧\n")


@pytest.mark.parametrize(
    "columns, settings, expected",
    [
        (["text", "prompt", "completion"], {}, "text"),
        (["prompt", "completion", "id"], {}, "prompt_completion"),
        (["instruction", "input", "output"], {}, "alpaca"),
        (["conversations"], {}, "messages"),
        (["quote", "author"], {"dataset_text_field": "quote"}, "text"),
        (["text", "messages"], {"dataset_format": "messages"}, "messages"),
        (["quote"], {}, "has quote, which is none of: text; prompt, completion; .*--dataset_text_field"),
        (["quote"], {"dataset_text_field": "text"}, "no such column: data has quote"),
        (["prompt"], {"dataset_format": "prompt_completion"}, "needs prompt and completion, but data has prompt"),
        (["text"], {"dataset_format": "messages", "dataset_text_field": "text"}, "has no effect with"),
    ],
)
def test_the_format_is_told_by_the_columns(config, columns, settings, expected):
    config = dataclasses.replace(config, **({"dataset_name": "data", "dataset_text_field": None} | settings))
    if expected in ("text", "prompt_completion", "alpaca", "messages"):
        assert choose_format(columns, config) == expected
    else:
        with pytest.raises(UserError, match=expected):
            choose_format(columns, config)


def test_a_template_that_nothing_reads_is_refused(config):
    with pytest.raises(UserError, match="--chat_template t.jinja: has no effect on texts"):
        Encoder(load_tokenizer("embedded"), dataclasses.replace(config, chat_template="t.jinja"), ["quote"])
