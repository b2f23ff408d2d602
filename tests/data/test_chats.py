"""Chats as people have them: each part reaches the template, or is named; what must not be trained is not."""

import dataclasses
import json

import pytest
from datasets import Dataset

from lora_dist.data import chat_template
from lora_dist.data.chats import read_chat
from lora_dist.data.encode import MAX_NOTES, Counts, encode
from lora_dist.data.formats import Encoder, load_tokenizer, mark_trained
from lora_dist.errors import UserError

PLAIN = """\
{%- if tools %}<|tools|>
{% for t in tools %}{{ t.function.name }} {% endfor %}</s>
{% endif -%}
{%- for m in messages %}<|{{ m.role }}|>
{{ '<think>' + m.reasoning_content + '</think>' if m.reasoning_content }}{{ m.content }}
{%- for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}</s>
{% endfor -%}
{%- if add_generation_prompt %}<|assistant|>
{% endif %}"""
MARKED = """\
{%- for m in messages %}<|{{ m.role }}|>
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}
{%- else %}{{ m.content }}</s>{% endif %}

{% endfor -%}
{%- if add_generation_prompt %}<|assistant|>
{% endif %}"""
BARE = "{% for m in messages %}{{ m.role }}: {{ m.content if m.role != 'system' }}</s>\n{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
QUESTION, ANSWER = {"role": "user", "content": "How warm?"}, {"role": "assistant", "content": "4 C."}


@pytest.fixture
def shown(config):
    def show(example: dict, template: str = PLAIN, **settings) -> tuple[str, list[str]]:
        """(the row with its trained tokens between ⟦ and ⟧, the warnings)."""
        tokenizer = load_tokenizer("embedded")
        tokenizer.chat_template = template
        changed = dataclasses.replace(config, dataset_text_field=None, max_length=1000, **settings)
        encoder, counts = Encoder(tokenizer, changed, list(example)), Counts()
        rows = list(encode(Dataset.from_list([example]), encoder, changed, counts, set()))
        return (mark_trained(tokenizer, *rows[0]) if rows else ""), counts.warnings("train", "truncate", 1000)

    return show


