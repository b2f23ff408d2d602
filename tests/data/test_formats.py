"""Token ids and labels of each format: exactly the completion is trained; what cannot be separated is refused."""

import dataclasses

import pytest
from tokenizers.processors import TemplateProcessing

from lora_dist.data.formats import Encoder, choose_format, encode_prompt, load_tokenizer, mark_trained
from lora_dist.data.tasks import IGNORE_INDEX
from lora_dist.errors import UserError

TURNS = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
CUE = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
TEMPLATES = {
    "plain": TURNS + CUE,
    "marked": "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{{ '\n' }}{% endfor %}" + CUE,
    # It drops the first sentences of earlier answers, as templates of reasoning models drop their thoughts.
    "rewriting": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content if loop.last or m.role == 'user' else "
    "m.content.split('.')[-1] }}</s>\n{% endfor %}" + CUE,
    "open": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "all marked": "{% generation %}" + TURNS + "{% endgeneration %}",
    "alternating": "{% if messages[0].role != 'user' %}{{ raise_exception('a chat begins with the user') }}{% endif %}"
    + TURNS + CUE,
}  # fmt: skip
CHAT = [("user", "Hello there."), ("assistant", "Hi."), ("user", "A harbour?"), ("assistant", "Yes. The sea.")]


def messages(turns, keys=("role", "content")):
    return [dict(zip(keys, turn, strict=True)) for turn in turns]


@pytest.fixture
def encode(config, tmp_path):
    def encode(example, template=None, **settings):
        """(text with marks around what is trained, token ids, labels) of one example."""
        chosen = dataclasses.replace(config, dataset_text_field=None, **settings)
        tokenizer = load_tokenizer("embedded")
        tokenizer.chat_template = TEMPLATES.get(template)
        encoder = Encoder(tokenizer, chosen, list(example))
        ((ids, labels),) = encoder([encoder.read(example, "example 7")])
        assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
        return mark_trained(tokenizer, ids, labels), ids, labels

    return encode


def test_every_token_of_a_text_is_trained_and_eos_ends_it(encode):
    shown, ids, _ = encode({"text": "“Hope.”"})
    assert shown == "⟦</s>“Hope.”</s>⟧" and ids[0] == ids[-1] == 2


@pytest.mark.parametrize("text", ["</s>", "</s></s>", ""])
def test_boundary_a_text_that_begins_with_bos_gets_no_second_one(encode, text):
    extra = [2] * max(0, text.count("</s>") - 1)
    plain, *_ = encode({"text": "Hope."})[1:]
    assert encode({"text": f"{text}Hope."})[1] == extra + plain
    _, plain, labels = encode({"prompt": "Name it:", "completion": " Hope."})
    pair = encode({"prompt": f"{text}Name it:", "completion": " Hope."})
    assert pair[1] == extra + plain and pair[2] == [IGNORE_INDEX] * len(extra) + labels


@pytest.mark.parametrize("adds", ["nothing", "eos"])
def test_boundary_an_eos_that_a_prompt_or_a_text_ends_with_stays_what_it_is(encode, monkeypatch, adds):
    """Each is one eos in the row: of the prompt it is not trained, at the end it is, whoever wrote it."""
    if adds == "eos":
        tokenizer = load_tokenizer("embedded")
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="</s> $A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
        )
        monkeypatch.setattr("tests.data.test_formats.load_tokenizer", lambda name: tokenizer)
    assert encode({"prompt": "Say hi</s>", "completion": "hello"})[0] == "</s>Say hi</s>⟦hello</s>⟧"
    assert encode({"prompt": "Say hi", "completion": "hello</s>"})[0] == "</s>Say hi⟦hello</s>⟧"
    assert encode({"prompt": "Say hi ", "completion": "hello"})[0] == "</s>Say hi ⟦hello</s>⟧"
    assert encode({"text": "hello</s>"})[0] == encode({"text": "hello"})[0] == "⟦</s>hello</s>⟧"