def test_chats_with_tools_train_the_call(shown):
    messages = [QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "4", "tool_call_id": "c1"}, ANSWER]  # fmt: skip
    row, warnings = shown({"messages": messages, "tools": [CALL]})
    assert row == (
        "<|tools|>\nget_weather </s>\n<|user|>\nHow warm?</s>\n"
        '<|assistant|>\n⟦<call>get_weather {"city": "Oslo"}</call></s>⟧\n'
        "<|tool|>\n4</s>\n<|assistant|>\n⟦4 C.</s>⟧\n"
    )
    assert warnings == []
    before = {"role": "assistant", "function_call": CALL["function"]}  # OpenAI's older name for it
    assert shown({"messages": [QUESTION, before, *messages[2:]], "tools": [CALL]})[0] == row
    _, warnings = shown({"messages": messages, "tools": json.dumps([CALL])}, BARE)
    left_out = "have a part that the chat template leaves out"
    assert sorted(w.split(" examples ")[1].split(";")[0] for w in warnings) == [
        f"{left_out}: tool_calls", f"{left_out}: tools"
    ]  # fmt: skip


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("untrained", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": True}])
def test_chats_turns_of_weight_0_are_not_trained(shown, template, untrained):
    bad = {"role": "assistant", "content": "bad answer"}
    messages = [QUESTION, bad | untrained, QUESTION, ANSWER | {"weight": 1}]
    row, warnings = shown({"messages": messages}, template)
    assert row == (
        "<|user|>\nHow warm?</s>\n<|assistant|>\nbad answer</s>\n<|user|>\nHow warm?</s>\n<|assistant|>\n⟦4 C.</s>⟧\n"
    )
    assert warnings == []


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_chats_that_open_with_the_assistant_give_the_same_tokens_with_and_without_marks(shown, template):
    row, warnings = shown({"messages": [{"role": "assistant", "content": "Hi."}, QUESTION, ANSWER]}, template)
    assert row == "<|assistant|>\nHi.</s>\n<|user|>\nHow warm?</s>\n<|assistant|>\n⟦4 C.</s>⟧\n"
    assert "begin with a message of the assistant, which is not trained" in warnings[0] and len(warnings) == 1


def test_chats_of_sharegpt_with_columns_and_other_role_names(shown):
    turns = [("Human", "q"), ("function_call", '{"name": "look_up", "arguments": {"x": 1}}'), ("observation", "r"),
             ("gpt", "a")]  # fmt: skip
    example = {"system": "Be terse.", "tools": "[]", "conversations": [{"from": f, "value": v} for f, v in turns]}
    row, warnings = shown(example)
    assert row == (
        "<|system|>\nBe terse.</s>\n<|user|>\nq</s>\n"
        '<|assistant|>\n⟦<call>look_up {"x": 1}</call></s>⟧\n<|tool|>\nr</s>\n<|assistant|>\n⟦a</s>⟧\n'
    )
    assert warnings == []
    for name in ("USER", "human", "prompter"):
        assert shown({"messages": [{"role": name, "content": "q"}, {"role": "BOT", "content": "a"}]})[0] == (
            "<|user|>\nq</s>\n<|assistant|>\n⟦a</s>⟧\n"
        )


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_chats_keep_their_reasoning_or_say_that_the_template_drops_it(shown, name):
    messages = [QUESTION, ANSWER | {name: "It is winter."}]
    assert "⟦<think>It is winter.</think>4 C.</s>⟧" in shown({"messages": messages})[0]
    _, warnings = shown({"messages": messages}, MARKED)
    assert f"1 of 1 train examples have a part that the chat template leaves out: {name}; first: example 1" in warnings


def test_chats_name_a_system_message_that_the_template_drops(shown):
    _, warnings = shown({"messages": [{"role": "system", "content": "Be terse."}, QUESTION, ANSWER]}, BARE)
    assert len(warnings) == 1 and "leaves out: the content of the role system; first: example 1" in warnings[0]


def test_chats_name_keys_that_the_template_does_not_read(shown):
    more = ANSWER | {"trainable": False, "mood": "4 C.", "thinking": ["a list"]}
    _, warnings = shown({"messages": [QUESTION, more], "chat_template_kwargs": {"terse": True}}, MARKED)
    named = [
        line.split(": ")[1].split(";")[0] for line in warnings if "key that the chat template does not read" in line
    ]
    assert sorted(named) == ["terse", "thinking", "trainable"]  # the row shows the value of "mood"
    _, warnings = shown({"messages": [QUESTION, ANSWER | {f"key_{i}": "x" for i in range(100)}]})
    assert len(warnings) == MAX_NOTES + 1 and "81 of" not in warnings[-1] and "other parts" in warnings[-1]


def test_chats_as_text_as_lists_and_as_parts_are_the_same(shown):
    expected = shown({"messages": [QUESTION, ANSWER]})
    assert expected == ("<|user|>\nHow warm?</s>\n<|assistant|>\n⟦4 C.</s>⟧\n", [])
    parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in (QUESTION, ANSWER)]
    lists = {key: [m[key] for m in (QUESTION, ANSWER)] for key in ("role", "content")}
    nulls = [m | {"tool_calls": None, "weight": None} for m in (QUESTION, ANSWER)]
    for messages in (json.dumps([QUESTION, ANSWER]), parts, lists, nulls):
        assert shown({"messages": messages}) == expected


def test_chats_without_an_answer_say_which_roles_they_have(shown):
    row, warnings = shown({"messages": [QUESTION, {"role": "system", "content": "x"}]})
    assert row == "" and "have no token to train on" in warnings[0]
    assert "have no message of the assistant to train on (they have user, system); first: example 1" in warnings[1]