def test_boundary_a_prompt_that_begins_with_bos_gets_no_second_one():
    tokenizer = load_tokenizer("embedded")
    assert encode_prompt(tokenizer, "</s>Hope") == encode_prompt(tokenizer, "Hope") == tokenizer("Hope")["input_ids"]


@pytest.mark.parametrize(
    "columns, expected",
    [
        (["instruction", "input", "output", "text"], "alpaca"),
        (["text", "prompt", "completion"], "prompt_completion"),
        (["text", "messages"], "messages"),
        (["text", "prompt"], "text"),
    ],
)
def test_boundary_a_table_of_prompts_that_also_has_texts_is_not_trained_as_texts(config, columns, expected):
    chosen = dataclasses.replace(config, dataset_text_field=None)
    assert choose_format(columns, chosen) == expected
    assert choose_format(columns, dataclasses.replace(config, dataset_text_field="text")) == "text"


def test_boundary_a_number_is_refused_with_what_to_write(encode):
    with pytest.raises(UserError, match='example 7: column completion holds a int; it must hold text: write "3" in q'):
        encode({"prompt": "1 + 2 =", "completion": 3})


@pytest.mark.parametrize("prompt, completion", [("Name it:", " a lamp"), ("Name it: ", "a lamp"), ("a har", "bour")])
def test_a_prompt_is_tokenized_as_it_will_be_at_inference(encode, prompt, completion):
    shown, ids, labels = encode({"prompt": prompt, "completion": completion})
    alone = load_tokenizer("embedded")(prompt)["input_ids"]
    assert ids[: len(alone)] == alone and labels[: len(alone)] == [IGNORE_INDEX] * len(alone)
    assert shown == f"</s>{prompt}⟦{completion}</s>⟧"
    all_trained, *_ = encode({"prompt": prompt, "completion": completion}, train_on_inputs=True)
    assert all_trained == f"⟦</s>{prompt}{completion}</s>⟧"


def test_a_token_may_reach_from_the_prompt_into_the_completion():
    """The last case above is an example, without which the test above would not test this."""
    tokenizer = load_tokenizer("embedded")
    alone = tokenizer("a har")["input_ids"]
    assert tokenizer("a harbour")["input_ids"][: len(alone)] != alone


def test_instructions_get_headings_without_a_template(encode):
    shown, *_ = encode({"instruction": "Name it.", "input": "A lamp", "output": "light"})
    assert shown == "</s>### Instruction:\nName it.\n\n### Input:\nA lamp\n\n### Response:\n⟦light</s>⟧"
    assert encode({"instruction": "Name it.", "input": None, "output": "light"})[0] == (
        "</s>### Instruction:\nName it.\n\n### Response:\n⟦light</s>⟧"
    )


def test_instructions_become_a_chat_with_a_template(encode):
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
def test_only_the_assistants_messages_are_trained(encode, template):
    """A template with {% generation %} marks and one without give the same tokens."""
    assert encode({"messages": messages(CHAT)}, template)[0] == EXPECTED
    sharegpt = [({"user": "human", "assistant": "gpt"}[role], text) for role, text in CHAT]
    assert encode({"conversations": messages(sharegpt, ("from", "value"))}, template)[0] == EXPECTED
    shown, ids, labels = encode({"messages": messages(CHAT)}, template, train_on_inputs=True)
    assert ids == labels and shown.count("⟦") == 1


def test_a_first_message_of_the_assistant_is_not_trained(encode):
    shown, *_ = encode({"messages": messages([("assistant", "Hi."), *CHAT[2:]])}, "plain")
    assert shown == "<|assistant|>\nHi.</s>\n<|user|>\nA harbour?</s>\n<|assistant|>\n⟦Yes. The sea.</s>⟧\n"


def test_a_chat_without_a_special_token_at_its_end_gets_eos(encode):
    shown, *_ = encode({"messages": messages(CHAT[:2])}, "open")
    assert shown == "user: Hello there.\nassistant: ⟦Hi.\n</s>⟧"


def test_a_prompt_made_of_messages_is_not_trained(encode):
    example = {"prompt": messages(CHAT[:3]), "completion": messages(CHAT[3:])}
    for template in ("plain", "marked"):  # the marks alone would also train the answer in the prompt
        shown, *_ = encode(example, template)
        assert shown == EXPECTED.replace("⟦Hi.</s>⟧", "Hi.</s>")


@pytest.mark.parametrize(
    "template, turns, message",
    [
        ("rewriting", [CHAT[0], ("assistant", "Well. Hi."), *CHAT[2:]], "example 7: .* changes message 2 .*generation"),
        ("all marked", CHAT, "example 7: the chat template marks every token"),
        ("alternating", CHAT[1:], "example 7: the chat template refuses it: a chat begins with the user"),
        ("plain", [("user", 3)], "example 7: message 1 of messages has a content that is a int; it must be text"),
        ("plain", [("user", [{"type": "image_url"}])], "example 7: message 1 .* has a part of type 'image_url'"),
        (
            "plain",
            [("moderator", "hi")],
            "message 1 of messages has the role 'moderator', .* rename it to one of system",
        ),
        ("plain", [(None, "text")], "example 7: message 1"),
        (None, CHAT, "--dataset_format messages: embedded has no chat template; give --chat_template"),
    ],
)
def test_a_chat_is_refused_if_its_trained_tokens_cannot_be_found(encode, template, turns, message):
    with pytest.raises(UserError, match=message):
        encode({"messages": messages(turns)}, template)


def test_a_template_that_changes_earlier_answers_is_accepted_for_one_answer(encode):
    assert encode({"messages": messages(CHAT[:2])}, "rewriting")[0].endswith("⟦Hi.</s>⟧\n")


@pytest.mark.parametrize(
    "columns, settings, expected",
    [
        (["text", "prompt", "completion"], {}, "prompt_completion"),
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
def test_the_columns_decide_the_format(config, columns, settings, expected):
    config = dataclasses.replace(config, **({"dataset_name": "data", "dataset_text_field": None} | settings))
    if expected in ("text", "prompt_completion", "alpaca", "messages"):
        assert choose_format(columns, config) == expected
    else:
        with pytest.raises(UserError, match=expected):
            choose_format(columns, config)


def test_a_chat_template_without_effect_is_refused(config):
    with pytest.raises(UserError, match="--chat_template t.jinja: has no effect on texts"):
        Encoder(load_tokenizer("embedded"), dataclasses.replace(config, chat_template="t.jinja"), ["quote"])


def test_chats_and_pairs_are_tokenized_together(config, monkeypatch):
    """The tokenizer is called as often for 40 examples as for 2; each text is handed to it once."""
    tokenizer, handed = load_tokenizer("embedded"), []
    tokenizer.chat_template = TEMPLATES["plain"]
    tokenize = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer),
        "__call__",
        lambda self, texts, **kwargs: handed.append(texts) or tokenize(self, texts, **kwargs),
    )
    chats = [{"messages": messages([("user", f"hi {i}"), ("assistant", f"yo {i}")])} for i in range(40)]
    pairs = [{"prompt": f"{i} a har", "completion": "bour" if i % 2 else " lamp"} for i in range(40)]
    for examples, most_calls in ((chats, 1), (pairs, 3)):
        for settings in ({}, {"train_on_inputs": True}):
            chosen = dataclasses.replace(config, dataset_text_field=None, **settings)
            encoder = Encoder(tokenizer, chosen, list(examples[0]))
            documents = [encoder.read(example, "") for example in examples]
            encoder(documents[:1])  # looks once at what the tokenizer adds
            handed.clear()
            together = encoder(documents)
            assert len(handed) <= most_calls and all(isinstance(texts, list) for texts in handed)
            assert together == [row for document in documents for row in encoder([document])]