@pytest.mark.parametrize("example, says", [
    ({"m": "not json"}, "column m holds text that is not JSON; it must hold a list"),
    ({"m": '{"role": "user"}'}, "column m holds a dict; it must hold a list"),
    ({"m": 3}, "column m holds a int; it must hold a list"),
    ({"m": {"role": ["user"], "content": []}}, "column m holds a dict; it must hold a list of messages"),
    ({"m": ["text"]}, "message 1 of m is a str; it must have a role and content"),
    ({"m": [{"content": "x"}]}, "message 1 of m has no role"),
    ({"m": [{"role": "narrator", "content": "x"}]}, "message 1 of m has the role 'narrator', which is not known;"),
    ({"m": [{"role": "user", "content": {"a": 1}}]}, "message 1 of m has a content that is a dict"),
    ({"m": [{"role": "user", "content": [{"type": "image", "url": "u"}]}]}, "has a part of type 'image'"),
    ({"m": [ANSWER | {"weight": 0.5}]}, "message 1 of m has weight 0.5; it must be 0 or 1"),
    ({"m": [ANSWER | {"train": "no"}]}, "message 1 of m has train 'no'; it must be 0 or 1"),
    ({"m": [ANSWER | {"tool_calls": [{"id": 1}]}]}, "a tool call without the name of a function"),
    ({"m": [ANSWER | {"tool_calls": [{"name": "f", "arguments": "{"}]}]}, "arguments of f holds text that is not JSON"),
    ({"m": [{"from": "function_call", "value": "f(x)"}]}, "holds text that is not JSON"),
    ({"m": [ANSWER], "tools": "x"}, "column tools holds text that is not JSON"),
    ({"m": [ANSWER], "tools": ["f"]}, "column tools must hold a list of objects"),
    ({"m": [ANSWER], "system": 3}, "column system holds a int; it must hold text"),
    ({"m": [{"role": "system", "content": "a"}], "system": "b"}, "a column system and another system message"),
    ({"m": "[" * 100_000}, "text that is not JSON"),
])  # fmt: skip
def test_boundary_of_chats(example, says):
    with pytest.raises(UserError) as raised:
        read_chat(example, ("m",), "--dataset_name d: line 7")
    assert str(raised.value).startswith("--dataset_name d: line 7: ") and says in str(raised.value)


def test_columns_that_are_not_read_are_named(config):
    columns = ["messages", "id", "system", "source", "tools"]
    tokenizer = load_tokenizer("embedded")
    tokenizer.chat_template = PLAIN
    assert Encoder(tokenizer, dataclasses.replace(config, dataset_text_field=None), columns).unread == ["id", "source"]


@pytest.mark.parametrize("template, says", [
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{{ 'a' * (10 ** 14) }}", "MemoryError"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{% for i in range(10**9) %}a{% endfor %}", "OverflowError"),
    ("{{ raise_exception('no such chat') }}", "no such chat"),
    ("{% if %}", "TemplateSyntaxError"),
    ("{{ messages.__class__.__mro__ }}", "SecurityError"),
    ("{% for m in messages %}{% generation %}{{ raise_exception('no') }}{% endgeneration %}{% endfor %}", "no"),
])  # fmt: skip
def test_boundary_of_templates(shown, template, says):
    with pytest.raises(UserError, match=f"example 1: the chat template refuses it: .*{says}.*; see the chat template"):
        shown({"messages": [QUESTION, ANSWER]}, template)


@pytest.mark.parametrize("template", [
    "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",  # many steps
    "{{ 10 ** (10 ** 9) }}",  # one step, which no signal interrupts
])  # fmt: skip
def test_boundary_of_a_template_that_does_not_end(shown, template, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_TRIAL_S", 2)
    with pytest.raises(UserError, match="the chat template of embedded: it did not end in 2 s"):
        shown({"messages": [QUESTION, ANSWER]}, template)


def test_boundary_of_a_template_that_does_not_end_on_one_chat(shown, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_RENDER_S", 1)
    loop = (
        "{% if messages | length > 2 %}{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}"
    )
    assert shown({"messages": [QUESTION, ANSWER]}, loop + "{% endif %}" + PLAIN)[0]
    with pytest.raises(UserError, match="example 1: the chat template refuses it: it took more than 1 s"):
        shown({"messages": [QUESTION, ANSWER, QUESTION]}, loop + "{% endif %}" + PLAIN)


def test_boundary_of_a_template_file(tmp_path):
    (tmp_path / "t.jinja").write_bytes(b"caf\xe9")
    for path in (tmp_path / "t.jinja", tmp_path, tmp_path / "none", "/dev/zero"):
        with pytest.raises(UserError, match=f"--chat_template {path}: "):
            load_tokenizer("embedded", str(path))
